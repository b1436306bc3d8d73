from __future__ import annotations

import hashlib
import os
import platform
import subprocess

import pytest
import torch

from scripts.files import sha256_of, written_aside


def tree(folder):
    """Contents of all files below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*")) if p.is_file()}


def write_file(path, words):
    path.write_text(words)


def write_folder(path, words):
    path.mkdir()
    (path / f"{words}.txt").write_text(words)


def fail(path):
    raise OSError(28, "No space left on device", str(path))


both = pytest.mark.parametrize("write", [write_file, write_folder])


@both
def test_a_path_appears_when_the_block_ends_and_not_before(tmp_path, write):
    path = tmp_path / "new" / "a"
    with written_aside(path) as aside:
        write(aside, "one")
        assert aside.parent == path.parent and aside.name.startswith(".") and not path.exists()
    assert os.listdir(path.parent) == ["a"] and list(tree(path.parent).values()) == ["one"]


@both
def test_an_old_file_or_folder_is_replaced_as_a_whole(tmp_path, write):
    for words in ("one", "two"):
        with written_aside(tmp_path / "a") as aside:
            write(aside, words)
    assert os.listdir(tmp_path) == ["a"] and list(tree(tmp_path).values()) == ["two"]


@both
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind_and_reaches_the_caller(tmp_path, write, error):
    with pytest.raises(error), written_aside(tmp_path / "a") as aside:
        write(aside, "half")
        raise error
    assert os.listdir(tmp_path) == []


@both
def test_a_failure_keeps_the_old_one(tmp_path, write):
    write(tmp_path / "a", "old")
    before = tree(tmp_path)
    with pytest.raises(ValueError), written_aside(tmp_path / "a") as aside:
        write(aside, "half")
        raise ValueError
    assert tree(tmp_path) == before


@both
def test_a_failing_rename_leaves_nothing_aside(tmp_path, monkeypatch, write):
    monkeypatch.setattr(os, "replace", lambda source, target: fail(target))
    with pytest.raises(OSError, match="No space left"), written_aside(tmp_path / "a") as aside:
        write(aside, "one")
    assert os.listdir(tmp_path) == []


def test_a_folder_is_not_half_removed_when_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    write_folder(tmp_path / "a", "old")
    with pytest.raises(OSError), written_aside(tmp_path / "a") as aside:
        write_folder(aside, "new")
        monkeypatch.setattr(os, "replace", lambda source, target: fail(target))
    assert tree(tmp_path) == {"a/old.txt": "old"}


@pytest.mark.parametrize("old", [{}, {"a/old.txt": "old"}], ids=["nothing there", "an old folder"])
def test_forgetting_to_write_is_an_error_and_changes_nothing(tmp_path, old):
    if old:
        write_folder(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "a"):
        pass
    assert tree(tmp_path) == old


def aside_of(path, process):
    """The path that a process of this number would write to."""
    with written_aside(path) as aside:
        aside.touch()
    path.unlink()
    return aside.with_name(aside.name.replace(str(os.getpid()), str(process)))


@both
@pytest.mark.parametrize("ending", ["", ".old"])
@pytest.mark.parametrize("same_number", [True, False])
def test_what_a_killed_process_left_is_no_obstacle_and_goes(tmp_path, write, ending, same_number):
    with subprocess.Popen(["true"]) as ended:
        pass
    aside = aside_of(tmp_path / "a", os.getpid() if same_number else ended.pid)
    write_folder(aside.with_name(aside.name + ending), "half")
    write(tmp_path / "a", "old")
    with written_aside(tmp_path / "a") as aside:
        write(aside, "one")
    assert os.listdir(tmp_path) == ["a"] and list(tree(tmp_path).values()) == ["one"]


def test_what_a_running_process_writes_stays(tmp_path):
    write_file(aside_of(tmp_path / "a", os.getppid()), "half")
    with written_aside(tmp_path / "a") as aside:
        write_file(aside, "one")
    assert sorted(tree(tmp_path).values()) == ["half", "one"]


def test_saved_tensors_do_not_depend_on_the_process_that_wrote_them(tmp_path, monkeypatch):
    for node in ("one", "other.example"):
        monkeypatch.setattr(platform, "node", lambda node=node: node)
        monkeypatch.setattr(os, "getpid", lambda node=node: len(node))
        with written_aside(tmp_path / node / "model.pt") as aside:
            torch.save({"a": torch.arange(3)}, aside)
    assert sha256_of(tmp_path / "one" / "model.pt") == sha256_of(tmp_path / "other.example" / "model.pt")


@pytest.mark.parametrize("size", [0, 5, (1 << 20) + 3])
def test_the_hash_is_that_of_hashlib(tmp_path, size):
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()
