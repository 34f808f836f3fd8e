"""The folder of a saved step, written so that the previous step stays complete after any crash.

Files are written to a hidden folder beside the final folder, and flushed to disk. When every stage
has written its files, the hidden folder is renamed. When every stage sees the renamed folder, the
file `latest` is changed to this step. On a shared disk the stages write into one folder; otherwise
each machine has its own folder. The operations are the same in both cases, because an operation
does no harm if another process has done it already.

A predecessor is an older system (see docs/glossary.md), whose folders are named `checkpoint_<N>`.
"""

import errno
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.files.checksums import FileSum, save_summed
from checkpoint.steps.latest import latest_text
from checkpoint.steps.manifest import part_name
from common.files import flush, leftover_files

_PARTIAL = ".partial-"
_REPLACED = ".replaced-"
_WITHDRAWN = ".withdrawn-"


def partial_folder(path: Path, step: int, nonce: str) -> Path:
    """Returns the hidden folder of a step; `nonce` is an id of this start of the program."""
    return path / f"{_PARTIAL}{step}-{nonce}"


def clear_leftovers(path: Path, nonce: str) -> None:
    """Deletes the incomplete files and folders that earlier starts of the program left in `path`.

    `nonce` is the id of this start of the program; the folders of this start are kept.
    """
    kinds = (_PARTIAL, _REPLACED, _WITHDRAWN)
    for folder in [folder for kind in kinds for folder in path.glob(f"{kind}*")]:
        if not folder.name.endswith(nonce):
            shutil.rmtree(folder, ignore_errors=True)
    for file in leftover_files(path):
        file.unlink(missing_ok=True)


def write_stage_files(folder: Path, stage: int, parts: Mapping[str, Any]) -> dict[str, FileSum]:
    """Saves each part of a stage's state to a file; returns the checksums by file name.

    Raises OSError if the disk fails; the error names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    states = {part_name(stage, part): state for part, state in parts.items()}
    return {name: save_summed(state, folder / name) for name, state in states.items()}


def move_aside(final: Path, nonce: str) -> None:
    """Renames `final` if it exists (from an earlier save of the step); this frees the name."""
    _rename_if_exists(final, _replaced_folder(final, nonce))


def delete_replaced(final: Path, nonce: str) -> None:
    """Deletes the folder that `move_aside` renamed; call it after the new folder is complete."""
    _delete_tree(_replaced_folder(final, nonce))


def _replaced_folder(final: Path, nonce: str) -> Path:
    return final.with_name(f"{_REPLACED}{final.name}-{nonce}")


def delete_step(folder: Path, nonce: str) -> None:
    """Deletes the folder of a step; after a crash at any moment the step is complete or deleted.

    Several processes can call it at the same time. Raises OSError with the name of a file that
    cannot be deleted.
    """
    aside = folder.with_name(f"{_WITHDRAWN}{folder.name}-{nonce}")
    _rename_if_exists(folder, aside)
    _delete_tree(aside)


def _delete_tree(folder: Path) -> None:
    def unless_gone(_call: object, _path: str, raised: tuple[type, BaseException, object]) -> None:
        if not isinstance(raised[1], FileNotFoundError):
            raise raised[1]

    shutil.rmtree(folder, onerror=unless_gone)


def publish(partial: Path, final: Path) -> None:
    """Renames a step's folder to its final name; several processes can call it at the same time.

    Raises OSError if the folder does not get this name.
    """
    _rename_if_exists(partial, final)
    flush(final.parent)  # opening the folder also refreshes the cache of a network disk's client
    if not final.is_dir():
        text = "the files of the folder were written, but the folder does not exist"
        raise FileNotFoundError(errno.ENOENT, text, str(final))


def _rename_if_exists(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if source.exists():
            raise


def step_folders(path: Path) -> list[int]:
    """Returns the steps that have a folder under `path`, complete or incomplete, in order."""
    if not path.is_dir():
        return []
    return sorted(int(e.name) for e in path.iterdir() if re.fullmatch(r"[0-9]+", e.name))


def predecessor_step(path: Path) -> int | None:
    """Returns the step in `latest` if this step has only a predecessor's folder, else None."""
    text = latest_text(path)
    if text is None or not re.fullmatch(r"[0-9]+", text) or (path / str(int(text))).is_dir():
        return None
    return int(text) if predecessor_folder(path, int(text)).is_dir() else None


def predecessor_folder(path: Path, step: int) -> Path:
    """Returns the folder in which a predecessor saved the step `step`."""
    return path / f"checkpoint_{step}"


def any_steps(path: Path) -> bool:
    """Returns whether `path` contains a checkpoint, even an incomplete one or a predecessor's."""
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    return any(re.fullmatch("latest|(checkpoint_)?[0-9]+", name) for name in names)
