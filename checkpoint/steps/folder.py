"""Writing a step's folder so that a crash at any moment leaves the last one whole.

Files go to a hidden folder beside the final one, are flushed to disk, and the folder is renamed
when every stage has written its own; `latest` follows when every stage sees the renamed folder. On
a shared disk the stages meet in one folder, without one each machine has its own: the steps are the
same, so each is written to be harmless when another process has done it already.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.files.checksums import FileSum, save_summed
from checkpoint.steps.latest import latest_text
from checkpoint.steps.manifest import PARTS, part_name
from common.files import flush, leftover_files

_PARTIAL = ".partial-"
_REPLACED = ".replaced-"
_WITHDRAWN = ".withdrawn-"


def partial_folder(path: Path, step: int, nonce: str) -> Path:
    """Where step `step` is written; `nonce` is the same for all processes of this start."""
    return path / f"{_PARTIAL}{step}-{nonce}"


def clear_leftovers(path: Path, nonce: str) -> None:
    """Removes what crashed saves of earlier starts left under `path`."""
    kinds = (_PARTIAL, _REPLACED, _WITHDRAWN)
    for folder in [folder for kind in kinds for folder in path.glob(f"{kind}*")]:
        if not folder.name.endswith(nonce):
            shutil.rmtree(folder, ignore_errors=True)
    for file in leftover_files(path):
        file.unlink(missing_ok=True)


def write_stage_files(folder: Path, stage: int, parts: Mapping[str, Any]) -> dict[str, FileSum]:
    """Saves each part as `prank_<stage>_<part>.pt`, flushed to disk; returns their sums by name.

    OSError names the file that could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {
        part_name(stage, part): save_summed(state, folder / part_name(stage, part))
        for part, state in parts.items()
    }


def make_way(final: Path, nonce: str) -> None:
    """Moves aside a folder that an earlier crash left under the final name, before writing."""
    _rename_if_there(final, _replaced_folder(final, nonce))


def drop_replaced(final: Path, nonce: str) -> None:
    """Removes what `make_way` moved aside, once a whole folder has the final name."""
    _remove_tree(_replaced_folder(final, nonce))


def _replaced_folder(final: Path, nonce: str) -> Path:
    return final.with_name(f"{_REPLACED}{final.name}-{nonce}")


def withdraw(folder: Path, nonce: str) -> None:
    """Removes a step's folder so that a crash at any moment leaves it whole or gone.

    Several processes may do so at once. OSError names what cannot be removed.
    """
    aside = folder.with_name(f"{_WITHDRAWN}{folder.name}-{nonce}")
    _rename_if_there(folder, aside)
    _remove_tree(aside)


def _remove_tree(folder: Path) -> None:
    def unless_gone(_call: object, _path: str, raised: tuple[type, BaseException, object]) -> None:
        if not isinstance(raised[1], FileNotFoundError):
            raise raised[1]

    shutil.rmtree(folder, onerror=unless_gone)


def publish(partial: Path, final: Path) -> None:
    """Renames a step's folder to its final name; several processes may do so at once."""
    _rename_if_there(partial, final)
    flush(final.parent)  # opening it also makes a network disk's client look anew
    if not final.is_dir():
        text = "its parts were written, but it is not there"
        raise FileNotFoundError(errno.ENOENT, text, str(final))


def _rename_if_there(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if source.exists():
            raise


def step_folders(path: Path) -> list[int]:
    """The steps under `path` that have a folder, whole or not."""
    if not path.is_dir():
        return []
    return sorted(int(e.name) for e in path.iterdir() if re.fullmatch(r"[0-9]+", e.name))


def save_of(folder: Path) -> str:
    """What tells saves without manifests apart: all stages write the same meta.json, and no two
    saves do."""
    return hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()


def not_whole(folder: Path, stages: Sequence[int]) -> list[str]:
    """Which of meta.json, config.json and those stages' files a step's folder without manifests has
    not, or not whole.

    torch's files are zip archives, whose directory is written last: a cut one has none.
    """
    common = [name for name in ("meta.json", "config.json") if not (folder / name).is_file()]
    parts = [part_name(stage, part) for stage in stages for part in PARTS]
    return common + [name for name in parts if not zipfile.is_zipfile(folder / name)]


def predecessor_step(path: Path) -> int | None:
    """The N of `latest` where it means a predecessor's `checkpoint_N`, else None."""
    text = latest_text(path)
    if text is None or not re.fullmatch(r"[0-9]+", text):
        return None
    step = int(text)
    is_theirs = not (path / str(step)).is_dir() and predecessor_folder(path, step).is_dir()
    return step if is_theirs else None


def predecessor_folder(path: Path, step: int) -> Path:
    """Where the systems that came before kept a step."""
    return path / f"checkpoint_{step}"


def any_steps(path: Path) -> bool:
    """Whether `path` holds any checkpoint, whole or not, ours or a predecessor's."""
    if not path.is_dir():
        return False
    return (path / "latest").exists() or any(
        re.fullmatch(r"(checkpoint_)?[0-9]+", entry.name) for entry in path.iterdir()
    )
