"""The rules of the house: floors, circles, argparse, torch, sizes of files, names.

Imports are read from the source, those inside a function or under `if TYPE_CHECKING` included: they
tie two modules together as much as any other. The registries name modules in strings, which are
loaded on demand: for the floors, such a string counts as an import; for circles it does not, since
it is how a registry avoids one.
"""

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
ENTRY_SCRIPTS = [
    *(f"convert_{way}_hf_{family}" for way in ("from", "to") for family in ("gptj", "gptneox")),
    "dist_clm_train",
]
# A room imports only from rooms on lower floors; those on the same floor do not know each other.
# common/ is the ground: the model reads its seeds and its files, too.
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
# A package without a file name means each of its modules.
LISTED = """
arguments tasks.registry tasks.source_spec tasks.evaluation_sets modules.registry
data_parallel.modes pipeline_parallel.schedule.schedules pipeline_parallel.partition.split
pipeline_parallel.partition.balance comm.rendezvous.dist_url comm.rendezvous.interface
comm.rendezvous.job_key comm.lifecycle comm.timing checkpoint.lock common.files common.text
common.seeds
"""
TORCH_FREE = LISTED.split()
MIN_LINES, MAX_LINES, MAX_PARAMETERS = 30, 300, 8
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


def assert_none(violations: Iterable[str], rule: str) -> None:
    """Fails with a line for each violation."""
    if lines := sorted(violations):
        pytest.fail("\n".join([rule, *lines]), pytrace=False)


class Import(NamedTuple):
    """One import: the line, and the module that is imported."""

    line: int
    module: str


def files(room: str) -> list[Path]:
    """Returns the Python files of a package, or the script of that name, relative to the root."""
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


def imports(path: Path, *, strings: bool = False) -> Iterator[Import]:
    """Yields the project's modules that a file imports; with `strings`, also those it names."""
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
            while name and name not in modules():  # a name in a module, or another's module
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
        pytest.fail(f"modules that import each other: {circle}", pytrace=False)


@pytest.mark.parametrize(
    "room", [room for room in ROOMS if room not in ("arguments", *ENTRY_SCRIPTS)]
)
def test_argparse_stays_where_commands_are_parsed(room: str) -> None:
    """Those places are arguments/, the entry scripts, `__main__` files and what stands aside."""
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
    """Imports all in one process, in which an import of torch is an error that no code catches."""
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


def test_the_root_has_five_python_files() -> None:
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


def test_no_class_name_has_two_meanings() -> None:
    places: dict[str, list[str]] = {}
    for room in OUTSIDE_TESTS:
        for path in files(room):
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    twice = (f"{name}: {', '.join(found)}" for name, found in places.items() if len(found) > 1)
    assert_none(twice, "classes of one name:")


@pytest.mark.parametrize("room", OUTSIDE_TESTS)
def test_a_constructor_has_at_most_eight_parameters(room: str) -> None:
    """Beside self; those of dataclasses and named tuples are written by Python and do not count."""
    many = []
    for path in files(room):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__new__"):
                args = node.args
                count = len([*args.posonlyargs, *args.args, *args.kwonlyargs]) - 1
                count += (args.vararg is not None) + (args.kwarg is not None)
                if count > MAX_PARAMETERS:
                    many.append(f"{path}:{node.lineno}: {count}")
    assert_none(many, f"constructors with more than {MAX_PARAMETERS} parameters:")


class Gone(NamedTuple):
    """A word that the project used to have for what the field calls otherwise.

    `words` must not be a part of any name that is bound in `rooms`: of a file, class, function,
    parameter, variable or attribute. `names` must not be the name of a file, class or function.
    """

    instead: str
    words: str = ""
    names: str = ""
    rooms: tuple[str, ...] = tuple(OUTSIDE_TESTS)


