"""What ends a command, as its user is told: one line, the last, that says what is wrong and what to do."""

from __future__ import annotations

import sys
from collections.abc import Collection
from types import TracebackType

__all__ = ["check_known", "is_bundle_command", "tell_errors_in_one_line"]

# layers that MONAI wraps around an error
WRAPPERS = ("Failed to instantiate component", "Failed to evaluate ", "applying transform")
EXPECTED = (ValueError, OSError, FloatingPointError)  # which this project raises with a cause and a mend
LONGEST = 600  # characters; of weights that don't fit, PyTorch lists all names


def is_bundle_command() -> bool:
    """Whether this process is ``python -m monai.bundle …``, and no program or notebook of somebody else."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name == "monai.bundle.__main__"


def tell_errors_in_one_line() -> None:
    """Let an error or Ctrl-C that ends the program be told in one line, not by a traceback; the exit status stays."""
    sys.excepthook = _tell


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        line = "interrupted; what is finished is kept, and the same command goes on from there"
    else:
        line = _line(error)
    print(line, file=sys.stderr)


def _line(error: BaseException) -> str:
    while error.__cause__ is not None and str(error).startswith(WRAPPERS):
        error = error.__cause__
    words = " ".join(str(error).split())
    if len(words) > LONGEST:
        words = f"{words[:LONGEST]} …"
    return words if words and isinstance(error, EXPECTED) else f"{type(error).__name__}: {words} (--debug shows where)"


def check_known(name: str, value: str, known: Collection[str]) -> None:
    """Raise a ``ValueError`` that names a setting and all that it may be, if its value is none of these."""
    if value not in known:
        raise ValueError(f"unknown {name} '{value}': choose one of {', '.join(known)}")
