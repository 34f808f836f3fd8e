"""Training checkpoints: every stage saves together, every stage resumes from the same step.

No shared disk is assumed. Replica 0 of each stage writes and reads that stage's files on its own
machine; the other replicas get weights and state from it over the network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint import step_folder
from comm.communicator import Communicator
from comm.messages import broadcast_json, gather_json
from comm.topology import Topology
from monitor.atomic import replace_file

logger = logging.getLogger(__name__)


class ResumePoint(NamedTuple):
    """Where training goes on: the step, and the folder that holds it on replica 0's machines.

    `meta` is its meta.json; None means a predecessor's checkpoint, of which only the weights count.
    """

    step: int
    folder: Path
    meta: dict[str, Any] | None


class CheckpointStore:
    """The checkpoints under one --checkpoint-path, as all processes of a run see them.

    `nonce` names this start of the run; `extras` are small files (config.json, tokenizer) by name
    that every step's folder holds.
    """

    def __init__(
        self,
        path: Path,
        *,
        control: Communicator,
        topology: Topology,
        nonce: str,
        extras: Mapping[str, bytes],
    ) -> None:
        self.path = path
        self._control, self._topology, self._nonce = control, topology, nonce
        self._extras = dict(extras)
        self._writes = topology.replica == 0
        if self._writes:
            step_folder.clear_leftovers(path, nonce)

    def save(self, step: int, *, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Saves `parts` (checkpoint, optimizer, scheduler) of this stage as step `step`.

        Every process calls it; `meta` is rank 0's. OSError where the disk fails.
        """
        meta = broadcast_json(self._control, {**meta, "start": self._nonce})
        partial = step_folder.partial_folder(self.path, step, self._nonce)
        final = self.path / str(step)
        if self._writes:
            step_folder.make_way(final, self._nonce)
        self._all_here()
        if self._writes:
            step_folder.write_stage_files(partial, self._topology.stage, parts)
            for name, data in self._extras.items():
                replace_file(partial / name, data)
            text = json.dumps(meta, indent=1, sort_keys=True)
            replace_file(partial / "meta.json", text.encode())
            step_folder.sync_folder(partial)
        self._all_here()
        if self._writes:
            step_folder.publish(partial, final)
        self._all_here()
        if self._writes:
            self._name_latest(step)
            step_folder.drop_replaced(final, self._nonce)
        self._all_here()  # exit status 0 is to mean that every stage came to its end

    def find(self) -> ResumePoint | None:
        """The newest step that every stage has whole; None where no stage has any checkpoint.

        Files that stages have of different saves are not one step. Every process calls it.
        ValueError says what each stage has where they have none in common.
        """
        found = gather_json(self._control, self._mine())[: self._topology.num_stages]
        common = set.intersection(*({(step, save) for step, save in one["whole"]} for one in found))
        if common:
            step, _ = max(common)
            return self._ours(step, found)
        old = {one["old"] for one in found}
        if old == {None}:
            # `latest` is written when all stages are whole: without it no save ever ended.
            if any(one["latest"] for one in found):
                raise ValueError(f"--checkpoint-path {self.path}: {_disagreement(found)}")
            return None
        if len(old) > 1:
            raise ValueError(f"--checkpoint-path {self.path}: {_disagreement(found)}")
        return ResumePoint(0, step_folder.predecessor_folder(self.path, old.pop()), None)

    def _mine(self) -> dict[str, Any]:
        """What this stage has here: steps, which are whole and of which save, and `latest`."""
        path, stage = self.path, self._topology.stage
        steps = step_folder.step_folders(path) if self._writes else []
        folders = {step: path / str(step) for step in steps}
        return {
            "steps": steps,
            "whole": [
                (step, step_folder.save_of(folder))
                for step, folder in folders.items()
                if step_folder.is_whole(folder, stage)
            ],
            "old": step_folder.predecessor_step(path) if self._writes else None,
            "latest": self._writes and (path / "latest").exists(),
        }

    def continue_from(self, step: int) -> None:
        """Lets `latest` name the step that the run goes on from, where it does not.

        It may lag behind, after a crash between a folder's rename and its own; and it may be ahead,
        where the step that it names is not whole any more.
        """
        if self._writes and step_folder.latest_step(self.path) != str(step):
            self._name_latest(step)

    def exists(self) -> bool:
        """Whether any stage has any checkpoint, whole or not; every process calls it."""
        mine = self._writes and step_folder.any_steps(self.path)
        return any(gather_json(self._control, mine))

    def _ours(self, step: int, found: list[dict[str, Any]]) -> ResumePoint:
        newer = sorted({s for one in found for s in one["steps"] if s > step})
        if newer and self._topology.rank == 0:
            logger.warning(
                "step %s is not whole on every stage, or not of one save: going back to %d",
                ", ".join(map(str, newer)),
                step,
            )
        folder = self.path / str(step)
        meta = read_meta(folder) if self._topology.rank == 0 else None
        return ResumePoint(step, folder, broadcast_json(self._control, meta))

    def _name_latest(self, step: int) -> None:
        replace_file(self.path / "latest", str(step).encode())
        step_folder.sync_folder(self.path)

    def _all_here(self) -> None:
        self._control.all_reduce(torch.zeros(1)).wait()


def _disagreement(found: list[dict[str, Any]]) -> str:
    have = "; ".join(f"stage {stage} has {_steps(one)}" for stage, one in enumerate(found))
    return (
        f"no step is whole on every stage and of one save ({have}); bring the missing files to "
        "their machines, or name another folder"
    )


def _steps(one: dict[str, Any]) -> str:
    steps = [str(step) for step, _ in one["whole"]]
    if one["old"] is not None:
        steps.append(f"checkpoint_{one['old']}")
    return ", ".join(steps) or "none"


def read_meta(folder: Path) -> dict[str, Any]:
    """A step's meta.json; ValueError names the file where it cannot be read."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or not isinstance(meta.get("step"), int):
            raise ValueError("no step in it")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    return meta


def part_file(folder: Path, stage: int, part: str) -> Path:
    """Where `save` keeps one part of a stage."""
    return folder / f"prank_{stage}_{part}.pt"


def read_part(folder: Path, stage: int, part: str) -> dict[str, Any]:
    """What `save` kept of one part; ValueError names the file where it cannot be read."""
    path = part_file(folder, stage, part)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own, pickle's, zip's and the system's
        raise ValueError(f"{path}: not readable: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict, found {type(state).__name__}")
    return state
