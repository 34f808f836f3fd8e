"""Tests the source code's rules on imports (project packages, argparse, torch) and file sizes.

Each package has a floor, a number in tests/support/source.py, and imports only from packages with
a lower number. The tests read all imports, including imports inside a function or under
`if TYPE_CHECKING`, because these also connect two modules. A registry names modules in strings and
loads them on demand. Such a string counts as an import for the floors, but not for import cycles,
because a registry is a way to avoid cycles.
"""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.source import (
    ASIDE,
    ENTRY_SCRIPTS,
    FLOORS,
    OUTSIDE_TESTS,
    ROOMS,
    ROOT,
    assert_none,
    files,
    module_of,
    modules,
    tree,
)

# A package in this list stands for all its modules.
LISTED = """
arguments tasks.registry tasks.source_spec tasks.evaluation_sets modules.registry
data_parallel.modes pipeline_parallel.schedule.schedules pipeline_parallel.partition.split
pipeline_parallel.partition.balance comm.rendezvous.dist_url comm.rendezvous.interface
comm.rendezvous.job_key comm.lifecycle comm.timing checkpoint.lock common.files common.text
common.seeds training.gpu_environment
"""
TORCH_FREE = LISTED.split()
MIN_LINES, MAX_LINES = 30, 300
IMPORT_ALL = """
import importlib, importlib.abc, json, sys, traceback

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError("torch is imported")

sys.meta_path.insert(0, NoTorch())
errors = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        errors[name] = "torch is imported" if "torch" in sys.modules else ""
    except BaseException:
        errors[name] = traceback.format_exc()
print(json.dumps(errors))
"""


class Import(NamedTuple):
    """One import: the line of the import, and the module that is imported."""

    line: int
    module: str


def imports(path: Path, *, strings: bool = False) -> Iterator[Import]:
    """Yields a file's imports of project modules; if `strings`, also modules named in strings."""
    package = module_of(path).split(".") if path.stem == "__init__" else list(path.parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            start = ".".join([*base, node.module] if node.module else base)
            names = [f"{start}.{alias.name}" for alias in node.names]
        elif strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]  # of "module" or "module:name"
            names = [name] if "." in name and name in modules() else []
        else:
            continue
        for name in names:
            while name and name not in modules():  # a name in a module, or a foreign module
                name = name.rpartition(".")[0]
            if name:
                yield Import(node.lineno, name)


@pytest.mark.parametrize("room", OUTSIDE_TESTS)
def test_a_room_imports_only_from_lower_floors(room: str) -> None:
    upwards = [
        f"{path}:{line}: {module}"
        for path in files(room)
        for line, module in imports(path, strings=True)
        if module.partition(".")[0] != room and FLOORS[module.partition(".")[0]] >= FLOORS[room]
    ]
    assert_none(upwards, "imports of a room that is not on a lower floor:")


def test_no_test_module_imports_another() -> None:
    """No test module imports another one; code that two of them need is in tests/support."""
    users = [
        f"{path}:{line}: {module}"
        for path in files("tests")
        for line, module in imports(path)
        if module.rpartition(".")[2].startswith("test_") and module != module_of(path)
    ]
    assert_none(users, "imports of a test module:")


def test_every_folder_of_code_has_a_floor() -> None:
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("[!.]*/**/*.py")}
    assert_none(folders - FLOORS.keys() - {"docs"}, "folders of code without a floor:")


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {found.module for found in imports(path)} - {module}
        for module, path in modules().items()
        if module.partition(".")[0] != "tests"
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = " imports ".join(reversed(error.args[1]))
        pytest.fail(f"modules that import each other in a circle: {circle}", pytrace=False)


@pytest.mark.parametrize(
    "room", [room for room in ROOMS if room not in ("arguments", *ENTRY_SCRIPTS)]
)
def test_argparse_stays_where_commands_are_parsed(room: str) -> None:
    """Only arguments/, entry scripts, `__main__` files and the folders in ASIDE use argparse."""
    users = {
        str(path)
        for path in files(room)
        if path.name != "__main__.py"
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Import) and "argparse" in {alias.name for alias in node.names})
        or (isinstance(node, ast.ImportFrom) and node.module == "argparse")
    }
    assert_none(users, "files that import argparse:")


def torch_free_modules() -> list[str]:
    return [
        module
        for listed in TORCH_FREE
        for module in modules()
        if module == listed or module.startswith(f"{listed}.")
    ]


@pytest.fixture(scope="module")
def import_errors() -> dict[str, str]:
    """Imports the modules in TORCH_FREE in a process that refuses torch; returns their errors."""
    command = [sys.executable, "-c", IMPORT_ALL, *torch_free_modules()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    errors: dict[str, str] = json.loads(done.stdout)
    return errors


@pytest.mark.parametrize("module", torch_free_modules())
def test_the_module_imports_no_torch(module: str, import_errors: dict[str, str]) -> None:
    assert import_errors[module] == ""


@pytest.mark.parametrize("listed", TORCH_FREE)
def test_the_torch_free_module_exists(listed: str) -> None:
    assert [module for module in torch_free_modules() if f"{module}.".startswith(f"{listed}.")]


@pytest.mark.parametrize("room", [*ROOMS, *ASIDE])
def test_every_init_file_is_empty(room: str) -> None:
    inits = [path for path in files(room) if path.name == "__init__.py"]
    assert_none((str(path) for path in inits if (ROOT / path).read_bytes()), "not empty:")


def test_the_root_has_seven_python_files() -> None:
    assert sorted(path.stem for path in ROOT.glob("*.py")) == ENTRY_SCRIPTS


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_is_too_long_or_too_short(room: str) -> None:
    wrong = []
    for path in files(room):
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        may_be_short = path.stem in ("__init__", "__main__", *ENTRY_SCRIPTS)
        if lines > MAX_LINES or (lines < MIN_LINES and not may_be_short):
            wrong.append(f"{path}: {lines} lines")
    assert_none(wrong, f"files that are not of {MIN_LINES} to {MAX_LINES} lines:")
