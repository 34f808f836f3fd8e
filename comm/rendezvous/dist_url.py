"""--dist-url: the host and the port at which all ranks find rank 0."""

import socket
from urllib.parse import urlsplit


def parse_dist_url(url: str) -> tuple[str, int]:
    """Returns host and port of tcp://host:port. ValueError for anything else."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme != "tcp" or parts.path not in ("", "/"):
        raise ValueError(f"--dist-url {url}: expected tcp://host:port, the port from 1 to 65535")
    return host, port


def resolve(host: str) -> tuple[socket.AddressFamily, str]:
    """Returns the family and the address of `host`, IPv4 first.

    Raises ValueError if the host is unknown.
    """
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        reason = error.args[-1]
        raise ValueError(f"--dist-url: cannot resolve the host {host!r}: {reason}") from None
    family, _, _, _, address = min(entries, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])
