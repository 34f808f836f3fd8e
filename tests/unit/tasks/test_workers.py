"""Tests the worker processes that tokenize, and the events that end them."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tasks.sources.base import Document
from tasks.tokenization.encoder import Encoder
from tasks.tokenization.workers import Workers
from tests.support.data import tokenizer

DOCUMENTS = [Document("the quick brown fox", "a:1")] * 3
SECONDS = 20.0


def is_there(pid: int) -> bool:
    """Returns whether a process lives; a zombie counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_signals_to_all_processes_are_not_for_workers() -> None:
    """A worker ignores SIGINT, SIGTERM and SIGUSR1, and ends when its rank calls `close`."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    workers = Workers(Encoder(tokenizer()), 1)
    expected = [one.token_ids.tolist() for one in Encoder(tokenizer()).encode_all(DOCUMENTS)]  # type: ignore[union-attr]
    result = workers.encode(DOCUMENTS)
    (child,) = multiprocessing.active_children()
    for given in (result, workers.encode(DOCUMENTS)):  # while it starts, and while it works
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(child.pid or 0, number)
        found = given()
        assert [one.token_ids.tolist() for one in found] == expected  # type: ignore[union-attr]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    workers.close()
    assert not child.is_alive()


def encode_until_it_fails(workers: Workers) -> None:
    """Encodes until an error comes, because a pool can work for a while after a process died."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        workers.encode(DOCUMENTS)()


def test_one_that_dies_is_told_and_the_others_end() -> None:
    """If either of two workers is killed, even if it holds a lock, encoding fails and both end."""
    for victim in range(2):
        workers = Workers(Encoder(tokenizer()), 2)
        results = [workers.encode(DOCUMENTS * 100) for _ in range(20)]
        for result in results:
            result()
        children = sorted(multiprocessing.active_children(), key=lambda child: child.pid or 0)
        assert len(children) == 2
        children[victim].kill()
        for _ in range(2):  # while the pool breaks, and after that
            with pytest.raises(
                ChildProcessError, match=r"tokenizer process died.*--data-workers 0"
            ):
                encode_until_it_fails(workers)
        closing = threading.Thread(target=workers.close, daemon=True)
        closing.start()
        closing.join(SECONDS)
        assert not closing.is_alive()
        assert not any(child.is_alive() for child in children)


def live_and_wait(pipe: int) -> None:
    """Starts two workers, writes their process ids to `pipe` and waits to be killed."""
    workers = Workers(Encoder(tokenizer()), 2)
    for result in [workers.encode(DOCUMENTS) for _ in range(20)]:
        result()
    os.write(pipe, json.dumps([child.pid for child in multiprocessing.active_children()]).encode())
    time.sleep(60)


def test_they_end_with_a_parent_that_is_killed() -> None:
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            live_and_wait(writer)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        children = json.loads(os.read(reader, 1000))
        assert 1 <= len(children) <= 2
        assert all(map(is_there, children))
    finally:
        os.close(reader)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    end = time.monotonic() + SECONDS
    while any(map(is_there, children)):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.05)
