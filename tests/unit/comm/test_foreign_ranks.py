"""Tests that only this job's ranks can join a run, whatever else connects to its ports.

In these tests, other clients connect to every port of a run of four processes, and ranks of other
jobs connect to the run's --dist-url. Such clients can write values to torch's store, but a rank
accepts only a value that a rank of this job has signed.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from comm.lifecycle.deadline import Deadline
from comm.lifecycle.exit import report_line
from comm.liveness.failure_policy import ExitPolicy
from comm.liveness.handshake import Handshake
from comm.liveness.protocol import decode, encode
from comm.rendezvous.dist_url import parse_dist_url
from comm.rendezvous.job_key import MIN_TOKEN, JobKey, read_job_key
from comm.rendezvous.join import Rendezvous
from comm.rendezvous.participants import Participant
from comm.rendezvous.signed_store import LIVENESS_ADDRESS, SignedStore
from comm.rendezvous.store import host_store
from comm.topology import Topology
from tests.support.connected import Rank, meet, member
from tests.support.launcher import Launch, Process, await_ready, free_port
from tests.support.sockets import Listener, listeners

SECRET = "a secret that nobody can guess"
KEY, OTHER_KEY = JobKey("job", SECRET.encode()), JobKey("job", b"something else altogether")
GARBAGE = {
    "nothing": b"",
    "half a handshake": b'{"rank": 1, "chal',
    "a line": b"GET / HTTP/1.1\r\n\r\n",
    "a wrong proof": encode({"rank": 1, "challenge": "00", "proof": "00" * 32}),
    "numbers": bytes(range(256)) * 4,
    "a pickle": b"\x80\x04\x95" + b"\xff" * 64,
    "too much": b"\xff" * 1_000_000,
}


def joins(ready: Path, rank: int, world_size: int, url: str, key: JobKey = KEY) -> None:
    """Joins the run, connects to the liveness server, and leaves; rank 0 leaves last."""
    met = meet(rank, world_size, url, key=key, join_timeout=30.0)
    ExitPolicy.connect(met, Topology(rank, world_size, 1)).detector.close()
    ready.touch()


def report_pickles(ready: Path, rank: int, url: str, program: Callable[[Rank], None]) -> None:
    """Runs `program` on one rank of four; reports on stderr if this process unpickles data."""

    def tell(event: str, found: tuple[object, ...]) -> None:
        if event == "pickle.find_class":
            report_line(f"unpickled: {found}")

    sys.addaudithook(tell)
    member(ready, rank, url, (2, 2), program, 20.0)


def add_until_told(stop_file: Path, rank: Rank) -> None:
    """Repeats an all-reduce over each group and checks the sums, until `stop_file` exists."""
    going = True
    while going:
        for group in (rank.groups.control, rank.groups.pipeline, rank.groups.replicas):
            total = torch.full((1000,), float(group.rank + 1))
            group.all_reduce(total).wait()
            assert total.tolist() == [group.size * (group.size + 1) / 2] * 1000
        stop = torch.tensor(float(stop_file.exists()))
        rank.groups.control.all_reduce(stop).wait()
        going = stop.item() == 0
        time.sleep(0.01)


def bother(listener: Listener) -> list[socket.socket]:
    """Sends each entry of GARBAGE to `listener` on a new connection; returns the connections."""
    links = []
    for data in GARBAGE.values():
        link = socket.create_connection(listener, timeout=5.0)
        links.append(link)
        link.settimeout(1.0)
        with contextlib.suppress(OSError):  # the server can close before all data is sent
            link.sendall(data)
    return links


def test_strangers_at_every_port_of_a_run(launch: Launch, tmp_path: Path) -> None:
    """Foreign data at every port does not disturb a run.

    The ranks listen only on the interface's address and unpickle nothing, their sums stay correct,
    and all ranks end with status 0.
    """
    url = f"tcp://127.0.0.1:{free_port()}"
    program = partial(add_until_told, tmp_path / "stop")
    ranks = [launch(report_pickles, r, url, program) for r in range(4)]
    await_ready(ranks)
    found = [listeners(rank.pid) for rank in ranks]
    assert {listener.address for of_rank in found for listener in of_rank} == {"127.0.0.1"}
    assert parse_dist_url(url)[1] in [listener.port for listener in found[0]]
    assert len(found[0]) >= 3, "the store, the liveness link, and gloo"
    assert all(found), "gloo listens on every rank"
    links = [link for of_rank in found for one in of_rank for link in bother(one)]
    other = launch(joins, 1, 4, url, OTHER_KEY)
    assert other.status(within=20.0) == 2
    assert f"differs from that of rank 1 (host {socket.gethostname()})" in other.lines[0]
    time.sleep(1.0)  # sums while the foreign clients are connected
    (tmp_path / "stop").touch()
    expect_good_ends(ranks, links)


def expect_good_ends(ranks: list[Process], links: list[socket.socket]) -> None:
    for rank in ranks:
        assert rank.status(within=20.0) == 0, rank.lines
        assert rank.lines == []
    for link in links:
        link.close()


def test_a_rank_of_another_job_is_refused(launch: Launch) -> None:
    """A rank of another job ends with a one-line error; this job's ranks end with status 0."""
    url = f"tcp://127.0.0.1:{free_port()}"
    ranks = [launch(joins, r, 3, url) for r in (0, 1)]
    other = launch(joins, 2, 3, url, OTHER_KEY)
    assert other.status(within=20.0) == 2
    host = socket.gethostname()
    (line,) = other.lines
    assert line.startswith(f"--dist-url {url}: rank 0 there (host {host}) belongs to another job: ")
    assert f"its --job-id or --job-token-file differs from that of rank 2 (host {host});" in line
    links = bother(Listener(*parse_dist_url(url)))
    expect_good_ends([*ranks, launch(joins, 2, 3, url)], links)


