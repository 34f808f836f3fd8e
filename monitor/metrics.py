"""metrics.jsonl: what each iteration did, one JSON object a line, readable while a run writes it.

The file is the run's own record: plots are drawn from it, users' scripts read it, and a resumed run
continues it as if it had never stopped.
"""

from __future__ import annotations

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
class IterationMetrics:
    """One line: the metrics of iteration `step`, the first of which is 1.

    `loss` is over all replicas and microbatches. `lr` and `grad_norm` are those of the update that
    this iteration ended, None where it ended none; `grad_norm` is None where it was skipped too.
    `step_seconds` leaves saves and evaluations out. `held_out` is of the evaluation after this
    iteration, `held_out_before` of that before the first. What is None from `loss_scale` on has no
    key.
    """

    step: int
    loss: float
    lr: float | None
    grad_norm: float | None
    tokens: int
    step_seconds: float
    loss_scale: float | None = None
    held_out: HeldOut | None = None
    held_out_before: HeldOut | None = None
    resumed: bool = False

    @property
    def tokens_per_second(self) -> float | None:
        """None where no time passed."""
        return self.tokens / self.step_seconds if self.step_seconds > 0 else None

    def to_json(self) -> dict[str, Any]:
        """The line's keys and values, all of which JSON can hold: what is not finite is None."""
        line: dict[str, Any] = {
            "step": self.step,
            "loss": finite_or_none(self.loss),
            "lr": finite_or_none(self.lr),
            "grad_norm": finite_or_none(self.grad_norm),
            "tokens": self.tokens,
            "step_seconds": self.step_seconds,
            "tokens_per_second": finite_or_none(self.tokens_per_second),
        }
        if self.loss_scale is not None:
            line["loss_scale"] = finite_or_none(self.loss_scale)
        return line | self._held_out_to_json() | ({"resumed": True} if self.resumed else {})

    def _held_out_to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if (after := self.held_out) is not None:
            found["eval_loss"] = finite_or_none(after.loss)
            found["eval_perplexity"] = finite_or_none(perplexity(after.loss))
            found |= _keyed("eval_sets", after)
        if (before := self.held_out_before) is not None:
            found["eval_loss_before"] = finite_or_none(before.loss)
            found |= _keyed("eval_sets_before", before)
        return found


class MetricsFile:
    """The writer of one metrics.jsonl. Its folder must exist by the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start_afresh(self) -> None:
        """Begins an empty file: a run that starts at step 0 has no past."""
        replace_file(self.path, b"")

    def cut_after(self, step: int) -> None:
        """Drops the lines past `step`, and what a crash left half written."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        replace_file(self.path, b"".join(map(_encode, kept)))

    def append(self, *metrics: IterationMetrics) -> None:
        """Adds lines in one write: all, or, where it raises OSError, none."""
        content = b"".join(_encode(one.to_json()) for one in metrics)
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(content) != len(content):  # the disk has become full in the middle
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, in order; none where there is no such file.

    Lines that are no JSON object with a step, as one being written may be, are left out.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    decoded = map(_decode, content.splitlines())
    return [line for line in decoded if line is not None]


def _keyed(key: str, held_out: HeldOut) -> dict[str, Any]:
    sets = held_out.sets_to_json()
    return {} if sets is None else {key: sets}


def _encode(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, allow_nan=False) + "\n").encode()


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


class SetLoss(NamedTuple):
    """A set's mean loss of a trained token, in nats, and how many of them it has."""

    loss: float
    tokens: int


@dataclass(frozen=True)
class HeldOut:
    """`loss` is the mean over the trained tokens of all sets, in nats.

    `sets` is by name; empty where the text is one set without a name.
    """

    loss: float
    sets: Mapping[str, SetLoss] = field(default_factory=dict)

    def sets_to_json(self) -> dict[str, dict[str, float | None]] | None:
        """Each set's loss, perplexity and tokens, None for what is not finite; None for no sets."""
        return {
            name: {
                "loss": finite_or_none(one.loss),
                "perplexity": finite_or_none(perplexity(one.loss)),
                "tokens": one.tokens,
            }
            for name, one in self.sets.items()
        } or None


def perplexity(loss: float) -> float:
    """The exponential of a token-averaged loss in nats; infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def finite_or_none(value: float | None) -> float | None:
    """What JSON can hold of a number."""
    return value if value is not None and math.isfinite(value) else None


class Stopwatch:
    """Runs from its making on."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, without pauses."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block counts in no lap."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began
