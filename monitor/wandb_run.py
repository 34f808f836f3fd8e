"""Weights & Biases beside our own metrics: used where it is configured, never in training's way.

Nothing that goes wrong with it, a server out of reach above all, does more than one warning; and it
never asks for anything, since a prompt on one of many ranks would hang them all.
"""

from __future__ import annotations

import configparser
import contextlib
import logging
import netrc
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from common.text import one_line

logger = logging.getLogger(__name__)

_INIT_SECONDS = 30.0
_CLOSE_SECONDS = 60.0


class RemoteRun(Protocol):
    """A run that metrics are logged to."""

    @property
    def run_id(self) -> str | None:
        """What to keep in a checkpoint, for a resumed run to continue this one."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Logs the values that iteration `step` has; those that are None are left out.

        A set's held-out loss is `eval_loss/<name>`, so that sets share a section of the charts.
        """

    def close(self) -> None:
        """Waits, not for ever, for what is on its way to the server."""


class NullRun:
    """Logs nowhere. It hands the id of an earlier run on, which a later one may continue."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class WandbRun:
    """Logs to one wandb run until the first failure, which is a warning."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._failed = False
        self.run_id: str | None = run.id

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Hands the values over; wandb sends them from a process of its own."""
        values = {key: value for key, value in _flat(metrics).items() if value is not None}
        self._try(lambda: self._run.log(values, step=step))

    def close(self) -> None:
        """Ends the run; what its server has not taken within a minute stays on disk."""
        closing = threading.Thread(target=lambda: self._try(self._run.finish), daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            logger.warning(
                "wandb is still sending after %.0f s: the rest is left for `wandb sync %s`",
                _CLOSE_SECONDS,
                Path(self._run.dir).parent,
            )

    def _try(self, action: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # of whatever kind: training does not stop for it
            self._failed = True
            logger.warning("wandb failed, the run goes on without: %s", one_line(error))


def open_wandb(
    *, project: str | None, config: Mapping[str, Any], run_id: str | None, folder: Path
) -> RemoteRun:
    """Opens a wandb run where wandb is configured, else a run that logs nowhere.

    Configured means a key, a login, or WANDB_MODE; otherwise wandb is not even imported. `run_id`
    is that of the run to continue, None for a new one. `folder`, which must exist, is where wandb
    keeps its files. The run's name is WANDB_NAME, which wandb reads itself.
    """
    mode = wandb_mode()
    if mode == "disabled" or (mode is None and not has_login()):
        return NullRun(run_id)
    if mode != "offline" and not has_login():
        logger.warning("WANDB_MODE is %s, but there is neither a key nor a login: no wandb", mode)
        return NullRun(run_id)
    try:
        return WandbRun(_init(project, config, run_id, folder))
    except Exception as error:  # of whatever kind: training does not stop for it
        logger.warning("wandb could not start, the run goes on without: %s", one_line(error))
        return NullRun(run_id)


def _init(project: str | None, config: Mapping[str, Any], run_id: str | None, folder: Path) -> Any:
    import wandb

    settings = wandb.Settings(init_timeout=_INIT_SECONDS, console="off")
    with contextlib.suppress(AttributeError, ValueError):  # versions before it block at the end
        settings.finish_timeout = _CLOSE_SECONDS
    return wandb.init(
        project=project,
        config=dict(config),
        id=run_id,
        resume="allow",
        dir=str(folder),
        settings=settings,
    )


def _flat(metrics: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(metrics)
    for key, loss_key in (("eval_sets", "eval_loss"), ("eval_sets_before", "eval_loss_before")):
        sets: Mapping[str, Any] = values.pop(key, {})
        values |= {f"{loss_key}/{name}": one["loss"] for name, one in sets.items()}
    return values


_PUBLIC_SERVERS = ("https://api.wandb.ai", "https://api.forge.coreweave.com")


def wandb_mode(environ: Mapping[str, str] = os.environ) -> str | None:
    """WANDB_MODE as wandb reads it; None where it is not set."""
    mode = environ.get("WANDB_MODE", "").strip().lower()
    return "offline" if mode == "dryrun" else mode or None


def has_login(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether wandb will find a key or a token, and so ask for none."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = {urlsplit(server).netloc for server in _servers(environ)}
    return bool(hosts & _netrc_hosts(environ))


def _servers(environ: Mapping[str, str]) -> Iterator[str]:
    configured = environ.get("WANDB_BASE_URL") or _settings_base_url(environ)
    if configured:
        yield configured
    else:
        yield from _PUBLIC_SERVERS


def _settings_base_url(environ: Mapping[str, str]) -> str | None:
    folder = Path(environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read([folder / "settings", Path("wandb/settings")], encoding="utf-8")
    except (configparser.Error, OSError, ValueError):
        return None
    return settings.get("default", "base_url", fallback=None)


def _netrc_hosts(environ: Mapping[str, str]) -> set[str]:
    named = environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            entries = netrc.netrc(path.expanduser()).hosts
        except (netrc.NetrcParseError, OSError, ValueError):
            continue
        return {host for host, (_, _, password) in entries.items() if password}
    return set()
