"""Finds end-systole among the frames of a cine."""

from __future__ import annotations

from torch import Tensor

__all__ = ["find_end_systole"]

# Of 82 patients of ACDC, from end-diastole to end-systole, the curve rises by 79 % or more of its height, has no second
# maximum, and has fallen by 31 % at most at the frame that an expert called end-systole.
MOVING = 0.1  # share of the voxels that change most: the heart, and little of what lies around it
CLEAR = 0.25  # share of its height by which the curve has to rise; noise alone gives a flat one
SECOND = 0.25  # share of its rise by which it may rise again after a fall
OPEN = 0.35  # up to this share of its rise lost at the last frame, the file ends at end-systole
CLOSED = 0.5  # from this share lost on, the heart has filled again
BRIGHTER = 0.1  # net share of the change towards bright, from which on the blood has become more, not less


def find_end_systole(cine: Tensor) -> tuple[int, str]:
    """Number of the frame of end-systole in a cine whose first frame is end-diastole, and the reason.

    The curve of the mean squared difference from the first frame, over the tenth of the voxels that change most, tells the
    two kinds of files apart: where it rises to one maximum and falls back, the file holds the whole cycle, and its maximum
    is end-systole; where it stays up, the file ends with end-systole.

    Args:
        cine: frames (F, H, W, D), three or more, in any unit; blood is brighter than the wall of the heart.

    Raises:
        ValueError: with the reason, where neither is clear: the frames differ by no more than noise, the curve has several
            maxima or falls back half, or there is more blood at its maximum, so that the first frame seems end-systole.
    """
    frames = cine.flatten(1).float()
    spread = frames.var(dim=0)
    frames = frames[:, spread >= spread.kthvalue(max(1, round(len(spread) * (1 - MOVING)))).values]
    curve = (frames - frames[0]).square().mean(dim=1)
    last, far = len(curve) - 1, int(curve.argmax())
    height = curve[far].item()
    rise = height - curve[1:].min().item()
    if not height:
        raise ValueError("all frames are the same image")
    if rise < CLEAR * height:
        raise ValueError("the frames differ by noise alone")
    if max(_largest_fall(curve[: far + 1]), _largest_fall(curve[far:].flip(0))) > SECOND * rise:
        raise ValueError("the frames come near the first one more than once, as in several heart beats")
    change = frames[far] - frames[0]
    if change.mean() > BRIGHTER * change.abs().mean():
        raise ValueError(f"there is more blood in frame {far}, the farthest from frame 0, which may be end-systole itself")
    lost = (height - curve[last].item()) / rise
    if lost <= OPEN:
        return last, "the last one, as the frames go away from the first and stay away"
    if lost < CLOSED:
        raise ValueError(f"the frames go away from the first as far as frame {far} and come back only in part")
    return far, "the farthest from the first, as the frames come back"


def _largest_fall(curve: Tensor) -> float:
    return (curve.cummax(dim=0).values - curve).max().item()
