"""Tests names: no class name is used twice, and no name has a word that the project gave up."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.source import OUTSIDE_TESTS, assert_none, files, tree

MAX_PARAMETERS = 8


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
    """A constructor has at most 8 parameters besides `self`; dataclasses are not checked."""
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
    """Words that the project gave up, and the usual technical words that replace them.

    In the packages `rooms`, no name of a file, class, function, parameter, variable or attribute
    contains one of `words`, and no file, class or function has one of `names` as its full name.
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
    """Returns each name that a file binds, with True for names of files, classes and functions."""
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
    """Returns a name's words in lower case: fake and hub for `_FakeHub` or `fake_hub`."""
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
