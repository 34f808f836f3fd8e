"""Where ranks of other jobs are told, by name, that they have come to the wrong one.

torch's store lets everybody in. A job's own keys cannot be found by a rank that has another job's
key, so that it would wait for its deadline. Here, under names that all jobs share, rank 0 proves
which job it is of; a rank that does not find it proved leaves its name, and goes. Whatever a
stranger writes here ends nobody's meeting. So nothing is counted in the store: it breaks the
connection of a rank that adds to what is no number.
"""

from __future__ import annotations

import json
import logging
import secrets

from torch.distributed.distributed_c10d import PrefixStore, Store

from comm.rendezvous.job_key import JobKey
from comm.rendezvous.participants import Participant

logger = logging.getLogger(__name__)

FLAGS = "--job-id or --job-token-file"
_MAX_STRANGERS = 16  # so many are read and told of; a scanner may leave any number
_MAX_NAME = 64
_NOBODY = "nobody"  # what a place that holds nothing is compared with, so that reading never waits


class ForeignRanks:
    """One rank's view; `here` is who it is, `url` where the door stands, for messages."""

    def __init__(self, plain: Store, key: JobKey, *, here: Participant, url: str) -> None:
        self._store = PrefixStore("dist-clm-train/door", plain)
        self._key, self._here, self._url = key, here, url
        self._is_checked = here.rank == 0
        self.strangers: list[str] = []

    def open(self) -> None:
        """Rank 0 proves which job it is of."""
        salt = secrets.token_hex(16)
        proof = self._key.prove("door", salt)
        sign = {"salt": salt, "proof": proof, "host": self._here.host}
        self._store.set("sign", json.dumps(sign))

    def check(self) -> None:
        """ValueError where rank 0 is there and of another job, which it is told of."""
        if self._is_checked or not self._store.check(["sign"]):
            return
        sign = _read(self._store.get("sign"))
        if self._key.is_proof(sign.get("proof"), "door", str(sign.get("salt"))):
            self._is_checked = True
            return
        self._knock(json.dumps({"rank": self._here.rank, "host": self._here.host}))
        raise ValueError(
            f"--dist-url {self._url}: rank 0 there (host {_plain(sign.get('host'))}) is of another "
            f"job: its {FLAGS} is not that of rank {self._here.rank} (host {self._here.host}); "
            "give all ranks of a job the same, and each job a port of its own"
        )

    def look(self) -> None:
        """Notes who came with another job's key; rank 0 tells of each."""
        while len(self.strangers) < _MAX_STRANGERS:
            found = self._store.compare_set(_place(len(self.strangers)), _NOBODY, _NOBODY)
            if found == _NOBODY.encode():
                return
            name = _read(found)
            stranger = f"rank {_plain(name.get('rank'))} (host {_plain(name.get('host'))})"
            self.strangers.append(stranger)
            if self._here.rank == 0:
                logger.warning("%s came with another %s: not of this job", stranger, FLAGS)

    def _knock(self, name: str) -> None:
        """Leaves `name` in the first place that is free, where there is one."""
        for number in range(_MAX_STRANGERS):
            if self._store.compare_set(_place(number), "", name) == name.encode():
                return


def _place(number: int) -> str:
    return f"knock/{number}"


def _read(text: bytes) -> dict[str, object]:
    """What anybody may have written; empty where it is no object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _plain(value: object) -> str:
    """A stranger's word, fit for a log."""
    return "".join(filter(str.isprintable, str(value)))[:_MAX_NAME]
