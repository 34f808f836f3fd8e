import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from monitor.wandb_run import WandbRun, has_login, open_wandb, wandb_mode


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MODE", "API_KEY", "BASE_URL", "IDENTITY_TOKEN_FILE", "CONFIG_DIR", "NAME"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces wandb by a double whose `init` fails; returns a list of `init`'s arguments."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        calls.append(arguments)
        raise TimeoutError("no answer\nfrom the server")

    module = SimpleNamespace(init=init, Settings=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def open_here(folder: Path, run_id: str | None = None) -> Any:
    return open_wandb(project="p", config={"lr": 1.0}, run_id=run_id, folder=folder)


@pytest.mark.parametrize("mode", [None, "disabled", "online"])
def test_unconfigured_imports_nothing_and_keeps_the_id(
    home: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    run = open_here(home, "abc")
    run.log({"loss": 1.0}, 1)
    run.close()
    assert run.run_id == "abc"


def test_online_without_a_login_is_a_warning_not_a_prompt(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    open_here(home)
    assert "wandb has no key and no login: wandb is off" in caplog.text


def test_a_server_out_of_reach_is_one_warning(
    home: Path, monkeypatch: pytest.MonkeyPatch, fake_wandb: list[dict[str, Any]], caplog: Any
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    run = open_here(home, "abc")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "continues without it: no answer from the server" in caplog.text
    assert run.run_id == "abc"
    assert fake_wandb[0]["id"] == "abc"
    assert fake_wandb[0]["resume"] == "allow"


def test_each_set_of_an_evaluation_has_a_chart() -> None:
    logged: list[tuple[dict[str, Any], int]] = []
    log = SimpleNamespace(id="abc", log=lambda values, step: logged.append((values, step)))
    run = WandbRun(log)
    wiki, chat = {"loss": 2.0, "perplexity": 7.4, "tokens": 3}, {"loss": None}
    after = {"eval_loss": 3.0, "eval_sets": {"wiki": wiki, "chat": chat}}
    run.log({**after, "eval_loss_before": 4.0, "eval_sets_before": {"wiki": {"loss": 5.0}}}, 7)
    charts = {"eval_loss": 3.0, "eval_loss/wiki": 2.0}
    assert logged == [({**charts, "eval_loss_before": 4.0, "eval_loss_before/wiki": 5.0}, 7)]


def test_a_run_that_fails_later_warns_once(caplog: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("gone")

    run = WandbRun(SimpleNamespace(id="abc", log=fail, finish=fail))
    run.log({"loss": 1.0}, 1)
    run.log({"loss": 1.0}, 2)
    run.close()
    assert len(caplog.records) == 1


def test_offline_keeps_a_run_on_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_NAME", "named")
    run = open_here(home)
    run.log({"loss": 1.0, "grad_norm": None}, 1)
    run.close()
    assert run.run_id
    assert list(home.glob(f"wandb/offline-run-*-{run.run_id}/*.wandb"))


@pytest.mark.parametrize(
    ("machine", "settings", "found"),
    [
        ("api.wandb.ai", None, True),
        ("api.forge.coreweave.com", None, True),
        ("github.com", None, False),
        ("wandb.example.org", "https://wandb.example.org", True),
        ("api.wandb.ai", "https://wandb.example.org", False),
    ],
)
def test_a_login_is_found_where_wandb_keeps_it(
    home: Path, machine: str, settings: str | None, found: bool
) -> None:
    (home / ".netrc").write_text(f"machine {machine}\n  login user\n  password secret\n")
    (home / ".netrc").chmod(0o600)
    if settings:
        folder = home / ".config" / "wandb"
        folder.mkdir(parents=True)
        (folder / "settings").write_text(f"[default]\nbase_url = {settings}\n")
    assert has_login() is found


@pytest.mark.parametrize("content", [None, "machine", 'machine "'])
def test_no_or_a_broken_netrc_is_no_login(home: Path, content: str | None) -> None:
    if content is not None:
        (home / ".netrc").write_text(content)
    assert not has_login()


def test_the_old_word_for_offline() -> None:
    assert wandb_mode({"WANDB_MODE": "dryrun"}) == "offline"
    assert wandb_mode({"WANDB_MODE": ""}) is None
