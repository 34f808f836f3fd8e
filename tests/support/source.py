"""Lists of source files, for tests of names and imports; a "room" is a package or entry script."""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENTRY_SCRIPTS = [
    *(f"convert_{way}_hf{end}" for way in ("from", "to") for end in ("", "_gptj", "_gptneox")),
    "dist_clm_train",
]
# A package imports only from packages with a lower number. common/ has the lowest, because modules/
# uses seeds and files from it.
FLOORS = {
    "tests": 8,
    "dist_clm_train": 7, "benchmarks": 7,
    "training": 6, "example_scripts": 6,
    "planning": 5, **{name: 5 for name in ENTRY_SCRIPTS if name.startswith("convert_")},
    "arguments": 4, "optimizer": 4, "checkpoint": 4,
    "pipeline_parallel": 3, "data_parallel": 3,
    "comm": 2, "monitor": 2, "tasks": 2,
    "modules": 1,
    "common": 0,
}  # fmt: skip
ASIDE = ("tests", "benchmarks", "example_scripts")
ROOMS = [room for room in FLOORS if room not in ASIDE]
OUTSIDE_TESTS = [room for room in FLOORS if room != "tests"]


def assert_none(violations: Iterable[str], rule: str) -> None:
    """Fails with one line per violation, if there are any."""
    if lines := sorted(violations):
        pytest.fail("\n".join([rule, *lines]), pytrace=False)


def files(room: str) -> list[Path]:
    """Returns the paths of a package's Python files, or of an entry script, relative to ROOT."""
    if room in ENTRY_SCRIPTS:
        return [Path(f"{room}.py")]
    return sorted(path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for room in FLOORS for path in files(room)}
