"""The flag --dist-url: the host and the port of rank 0, to which all ranks connect."""

import socket
from urllib.parse import urlsplit


def parse_dist_url(url: str) -> tuple[str, int]:
    """Returns host and port of a URL tcp://host:port; raises ValueError for any other text."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme != "tcp" or parts.path not in ("", "/"):
        raise ValueError(f"--dist-url {url}: expected tcp://host:port, the port from 1 to 65535")
    return host, port


def resolve(host: str) -> tuple[socket.AddressFamily, str]:
    """Returns the address family and the address of `host`; prefers IPv4.

    Raises ValueError if the host is unknown.
    """
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        reason = error.args[-1]
        raise ValueError(f"--dist-url: cannot resolve the host {host!r}: {reason}") from None
    family, _, _, _, address = min(entries, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])
