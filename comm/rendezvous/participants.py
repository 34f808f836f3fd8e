"""What each rank says of itself when it joins, and whether the ranks fit together."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

Fact: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Participant:
    """One rank's place; `facts` (flag -> value) must be the same on all ranks."""

    rank: int
    host: str
    address: str
    interface: str
    pid: int
    facts: Mapping[str, Fact]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Participant:
        return cls(**json.loads(text))


def find_mismatch(roster: Sequence[Participant]) -> str | None:
    """The first way in which a rank does not fit with the first of `roster`, in one line."""
    for other in roster[1:]:
        problem = _differing_fact(roster[0], other) or _unreachable(roster[0], other)
        if problem:
            return problem
    return None


def _differing_fact(one: Participant, other: Participant) -> str | None:
    for name in dict.fromkeys([*one.facts, *other.facts]):
        if one.facts.get(name) != other.facts.get(name):
            return (
                f"{name} must be the same on all ranks: it is {_shown(one.facts.get(name))} on "
                f"rank {one.rank} (host {one.host}) and {_shown(other.facts.get(name))} on rank "
                f"{other.rank} (host {other.host})"
            )
    return None


def _unreachable(one: Participant, other: Participant) -> str | None:
    """A loopback address is of no use to a rank that has another one."""
    inner, outer = sorted((one, other), key=lambda arrival: not _is_loopback(arrival))
    if _is_loopback(inner) == _is_loopback(outer):
        return None
    return (
        f"--net-interface: rank {inner.rank} (host {inner.host}) uses {inner.interface} "
        f"({inner.address}), which rank {outer.rank} (host {outer.host}) on {outer.interface} "
        f"({outer.address}) cannot reach: name an interface that reaches the other hosts"
    )


def _is_loopback(arrival: Participant) -> bool:
    return ipaddress.ip_address(arrival.address).is_loopback


def _shown(value: Fact) -> str:
    """As the user would type it."""
    return "not given" if value is None else json.dumps(value).strip('"')
