"""The links that a run's messages take: between neighbouring stages, and between replicas."""

from itertools import combinations, pairwise
from typing import NamedTuple

from comm.topology import Topology


class Link(NamedTuple):
    """One direction between two global ranks, in their `pipeline` or `replicas` group."""

    group: str
    source: int
    to: int


def links(topology: Topology) -> list[Link]:
    """All links of a run in both directions, pipeline by pipeline, then stage by stage.

    Of replicas all pairs: each adds up its share of the sum from all others.
    """
    found = []
    for replica in range(topology.num_replicas):
        for pair in pairwise(topology.pipeline_ranks(replica)):
            found += _both("pipeline", *pair)
    for stage in range(topology.num_stages):
        for pair in combinations(topology.replica_ranks(stage), 2):
            found += _both("replicas", *pair)
    return found


def _both(group: str, one: int, other: int) -> list[Link]:
    return [Link(group, one, other), Link(group, other, one)]
