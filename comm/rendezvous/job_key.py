"""The secret key of a job: with it, ranks prove to each other that they belong to the same job.

The key is never sent. A proof is an HMAC-SHA256 (RFC 2104) of a message with the key. Someone
who reads a proof on the network cannot use it for another message.
"""

import hashlib
import hmac
import json
from pathlib import Path

MIN_TOKEN = 16  # bytes; a shorter token can be guessed
MAX_TOKEN = 64 * 1024


class JobKey:
    """A secret key, derived from --job-id and, if given, the contents of --job-token-file."""

    def __init__(self, job_id: str, token: bytes = b"") -> None:
        named = json.dumps(job_id).encode()
        self._secret = hashlib.sha256(b"%d %b %b" % (len(named), named, token)).digest()

    def prove(self, *message: str | int) -> str:
        """Returns a hex proof that the sender of `message` knows the key."""
        return hmac.new(self._secret, json.dumps(message).encode(), hashlib.sha256).hexdigest()

    def is_proof(self, proof: object, *message: str | int) -> bool:
        """Returns whether `proof` is the proof of `message`; compares in constant time."""
        return isinstance(proof, str) and hmac.compare_digest(
            proof.encode(errors="replace"), self.prove(*message).encode()
        )


def read_job_key(job_id: str, token_file: Path | None) -> JobKey:
    """Returns the key of a job; raises ValueError if the token file is missing or too short."""
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
            f"{MIN_TOKEN} random bytes, for example from `openssl rand -hex 32`"
        )
    return JobKey(job_id, token)


def is_readable_by_others(token_file: Path) -> bool:
    """Returns whether the file's mode gives group or others any permission."""
    return token_file.stat().st_mode & 0o077 != 0
