"""metrics.jsonl: the metrics of each iteration, one JSON object per line, readable during the run.

The plots and users' scripts read the file. A resumed run continues the file as if the run had never
stopped.
"""

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common.files import replace_file


@dataclass(frozen=True)
class StepWork:
    """The work of an iteration, which is the same in all iterations of a run.

    num_tokens: the positions that go through the model, in all replicas; also positions that are
        not trained.
    device_flops: the floating-point operations of forward and backward, per device: the mean over
        all devices. Recomputation is not counted.
    peak_flops: the most operations per second of a device, the mean over all devices; None if the
        peak of a device is not known.
    """

    num_tokens: int
    device_flops: float
    peak_flops: float | None


@dataclass(frozen=True)
class IterationMetrics:
    """The metrics of iteration `step`, counted from 1: one line of metrics.jsonl.

    loss: mean over the trained tokens of all replicas and microbatches, in nats.
    lr, grad_norm: the values of the update at the end of this iteration; None without an update.
        grad_norm is also None for a skipped update.
    work: the tokens and operations of the iteration.
    step_seconds: the time of the iteration, without saves and evaluations.
    held_out: the evaluation after this iteration.
    held_out_before: the evaluation before the first iteration.
    resumed: whether this is the first iteration after a resume.

    If loss_scale, held_out or held_out_before is None, its keys are not in the line. The key mfu is
    not in the line if the peak of a device is not known.
    """

    step: int
    loss: float
    lr: float | None
    grad_norm: float | None
    num_trained_tokens: int
    work: StepWork
    step_seconds: float
    loss_scale: float | None = None
    held_out: "HeldOut | None" = None
    held_out_before: "HeldOut | None" = None
    resumed: bool = False

    @property
    def tokens_per_second(self) -> float | None:
        """The processed tokens per second of all replicas; None if no time passed."""
        return self._rate(self.work.num_tokens)

    @property
    def tflops(self) -> float | None:
        """The teraflops per second of a device; None if no time passed."""
        return self._rate(self.work.device_flops / 1e12)

    @property
    def mfu(self) -> float | None:
        """The model flops utilization: the flops per second divided by the device's peak.

        None if no time passed or the peak is not known. (As in Chowdhery et al., PaLM, arXiv
        2204.02311, appendix B; here with the causal half of attention only.)
        """
        peak = self.work.peak_flops
        return None if peak is None else self._rate(self.work.device_flops / peak)

    def to_json(self) -> dict[str, Any]:
        """Returns the keys and values of the line; numbers that are not finite become None."""
        line: dict[str, Any] = {
            "step": self.step,
            "loss": finite_or_none(self.loss),
            "lr": finite_or_none(self.lr),
            "grad_norm": finite_or_none(self.grad_norm),
            "tokens": self.num_trained_tokens,
            "tokens_processed": self.work.num_tokens,
            "step_seconds": self.step_seconds,
            "tokens_per_second": finite_or_none(self.tokens_per_second),
            "tflops": finite_or_none(self.tflops),
        }
        if self.work.peak_flops is not None:
            line["mfu"] = finite_or_none(self.mfu)
        if self.loss_scale is not None:
            line["loss_scale"] = finite_or_none(self.loss_scale)
        return line | self._held_out_to_json() | ({"resumed": True} if self.resumed else {})

    def _rate(self, amount: float) -> float | None:
        return amount / self.step_seconds if self.step_seconds > 0 else None

    def _held_out_to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for suffix, held_out in (("", self.held_out), ("_before", self.held_out_before)):
            if held_out is not None:
                values[f"eval_loss{suffix}"] = finite_or_none(held_out.loss)
                if not suffix:
                    values["eval_perplexity"] = finite_or_none(perplexity(held_out.loss))
                if held_out.sets:
                    values[f"eval_sets{suffix}"] = held_out.sets_to_json()
        return values


class MetricsFile:
    """The writer of one metrics.jsonl; the folder must exist before the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """Replaces the file by an empty file, for a run that starts at step 0."""
        replace_file(self.path, b"")

    def cut_after(self, step: int) -> None:
        """Deletes the lines of iterations after `step`, and incomplete lines left by a crash."""
        lines = [line for line in read_metrics(self.path) if line["step"] <= step]
        replace_file(self.path, b"".join(map(_encode, lines)))

    def append(self, *metrics: IterationMetrics) -> None:
        """Appends a line for each iteration; if `append` raises OSError, the file is unchanged."""
        content = b"".join(_encode(iteration.to_json()) for iteration in metrics)
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(content) != len(content):  # the disk became full during the write
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a metrics.jsonl, in order; [] if the file does not exist.

    Skips any line that is not a JSON object with a step, for example an incomplete line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    decoded = map(_decode, content.splitlines())
    return [line for line in decoded if line is not None]


def _encode(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, allow_nan=False) + "\n").encode()


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


class SetLoss(NamedTuple):
    """The mean loss of an evaluation set in nats per trained token, and the number of tokens."""

    loss: float
    num_trained_tokens: int


@dataclass(frozen=True)
class HeldOut:
    """The result of an evaluation on held-out data.

    loss: mean over the trained tokens of all sets, in nats.
    sets: the loss of each set, by name; empty if the data is one set without a name.
    """

    loss: float
    sets: Mapping[str, SetLoss] = field(default_factory=dict)

    def sets_to_json(self) -> dict[str, dict[str, float | None]]:
        """Returns the loss, perplexity and tokens of each set; a number is None if not finite."""
        return {
            name: {
                "loss": finite_or_none(loss),
                "perplexity": finite_or_none(perplexity(loss)),
                "tokens": num_trained_tokens,
            }
            for name, (loss, num_trained_tokens) in self.sets.items()
        }


def perplexity(loss: float) -> float:
    """Returns exp(loss) of a mean loss in nats; infinity if the result overflows a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def finite_or_none(value: float | None) -> float | None:
    """Returns `value` if it is finite, else None, because JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


class Stopwatch:
    """A stopwatch, which starts when it is created."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last `lap`, or since creation; omits `paused` blocks."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the `with` block from the next result of `lap`."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start
