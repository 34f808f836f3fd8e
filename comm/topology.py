"""Topology: the ranks, stages and replicas of a run, in one frozen object."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The stage and replica of one process: rank = replica * num_stages + stage.

    The ranks of a pipeline are contiguous; the ranks of a stage's replicas differ by `num_stages`.
    """

    rank: int
    num_stages: int
    num_replicas: int

    @property
    def world_size(self) -> int:
        return self.num_stages * self.num_replicas

    @property
    def stage(self) -> int:
        return self.rank % self.num_stages

    @property
    def replica(self) -> int:
        return self.rank // self.num_stages

    @property
    def is_first(self) -> bool:
        """Whether this stage holds the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage holds the head."""
        return self.stage == self.num_stages - 1

    def rank_of(self, *, stage: int, replica: int) -> int:
        return replica * self.num_stages + stage

    def pipeline_ranks(self, replica: int) -> tuple[int, ...]:
        """Returns the ranks of one pipeline, in the order of the stages."""
        return tuple(range(replica * self.num_stages, (replica + 1) * self.num_stages))

    def replica_ranks(self, stage: int) -> tuple[int, ...]:
        """Returns the ranks that hold one stage, in the order of the replicas."""
        return tuple(range(stage, self.world_size, self.num_stages))

    def describe(self, rank: int, *, host: str | None = None) -> str:
        """Returns `rank 3 (stage 1, replica 1)`, or `rank 3 (stage 1, replica 1, host <host>)`."""
        place = f"stage {rank % self.num_stages}, replica {rank // self.num_stages}"
        return f"rank {rank} ({place})" if host is None else f"rank {rank} ({place}, host {host})"
