"""Checks the settings of a run, before anything is made of them.

MONAI puts whatever a command line says into the configuration: a misspelt name is never read, and ``false`` is a text, which
counts as true. The configurations call :func:`check` first.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from scripts.messages import is_bundle_command, tell_errors_in_one_line

__all__ = ["check"]

TEXTS = {
    "true": True,
    "false": False,
    "null": None,
}  # as JSON writes them; the command line of Python takes True, False, None
EXPRESSIONS = ("$", "@", "%")
# what MONAI reads itself, and what evaluation names for the command line
READ_BY_OTHERS = {"imports", "initialize", "run", "finalize", "benchmark", "comparison", "methods", "seen", "debug"}
READ_BY_OTHERS |= {"tracking_uri", "experiment_name", "run_name", "save_execute_config"}
TEXT_OR_OTHER = {"threshold": (int, float), "amp": (bool,)}  # a word, or a value
FRACTIONS = {"checkpoint_minutes"}  # whole by default, but need not be
PATHS = re.compile(r".*_(dir|root|weights)|slice_labels|checkpoint|class_folder")


def check() -> None:
    """Hold the settings of the configuration that calls this against those of the bundle's files, and mend what is clear.

    The texts ``true``, ``false`` and ``null`` become what they stand for, whole numbers that came as ``1e1`` whole, and
    numbers in place of a file or folder its name. A name that begins with ``_`` is nobody's setting, and free. From here on
    the command line tells errors in one line, unless ``--debug`` is given.

    Raises:
        ValueError: in one line for all of them, for settings that nothing reads, with the nearest known name, and for values
            of another kind than in the bundle's files.
    """
    parser = _calling_parser()
    config = parser.config
    files = _bundle_files(parser)
    changed = _replace_texts(config)
    if is_bundle_command() and not config.get("debug"):
        tell_errors_in_one_line()
    faults = [] if not files else list(_unread(config, files[0]))
    for settings, name, full_name in _settings(config):
        known = [value[name] for value in _at(files, full_name) if name in value]
        try:
            value = _mended(name, settings[name], known)
        except TypeError as error:
            faults.append(f"--{full_name}: {error}{_nearest_setting(full_name, config) if 'a part' in str(error) else ''}")
            continue
        changed |= value is not settings[name]
        settings[name] = value
    if faults:
        raise ValueError("; ".join(faults))
    if changed:
        parser.parse(reset=True)  # what was made of the old settings goes


def _calling_parser() -> ConfigParser:
    """The parser that is just making the part of a configuration that called, which MONAI hands to no part."""
    frame = sys._getframe()
    while frame := frame.f_back:
        if isinstance(parser := frame.f_locals.get("self"), ConfigParser):
            return parser
    raise RuntimeError("settings are checked from within a configuration")


def _bundle_files(parser: ConfigParser) -> list[dict]:
    """The configurations of the bundle for training, or those for inference, whichever it is; the main one first."""
    kinds = ("train", "train_*") if "train" in parser.config else ("inference", "inference_*", "evaluate*")
    folder = Path(parser.get_parsed_content("bundle_root")) / "configs"
    return [json.loads(path.read_text(encoding="utf-8")) for kind in kinds for path in sorted(folder.glob(f"{kind}.json"))]


def _replace_texts(config: dict | list) -> bool:
    """Put in place of texts what they stand for; whether there were any."""
    found = False
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key == ConfigParser.meta_key:
            continue
        if isinstance(value, (dict, list)):
            found |= _replace_texts(value)
        elif isinstance(value, str) and value in TEXTS:
            config[key], found = TEXTS[value], True
    return found


def _unread(config: dict, known: dict) -> Iterator[str]:
    """A line for each setting that nothing reads."""
    read = set(re.findall(r"@(\w+)", json.dumps(config, default=str))) | READ_BY_OTHERS | known.keys()
    for name, value in config.items():
        plain = not isinstance(value, dict) and not (isinstance(value, str) and value.startswith(EXPRESSIONS))
        if plain and name not in read and not name.startswith("_"):
            yield f"--{name}: no such setting{_nearest_setting(name, known)}"


def _nearest_setting(name: str, config: dict) -> str:
    names = [full_name for settings, key, full_name in _settings(config) if not _is_part(settings[key])]
    names = [known for known in names if known != name]
    nearest = difflib.get_close_matches(name, names, 1, 0.5)
    return f", is --{nearest[0]} meant?" if nearest else ""


def _settings(config: dict) -> Iterator[tuple[dict, str, str]]:
    """The dictionary, the name in it and the full name of everything that may be set, parts of the configuration too."""
    for name, value in list(config.items()):
        if name in READ_BY_OTHERS or name == ConfigParser.meta_key:
            continue
        if isinstance(value, dict) and not _is_part(value):
            yield from ((value, inner, f"{name}#{inner}") for inner in list(value))
        else:
            yield config, name, name


def _at(files: list[dict], full_name: str) -> Iterator[dict]:
    """The dictionaries of the files in which a name is to be looked up."""
    outer = full_name.rpartition("#")[0]
    for file in files:
        place = file.get(outer, {}) if outer else file
        if isinstance(place, dict):
            yield place


def _is_part(value: object) -> bool:
    """Whether a value is something that the configuration makes, or is made of, such as a network or a list of handlers."""
    if isinstance(value, dict):
        return "_target_" in value or any(_is_part(inner) for inner in value.values())
    return isinstance(value, list) and any(isinstance(inner, dict) for inner in value)


def _mended(name: str, value: Any, known: list[Any]) -> Any:
    """The value in the kind of those that are known.

    Raises:
        TypeError: if that is not possible.
    """
    as_known = any(type(k) is type(value) and k == value for k in known)
    if not known or as_known or (isinstance(value, str) and value.startswith(EXPRESSIONS)):
        return value
    if not isinstance(value, (bool, int, float, str, type(None))):
        if isinstance(value, (list, tuple)) and not any(
            isinstance(k, (list, str, type(None))) or _is_part(k) for k in known
        ):
            raise TypeError(f"a single value is wanted, got {value}")
        return value
    if PATHS.fullmatch(name):
        return _path(name, value)
    if None in known or any(isinstance(k, str) and k.startswith(EXPRESSIONS) for k in known):
        return value
    if all(_is_part(k) for k in known):
        raise TypeError(f"is a part of the configuration, and can't be {value}")
    kinds = {kind for k in known for kind in (bool, int, float, str, list) if type(k) is kind}
    if kinds == {bool}:
        if value not in (0, 1):
            raise TypeError(f"must be true or false, got {value}")
        return bool(value)
    if kinds and kinds <= {int, float}:
        return _number(name, value, whole=float not in kinds)
    if kinds == {list}:
        raise TypeError(f"must be a list such as {json.dumps(known[0])}, got {value}")
    if kinds == {str} and not isinstance(value, (str, type(None), *TEXT_OR_OTHER.get(name, ()))):
        raise TypeError(f"must be a word such as {known[0]}, got {value}")
    return value


def _path(name: str, value: object) -> object:
    if isinstance(value, (bool, float)) or (value is None and name.endswith(("_dir", "_root"))):
        raise TypeError(f"must be a file or folder, got {value}; write ./NAME if it has such a name")
    return str(value) if isinstance(value, int) else value


def _number(name: str, value: object, whole: bool) -> object:
    if isinstance(value, (bool, str, type(None))):
        allowed = TEXT_OR_OTHER.get(name) and isinstance(value, str)
        if not allowed:
            raise TypeError(f"must be a number, got {value}")
    elif whole and isinstance(value, float):
        if value.is_integer():
            return int(value)
        if name not in FRACTIONS:
            raise TypeError(f"must be a whole number, got {value}")
    return value
