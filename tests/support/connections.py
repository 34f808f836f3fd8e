"""A hook that cuts connections between two ranks, as if a router closed them on both sides.

A cut needs no privilege, because a thread in one of the ranks shuts down this rank's own sockets.
"""

import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.support.sockets import descriptors, tcp_lines

_ESTABLISHED = "01"
_ANSWER_SECONDS = 3.0

Ports = tuple[int, int]  # ports of this end and of the other end


def between(pid: int, other: int) -> list[Ports]:
    """Returns the connections between two processes, as pairs: port of `pid`, port of `other`."""
    theirs = {(remote, local) for local, remote in _connections(other)}
    return sorted(_connections(pid) & theirs)


def _connections(pid: int) -> set[Ports]:
    """Returns the ports of a process's connections, also if it is in another network namespace."""
    ends = tcp_lines(pid, _ESTABLISHED)
    return {(int(own.split(":")[1], 16), int(other.split(":")[1], 16)) for own, other in ends}


@dataclass(frozen=True)
class Cutter:
    """A hook that cuts connections of one rank to others when the parent process asks for this."""

    rank: int
    _asked: tuple[int, int] = field(default_factory=os.pipe)
    _done: tuple[int, int] = field(default_factory=os.pipe)

    def arm(self) -> None:
        threading.Thread(target=self._serve, name="cutter", daemon=True).start()

    def cut(self, connections: Sequence[Ports]) -> None:
        """Asks the rank for the cuts; returns after them, or after 3 seconds without an answer."""
        for local, remote in connections:
            os.write(self._asked[1], f"{local} {remote}\n".encode())
        done = 0
        while done < len(connections):
            if not select.select([self._done[0]], [], [], _ANSWER_SECONDS)[0]:
                return  # the process hangs or ends
            done += len(os.read(self._done[0], len(connections)))

    def close(self) -> None:
        for descriptor in (*self._asked, *self._done):
            os.close(descriptor)

    def _serve(self) -> None:
        with os.fdopen(self._asked[0]) as requests:
            for request in requests:
                local, remote = map(int, request.split())
                for end in _ends(local, remote):
                    with contextlib.suppress(OSError):  # already closed
                        end.shutdown(socket.SHUT_RDWR)
                os.write(self._done[1], b".")


def _ends(local: int, remote: int) -> Iterator[socket.socket]:
    """Yields each socket of this process that connects port `local` to port `remote`."""
    for descriptor in descriptors("self").values():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as end:
            is_ip = end.family in (socket.AF_INET, socket.AF_INET6)
            if is_ip and (end.getsockname()[1], end.getpeername()[1]) == (local, remote):
                yield end
