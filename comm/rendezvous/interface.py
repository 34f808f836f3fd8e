"""The network interface of a process: the one that the user names, else the one towards rank 0."""

import ipaddress
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import netifaces

from comm.rendezvous.dist_url import resolve

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class Interface:
    """A network interface of this machine, and its address."""

    name: str
    address: str


def choose_interface(
    *, flag: str | None, master_host: str, environ: Mapping[str, str]
) -> Interface:
    """Returns the interface that `flag` or one of VARIABLES names, else the one towards rank 0.

    Raises:
        ValueError: the named interface is missing or has no address; two given names differ;
            `master_host` is unknown, or no route leads to it; no interface is found on the route.
    """
    given = _given_name(flag, environ)
    if given is not None:
        source, name = given
        return _named(name, source=source, target=resolve(master_host)[1])
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
    """Sets the interface variables of gloo and NCCL, except variables that the user has set."""
    for variable in VARIABLES:
        environ.setdefault(variable, interface.name)


def _given_name(flag: str | None, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Returns the flag or variable that names an interface, and the interface's name.

    Returns None if no flag or variable is set; raises ValueError if two names differ.
    """
    given = {"--net-interface": flag} | {name: environ.get(name) for name in VARIABLES}
    named = [(source, name) for source, name in given.items() if name]
    for source, name in named[1:]:
        if name != named[0][1]:
            first, value = named[0]
            raise ValueError(
                f"{first} {value}: {source} is {name}; they must be the same; "
                f"there are {_listing()}"
            )
    return named[0] if named else None


def _named(name: str, *, source: str, target: str) -> Interface:
    candidates = [interface for interface in _interfaces() if interface.name == name]
    if name not in netifaces.interfaces():
        raise ValueError(f"{source} {name}: no such interface here; there are {_listing()}")
    if not candidates:
        raise ValueError(f"{source} {name}: this interface has no address; there are {_listing()}")
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
