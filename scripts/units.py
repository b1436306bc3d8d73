"""Tells the units of a CT."""

from __future__ import annotations

from monai.data import MetaTensor

__all__ = ["told_units"]

UINT8 = 2  # NIfTI's code of the type
FULL = 250  # a picture's brightest pixel is hardly below it, and the window of a CT rarely ends there


def told_units(image: MetaTensor) -> str:
    """The units of a CT, ``hounsfield`` or ``grey`` (0 to 255), as far as the file and its values tell them.

    - A value below 0 is in Hounsfield units, and so is a DICOM file or series of the modality CT with more than 8 bits.
    - A picture (PNG, JPEG, ...) is grey.
    - Of another volume, 8 bits (uint8) that reach 250 are a stack of pictures, which span their range; other types that stay
      below 250 are CT that was clipped to a window, in Hounsfield units.

    Args:
        image: voxels, with the meta data of :class:`scripts.data.reading.LoadSequencesd`.

    Raises:
        ValueError: with the file's name, if it can't be told: CT saved with 8 bits and dark pictures look alike, grey levels
            saved as floating-point numbers and CT clipped at 255, values from 0 to 1, and CT without its offset of -1024.
    """
    meta = image.meta
    low, high = float(image.min()), float(image.max())
    eight_bits = int(meta.get("datatype", 0)) == UINT8 or str(meta.get("0028|0100", "")).strip() == "8"
    if low < 0 or (str(meta.get("0008|0060", "")).strip() == "CT" and not eight_bits):
        return "hounsfield"
    if meta.get("has_geometry") is False or (eight_bits and FULL <= high <= 255):
        return "grey"
    if not eight_bits and 1 < high < FULL:
        return "hounsfield"
    raise ValueError(
        f"{meta.get('filename_or_obj', 'image')}: values from {low:g} to {high:g}, which may be Hounsfield units, grey "
        "levels, or neither; give --units hounsfield if water is 0, and air was -1000 before it was clipped, or "
        "--units grey for pictures of 0 to 255; else convert the scan again from its source."
    )
