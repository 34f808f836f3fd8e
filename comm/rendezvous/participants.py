"""Descriptions of the ranks that join a run, and the check that the descriptions match."""

import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

Fact: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Participant:
    """The description of one rank; `facts` (flag -> value) must be the same on all ranks."""

    rank: int
    host: str
    address: str
    interface: str
    pid: int
    facts: Mapping[str, Fact]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Participant":
        return cls(**json.loads(text))


def find_mismatch(participants: Sequence[Participant]) -> str | None:
    """Returns a one-line error for the first participant that does not match `participants[0]`.

    Returns None if all participants match.
    """
    first = participants[0]
    for other in participants[1:]:
        problem = _differing_fact(first, other) or _unreachable(first, other)
        if problem:
            return problem
    return None


def _differing_fact(first: Participant, other: Participant) -> str | None:
    for name in dict.fromkeys([*first.facts, *other.facts]):
        if first.facts.get(name) != other.facts.get(name):
            return (
                f"{name} must be the same on all ranks: it is {_format(first.facts.get(name))} on "
                f"rank {first.rank} (host {first.host}) and {_format(other.facts.get(name))} on "
                f"rank {other.rank} (host {other.host})"
            )
    return None


def _unreachable(first: Participant, other: Participant) -> str | None:
    """Returns an error if exactly one of the two addresses is a loopback address, else None.

    Another machine cannot reach a loopback address.
    """
    first_inside, other_inside = (
        ipaddress.ip_address(participant.address).is_loopback for participant in (first, other)
    )
    if first_inside == other_inside:
        return None
    inner, outer = (first, other) if first_inside else (other, first)
    return (
        f"--net-interface: rank {inner.rank} (host {inner.host}) uses {inner.interface} "
        f"({inner.address}), which rank {outer.rank} (host {outer.host}) on {outer.interface} "
        f"({outer.address}) cannot reach: name an interface that reaches the other hosts"
    )


def _format(value: Fact) -> str:
    """Returns the value as the user writes it on the command line, or `not given`."""
    return "not given" if value is None else json.dumps(value).strip('"')
