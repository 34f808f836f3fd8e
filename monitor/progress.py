"""Progress of the run: on a terminal a live line, otherwise a plain line every ten seconds."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from common.text import format_duration
from monitor.console import Console
from monitor.metrics import HeldOut, IterationMetrics, perplexity

_PLAIN_INTERVAL = 10.0  # seconds between plain lines
_LIVE_INTERVAL = 0.1  # seconds between updates of the live line
_MIN_TFLOPS = 1.0  # a slower device shows its speed only if its peak is known
_RECENT = 50  # the number of recent iterations from which the remaining time is estimated


class Progress:
    """The progress line of a run with `total_steps` steps, on the same console as the log lines.

    The first and the last iteration and every evaluation are always shown.
    """

    def __init__(
        self, total_steps: int, console: Console, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_steps = total_steps
        self._console = console
        self._clock = clock
        self._interval = _LIVE_INTERVAL if console.is_terminal else _PLAIN_INTERVAL
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._shown_at: float | None = None
        self._lr: float | None = None
        self._eval_loss: float | None = None

    def update(self, metrics: IterationMetrics) -> None:
        """Shows the iteration if none was shown for `_interval` seconds; shows any evaluation."""
        self._recent.append(metrics.step_seconds)
        self._lr = self._lr if metrics.lr is None else metrics.lr
        if metrics.held_out is not None:
            self.show_evaluation(metrics.step, metrics.held_out)
        is_due = self._shown_at is None or self._clock() - self._shown_at >= self._interval
        if metrics.step >= self._total_steps or is_due:
            self._shown_at = self._clock()
            show = self._console.set_live if self._console.is_terminal else self._console.print
            show(self._line(metrics))

    def show_evaluation(self, step: int, held_out: HeldOut) -> None:
        """Prints the held-out loss of all data and of each set; `step` is 0 before iteration 1."""
        self._eval_loss = held_out.loss
        sets = [f"; {name}: {_format(of_set.loss)}" for name, of_set in held_out.sets.items()]
        self._console.print(f"step {step}: held-out {_format(held_out.loss)}{''.join(sets)}")

    def close(self) -> None:
        """Keeps the last live line on the terminal; later output is printed below this line."""
        self._console.keep_live()

    def _line(self, metrics: IterationMetrics) -> str:
        parts = [f"step {metrics.step}/{self._total_steps}", f"loss {metrics.loss:.4f}"]
        if self._lr is not None:
            parts.append(f"lr {self._lr:.3g}")
        if metrics.tokens_per_second is not None:
            parts.append(f"{metrics.tokens_per_second:,.0f} tokens/s")
        if metrics.step < self._total_steps:
            left = recent_average(self._recent) * (self._total_steps - metrics.step)
            parts.append(f"{format_duration(left)} left")
        parts += _utilization(metrics)  # a narrow terminal cuts the end of the line
        if self._eval_loss is not None:
            parts.append(f"held-out {self._eval_loss:.4f}")
        return " | ".join(parts)


def _utilization(metrics: IterationMetrics) -> list[str]:
    """Returns the part of the line about a device's speed; CPUs are too slow to need one."""
    tflops, mfu = metrics.tflops, metrics.mfu
    if tflops is None or (mfu is None and tflops < _MIN_TFLOPS):
        return []
    return [f"{tflops:.1f} TFLOP/s" + ("" if mfu is None else f", MFU {mfu:.0%}")]


def _format(loss: float) -> str:
    return f"loss {loss:.4f}, perplexity {perplexity(loss):.4g}"


def recent_average(seconds: Sequence[float]) -> float:
    """Returns the mean of `seconds`; if there are five or more, omits the shortest and the longest.

    A median would be wrong with gradient accumulation, because every n-th iteration is longer.
    """
    usual = sorted(seconds)[1:-1] if len(seconds) >= 5 else seconds
    return sum(usual) / len(usual)
