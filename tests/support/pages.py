"""Documentation pages, their bash blocks, and a copy of the project in which the blocks run."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.launcher import free_port

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
NOT_RUN = ("# needs GPUs", "# needs a network")  # first line of a block that is not run
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_DEADLINE = 300.0
# The results of earlier runs and builds; no folder of the project has such a name.
_NOT_COPIED = (
    *(".*", "__pycache__", "htmlcov", "wandb", "site", "quickstart", "data"),
    *("pretrained_models", "model_checkpoints", "trace_json"),
)
# bash's own `wait` returns 0, also if a job failed.
_WAIT = 'wait() { local job; for job in $(jobs -p); do builtin wait "$job" || return; done; }\n'


@dataclass(frozen=True)
class Block:
    """A bash block of a page; `line` is the line of its first command."""

    page: Path
    line: int
    text: str

    @property
    def is_run(self) -> bool:
        return not self.text.startswith(NOT_RUN)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        yield Block(page, text.count("\n", 0, match.start()) + 2, match[1])


def copy_project(folder: Path) -> Path:
    """Copies the project to `folder`/project; the copy's .venv is a link to sys.prefix."""
    copy = folder / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


def run_block(block: Block, project: Path) -> None:
    """Runs a block in a copy of the project; asserts that each command succeeds.

    The port in the page can be in use on this machine, so a free port replaces it.
    """
    script = _WAIT + block.text.replace("7033", str(free_port()))
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=project,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=_DEADLINE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, f"{block} ended with {process.returncode}:\n{output}"
