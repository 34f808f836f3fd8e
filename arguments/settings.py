"""The numbers of a run, and what is due after which of its iterations."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class LoopSettings:
    """The numbers of a run. Steps are iterations; `accumulate` of them make an update.

    `rows` is one pipeline's batch and `micro_rows` a microbatch, in sequences of `tokens` tokens.
    """

    total_steps: int
    accumulate: int
    rows: int
    micro_rows: int
    tokens: int
    checkpoint_steps: int
    evaluation_steps: int
    seed: int

    @property
    def total_updates(self) -> int:
        return self.total_steps // self.accumulate

    def nominal_tokens(self, num_replicas: int) -> int:
        """Predicted tokens of an update whose every token is trained."""
        return self.accumulate * num_replicas * self.rows * (self.tokens - 1)

    @property
    def num_microbatches(self) -> int:
        return self.rows // self.micro_rows

    def begins_update(self, step: int) -> bool:
        return (step - 1) % self.accumulate == 0

    def ends_update(self, step: int) -> bool:
        return step % self.accumulate == 0

    def saves_after(self, step: int) -> bool:
        """A save due inside an accumulation happens at the update that ends it."""
        if not self.ends_update(step):
            return False
        every = self.checkpoint_steps
        due = every > 0 and step // every > (step - self.accumulate) // every
        return due or step == self.total_steps

    def evaluates_after(self, step: int) -> bool:
        every = self.evaluation_steps
        return step == self.total_steps or (every > 0 and step % every == 0)


def loop_settings(args: argparse.Namespace) -> LoopSettings:
    """The numbers of the run, from its flags."""
    return LoopSettings(
        total_steps=args.total_steps,
        accumulate=args.gradient_accumulate_step,
        rows=args.batch_size,
        micro_rows=args.micro_batch_size,
        tokens=args.seq_length,
        checkpoint_steps=args.checkpoint_steps,
        evaluation_steps=args.evaluation_steps,
        seed=args.seed,
    )
