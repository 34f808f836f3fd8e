"""Tests README and docs: the site can be built, all links and flags exist, the commands succeed."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arguments.train import train_parser
from tests.support.pages import PAGES, ROOT, blocks_of, copy_project, run_block

README = ROOT / "README.md"
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Flags of the converters, `python -m pipeline_parallel.schedule`, scripts and other programs;
# --log-every is the example of the recipe "Add a flag".
OTHER_FLAGS = {
    *("--save-dir", "--dtype", "--ckpt-path", "--save-path", "--n-stages", "--n-layer-per-stage"),
    *("--config-name", "--verify", "--stages", "--microbatches", "--forward", "--input-gradient"),
    *("--weight-gradient", "--check", "--checkout", "--only", "--out", "--nproc-per-node"),
    *("--max-restarts", "--shutdown-timeout", "--signals-to-handle", "--signal", "--strict"),
    *("--device", "--quick", "--wheels", "--python", "--no-deps", "--only-binary", "--dest"),
    *("--python-version", "--platform", "--log-every"),
}
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(https?:[^\" >]*)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the site; --strict refuses a link in docs/ whose page or anchor is missing."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_loads_nothing_from_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    assert {link for page in pages for link in LOADED.findall(page.read_text())} == set()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_into_the_project_lead_somewhere(page: str, site: Path) -> None:
    """The file and the anchor of each link exist; mkdocs itself checks links inside docs/."""
    for target, anchor in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
        if anchor:
            html = site / Path(target).relative_to("docs").with_suffix(".html")
            assert f'id="{anchor}"' in html.read_text(), f"{target}#{anchor}"


def test_the_page_of_flags_is_that_of_the_flag_table() -> None:
    """The page of flags equals what `python docs/write_flags.py` writes from the flag table."""
    command = [sys.executable, "docs/write_flags.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0


def test_readme_is_short_and_has_every_package() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for package in ROOT.glob("*/__init__.py"):
        if package.parent.name not in ("tests", "example_scripts"):
            assert f"{package.parent.name}/ " in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page: Path) -> None:
    """Each file that a page names outside code blocks exists; a path may lack its first folders."""
    text = re.sub(r"```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    names = set(re.findall(r"(?<![\w/.<>-])[\w/]*\w\.(?:py|sh|sbatch)\b", text))
    files = [f"/{path.relative_to(ROOT)}" for path in ROOT.glob("[!.]*/**/*")]
    names = {name for name in names if not (ROOT / name).exists()}
    assert {name for name in names if not any(file.endswith(f"/{name}") for file in files)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_that_is_named_exists(page: Path) -> None:
    actions = train_parser(shows_all=True)._actions
    flags = {name for action in actions for name in action.option_strings} | OTHER_FLAGS
    assert set(FLAG.findall(page.read_text(encoding="utf-8"))) - flags == set()


def test_the_home_page_has_the_status_of_readme() -> None:
    """Both pages begin with a table of what has run where; the rows are the same."""
    pages = [README, ROOT / "docs" / "index.md"]
    first_tables = [page.read_text(encoding="utf-8").split("|---|---|\n")[1] for page in pages]
    readme, home = (table.split("\n\n")[0].replace("**", "") for table in first_tables)
    assert "one GPU" in readme
    assert home == readme


def test_the_licence_is_apache_2_0_to_the_letter() -> None:
    """The expected checksum is that of apache.org/licenses/LICENSE-2.0.txt."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert "Apache License 2.0: see `LICENSE`." in README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Returns a function that copies the project together with the results of the quick start."""
    first = copy_project(tmp_path_factory.mktemp("shown"))
    command = [sys.executable, "-m", "example_scripts.quickstart"]
    subprocess.run(command, cwd=first, check=True, timeout=600)

    def copy(folder: Path) -> Path:
        project = copy_project(folder)
        shutil.copytree(first / "quickstart", project / "quickstart")
        return project

    return copy


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.is_run for block in blocks_of(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_shown_command_runs(
    page: Path, shown: Callable[[Path], Path], tmp_path: Path
) -> None:
    """A page's runnable blocks succeed in order, in a project with the quick start's results."""
    project = shown(tmp_path)
    for block in blocks_of(page):
        if block.is_run:
            run_block(block, project)


def test_every_block_of_commands_is_seen() -> None:
    """No command block is indented or marked sh, shell or console; tests would miss such blocks."""
    for page in PAGES:
        fences = re.findall(r"^\s*```(\w+)", page.read_text(encoding="utf-8"), flags=re.M)
        assert not {"sh", "shell", "console"}.intersection(fences), page
        assert fences.count("bash") == len(list(blocks_of(page))), page
