"""Which steps every stage has whole, on whatever disk: those that --keep-checkpoints counts.

A crash in a save, or a disk that was exchanged, leaves a step on some machines and not on others,
and no run goes on from that.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoint.steps.folder import not_whole, save_of, step_folders
from checkpoint.steps.manifest import manifest_stages, part_name, read_manifest
from comm.collective_io import run_on_all
from comm.communicator import Communicator
from comm.objects import gather_json
from common.files import read_json_object

logger = logging.getLogger(__name__)


class HeldFiles(NamedTuple):
    """A stage's files of a step that a disk has whole, of a save by `num_stages` stages, where 0 is
    not told."""

    save: str
    num_stages: int
    stage: int


def find_whole_steps(path: Path | None, last: int, *, control: Communicator) -> list[int] | None:
    """The steps up to `last` that all stages have whole, as far as their files' sizes tell.

    Every process calls it, at once; `path` is None for one that writes no checkpoints. None, the
    same on all, and rank 0 warns, where a disk cannot be read.
    """
    found: dict[int, list[HeldFiles]] = {}

    def look() -> None:
        assert path is not None
        steps = [step for step in step_folders(path) if step <= last]
        found.update({step: _look_at(path / str(step), step) for step in steps})

    what = f"looking at what is older than step {last}"
    failure = run_on_all(control, None if path is None else look, what)
    views = gather_json(control, None if path is None else list(found.items()))
    if failure is not None:
        if control.rank == 0:
            logger.warning("older checkpoints stay, since one cannot be read: %s", failure)
        return None
    decoded = [
        {step: [HeldFiles(*one) for one in held] for step, held in view}
        for view in views
        if view is not None
    ]
    return common_steps(decoded)


def common_steps(views: Sequence[Mapping[int, Sequence[HeldFiles]]]) -> list[int]:
    """The steps that are whole, in order, by what each stage's disk has of them."""
    steps = {step for view in views for step in view}
    return sorted(step for step in steps if _is_whole([view.get(step, ()) for view in views]))


def _is_whole(disks: Sequence[Sequence[HeldFiles]]) -> bool:
    """Each stage has its own files on its own disk. Of a step that other stages saved, the disks
    together have all."""
    held = {one for disk in disks for one in disk}
    for save, told in {(one.save, one.num_stages) for one in held}:
        wanted = [HeldFiles(save, told, stage) for stage in range(told or len(disks))]
        if len(wanted) == len(disks):
            if all(one in disk for one, disk in zip(wanted, disks, strict=True)):
                return True
        elif held.issuperset(wanted):
            return True
    return False


def _look_at(folder: Path, step: int) -> list[HeldFiles]:
    """OSError where the disk fails, which is not to be taken for a step that is not whole."""
    stages = manifest_stages(folder)
    if not stages:
        return _look_unchecked(folder)
    found = []
    for stage in stages:
        try:
            manifest = read_manifest(folder, stage)
            manifest.check_sizes(folder)
        except ValueError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from error
            continue
        if manifest.step == step:
            found.append(HeldFiles(manifest.save, manifest.num_stages, stage))
    return found


def _look_unchecked(folder: Path) -> list[HeldFiles]:
    """Of a step of a time without manifests."""
    if not_whole(folder, []):
        return []
    try:
        told = read_json_object(folder / "meta.json").get("num_stages")
    except ValueError:
        return []
    num_stages, save = told if isinstance(told, int) else 0, save_of(folder)
    names = (path.name for path in folder.glob(part_name("*", "checkpoint")))
    found = (re.fullmatch(part_name("([0-9]+)", "checkpoint"), name) for name in names)
    stages = [int(one[1]) for one in found if one]
    return [
        HeldFiles(save, num_stages, stage) for stage in stages if not not_whole(folder, [stage])
    ]
