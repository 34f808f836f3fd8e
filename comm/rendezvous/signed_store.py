"""Proofs in torch's TCPStore, which accepts any client: ranks of another job may come by mistake.

Rank 0 proves its job under a name that all jobs share, so that a rank with another key ends at once
instead of waiting for its deadline. All other names depend on the key and on the start of the job.
The values that decide over a run carry a proof, so that no other client can replace them.
"""

import secrets

from torch.distributed.distributed_c10d import PrefixStore, Store

from comm.rendezvous.job_key import JobKey

LIVENESS_ADDRESS = "liveness"  # the name of the value
_MAX_HOST = 64  # characters of a foreign host's name that are reported


class SignedStore:
    """Text by name; a value without the proof of this job, start and name is an error.

    start: distinguishes this start of the job from others in the same store.
    plain: torch's store under this start's names, for values without a proof.
    """

    def __init__(self, store: Store, key: JobKey, *, start: str) -> None:
        self._key, self._start = key, start
        self._all_jobs = PrefixStore("dist-clm-train", store)
        self.plain = PrefixStore(f"{start}/{key.prove('prefix', start)}", store)

    def prove_job(self, host: str) -> None:
        """Proves the job of this rank, which is rank 0 on `host`."""
        salt = secrets.token_hex(16)
        self._all_jobs.set("job", f"{salt} {self._key.prove('job', salt)} {host}")

    def check_job(self, *, url: str, rank: int, host: str) -> bool:
        """Returns whether rank 0 has proved the job. Raises ValueError if it is of another job.

        This rank is `rank` on `host`.
        """
        if not self._all_jobs.check(["job"]):
            return False
        text = self._all_jobs.get("job").decode(errors="replace")
        salt, proof, rank_0_host = [*text.split(" ", 2), "", ""][:3]
        if self._key.is_proof(proof, "job", salt):
            return True
        shown = "".join(filter(str.isprintable, rank_0_host))[:_MAX_HOST]
        raise ValueError(
            f"--dist-url {url}: rank 0 there (host {shown}) is of another job: its --job-id or "
            f"--job-token-file is not that of rank {rank} (host {host}); give all ranks of a job "
            "the same, and each job a port of its own"
        )

    def set(self, name: str, value: str) -> None:
        """Writes a value."""
        self.plain.set(name, self._sign(name, value))

    def set_first(self, name: str, value: str) -> None:
        """Writes a value unless there is one."""
        self.plain.compare_set(name, "", self._sign(name, value))

    def get(self, name: str) -> str:
        """Waits for a value; raises ConnectionError if no rank of this job wrote it.

        Raises DistError if the store is gone, or no value came within its timeout.
        """
        proof, _, value = self.plain.get(name).decode(errors="replace").partition(" ")
        if not self._key.is_proof(proof, "value", self._start, name, value):
            raise foreign_value(name)
        return value

    def _sign(self, name: str, value: str) -> str:
        return f"{self._key.prove('value', self._start, name, value)} {value}"


def foreign_value(name: str) -> ConnectionError:
    """Returns the error for a value that no rank of this job wrote."""
    return ConnectionError(
        f"the store at --dist-url holds {name}, which no rank of this job wrote: something else "
        "writes there; choose another port, and let only this job's machines reach it"
    )
