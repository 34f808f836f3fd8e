"""Handshake on a new liveness connection: rank 0 and another rank prove that they know the job key.

The handshake is challenge and response in both directions (ISO/IEC 9798-4). Each side draws a new
random number, and the other side's proof must contain that number. So no proof can be replayed.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comm.rendezvous.job_key import JobKey


@dataclass(frozen=True)
class Handshake:
    """The handshake messages of both sides; `nonce` identifies one start of the job.

    A rank that belongs to an older start of the job fails the handshake.
    """

    key: JobKey
    nonce: str

    def reply(self, challenge: object, *, rank: int) -> dict[str, Any]:
        """Returns the reply of `rank` to rank 0's challenge, with a challenge for rank 0."""
        counter = secrets.token_hex(16)
        proof = self.key.prove("rank", self.nonce, rank, str(challenge), counter)
        return {"rank": rank, "challenge": counter, "proof": proof}

    def check(self, challenge: str, reply: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Returns the rank that replied, and rank 0's answer; raises ValueError for a bad proof."""
        rank, counter = reply.get("rank"), reply.get("challenge")
        if type(rank) is not int or not isinstance(counter, str):
            raise ValueError("not a reply")
        if not self.key.is_proof(reply.get("proof"), "rank", self.nonce, rank, challenge, counter):
            raise ValueError("the proof is not for this start of the job")
        return rank, {"proof": self.key.prove("rank 0", self.nonce, rank, challenge, counter)}

    def is_answer(
        self, answer: Mapping[str, Any], *, challenge: object, reply: Mapping[str, Any]
    ) -> bool:
        """Returns whether `answer` proves that rank 0 of this start of the job has read `reply`."""
        message = ("rank 0", self.nonce, reply["rank"], str(challenge), reply["challenge"])
        return self.key.is_proof(answer.get("proof"), *message)
