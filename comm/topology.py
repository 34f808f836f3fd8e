"""Topology: ranks, stages and replicas, as one frozen object that is passed in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The place of one process: rank = replica * num_stages + stage.

    Pipelines are contiguous ranks; the replicas of one stage are `num_stages` apart.
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
        """Returns the ranks of one pipeline, first stage first."""
        return tuple(range(replica * self.num_stages, (replica + 1) * self.num_stages))

    def replica_ranks(self, stage: int) -> tuple[int, ...]:
        """Returns the ranks that hold one stage, first replica first."""
        return tuple(range(stage, self.world_size, self.num_stages))

    def describe(self, rank: int, *, host: str | None = None) -> str:
        """Returns `rank 3 (stage 1, replica 1)`, with `, host name` after the replica if given."""
        place = f"stage {rank % self.num_stages}, replica {rank // self.num_stages}"
        return f"rank {rank} ({place})" if host is None else f"rank {rank} ({place}, host {host})"
