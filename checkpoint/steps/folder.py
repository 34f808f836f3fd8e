"""The folder of a step, written so that a crash at any moment leaves the last step complete.

Files are written to a hidden folder beside the final one and flushed to disk. The folder is renamed
when every stage has written its own files, and `latest` follows when every stage sees the renamed
folder. On a shared disk the stages write into one folder; without one each machine has its own. The
operations are the same in both cases, so each is harmless if another process has done it already.
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
    """Returns the hidden folder of a step; `nonce` is the same for all processes of a start."""
    return path / f"{_PARTIAL}{step}-{nonce}"


def clear_leftovers(path: Path, nonce: str) -> None:
    """Deletes what interrupted saves of earlier starts left under `path`."""
    kinds = (_PARTIAL, _REPLACED, _WITHDRAWN)
    for folder in [folder for kind in kinds for folder in path.glob(f"{kind}*")]:
        if not folder.name.endswith(nonce):
            shutil.rmtree(folder, ignore_errors=True)
    for file in leftover_files(path):
        file.unlink(missing_ok=True)


def write_stage_files(folder: Path, stage: int, parts: Mapping[str, Any]) -> dict[str, FileSum]:
    """Saves each part, flushed to disk; returns checksums by name, or an OSError names the file."""
    folder.mkdir(parents=True, exist_ok=True)
    states = {part_name(stage, part): state for part, state in parts.items()}
    return {name: save_summed(state, folder / name) for name, state in states.items()}


def move_aside(final: Path, nonce: str) -> None:
    """Renames a folder that an earlier crash left under the final name."""
    _rename_if_exists(final, _replaced_folder(final, nonce))


def delete_replaced(final: Path, nonce: str) -> None:
    """Deletes the folder that `move_aside` renamed, once a complete folder has the final name."""
    _delete_tree(_replaced_folder(final, nonce))


def _replaced_folder(final: Path, nonce: str) -> Path:
    return final.with_name(f"{_REPLACED}{final.name}-{nonce}")


def delete_step(folder: Path, nonce: str) -> None:
    """Deletes a step's folder so that a crash at any moment leaves it complete or gone.

    Several processes may do so at once. An OSError names the file that cannot be deleted.
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
    """Renames a step's folder to its final name; several processes may do so at once."""
    _rename_if_exists(partial, final)
    flush(final.parent)  # opening it also refreshes the entries that a network disk's client caches
    if not final.is_dir():
        text = "its parts were written, but it is not there"
        raise FileNotFoundError(errno.ENOENT, text, str(final))


def _rename_if_exists(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if source.exists():
            raise


def step_folders(path: Path) -> list[int]:
    """Returns the steps that have a folder under `path`, complete or not."""
    if not path.is_dir():
        return []
    return sorted(int(e.name) for e in path.iterdir() if re.fullmatch(r"[0-9]+", e.name))


def predecessor_step(path: Path) -> int | None:
    """Returns the N of `latest` if it means a predecessor's `checkpoint_N`, else None."""
    text = latest_text(path)
    if text is None or not re.fullmatch(r"[0-9]+", text) or (path / str(int(text))).is_dir():
        return None
    return int(text) if predecessor_folder(path, int(text)).is_dir() else None


def predecessor_folder(path: Path, step: int) -> Path:
    """Returns the folder of a step in a predecessor's layout."""
    return path / f"checkpoint_{step}"


def any_steps(path: Path) -> bool:
    """Whether `path` holds any checkpoint, complete or not, ours or a predecessor's."""
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    return any(re.fullmatch("latest|(checkpoint_)?[0-9]+", name) for name in names)
