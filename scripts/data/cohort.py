"""The cases of a run: which are left to do, and which can't be read."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from monai.utils import ensure_tuple
from torch.utils.data import Dataset

__all__ = ["CohortDataset", "generated_cases", "root_cause", "table_rows", "unfinished"]

logger = logging.getLogger(__name__)


def generated_cases(number: int, seed: int = 0, label: int | None = None) -> list[dict]:
    """Cases of a generative network: ``generated_<seed>`` with ``seed``, and ``class_label`` if a class is wanted.

    Args:
        number: how many; their seeds follow each other.
        seed: seed of the first, 0 or more.
        label: class of all, for a network that was trained with classes.

    Raises:
        ValueError: if there is none to generate, or a seed does not lie in 0 ... 2^32 - 1.
    """
    if number < 1:
        raise ValueError(f"--number must be at least 1, got {number}")
    if not 0 <= seed <= 2**32 - number:
        raise ValueError(f"--seed must be 0 or more, and the last of {number} below 2^32, got {seed}")
    chosen = {} if label is None else {"class_label": label}
    return [{"case": f"generated_{s}", "seed": s, **chosen} for s in range(seed, seed + number)]


def unfinished(
    cases: list[dict],
    output_dir: str | Path,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    table: str = "results.csv",
) -> list[dict]:
    """Cases that have no row yet in ``output_dir/<table>``, or all of them with ``overwrite``.

    Of several processes each takes every ``world_size``-th case, beginning with number ``rank``; what is finished is left
    out only then, so that a case stays with its process when another one was faster. Cases of one name, whose results would
    replace each other, become one that fails.

    Raises:
        ValueError: if results would be written into an input, or where one lies; or if the table is another program's.
    """
    for case in cases:
        _check_apart(case, Path(output_dir) / case["case"])
    cases = _without_namesakes(cases)[rank::world_size]
    finished = {row["case"] for row in table_rows(Path(output_dir) / table)}
    if overwrite or not finished:
        return cases
    left = [case for case in cases if "failure" in case or case["case"] not in finished]
    if len(left) < len(cases):
        logger.info(f"{len(cases) - len(left)} cases are finished already (--overwrite true does them again)")
    return left


def table_rows(path: Path, columns: Sequence[str] = ("case",)) -> list[dict[str, str]]:
    """Rows of a table that this program has written; none if there is no such file.

    Raises:
        ValueError: if the table lacks one of the columns, so that it is somebody's own.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if set(columns) <= set(rows.fieldnames or ()):
                return list(rows)
    except UnicodeDecodeError:
        pass
    raise ValueError(f"{path}: is not of this program, it has no column {columns[-1]}; choose another --output_dir")


def _inputs(case: dict) -> list[str | Path]:
    """Paths of the files and folders that a case is read from."""
    values = [value for key, value in case.items() if key not in ("case", "patient", "failure")]
    return [path for value in values for path in ensure_tuple(value) if isinstance(path, (str, Path))]


def _without_namesakes(cases: list[dict]) -> list[dict]:
    """Cases with those of one name put together as one with a ``failure``, a line that names the paths of all."""
    groups: dict[str, list[dict]] = {}
    for case in cases:
        groups.setdefault(case["case"], []).append(case)
    return [
        group[0]
        if len(group) == 1
        else {
            "case": name,
            "failure": f"{' and '.join(str(path) for case in group for path in _inputs(case)[:1])}: {len(group)} cases have "
            "one name, and none of them is done; rename all but one",
        }
        for name, group in groups.items()
    ]


def _check_apart(case: dict, folder: Path) -> None:
    """Refuse a case whose results would be written into one of its inputs, or into a folder that holds one."""
    folder = folder.resolve()
    for path in _inputs(case):
        given, real = Path(path).absolute(), Path(path).resolve()
        if any(folder in (place, *place.parents) for place in (given, real)) or (real.is_dir() and real in folder.parents):
            raise ValueError(
                f"{path}: is an input, and {folder} is where the results of case {case['case']} go; "
                "choose another --output_dir, which holds no scans"
            )


def root_cause(error: BaseException) -> str:
    """One line that says what went wrong, from below the layers that MONAI's ``Compose`` wraps around an error."""
    while str(error).startswith("applying transform") and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


class CohortDataset(Dataset):
    """Dataset of cases in which one that can't be read does not stop the others.

    Such a case comes as ``{"case": name, "failure": one line}``, which
    :class:`scripts.engines.CohortEvaluator` reports and leaves out; so does one that is given like this.

    Args:
        data: cases.
        transform: preprocessing.
    """

    def __init__(self, data: Sequence[dict], transform: Callable) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        case = self.data[index]
        if "failure" in case:
            return case
        try:
            return self.transform(dict(case))
        except Exception as error:
            reason, paths = root_cause(error), [path for path in ensure_tuple(case.get("image")) if path]
            if paths and case["case"] not in reason:  # not every error names its file
                reason = f"{paths[0]}: {reason}"
            return {"case": case["case"], "failure": reason}
