"""Which network interface a process talks over: named by the user, or the one the kernel picks."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import netifaces

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class Interface:
    """A network interface of this machine and the address that it is reached at."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.address).is_loopback


def choose_interface(
    *, flag: str | None, master_host: str, environ: Mapping[str, str]
) -> Interface:
    """The interface of --net-interface, else of the environment, else the way to the master.

    Raises:
        ValueError: no such interface; flag and variables disagree; the master's name is unknown.
    """
    wanted = _agreed_name(flag, environ)
    if wanted is not None:
        source, name = wanted
        return _named(name, source=source, target=_address_of(master_host))
    address = _local_address_towards(master_host)
    for interface in _interfaces():
        if interface.address == address:
            return interface
    if ipaddress.ip_address(address).is_loopback:  # the whole of 127.0.0.0/8 belongs to lo
        return next(interface for interface in _interfaces() if interface.is_loopback)
    raise ValueError(
        f"--net-interface is needed: no interface holds {address}, this machine's address towards "
        f"--dist-url's host {master_host}; there are {_listing()}"
    )


def export(interface: Interface, environ: MutableMapping[str, str]) -> None:
    """Tells gloo and NCCL, through the environment, where the user has not done so."""
    for variable in VARIABLES:
        environ.setdefault(variable, interface.name)


def resolve(host: str) -> tuple[socket.AddressFamily, str]:
    """The family and address of `host`, IPv4 first.

    Raises:
        ValueError: there is no such host.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(
            f"--dist-url: cannot resolve the host {host!r}: {error.args[-1]}"
        ) from None
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])


def _agreed_name(flag: str | None, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Who names an interface, and its name; all who name one must name the same."""
    named = [("--net-interface", flag)] if flag else []
    named += [(variable, environ[variable]) for variable in VARIABLES if environ.get(variable)]
    for source, name in named[1:]:
        if name != named[0][1]:
            first, value = named[0]
            raise ValueError(
                f"{first} {value}: {source} is {name}; they must be the same; "
                f"there are {_listing()}"
            )
    return (named[0][0], str(named[0][1])) if named else None


def _named(name: str, *, source: str, target: str) -> Interface:
    candidates = [interface for interface in _interfaces() if interface.name == name]
    if name not in netifaces.interfaces():
        raise ValueError(f"{source} {name}: no such interface here; there are {_listing()}")
    if not candidates:
        raise ValueError(f"{source} {name}: this interface has no address; there are {_listing()}")
    version = ipaddress.ip_address(target).version
    same = (c for c in candidates if ipaddress.ip_address(c.address).version == version)
    return next(same, candidates[0])


def _address_of(host: str) -> str:
    return resolve(host)[1]


def _local_address_towards(host: str) -> str:
    """This machine's address on the way to `host`; connecting a UDP socket sends nothing."""
    family, address = resolve(host)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise ValueError(
                f"--dist-url: no way to the host {host} from here: {error.strerror}; "
                f"the interfaces are {_listing()}"
            ) from None
        return str(probe.getsockname()[0])


def _interfaces() -> Iterator[Interface]:
    """Every (interface, address) pair of this machine, IPv4 addresses first for each."""
    for name in netifaces.interfaces():
        addresses = netifaces.ifaddresses(name)
        for family in _FAMILIES:
            for entry in addresses.get(int(family), []):
                yield Interface(name, entry["addr"].partition("%")[0])


def _listing() -> str:
    return ", ".join(dict.fromkeys(interface.name for interface in _interfaces()))