GONE = [
    Gone("liveness/server, client, failure_detector", names="Hub Watch hub_link HubLink"),
    Gone("liveness/server", words="hub", rooms=("comm",)),
    Gone("heartbeat", words="pulse"),
    Gone("handshake", words="greeting greet"),
    Gone("participants, find_mismatch", words="roster misfit"),
    Gone("Participant", words="arrival", rooms=("comm",)),
    Gone("foreign_ranks", words="door"),
    Gone("lifecycle/exit", names="ending say leave say_and_leave", rooms=("comm", "training")),
    Gone("lifecycle/stop_signals, deadline", words="watchdog", names="stopping"),
    Gone("signed_store", words="sealed", names="seal", rooms=("comm",)),
    Gone("process_groups, ProcessGroups", words="fabric"),
    Gone("streams, Stream, Event", words="lane lanes", names="Mark CudaMark HostMark"),
    Gone("objects, backends/base", names="Messages messages Membership membership"),
    Gone("single_process", names="local LocalCommunicator", rooms=("comm",)),
    Gone("host_staging", names="host_copy HostCopyCommunicator"),
    Gone("ordered_reduce", names="ordered_sum"),
    Gone("current operation", words="activity"),
    Gone("collective_io.run_on_all", words="together"),
    Gone("p2p, StageLink", words="channel", rooms=("pipeline_parallel", "training", "planning")),
    Gone("batch_scatter", names="feed Feed TrainingFeed"),
    Gone("dependencies", names="replay"),
    Gone("microbatches in flight", names="held Held", rooms=("pipeline_parallel", "planning")),
    Gone("grad_buffer", words="sink", names="FlatGradients flat_gradients"),
    Gone("bucketed broadcast", words="pieces", rooms=("data_parallel",)),
    Gone("zero partition", words="ownership", names="deal_out"),
    Gone("step_totals", words="agreement"),
    Gone("UpdateStep, UpdateResult", words="updater outcome"),
    Gone("matmul/", words="products processor", rooms=("modules", "training", "planning")),
    Gone("matmul/matmul_rate, rounding", names="product_rate rounded_products"),
    Gone("attention/varlen, PackedDocuments", names="document_attention Documents"),
    Gone("doc_starts", names="begins", rooms=("modules", "pipeline_parallel", "tasks")),
    Gone("dry_run, Fake*", words="rehearsal rehearse rehearsed"),
    Gone("out_of_memory", words="shortage"),
    Gone("clock_sync, step_trace", names="RunClock run_clock TracedStep traced_step"),
    Gone("compatibility, retention", words="continuity removal prune pruning"),
    Gone("complete steps", names="whole_steps find_whole_steps"),
    Gone("store, validation", names="training_state TrainingState strict"),
    Gone("inspect_step", names="stage_record StageRecord"),
    Gone("cleanup, urgent", words="tidy hurry"),
    Gone("resolve, before_save", names="settle saving"),
    Gone("seq_len, token_ids, num_trained_tokens, microbatch_tokens", names="tokens"),
]


@cache
def bound_names(path: Path) -> frozenset[tuple[str, bool]]:
    """Returns the names that a file binds, and whether each is of a file, class or function."""
    names = {(part, True) for part in path.with_suffix("").parts[1:]}
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add((node.name, True))
        elif isinstance(node, ast.arg):
            names.add((node.arg, False))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add((node.id, False))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add((node.attr, False))
    return frozenset(names)


@cache
def words(name: str) -> set[str]:
    """Returns the words of a name in either case: `_FakeHub` and `fake_hub` have the same."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


@pytest.mark.parametrize("gone", GONE, ids=lambda gone: (gone.words or gone.names).split()[0])
def test_the_field_s_word_is_used(gone: Gone) -> None:
    still = {
        f"{path}: {name}"
        for room in gone.rooms
        for path in files(room)
        for name, defines in bound_names(path)
        if words(name) & set(gone.words.split())
        or (defines and name.strip("_") in gone.names.split())
    }
    assert_none(still, f"the field's name is {gone.instead}; these have the old one:")
