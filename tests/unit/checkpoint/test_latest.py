"""Tests the file `latest` and its manifest after a power loss, a crash, or damage."""

import itertools
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pytest

from checkpoint.files.checksums import seal
from checkpoint.steps.latest import check_latest, expect_latest, write_latest
from common.files import replace_file


class Disk:
    """A simulated disk, on which a power loss can undo a rename until the folder is flushed.

    After each rename, the disk calls `look` in each state that a power loss could leave.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
        self.unsure: list[tuple[Path, bytes | None]] = []
        self._look, self._replace, self._fsync = look, os.replace, os.fsync
        monkeypatch.setattr(os, "replace", self._on_replace)
        monkeypatch.setattr(os, "fsync", self._on_fsync)

    def _on_replace(self, source: Path, target: Path) -> None:
        self.unsure.append((target, target.read_bytes() if target.exists() else None))
        self._replace(source, target)
        for count in range(len(self.unsure) + 1):
            for lost in itertools.combinations(self.unsure, count):
                self._look_without(lost)

    def _look_without(self, lost: tuple[tuple[Path, bytes | None], ...]) -> None:
        now = {target: target.read_bytes() for target, _ in lost}
        for target, before in reversed(lost):
            target.unlink() if before is None else target.write_bytes(before)
        self._look()
        for target, content in now.items():
            target.write_bytes(content)

    def _on_fsync(self, handle: int) -> None:
        self._fsync(handle)
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            self.unsure = []


def test_a_replaced_file_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, lambda: None)
    replace_file(tmp_path / "file", b"content")
    assert disk.unsure == []
    assert (tmp_path / "file").read_bytes() == b"content"


def test_no_loss_of_power_is_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No power loss makes check_latest fail, even if the new step is lower than the old one."""
    seen: set[str | None] = set()

    def look() -> None:
        check_latest(tmp_path, has_manifests=True)
        latest = tmp_path / "latest"
        seen.add(latest.read_text() if latest.exists() else None)

    Disk(monkeypatch, look)
    expect_latest(tmp_path)
    for step in (4, 8, 2, 2, 10):
        write_latest(tmp_path, step)
        look()
        assert (tmp_path / "latest").read_text() == str(step)
    assert seen == {None, "4", "8", "2", "10"}


def test_a_crash_in_the_first_save_leaves_a_predecessors_checkpoint(tmp_path: Path) -> None:
    """A predecessor wrote `latest` without a manifest; the first save ends before write_latest."""
    (tmp_path / "latest").write_text("100")
    expect_latest(tmp_path)
    check_latest(tmp_path, has_manifests=False)
    write_latest(tmp_path, 4)
    check_latest(tmp_path, has_manifests=True)


@pytest.mark.parametrize("step", [2, 8])
@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_the_next_run_goes_on_after_a_crash(step: int, written: int, tmp_path: Path) -> None:
    """After a crash in the middle of a write of `latest`, the next run can write `latest`."""
    write_latest(tmp_path, 4)
    left = [replace_file] * written
    dying = patch("checkpoint.steps.latest.replace_file", lambda *file: left.pop()(*file))
    with dying, suppress(IndexError):
        write_latest(tmp_path, step)
    for _ in range(2):
        check_latest(tmp_path, has_manifests=True)
        write_latest(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "2"


@pytest.mark.parametrize(("text", "known"), [("8", 4), ("4", 8), ("8", None), ("x", 4)])
def test_another_number_than_the_manifests_is_damage(
    text: str, known: int | None, tmp_path: Path
) -> None:
    """`latest` is damaged if it does not name its manifest's step, even if it names a folder."""
    (tmp_path / "latest").write_text(text)
    (tmp_path / "latest_manifest.json").write_bytes(seal({"step": known}))
    (tmp_path / text).mkdir()
    with pytest.raises(ValueError, match=r"/latest: damaged: .* remove latest and"):
        check_latest(tmp_path, has_manifests=True)