STRANGE = {
    "verdict": ('{"nonce": "ab"}', "holds verdict, which no rank of this job wrote"),
    "rank/1": ("9", "holds a description of a rank, which no rank of this job wrote"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_the_store_tells_a_stranger_no_secret_and_believes_none(launch: Launch, name: str) -> None:
    """A foreign client finds no secret in the store; a value that it sets makes the run fail."""
    value, words = STRANGE[name]
    port = free_port()
    rank = launch(joins, 0, 2, f"tcp://127.0.0.1:{port}")
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    deadline = time.monotonic() + 10.0
    while not any("rank/0" in key for key in store.list_keys()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    told = "".join(f"{key} {store.get(key)!r}" for key in store.list_keys())
    assert SECRET not in told
    (key,) = [key for key in store.list_keys() if key.endswith("rank/0")]
    store.set(key.replace("rank/0", name), value)
    assert rank.status(within=10.0) == 1
    (line,) = rank.lines
    assert words in line


def test_a_value_is_good_for_its_name_start_and_job_alone() -> None:
    plain = HashStore()
    mine = SignedStore(plain, KEY, start="run/0")
    mine.set("a", "one two")
    assert mine.get("a") == "one two"
    mine.set_first("a", "three")
    assert mine.get("a") == "one two"
    signed = mine.plain.get("a").decode()
    later, foreign = (
        SignedStore(plain, key, start=start)
        for key, start in ((KEY, "run/1"), (OTHER_KEY, "run/0"))
    )
    for other, name in ((mine, "b"), (later, "a"), (foreign, "a")):
        other.plain.set(name, signed)
        with pytest.raises(ConnectionError, match="which no rank of this job wrote"):
            other.get(name)
    assert SECRET not in signed


def silence(link: socket.socket) -> None:
    link.recv(1)


def nonsense(link: socket.socket) -> None:
    link.sendall(b"220 mail.example.org ESMTP\r\n")
    link.recv(1)


def another_jobs_server(link: socket.socket) -> None:
    link.sendall(encode({"challenge": "0123"}))
    reply = decode(link.makefile("rb").readline())
    answer = OTHER_KEY.prove("rank 0", "nonce", 1, "0123", reply["challenge"])
    link.sendall(encode({"proof": answer}))


def mirror(link: socket.socket) -> None:
    """Sends back the rank's handshake reply, as if it were the answer of rank 0."""
    link.sendall(encode({"challenge": "0123"}))
    link.sendall(link.makefile("rb").readline())


@pytest.mark.parametrize("stranger", [silence, nonsense, another_jobs_server, mirror])
def test_a_rank_connects_to_no_stranger(stranger: Callable[[socket.socket], None]) -> None:
    """A rank refuses a foreign server at the address of rank 0's liveness server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = SignedStore(HashStore(), KEY, start="")
        store.set(LIVENESS_ADDRESS, f"127.0.0.1 {listener.getsockname()[1]}")
        participants = tuple(Participant(r, f"host{r}", "127.0.0.1", "lo", 1, {}) for r in range(2))
        met = Rendezvous(1, participants, "nonce", KEY, store, _no_deadline())
        serving = threading.Thread(target=lambda: stranger(listener.accept()[0]))
        serving.start()
        with pytest.raises(ConnectionError, match=r"does not prove to be rank 0 \(host host0\)"):
            ExitPolicy.connect(met, Topology(1, 2, 1))
        serving.join(5.0)


def test_a_handshake_proves_both_sides() -> None:
    handshake = Handshake(KEY, "nonce")
    reply = handshake.reply("0123", rank=3)
    rank, answer = handshake.check("0123", reply)
    assert rank == 3
    assert handshake.is_answer(answer, challenge="0123", reply=reply)
    assert not handshake.is_answer(answer, challenge="4567", reply=reply)
    for other in (Handshake(OTHER_KEY, "nonce"), Handshake(KEY, "older")):
        with pytest.raises(ValueError, match="not for this start"):
            other.check("0123", reply)


def test_a_token_file(tmp_path: Path) -> None:
    """The job's key depends on --job-id and the token in the file; errors never quote the token."""
    path = tmp_path / "token"
    path.write_text(f"{SECRET}\n")
    key = read_job_key("job", path)
    assert KEY.is_proof(key.prove("x"), "x")
    assert not KEY.is_proof(read_job_key("other", path).prove("x"), "x")
    assert not KEY.is_proof(read_job_key("job", None).prove("x"), "x")
    assert SECRET not in repr(key)
    path.write_text("short")
    with pytest.raises(ValueError, match=f"holds 5 bytes, expected at least {MIN_TOKEN}") as error:
        read_job_key("job", path)
    assert "short" not in str(error.value).replace(str(path), "")
    with pytest.raises(ValueError, match=r"--job-token-file .*missing: No such file"):
        read_job_key("job", tmp_path / "missing")


def test_a_name_of_this_machine_itself_stands_for_its_interface(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store does not listen on a loopback address that /etc/hosts gives to this machine's name.

    It listens on the address of the network interface instead. If the interface's address is a
    loopback address too, as in this test, rank 0 warns that no other machine can join.
    """
    monkeypatch.setattr(
        "comm.rendezvous.store.resolve",
        lambda host: (socket.AF_INET, {"node7": "127.0.1.1"}.get(host, host)),
    )
    port = free_port()
    store = host_store(f"tcp://node7:{port}", address="127.0.0.5", deadline=_no_deadline())
    found = [listener for listener in listeners(os.getpid()) if listener.port == port]
    assert found == [("127.0.0.5", port)]
    assert "node7 is a loopback address here, so that no other machine can join" in caplog.text
    del store


def _no_deadline() -> Deadline:
    deadline = Deadline(5.0)
    deadline.cancel()
    return deadline
