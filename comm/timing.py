"""The waiting times of ranks that start, watch each other and end.

Tests pass shorter ones, so that they need neither sleep nor patch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Waiting times in seconds, beside those that have a flag of their own.

    poll: between two looks at the store while ranks join.
    report: until a rank that waits for others says so, and between such lines.
    acknowledge: for the ranks that have joined to read why the others end.
    late: for ranks that have not joined yet to come and read a user's mistake.
    join_grace: after --join-timeout, until a rank that is stuck in a library is ended.
    handshake: for a new connection to prove its rank.
    send: for a message to be taken over by the system.
    serve_tick, client_tick: between two looks at the heartbeats, on rank 0 and on the others.
    heartbeat_interval: between the checks that all ranks answer.
    unresponsive: without a message, until a rank counts as unresponsive.
    check: for all ranks to answer that they are alive.
    linger: for the others to hear of a failure before this rank ends.
    before_exit: for work between a failure and the exit.
    close: for the other ranks to close their connections at the end of a run.
    same_stop: closer signals are one request: a terminal and a launcher may both send one.
    """

    poll: float = 0.1
    report: float = 10.0
    acknowledge: float = 3.0
    late: float = 5.0
    join_grace: float = 5.0
    handshake: float = 10.0
    send: float = 2.0
    serve_tick: float = 0.2
    client_tick: float = 0.5
    heartbeat_interval: float = 10.0
    unresponsive: float = 30.0
    check: float = 3.0
    linger: float = 5.0
    before_exit: float = 90.0
    close: float = 60.0
    same_stop: float = 2.0

    @property
    def answer(self) -> float:
        """For rank 0 to answer whether all ranks are alive."""
        return self.check + 2.0


DEFAULT_TIMING = Timing()
