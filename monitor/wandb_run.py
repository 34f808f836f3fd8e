"""Weights & Biases (wandb): an additional record of the metrics, if the user has configured it.

Any failure, such as an unreachable server, only logs a warning. wandb is not started if it would
prompt for input, because a prompt on one rank would make all ranks wait.
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
    """A run at wandb; after the first failure of wandb, this object logs nothing.

    run: the result of `wandb.init`; if None, nothing is logged.
    run_id: the id of an earlier wandb run, used only if `run` is None; checkpoints keep the id, so
        that wandb can continue that run after a resume.
    """

    def __init__(self, run: Any = None, *, run_id: str | None = None) -> None:
        self._run, self._is_active = run, run is not None
        self.run_id: str | None = run_id if run is None else run.id

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Logs the values of iteration `step`, except None; wandb's own process sends the values.

        The key of a set's held-out loss is `eval_loss/<name>`, so that wandb shows the charts of
        all sets in one section.
        """
        values = {key: value for key, value in _flat(metrics).items() if value is not None}
        self._try(lambda: self._run.log(values, step=step))

    def close(self) -> None:
        """Ends the wandb run; data that wandb cannot send within a minute stays on disk."""
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
        except Exception as error:  # no error of wandb stops the training
            self._is_active = False
            logger.warning("wandb failed, the run continues without it: %s", one_line(error))


def open_wandb(
    *, project: str | None, config: Mapping[str, Any], run_id: str | None, folder: Path
) -> WandbRun:
    """Opens a wandb run if wandb is configured, else returns a run that logs nothing.

    wandb is configured if there is a key, a login, or WANDB_MODE; otherwise wandb is not imported.
    wandb itself reads the run's name from WANDB_NAME.

    Args:
        run_id: the id of the wandb run to continue; None for a new wandb run.
        folder: the folder for wandb's files; it must exist.
    """
    mode = wandb_mode()
    if mode == "disabled" or (mode is None and not has_login()):
        return WandbRun(run_id=run_id)
    if mode != "offline" and not has_login():
        logger.warning("WANDB_MODE is %s, but wandb has no key and no login: wandb is off", mode)
        return WandbRun(run_id=run_id)
    try:
        return WandbRun(_init(project, config, run_id, folder))
    except Exception as error:  # no error of wandb stops the training
        logger.warning("wandb could not start, the run continues without it: %s", one_line(error))
        return WandbRun(run_id=run_id)


def _init(project: str | None, config: Mapping[str, Any], run_id: str | None, folder: Path) -> Any:
    import wandb

    settings = wandb.Settings(init_timeout=_INIT_SECONDS, console="off")
    with contextlib.suppress(AttributeError, ValueError):  # older versions lack it
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
    """Returns the mode that wandb reads from WANDB_MODE, in lower case; None if it is not set."""
    mode = environ.get("WANDB_MODE", "").strip().lower()
    return "offline" if mode == "dryrun" else mode or None


def has_login(environ: Mapping[str, str] = os.environ) -> bool:
    """Returns whether wandb will find a key or a token; without them wandb would prompt."""
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
