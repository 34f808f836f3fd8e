"""Is Weights & Biases configured? Answered without importing wandb, which takes a second or two.

Follows wandb itself: WANDB_MODE, a key in the environment, or a login, which `wandb login` keeps in
a netrc file under its server's host, and that server, if it is not the public one, in a settings
file.
"""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

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
