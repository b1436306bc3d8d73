"""The rooms of the code: which module may import which, read from the source."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

KINDS = sorted(path.name for path in (ROOT / "scripts" / "tasks").iterdir() if path.is_dir() and path.name != "__pycache__")
FILES_OF_A_KIND = {"__init__", "metrics", "results", "figures", "evaluation", "benchmark", "comparison", "transforms"}
FILES_OF_A_KIND |= {"painted"}  # tumours
MOST_LINES = 430
# what a room, or a module, knows nothing of
BASIC = (
    "scripts.transforms",
    "scripts.grids",
    "scripts.thresholds",
    "scripts.samplers",
    "scripts.noise",
    "scripts.corruptions",
    "scripts.losses",
    "scripts.precision",
    "scripts.files",
    "scripts.tables",
)
FORBIDDEN = {
    **{module: ("scripts.data", "scripts.networks", "scripts.tasks", "scripts.release") for module in BASIC},
    "scripts.data": ("scripts.networks", "scripts.tasks", "scripts.release"),
    "scripts.networks": ("scripts.tasks", "scripts.release", "scripts.engines"),
    **{
        f"scripts.tasks.{kind}": ("scripts.release", *(f"scripts.tasks.{other}" for other in KINDS if other != kind))
        for kind in KINDS
    },
}


def sources() -> dict[str, str]:
    """The text of every module by its dotted name."""
    paths = sorted((ROOT / "scripts").rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return dict(zip(names, (path.read_text(encoding="utf-8") for path in paths), strict=True))


SOURCES = sources()


def imported_by(module: str) -> set[str]:
    """Modules of the project that a module imports, wherever in its text."""
    imported = set()
    for node in ast.walk(ast.parse(SOURCES[module])):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} names what it imports from the root"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {member if member in SOURCES else node.module for member in members}
    return {name for name in imported if name.split(".")[0] == "scripts"}


IMPORTS = {module: imported_by(module) for module in SOURCES}


def lies_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def test_all_imports_are_of_modules_that_there_are():
    assert set().union(*IMPORTS.values()) <= set(SOURCES)
    assert {"scripts.samplers", "scripts.data.reading"} <= set().union(*IMPORTS.values())


def test_no_imports_run_in_a_circle():
    list(TopologicalSorter(IMPORTS).static_order())  # an error names the circle


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_run_one_way(room):
    modules = [module for module in SOURCES if lies_in(module, room)]
    assert modules, f"{room} is there"
    wrong = [
        f"{module} imports {other}"
        for module in modules
        for other in IMPORTS[module]
        if any(lies_in(other, unknown) for unknown in FORBIDDEN[room])
    ]
    assert not wrong


def test_no_shared_module_imports_a_task_or_what_ships():
    shared = [module for module in SOURCES if module.count(".") < 2 and module != "scripts.__main__"]
    wrong = [
        f"{module} imports {other}"
        for module in shared
        for other in IMPORTS[module]
        if lies_in(other, "scripts.tasks") or lies_in(other, "scripts.release")
    ]
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_every_kind_of_result_have_the_same_names(kind):
    prefix = f"scripts.tasks.{kind}"
    names = {module.removeprefix(f"{prefix}.") for module in SOURCES if module.startswith(f"{prefix}.")}
    assert names <= FILES_OF_A_KIND


def test_no_module_is_too_long_to_be_read_at_once():
    lines = {module: text.count("\n") for module, text in SOURCES.items()}
    assert not {module: number for module, number in lines.items() if number > MOST_LINES}


@pytest.mark.parametrize("module", SOURCES)
def test_text_is_read_and_written_as_utf_8_whatever_the_locale(module):
    """Text is what is opened without a mode of bytes."""
    for call in (node for node in ast.walk(ast.parse(SOURCES[module])) if isinstance(node, ast.Call)):
        name = getattr(call.func, "id", getattr(call.func, "attr", None))
        is_open = isinstance(call.func, ast.Name) and name == "open"
        is_bytes = any("b'" in ast.unparse(argument) for argument in call.args[1:2])
        if name in ("read_text", "write_text") or (is_open and not is_bytes):
            assert any(keyword.arg == "encoding" for keyword in call.keywords), f"line {call.lineno}"
