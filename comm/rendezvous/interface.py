"""The network interface of a process: the one that the user names, else the one towards rank 0.

NCCL_SOCKET_IFNAME has NCCL's own syntax: `=eth0` is the interface eth0; `eth` is all interfaces
whose names begin with eth; `eth0,eth1` and `^docker,lo` are lists of such prefixes, to use and to
avoid. Here a value names an interface only if it is the name of one, with or without `=`. Other
values are patterns for NCCL, which do not choose the interface of this process.
"""

import ipaddress
import logging
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import netifaces

from comm.rendezvous.dist_url import resolve

logger = logging.getLogger(__name__)

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class Interface:
    """A network interface of this machine, and its address."""

    name: str
    address: str


def choose_interface(
    *, flag: str | None, master_host: str, environ: Mapping[str, str]
) -> Interface:
    """Returns the interface that `flag` or a variable names, else the one towards rank 0.

    Warns if NCCL_SOCKET_IFNAME is a pattern that excludes the named interface.

    Raises:
        ValueError: the named interface is missing or has no address; two given names differ;
            `master_host` is unknown, or no route leads to it; no interface is found on the route.
    """
    given = _given_name(flag, environ)
    if given is not None:
        source, name = given
        interface = _named(name, source=source, target=resolve(master_host)[1])
        pattern = environ.get(_NCCL)
        if pattern and not _nccl_uses(pattern, name):
            logger.warning(
                "%s: %s %s makes NCCL use other interfaces; unset the variable if that is not "
                "intended",
                source,
                _NCCL,
                pattern,
            )
        return interface
    address = _local_address_towards(master_host)
    for interface in _interfaces():
        if interface.address == address:
            return interface
    if ipaddress.ip_address(address).is_loopback:  # lo serves all addresses of 127.0.0.0/8
        return next(i for i in _interfaces() if ipaddress.ip_address(i.address).is_loopback)
    raise ValueError(
        f"--net-interface is needed: no interface holds {address}, this machine's address on the "
        f"route to --dist-url's host {master_host}; there are {_listing()}"
    )


def export(interface: Interface, environ: MutableMapping[str, str]) -> None:
    """Sets the interface variables of gloo and NCCL, except variables that the user has set.

    NCCL gets `=eth1`, because `eth1` would also mean eth10.
    """
    environ.setdefault(_GLOO, interface.name)
    environ.setdefault(_NCCL, f"={interface.name}")


def _given_name(flag: str | None, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Returns the flag or variable that names an interface with its value, and the name.

    Returns None if nothing names an interface; raises ValueError if two names differ.
    """
    gloo, nccl = environ.get(_GLOO), environ.get(_NCCL)
    given = [("--net-interface", flag, flag), (_GLOO, gloo, gloo)]
    given.append((_NCCL, nccl, _nccl_name(nccl) if nccl else None))
    named = [(source, value, name) for source, value, name in given if name]
    for source, value, name in named[1:]:
        first, first_value, first_name = named[0]
        if name != first_name:
            raise ValueError(
                f"{first} {first_value}: {source} is {value}; they must be the same; "
                f"there are {_listing()}"
            )
    return next(((f"{source} {value}", name) for source, value, name in named), None)


def _nccl_name(value: str) -> str | None:
    """Returns the interface that a value of NCCL_SOCKET_IFNAME names; None if it is a pattern.

    A word that no interface here begins with is a name too: a mistake, which the caller finds.
    """
    name = value.removeprefix("=")
    if name in netifaces.interfaces():
        return name
    is_list = value.startswith("^") or "," in value or ":" in value
    is_prefix = any(there.startswith(value) for there in netifaces.interfaces())
    return None if is_list or is_prefix else name


def _nccl_uses(value: str, name: str) -> bool:
    """Returns whether NCCL uses interface `name` with this NCCL_SOCKET_IFNAME, if it is up."""
    avoided = value.startswith("^")
    listed = value.removeprefix("^")
    exact = listed.startswith("=")
    words = [word.partition(":")[0] for word in listed.removeprefix("=").split(",")]
    matches = any(name == word if exact else name.startswith(word) for word in words)
    return matches != avoided


def _named(name: str, *, source: str, target: str) -> Interface:
    """Returns the interface `name`, with an address of the same version as `target` if it can."""
    candidates = [interface for interface in _interfaces() if interface.name == name]
    if name not in netifaces.interfaces():
        raise ValueError(f"{source}: no such interface here; there are {_listing()}")
    if not candidates:
        raise ValueError(f"{source}: this interface has no address; there are {_listing()}")
    version = ipaddress.ip_address(target).version
    same = (c for c in candidates if ipaddress.ip_address(c.address).version == version)
    return next(same, candidates[0])


def _local_address_towards(host: str) -> str:
    """Returns this machine's address on the route to `host`; the UDP connect sends no packet."""
    family, address = resolve(host)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise ValueError(
                f"--dist-url: no route to the host {host} from here: {error.strerror}; "
                f"the interfaces are {_listing()}"
            ) from None
        return str(probe.getsockname()[0])


def _interfaces() -> Iterator[Interface]:
    """Yields every interface of this machine with each of its addresses, IPv4 before IPv6."""
    for name in netifaces.interfaces():
        addresses = netifaces.ifaddresses(name)
        for family in _FAMILIES:
            for entry in addresses.get(int(family), []):
                yield Interface(name, entry["addr"].partition("%")[0])


def _listing() -> str:
    return ", ".join(dict.fromkeys(interface.name for interface in _interfaces()))
