"""--dist-url: the host and the port at which rank 0 is met."""

from __future__ import annotations

from urllib.parse import urlsplit


def parse_dist_url(url: str) -> tuple[str, int]:
    """Host and port of tcp://host:port; ValueError for anything else."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme != "tcp" or parts.path not in ("", "/"):
        raise ValueError(f"--dist-url {url}: expected tcp://host:port, the port from 1 to 65535")
    return host, port
