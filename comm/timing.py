"""Waiting times of rendezvous, liveness and exit.

Tests pass shorter times, so that the tests are fast.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Waiting times in seconds, beside those that a user sets with flags, such as --dist-timeout.

    poll: the interval of reading the store while ranks join.
    report: the interval of log lines from a rank that waits for others.
    acknowledge: how long rank 0 waits until all joined ranks have read an error of the rendezvous.
    late: the same for ranks that have not joined yet, if the join deadline has not passed.
    join_grace: the time after --join-timeout until the process ends, even if a library hangs.
    handshake: the time for a new connection to prove its rank.
    send: the timeout of sending a message.
    serve_tick, client_tick: the interval of heartbeat checks, on rank 0 and on the other ranks.
    heartbeat_interval: the interval of messages that every rank must answer.
    unresponsive: the time without a message until a rank counts as unresponsive.
    check: the time for all ranks to answer that they are alive.
    linger: the time for the other ranks to learn of a failure before this rank ends.
    before_exit: the time for this rank's slow cleanup between a failure and its exit.
    close: the time for the other ranks to disconnect at the end of a run.
    same_stop: signals within this time are one stop request, because a terminal and a launcher may
        each send a signal.
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
        """Returns the seconds within which rank 0 must answer whether all ranks are alive."""
        return self.check + 2.0


DEFAULT_TIMING = Timing()
