"""Tests the training loop, with test doubles for its components."""

from types import SimpleNamespace
from typing import Any

from monitor.metrics import StepWork
from monitor.recorder import Recorder
from training.trainer import Trainer


class Saver:
    """A saver that writes a checkpoint during training; the write ends in the next iteration."""

    is_pending = is_writing = False

    def __init__(self) -> None:
        self.published: list[int] = []
        self.iteration = 0

    def save(self, step: int, data: object, *, is_last: bool) -> bool:
        self.is_pending = self.is_writing = not is_last
        return is_last

    def finish(self, *, is_last: bool = False) -> bool:
        self.is_pending = False
        self.published.append(self.iteration)
        return True


class Iterations:
    """Test double of Iteration; in each iteration, the saver's write of a checkpoint ends."""

    update_step = SimpleNamespace(has_given_up=False, may_skip=False)
    feed = SimpleNamespace(state={})

    def __init__(self, saver: Saver) -> None:
        self._saver = saver

    def advance(self, step: int, *, is_writing: Any) -> tuple[Any, None]:
        self._saver.iteration, self._saver.is_writing = step, False
        totals = SimpleNamespace(stop_cause=None, loss=1.0, tokens=1, is_writing=is_writing())
        return totals, None

    def check_weights(self, step: int) -> None:
        """Does nothing, because all weights are finite."""


def test_a_step_is_published_in_the_iteration_in_which_its_write_ended() -> None:
    settings: Any = SimpleNamespace(
        update=SimpleNamespace(total_steps=6, ends_update=lambda step: True),
        data=SimpleNamespace(evaluates_after=lambda step, total_steps: False),
        checkpoint=SimpleNamespace(saves_after=lambda step, update: step in (2, 6)),
    )
    saver: Any = Saver()
    iterations: Any = Iterations(saver)
    trainer = Trainer(
        settings,
        iteration=iterations,
        work=StepWork(num_tokens=1, device_flops=1.0, peak_flops=None),
        evaluation=None,
        recorder=Recorder(),
        saver=saver,
    )
    assert trainer.run(0) is None
    assert saver.published == [3]
