"""The key of a job, by which its ranks prove to each other that they belong to it.

The key is never sent. A proof is its HMAC-SHA256 (RFC 2104) over a message, so that a listener
learns nothing that it could use for another message.
"""

import hashlib
import hmac
import json
from pathlib import Path

MIN_TOKEN = 16  # bytes; fewer can be guessed
MAX_TOKEN = 64 * 1024


class JobKey:
    """The key of --job-id and, if there is one, of a token file's contents."""

    def __init__(self, job_id: str, token: bytes = b"") -> None:
        named = json.dumps(job_id).encode()
        self._secret = hashlib.sha256(b"%d %b %b" % (len(named), named, token)).digest()

    def prove(self, *message: str | int) -> str:
        """Returns the proof that its sender knows the key, valid for `message` alone; hex."""
        return hmac.new(self._secret, json.dumps(message).encode(), hashlib.sha256).hexdigest()

    def is_proof(self, proof: object, *message: str | int) -> bool:
        """Returns whether `proof` is that of `message`, in a time that reveals nothing of it."""
        return isinstance(proof, str) and hmac.compare_digest(
            proof.encode(errors="replace"), self.prove(*message).encode()
        )


def read_job_key(job_id: str, token_file: Path | None) -> JobKey:
    """Returns the key of a run's flags. ValueError for a file that is missing or too short."""
    if token_file is None:
        return JobKey(job_id)
    try:
        with token_file.open("rb") as file:
            token = file.read(MAX_TOKEN).strip()
    except OSError as error:
        raise ValueError(f"--job-token-file {token_file}: {error.strerror}") from None
    if len(token) < MIN_TOKEN:
        raise ValueError(
            f"--job-token-file {token_file}: it holds {len(token)} bytes, expected at least "
            f"{MIN_TOKEN} that nobody can guess, as `openssl rand -hex 32` makes them"
        )
    return JobKey(job_id, token)


def is_readable_by_others(token_file: Path) -> bool:
    """Returns whether another user of this machine may read the file."""
    return token_file.stat().st_mode & 0o077 != 0
