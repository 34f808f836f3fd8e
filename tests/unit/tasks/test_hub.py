"""Tests data sets of the Hugging Face hub, without the hub: how rows are read, and the errors."""

import contextlib
import http.server
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from tasks.open import open_source
from tasks.registry import check_source
from tasks.shuffling.buffered import BufferedShuffle
from tasks.shuffling.shuffle import shuffle_source
from tasks.source_spec import SourceSpec
from tasks.sources import hub as module
from tests.support.data import check_restored_anywhere, make_texts
from tests.support.refusal import refusal

TEXTS = make_texts(103, seed=1)
NAME = "org/some.data_set-1"
NO_COLUMN = "none of the columns text, prompt, completion, messages"
Calls = list[tuple[Any, ...]]


def rows() -> list[dict[str, Any]]:
    return [{"text": text, "meta": {"number": number}} for number, text in enumerate(TEXTS)]


def of_shards() -> Any:
    return datasets.Dataset.from_list(rows()).to_iterable_dataset(num_shards=4)


def of_rows() -> Any:
    """Returns a stream that does not list its columns."""
    return datasets.IterableDataset.from_generator(rows)


def one_column() -> Any:
    return datasets.Dataset.from_dict({"body": ["a"]}).to_iterable_dataset()


def no_row() -> Any:
    return datasets.IterableDataset.from_generator(lambda: iter(()))


def no_split() -> Any:
    raise ValueError("Bad split: train.\nMore")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Calls]:
    """Returns `put(make)`: it replaces `load_dataset` by `make` and returns the later calls."""

    def put(make: Callable[[], Any]) -> Calls:
        calls: Calls = []

        def load_dataset(*args: Any, **options: Any) -> Any:
            calls.append((*args, options))
            return make()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return calls

    return put


def opened(name: str = NAME) -> BufferedShuffle:
    documents = shuffle_source(open_source(name), seed=7, chunk_documents=10)
    assert isinstance(documents, BufferedShuffle)
    return documents


@pytest.mark.parametrize("make", [of_shards, of_rows])
def test_every_row_once_per_epoch_and_from_anywhere(
    make: Callable[[], Any], serve: Callable[..., Calls], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    calls = serve(make)
    check_source(SourceSpec(NAME))
    documents = opened()
    assert f"{NAME}: shuffled in chunks of up to 10 documents" in caplog.text
    epochs = [[documents.next() for _ in TEXTS] for _ in range(2)]
    for epoch in epochs:
        assert {(document.text, document.origin) for document in epoch} == {
            (text, f"{NAME}:{number}") for number, text in enumerate(TEXTS, 1)
        }
    assert epochs[0] != epochs[1]
    assert calls[0] == (NAME, None, {"split": "train", "streaming": True})
    check_restored_anywhere(opened(), opened())


def test_a_configuration_is_named_after_it(serve: Callable[..., Calls]) -> None:
    calls = serve(of_shards)
    assert opened(f"{NAME}/20220301.en").next().origin.startswith(f"{NAME}/20220301.en:")
    assert calls[0][:2] == (NAME, "20220301.en")


def test_a_shorter_data_set_is_not_resumed(serve: Callable[..., Calls]) -> None:
    serve(of_shards)
    documents = opened()
    for _ in range(98):
        documents.next()
    state = documents.state()
    serve(lambda: datasets.Dataset.from_list(rows()[:92]).to_iterable_dataset())
    with pytest.raises(ValueError, match=f"{NAME}: the source changed since the checkpoint"):
        opened().restore(state)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (one_column, f"{NAME} on the hub: it has {NO_COLUMN}"),
        (no_row, f"{NAME} on the hub: it has {NO_COLUMN}"),
        (
            no_split,
            f"--task-name {NAME}: there is no such file or folder; and {NAME} on the hub: Bad "
            "split: train.",
        ),
    ],
)
def test_refused_before_training(
    make: Callable[[], Any], reason: str, serve: Callable[..., Calls]
) -> None:
    serve(make)
    assert refusal(lambda: check_source(SourceSpec(NAME))) == reason


def test_a_stream_that_breaks_is_named(serve: Callable[..., Calls]) -> None:
    def breaking() -> Iterator[dict[str, Any]]:
        yield from rows()[:5]
        raise ConnectionError("the line\nwas cut")

    serve(lambda: datasets.IterableDataset.from_generator(breaking))
    assert refusal(lambda: opened().next()).startswith(f"{NAME}:6: the hub: ")


# ---- a hub that cannot be reached ----


@contextlib.contextmanager
def silent_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def closed_port() -> Iterator[str]:
    with silent_port() as url:
        pass
    yield url


@contextlib.contextmanager
def empty_hub() -> Iterator[str]:
    """Runs a server that answers every request as the hub does for an unknown data set."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        (closed_port, "Connection refused"),
        (silent_port, "timed out"),
        (empty_hub, "no such data set, or your token has no access to it"),
    ],
)
@pytest.mark.parametrize("flag", ["--task-name", "--evaluation-data"])
def test_told_at_once(
    endpoint: Callable[[], Any], reason: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request finds a hub error; `datasets`, which retries for half a minute, is not called."""
    monkeypatch.setattr(module, "HUB_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("asked"))
    with endpoint() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        for ask in (
            lambda: check_source(SourceSpec("data/train"), flag=flag),
            lambda: open_source("data/train", flag=flag),
        ):
            line = refusal(ask)
            assert line.startswith(
                f"{flag} data/train: there is no such file or folder; and data/train on the hub: "
            )
            assert reason in line
