"""Which checkpoints stay: older steps go, and optimizer state goes from those that stay.

Only what came before the step that was just saved is touched, once every stage has it whole and
`latest` names it. A step that not every stage has whole counts for none, and goes. One is renamed
aside before it is removed, and a manifest says what is gone before it goes: a crash at any moment
leaves a step whole, or gone, or saying what it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint.steps.folder import step_folders, withdraw
from checkpoint.steps.manifest import StageManifest, manifest_stages, part_name, read_manifest
from common.files import replace_file


@dataclass(frozen=True)
class Keep:
    """How many of the newest steps stay, and how many with optimizer state; None is all."""

    steps: int | None = None
    optimizer_states: int | None = None

    @property
    def is_all(self) -> bool:
        """Whether nothing is ever removed."""
        return self.steps is None and self.optimizer_states is None

    def added_bytes(self, saves: int, *, kept: tuple[int, int], weights: int, state: int) -> int:
        """The most that `saves` further checkpoints take at one time.

        `kept` are the steps that are there, and those of them with optimizer state; `weights` and
        `state` are the bytes of one. A new step is written before an old one goes.
        """
        limits = [most for most in (self.steps, self.optimizer_states) if most is not None]
        steps, states = (
            saves if most is None else min(saves, max(1, most + 1 - there))
            for most, there in ((self.steps, kept[0]), (min(limits, default=None), kept[1]))
        )
        return steps * weights + states * state


def prune(path: Path, step: int, keep: Keep, *, whole: Sequence[int], nonce: str) -> None:
    """Removes under `path`, where `step` was saved, what `keep` does not ask for.

    `whole` are the steps that count, those that all stages have whole, in order and with `step` the
    last: others go too. That is all of a step that is there, by whichever stages it was saved: the
    run may have had others. The stages of one folder may do so at once. OSError where the disk
    fails.
    """
    steps = [one for one in step_folders(path) if one <= step and _is_ours(path / str(one))]
    for old in _others(steps, whole, keep.steps):
        withdraw(path / str(old), nonce)
    for old in _others(steps, whole, keep.optimizer_states):
        if (path / str(old)).is_dir():
            _drop_optimizers(path / str(old))


def _is_ours(folder: Path) -> bool:
    """Nothing else that is called by a number is ever removed."""
    return any(folder.glob("prank_*"))


def _others(steps: Sequence[int], whole: Sequence[int], most: int | None) -> list[int]:
    """All but the newest `most` of those that are whole."""
    return [] if most is None else [step for step in steps if step not in whole[-most:]]


def _drop_optimizers(folder: Path) -> None:
    """Leaves alone what has no manifest to say so, or a damaged one."""
    for stage in manifest_stages(folder):
        with suppress(ValueError):
            _drop_optimizer(folder, read_manifest(folder, stage))


def _drop_optimizer(folder: Path, manifest: StageManifest) -> None:
    name = part_name(manifest.stage, "optimizer")
    if name not in manifest.dropped:
        files = {file: one for file, one in manifest.files.items() if file != name}
        told = replace(manifest, files=files, dropped=[*manifest.dropped, name])
        replace_file(folder / manifest.name, told.encode())
    (folder / name).unlink(missing_ok=True)
