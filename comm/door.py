"""Where ranks of other jobs are told, by name, that they have come to the wrong one.

torch's store lets everybody in. A job's own keys cannot be found by a rank that has another job's
key, so that it would wait for its deadline. Here, under names that all jobs share, rank 0 proves
which job it is of; a rank that does not find it proved leaves its name, and goes.
"""

from __future__ import annotations

import json
import logging
import secrets

from torch.distributed.distributed_c10d import PrefixStore, Store

from comm.job_key import JobKey
from comm.roster import Arrival

logger = logging.getLogger(__name__)

FLAGS = "--job-id or --job-token-file"
_MAX_STRANGERS = 16  # so many are read and told of; a scanner may leave any number
_MAX_NAME = 64


class Door:
    """One rank's view; `here` is who it is, `url` where the door stands, for messages."""

    def __init__(self, plain: Store, key: JobKey, *, here: Arrival, url: str) -> None:
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
        number = self._store.add("knocks", 1)
        name = {"rank": self._here.rank, "host": self._here.host}
        self._store.set(f"knock/{number}", json.dumps(name))
        raise ValueError(
            f"--dist-url {self._url}: rank 0 there (host {_plain(sign.get('host'))}) is of another "
            f"job: its {FLAGS} is not that of rank {self._here.rank} (host {self._here.host}); "
            "give all ranks of a job the same, and each job a port of its own"
        )

    def look(self) -> None:
        """Notes who came with another job's key; rank 0 tells of each."""
        count = min(self._store.add("knocks", 0), _MAX_STRANGERS)
        while len(self.strangers) < count:
            key = f"knock/{len(self.strangers) + 1}"
            if not self._store.check([key]):
                return  # it is about to be written
            name = _read(self._store.get(key))
            stranger = f"rank {_plain(name.get('rank'))} (host {_plain(name.get('host'))})"
            self.strangers.append(stranger)
            if self._here.rank == 0:
                logger.warning("%s came with another %s: not of this job", stranger, FLAGS)


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
