"""Tests the order in which the unfinished sums of a group complete; two threads may use them."""

import threading

from comm.backends.ordered_reduce import InTurn

DEADLINE = 20.0


class _Sum:
    """A sum that completes when `gate` is set; `completed` lists the names of complete sums."""

    def __init__(self, name: str, completed: list[str]) -> None:
        self._name, self._completed = name, completed
        self.waiting, self.gate = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.waiting.set()
        assert self.gate.wait(DEADLINE)
        self._completed.append(self._name)


def test_a_thread_does_not_overtake_the_sum_that_another_thread_completes() -> None:
    """A thread waits for the first sum; meanwhile another thread adds and waits for the second.

    Before, the second thread did not see the first sum, which the first thread had already removed.
    So it completed the second sum first, and members that wait in the other order would hang.
    """
    completed: list[str] = []
    first, second = _Sum("first", completed), _Sum("second", completed)
    second.gate.set()
    sums = InTurn()
    begun = sums.add(first)
    one = threading.Thread(target=begun.wait, daemon=True)
    one.start()
    assert first.waiting.wait(DEADLINE)
    other = threading.Thread(target=sums.add(second).wait, daemon=True)
    again = threading.Thread(target=begun.wait, daemon=True)
    for thread in (other, again):
        thread.start()
        thread.join(0.1)
        assert thread.is_alive(), "it waits for the first sum, too"
    first.gate.set()
    for thread in (one, other, again):
        thread.join(DEADLINE)
    assert completed == ["first", "second"]
