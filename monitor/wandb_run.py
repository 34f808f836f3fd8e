"""Weights & Biases, beside the run's own metrics, if it is configured.

Any failure, such as an unreachable server, is only a warning. wandb never prompts: a prompt on one
of many ranks would hang them all.
"""

import configparser
import contextlib
import logging
import netrc
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.text import one_line

logger = logging.getLogger(__name__)

_INIT_SECONDS = 30.0
_CLOSE_SECONDS = 60.0


class WandbRun:
    """A run at wandb, which is logged to until the first failure.

    run: of `wandb.init`; None logs nothing.
    run_id: the id of an earlier run, which a later one may continue, if there is no `run`.
    """

    def __init__(self, run: Any = None, *, run_id: str | None = None) -> None:
        self._run, self._is_active = run, run is not None
        self.run_id: str | None = run_id if run is None else run.id

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Logs the values of iteration `step` that are not None; wandb's own process sends them.

        The held-out loss of a set is `eval_loss/<name>`, so that the charts of sets share a
        section.
        """
        values = {key: value for key, value in _flat(metrics).items() if value is not None}
        self._try(lambda: self._run.log(values, step=step))

    def close(self) -> None:
        """Ends the run; data that is not sent within a minute stays on disk."""
        if not self._is_active:
            return
        closing = threading.Thread(target=lambda: self._try(self._run.finish), daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            logger.warning(
                f"wandb is still sending after {_CLOSE_SECONDS:.0f} s; "
                f"run `wandb sync {Path(self._run.dir).parent}` to send the rest"
            )

    def _try(self, action: Callable[[], object]) -> None:
        if not self._is_active:
            return
        try:
            action()
        except Exception as error:  # of any kind: training does not stop for it
            self._is_active = False
            logger.warning("wandb failed, the run goes on without it: %s", one_line(error))


def open_wandb(
    *, project: str | None, config: Mapping[str, Any], run_id: str | None, folder: Path
) -> WandbRun:
    """Opens a wandb run if wandb is configured, else a run that logs nothing.

    Configured means a key, a login, or WANDB_MODE; otherwise wandb is not imported. wandb itself
    reads the run's name from WANDB_NAME.

    Args:
        run_id: the id of the run to continue; None for a new one.
        folder: holds the files of wandb; it must exist.
    """
    mode = wandb_mode()
    if mode == "disabled" or (mode is None and not has_login()):
        return WandbRun(run_id=run_id)
    if mode != "offline" and not has_login():
        logger.warning("WANDB_MODE is %s, but wandb has neither a key nor a login: not used", mode)
        return WandbRun(run_id=run_id)
    try:
        return WandbRun(_init(project, config, run_id, folder))
    except Exception as error:  # of any kind: training does not stop for it
        logger.warning("wandb could not start, the run goes on without it: %s", one_line(error))
        return WandbRun(run_id=run_id)


def _init(project: str | None, config: Mapping[str, Any], run_id: str | None, folder: Path) -> Any:
    import wandb

    settings = wandb.Settings(init_timeout=_INIT_SECONDS, console="off")
    with contextlib.suppress(AttributeError, ValueError):  # older versions lack it, and block
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
        values |= {f"{loss_key}/{name}": of_set["loss"] for name, of_set in sets.items()}
    return values


_PUBLIC_SERVERS = ("https://api.wandb.ai", "https://api.forge.coreweave.com")


def wandb_mode(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns WANDB_MODE as wandb reads it; None if it is not set."""
    mode = environ.get("WANDB_MODE", "").strip().lower()
    return "offline" if mode == "dryrun" else mode or None


def has_login(environ: Mapping[str, str] = os.environ) -> bool:
    """Tells whether wandb will find a key or a token, so that it does not prompt."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    configured = environ.get("WANDB_BASE_URL") or _settings_base_url(environ)
    servers = [configured] if configured else _PUBLIC_SERVERS
    return not _netrc_hosts(environ).isdisjoint(urlsplit(server).netloc for server in servers)


def _settings_base_url(environ: Mapping[str, str]) -> str | None:
    folder = Path(environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read([folder / "settings", Path("wandb/settings")], encoding="utf-8")
    except (configparser.Error, OSError, ValueError):
        return None
    return settings.get("default", "base_url", fallback=None)


def _netrc_hosts(environ: Mapping[str, str]) -> set[str]:
    netrc_path = environ.get("NETRC")
    for path in [Path(netrc_path)] if netrc_path else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            entries = netrc.netrc(path.expanduser()).hosts
        except (netrc.NetrcParseError, OSError, ValueError):
            continue
        return {host for host, (_, _, password) in entries.items() if password}
    return set()
