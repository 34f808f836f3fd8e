"""The liveness link: when one rank ends, every other knows at once which, where and why.

Each rank keeps one connection to a hub on rank 0 (comm.liveness.server). A connection that ends
without a
goodbye means that its process died; the survivors say so in one line and end too, from a thread
of their own, since the main thread may be stuck in a library that waits for the dead.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, NoReturn

from comm.communicator import CurrentOperation
from comm.lifecycle.deadline import Deadline
from comm.lifecycle.exit import exit_process, report_line
from comm.lifecycle.stop_signals import StopCause, StopRequest
from comm.liveness import heartbeat as pulse
from comm.liveness.client import open_link
from comm.liveness.handshake import Handshake
from comm.liveness.heartbeat import Heartbeat
from comm.liveness.protocol import MAX_LINE, Message, decode, encode
from comm.liveness.server import FAILING_SECONDS, PING_SECONDS, LivenessServer
from comm.rendezvous.join import Rendezvous
from comm.topology import Topology

logger = logging.getLogger(__name__)

_LINGER_SECONDS = 5.0
_LAST_SECONDS = 90.0
_TICK_SECONDS = 0.5
_GOODBYE_SECONDS = 60.0
_VERDICT_SECONDS = PING_SECONDS + 2.0
_RESUME = "Start all ranks again to resume from the latest checkpoint."


class FailureDetector:
    """This rank's end of the link. All methods may be called from any thread."""

    def __init__(self, *, rank: int, describe: list[str], stop: StopRequest | None = None) -> None:
        self.activity = CurrentOperation()
        self._stop = stop or StopRequest()
        self._rank = rank
        self._describe = describe
        self._hub: LivenessServer | None = None
        self._link: socket.socket | None = None
        self._watchdog: Deadline | None = None  # of the meeting
        self._failing: Message | None = None  # the first rank that told of it
        self._first = threading.Lock()
        self._patience = 2 * _LINGER_SECONDS
        self._heard = threading.Event()
        self._all_alive = threading.Event()
        self._closing = False
        self._pulse = Heartbeat()  # of rank 0, which knows of the others

    @classmethod
    def alone(cls) -> FailureDetector:
        """A world of one: the same methods, no socket."""
        return cls(rank=0, describe=["rank 0"])

    @classmethod
    def connect(
        cls, rendezvous: Rendezvous, topology: Topology, *, stop: StopRequest | None = None
    ) -> FailureDetector:
        """Links this rank with the others; in a world of one, with nobody.

        A rank that has joined but does not link before the join deadline ends all. On rank 0,
        `stop` gets what other ranks pass on.

        Raises:
            ConnectionError: rank 0 has gone, cannot be reached at its interface's address, or is
                another there.
        """
        if rendezvous.sealed is None:
            return cls.alone()
        describe = [
            f"{topology.describe(arrival.rank)[:-1]}, host {arrival.host})"
            for arrival in rendezvous.roster
        ]
        watch = cls(rank=rendezvous.rank, describe=describe, stop=stop)
        watch._watchdog = rendezvous.watchdog
        assert watch._watchdog is not None
        if rendezvous.rank == 0:
            watch._open_hub(rendezvous)
        else:
            watch._open_link(rendezvous)
        watch._watchdog.hand_over(watch._unconnected)
        return watch

    def pass_on(self, number: int) -> None:
        """Tells rank 0 that the signal of that number asked this rank to stop."""
        if self._link is not None:
            with contextlib.suppress(OSError):
                self._link.sendall(encode({"stop": number}))

    def announce(self, status: int, line: str) -> None:
        """Tells all ranks that this one is about to `fail`, with a line that takes time to find.

        Until it does nobody ends for having waited in vain for it; should it take too long, or
        die of it, all end with `line` and `status`.
        """
        message = {"failing": status, "line": line, "rank": self._rank}
        if self._hub is not None:
            self._hub.failing(message)
        if self._link is not None:
            self._failing = self._failing or message
            with contextlib.suppress(OSError):
                self._link.sendall(encode(message))

    def fail(self, status: int, line: str, *, last: Callable[[], object] | None = None) -> NoReturn:
        """Says `line`, tells all other ranks, and ends this process with `status`.

        `last` is called once they know, and may take a minute.
        """
        self._claim()
        self._patience = self._patience if last is None else _LAST_SECONDS
        report_line(line if self._alone else f"rank {self._rank}: {line}")
        message = {"failed": status, "line": line, "rank": self._rank}
        if self._hub is not None:
            self._hub.event(message)
        if self._link is not None:
            with contextlib.suppress(OSError):
                self._link.sendall(encode(message))
        if last is not None:
            _do_last(last)
        if self._link is not None:
            self._heard.wait(_LINGER_SECONDS)
        self._leave(status)

    def explain(
        self, error: BaseException, *, last: Callable[[], object] | None = None
    ) -> NoReturn:
        """An operation failed: ends this process, naming the cause if the hub can tell it.

        The hub hears of a dead rank by itself, and asks around for one that hangs; only where
        all ranks are alive, and none is failing, does the text of `error`, which is but the
        symptom, stand. `last` is as for `fail`.
        """
        if self._all_answer():
            if self._failing is not None:
                time.sleep(FAILING_SECONDS + _LINGER_SECONDS)  # the hub ends this process before
            self.fail(1, f"{error} {_RESUME}", last=last)
        self._end(1, self._gone(0, "it does not answer"))

    def _unconnected(self, status: int, line: str) -> NoReturn:
        """The groups did not stand in time: ends this process, naming a rank that hangs."""
        if self._all_answer():
            self.fail(status, line.removeprefix(f"rank {self._rank}: "))
        self._end(status, self._gone(0, "it does not answer"))

    def close(self) -> None:
        """Says goodbye; rank 0 waits (a minute at most) until all others have."""
        self._closing = True
        if self._link is not None:
            with contextlib.suppress(OSError):
                self._link.sendall(encode({"bye": True}))
                self._link.shutdown(socket.SHUT_RDWR)
        if self._hub is not None:
            self._hub.await_goodbyes(seconds=_GOODBYE_SECONDS)
            self._hub.close()

    @property
    def _alone(self) -> bool:
        return self._hub is None and self._link is None

    def _open_hub(self, rendezvous: Rendezvous) -> None:
        assert rendezvous.sealed is not None
        assert rendezvous.watchdog is not None
        address = rendezvous.roster[0].address
        self._hub = LivenessServer(
            address=address,
            greeting=Handshake(rendezvous.key, rendezvous.nonce),
            world_size=len(rendezvous.roster),
            on_event=self._on_message,
        )
        rendezvous.sealed.set("watch", f"{address} {self._hub.port}")
        missing = self._hub.await_all(seconds=rendezvous.watchdog.left)
        if missing:
            names = ", ".join(self._describe[rank] for rank in missing)
            self.fail(1, f"{names} joined but did not link with rank 0 at {address} in time")

    def _open_link(self, rendezvous: Rendezvous) -> None:
        self._link, lines = open_link(rendezvous, master=self._describe[0])
        threading.Thread(target=self._listen, args=(lines,), name="watch-link", daemon=True).start()
        threading.Thread(target=self._mind_rank_0, name="watch-pulse", daemon=True).start()

    def _listen(self, lines: BinaryIO) -> None:
        with contextlib.suppress(OSError, ValueError), lines:
            for line in iter(lambda: lines.readline(MAX_LINE), b""):
                self._pulse.heard(0)
                self._on_message(decode(line))
        self._heard.set()
        if not self._closing:
            self._end_without(0, "the connection to it closed")

    def _mind_rank_0(self) -> None:
        while not self._closing:
            for rank, is_quiet in self._pulse.changes([0]):
                self._tell_quiet(rank, is_quiet)
            time.sleep(_TICK_SECONDS)

    def _tell_quiet(self, rank: int, is_quiet: bool) -> None:
        if is_quiet:
            logger.warning(
                "%s has not been heard for %g s: its process is stopped or starved, or its link is "
                "cut; who waits for it longer than --dist-timeout ends all",
                self._describe[rank],
                pulse.QUIET_SECONDS,
            )
        else:
            logger.warning("%s is heard again", self._describe[rank])

    def _on_message(self, message: Message) -> None:
        if "check" in message and self._link is not None:
            self._link.sendall(encode({"alive": True}))
        elif "all_alive" in message:
            self._all_alive.set()
        elif "quiet" in message:
            self._tell_quiet(message["rank"], message["quiet"])
        elif "bye" in message:
            self._closing = True
        elif "lost" in message:
            self._end_without(message["lost"], "its connection closed without a goodbye")
        elif "silent" in message:
            self._end_without(message["silent"], "it does not answer")
        elif "stop" in message:
            self._stop.ask(StopCause(int(message["rank"]), int(message["stop"])))
        elif "failing" in message:
            self._failing = message
        elif "failed" in message:
            self._heard.set()
            self._end_as(message["rank"], int(message["failed"]), message["line"])

    def _end_without(self, rank: int, reason: str) -> NoReturn:
        """That rank is gone: of what it had said that it is failing of, if it had."""
        failing = self._failing
        if failing is not None and failing["rank"] == rank:
            self._end_as(rank, int(failing["failing"]), failing["line"])
        self._end(1, self._gone(rank, reason))

    def _end_as(self, rank: int, status: int, line: str) -> NoReturn:
        self._end(status, line if rank == self._rank else f"rank {rank}: {line}")

    def _gone(self, rank: int, reason: str) -> str:
        return (
            f"{self._describe[rank]} is gone: {reason}, while this rank was in: "
            f"{self.activity.text}. {_RESUME}"
        )

    def _all_answer(self) -> bool:
        """False if rank 0 does not answer; for another silent rank the hub ends this process."""
        if self._hub is not None:
            self._hub.check()
        elif self._link is not None:
            with contextlib.suppress(OSError):
                self._link.sendall(encode({"check": True}))
        return self._alone or self._all_alive.wait(_VERDICT_SECONDS)

    def _claim(self) -> None:
        """Only the first thread goes on from here; another stops until the process ends."""
        if not self._first.acquire(blocking=False):
            time.sleep(self._patience)
            exit_process(1)
        if self._watchdog is not None:
            self._watchdog.cancel()  # it would say another line while this process waits for others

    def _end(self, status: int, line: str) -> NoReturn:
        """Ends this process for what happened elsewhere, unless it is ending already."""
        self._claim()
        report_line(f"rank {self._rank}: {line}")
        self._leave(status)

    def _leave(self, status: int) -> NoReturn:
        if self._hub is not None:
            self._hub.await_goodbyes(seconds=_LINGER_SECONDS)
        exit_process(status)


def _do_last(last: Callable[[], object]) -> None:
    """What goes wrong in it is not what this process ends for."""
    try:
        last()
    except Exception as error:
        logger.warning("while ending: %s: %s", type(error).__name__, error)
