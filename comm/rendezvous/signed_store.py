"""A store in which a value can carry a proof that a rank of this job wrote it.

Proofs are needed because torch's TCPStore accepts any client, even a rank of another job. `set` and
`set_first` write a value with a proof, and `get` detects a value from another client. The names of
these values in the TCPStore depend on the job key and on the start of the job. Only one name is the
same for all jobs: under this name, rank 0 writes a proof that it knows its job key. A rank with
another job key finds this proof wrong; it ends at once and does not wait for its deadline.
"""

import secrets

from torch.distributed.distributed_c10d import PrefixStore, Store

from comm.rendezvous.job_key import JobKey

LIVENESS_ADDRESS = "liveness"  # the name of the stored value
_MAX_HOST = 64  # an error shows at most this many characters of a foreign host name


class SignedStore:
    """A store of text values; a proof depends on the job key, `start`, the value and its name.

    start: the name of this start of the job; each start that uses the same store has another name.
    plain: torch's store with a name prefix for this start, for values without a proof.
    """

    def __init__(self, store: Store, key: JobKey, *, start: str) -> None:
        self._key, self._start = key, start
        self._all_jobs = PrefixStore("dist-clm-train", store)
        self.plain = PrefixStore(f"{start}/{key.prove('prefix', start)}", store)

    def prove_job(self, host: str) -> None:
        """Writes a proof of the job, and rank 0's host name for errors; only rank 0 calls this."""
        salt = secrets.token_hex(16)
        self._all_jobs.set("job", f"{salt} {self._key.prove('job', salt)} {host}")

    def check_job(self, *, url: str, rank: int, host: str) -> bool:
        """Returns whether rank 0's proof is in the store.

        `rank` and `host` describe this process. Raises ValueError if rank 0 is of another job.
        """
        if not self._all_jobs.check(["job"]):
            return False
        text = self._all_jobs.get("job").decode(errors="replace")
        salt, proof, rank_0_host = [*text.split(" ", 2), "", ""][:3]
        if self._key.is_proof(proof, "job", salt):
            return True
        shown = "".join(filter(str.isprintable, rank_0_host))[:_MAX_HOST]
        raise ValueError(
            f"--dist-url {url}: rank 0 there (host {shown}) belongs to another job: its --job-id "
            f"or --job-token-file differs from that of rank {rank} (host {host}); use the same "
            "values on all ranks of a job, and a different port for each job"
        )

    def set(self, name: str, value: str) -> None:
        """Writes a value with its proof."""
        self.plain.set(name, self._sign(name, value))

    def set_first(self, name: str, value: str) -> None:
        """Writes a value with its proof, unless the store has a value of this name already."""
        self.plain.compare_set(name, "", self._sign(name, value))

    def get(self, name: str) -> str:
        """Waits for a value and returns it; raises ConnectionError if its proof is wrong.

        Raises DistError if the store's host ended, or if no value came within the store's timeout.
        """
        proof, _, value = self.plain.get(name).decode(errors="replace").partition(" ")
        if not self._key.is_proof(proof, "value", self._start, name, value):
            raise foreign_value(name)
        return value

    def _sign(self, name: str, value: str) -> str:
        return f"{self._key.prove('value', self._start, name, value)} {value}"


def foreign_value(name: str) -> ConnectionError:
    """Returns the error for a value `name` that no rank of this job wrote."""
    return ConnectionError(
        f"the store at --dist-url holds {name}, which no rank of this job wrote: something else "
        "writes there; choose another port, and let only this job's machines reach it"
    )
