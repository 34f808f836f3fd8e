"""Values of one start of a job in a store that anybody may write to: each carries its proof."""

from __future__ import annotations

from torch.distributed.distributed_c10d import PrefixStore, Store

from comm.rendezvous.job_key import JobKey


class SignedStore:
    """Text by name. What no rank of this job wrote is never taken for a value.

    plain: torch's store, which asks nobody who he is.
    start: tells this start of the job from others in one store.
    """

    def __init__(self, plain: Store, key: JobKey, *, start: str) -> None:
        self._key, self._start = key, start
        self.store = PrefixStore(f"{start}/{key.prove('prefix', start)}", plain)

    def set(self, name: str, value: str) -> None:
        """Writes a value, over any that is there."""
        self.store.set(name, self._seal(name, value))

    def set_first(self, name: str, value: str) -> str:
        """Writes a value unless there is one; the one that is there then. Raises as `get`."""
        return self._open(name, self.store.compare_set(name, "", self._seal(name, value)))

    def get(self, name: str) -> str:
        """Waits for a value.

        Raises:
            ConnectionError: what is there is from no rank of this job.
            DistError: the store is gone, or nothing came within its time.
        """
        return self._open(name, self.store.get(name))

    def has(self, *names: str) -> bool:
        """Whether all are there."""
        return bool(self.store.check(list(names)))

    def add(self, name: str, number: int) -> int:
        """Adds to a counter, and its count; counters carry no proof."""
        return int(self.store.add(name, number))

    def _seal(self, name: str, value: str) -> str:
        return f"{self._key.prove('value', self._start, name, value)} {value}"

    def _open(self, name: str, found: bytes) -> str:
        proof, _, value = found.decode(errors="replace").partition(" ")
        if not self._key.is_proof(proof, "value", self._start, name, value):
            raise ConnectionError(
                f"the store at --dist-url holds {name}, which no rank of this job wrote: something "
                "else writes there; choose another port, and let only this job's machines reach it"
            )
        return value
