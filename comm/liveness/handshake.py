"""How rank 0 and another rank prove to each other, on a new connection, that they are of one start.

Challenge and response, both ways (ISO/IEC 9798-4): each proves that it knows the job's key, over
what the other has drawn just now, so that neither can be played back or handed on.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comm.rendezvous.job_key import JobKey


@dataclass(frozen=True)
class Handshake:
    """`nonce` names this start of the job: ranks of an older one are strangers."""

    key: JobKey
    nonce: str

    def reply(self, challenge: object, *, rank: int) -> dict[str, Any]:
        """What rank `rank` says to rank 0's challenge, with one of its own."""
        mine = secrets.token_hex(16)
        proof = self.key.prove("rank", self.nonce, rank, str(challenge), mine)
        return {"rank": rank, "challenge": mine, "proof": proof}

    def check(self, challenge: str, reply: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """The rank that says so, and rank 0's answer. ValueError for who is not of this start."""
        rank, theirs = reply.get("rank"), reply.get("challenge")
        if type(rank) is not int or not isinstance(theirs, str):
            raise ValueError("no greeting")
        if not self.key.is_proof(reply.get("proof"), "rank", self.nonce, rank, challenge, theirs):
            raise ValueError("not of this start of the job")
        return rank, {"proof": self.key.prove("rank 0", self.nonce, rank, challenge, theirs)}

    def is_answer(
        self, answer: Mapping[str, Any], *, challenge: object, reply: Mapping[str, Any]
    ) -> bool:
        """Whether who answered `reply` is rank 0 of this start."""
        return self.key.is_proof(
            answer.get("proof"),
            "rank 0",
            self.nonce,
            reply["rank"],
            str(challenge),
            reply["challenge"],
        )
