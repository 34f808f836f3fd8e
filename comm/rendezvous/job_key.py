"""What the ranks of one job know, and how they prove it to each other.

The key never travels: what does is its HMAC-SHA256 (RFC 2104) over what is to be proved, so that
who listens learns nothing that could be used for anything else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

MIN_TOKEN = 16  # bytes; fewer can be guessed
MAX_TOKEN = 64 * 1024


class JobKey:
    """The key of --job-id and, where there is one, of a token file's contents."""

    def __init__(self, job_id: str, token: bytes = b"") -> None:
        named = json.dumps(job_id).encode()
        self._secret = hashlib.sha256(b"%d %b %b" % (len(named), named, token)).digest()

    def prove(self, *what: str | int) -> str:
        """The proof that its maker knows the key, good for `what` alone; hex."""
        return hmac.new(self._secret, json.dumps(what).encode(), hashlib.sha256).hexdigest()

    def is_proof(self, proof: object, *what: str | int) -> bool:
        """Whether `proof` is that of `what`, in a time that does not tell how much of it is."""
        return isinstance(proof, str) and hmac.compare_digest(
            proof.encode(errors="replace"), self.prove(*what).encode()
        )


def read_job_key(job_id: str, token_file: Path | None) -> JobKey:
    """The key of a run's flags. ValueError names a file that is not there or holds too little."""
    return JobKey(job_id, b"" if token_file is None else _read_token(token_file))


def is_readable_by_others(token_file: Path) -> bool:
    """Whether another user of this machine might read it."""
    return token_file.stat().st_mode & 0o077 != 0


def _read_token(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            token = file.read(MAX_TOKEN).strip()
    except OSError as error:
        raise ValueError(f"--job-token-file {path}: {error.strerror}") from None
    if len(token) < MIN_TOKEN:
        raise ValueError(
            f"--job-token-file {path}: it holds {len(token)} bytes, expected at least {MIN_TOKEN} "
            "that nobody can guess, as `openssl rand -hex 32` makes them"
        )
    return token
