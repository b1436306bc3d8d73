from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.usefixtures("own_imports")


def make_code(root: Path, answer: str) -> Path:
    """A package ``scripts`` with the real module and one that tells packages apart; gives the folder that it lies in."""
    (root / "scripts").mkdir(parents=True)
    (root / "scripts" / "__init__.py").touch()
    (root / "scripts" / "findable.py").write_text((ROOT / "scripts" / "findable.py").read_text(encoding="utf-8"))
    (root / "scripts" / "told_apart.py").write_text(f"ANSWER = {answer!r}\n")
    return root


def find(root: Path) -> None:
    runpy.run_path(f"{root}/scripts/findable.py")


def answer() -> str:
    return importlib.import_module("scripts.told_apart").ANSWER


def test_the_package_beside_it_is_imported_from_whatever_folder(tmp_path, monkeypatch):
    root = make_code(tmp_path / "bundle", "here")
    monkeypatch.chdir(tmp_path)
    find(Path("bundle"))
    monkeypatch.chdir("/")
    assert answer() == "here" and sys.path[0] == str(root)


def test_each_of_two_packages_gets_its_own_code_by_turns_and_what_was_made_stays(tmp_path):
    one, two = make_code(tmp_path / "one", "one"), make_code(tmp_path / "two", "two")
    find(one)
    made = importlib.import_module("scripts.told_apart")
    for root, expected in ((two, "two"), (one, "one"), (one, "one"), (two, "two")):
        find(root)
        assert answer() == expected
    assert made.ANSWER == "one"


def test_bundles_that_share_a_package_through_links_do_not_load_it_again(tmp_path):
    shared = make_code(tmp_path, "shared")
    roots = [tmp_path / "bundles" / name for name in ("one", "two")]
    for root in roots:
        root.mkdir(parents=True)
        (root / "scripts").symlink_to("../../scripts")
    find(roots[0])
    first = importlib.import_module("scripts.told_apart")
    for root in (roots[1], shared):
        find(root)
        assert importlib.import_module("scripts.told_apart") is first


@pytest.mark.parametrize("name", ["scripts.py", "scripts/other.txt"])
def test_a_module_or_a_bare_folder_of_that_name_is_not_in_the_way(tmp_path, monkeypatch, name):
    root = make_code(tmp_path / "bundle", "here")
    foreign = tmp_path / "foreign" / name
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    sys.path[:] = [str(tmp_path / "foreign"), *(path for path in sys.path if path != str(ROOT))]
    importlib.import_module("scripts")
    find(root)
    assert answer() == "here"


def test_a_folder_that_is_first_already_is_not_named_twice(tmp_path):
    root = make_code(tmp_path, "here")
    find(root)
    before = list(sys.path)
    find(root)
    assert sys.path == before
