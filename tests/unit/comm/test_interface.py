"""Tests the choice of the network interface on a simulated machine."""

import re
import socket

import netifaces
import pytest

from comm.rendezvous import interface
from comm.rendezvous.interface import Interface, choose_interface, export

MACHINE = {
    "lo": {socket.AF_INET: ["127.0.0.1"], socket.AF_INET6: ["::1"]},
    "eth0": {socket.AF_INET: ["10.0.0.5"], socket.AF_INET6: ["fe80::5%eth0", "fd00::5"]},
    "ib0": {socket.AF_INET: ["10.9.0.5"]},
    "ib01": {socket.AF_INET: ["10.9.1.5"]},
    "down0": {},
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netifaces, "interfaces", lambda: list(MACHINE))
    monkeypatch.setattr(
        netifaces,
        "ifaddresses",
        lambda name: {
            int(family): [{"addr": address} for address in addresses]
            for family, addresses in MACHINE[name].items()
        },
    )


@pytest.mark.parametrize(
    ("flag", "environ", "expected"),
    [
        ("eth0", {}, Interface("eth0", "10.0.0.5")),
        ("ib0", {"GLOO_SOCKET_IFNAME": "ib0"}, Interface("ib0", "10.9.0.5")),
        (None, {"NCCL_SOCKET_IFNAME": "ib0"}, Interface("ib0", "10.9.0.5")),
        (None, {"GLOO_SOCKET_IFNAME": ""}, Interface("lo", "127.0.0.1")),
        (None, {}, Interface("lo", "127.0.0.1")),
    ],
)
def test_choice(flag: str | None, environ: dict[str, str], expected: Interface) -> None:
    assert choose_interface(flag=flag, master_host="127.0.0.1", environ=environ) == expected


@pytest.mark.parametrize("flag", [None, "eth0"])
@pytest.mark.parametrize("value", ["^docker,lo", "^=lo", "eth,ib", "eth", "=eth0,ib0", "eth0:5000"])
def test_a_pattern_for_nccl_is_left_to_nccl(
    value: str, flag: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """NCCL's own syntax ended the run: "NCCL_SOCKET_IFNAME ^docker,lo: no such interface"."""
    environ = {"NCCL_SOCKET_IFNAME": value}
    found = choose_interface(flag=flag, master_host="127.0.0.1", environ=environ)
    assert found == (Interface("eth0", "10.0.0.5") if flag else Interface("lo", "127.0.0.1"))
    export(found, environ)
    assert environ == {"GLOO_SOCKET_IFNAME": found.name, "NCCL_SOCKET_IFNAME": value}
    assert not caplog.records


@pytest.mark.parametrize("value", ["eth0", "=eth0"])
@pytest.mark.parametrize("flag", [None, "eth0"])
def test_nccl_s_name_of_an_interface(flag: str | None, value: str) -> None:
    environ = {"NCCL_SOCKET_IFNAME": value}
    found = choose_interface(flag=flag, master_host="127.0.0.1", environ=environ)
    assert found == Interface("eth0", "10.0.0.5")
    environ["GLOO_SOCKET_IFNAME"] = "eth0"
    assert choose_interface(flag=flag, master_host="127.0.0.1", environ=environ) == found


@pytest.mark.parametrize("value", ["^eth", "ib", "^=eth0", "=ib0,ib01"])
@pytest.mark.parametrize("source", ["--net-interface", "GLOO_SOCKET_IFNAME"])
def test_a_pattern_that_excludes_the_named_interface_is_a_warning(
    source: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    flag = "eth0" if source == "--net-interface" else None
    environ = {"NCCL_SOCKET_IFNAME": value} | ({} if flag else {source: "eth0"})
    found = choose_interface(flag=flag, master_host="127.0.0.1", environ=environ)
    assert found == Interface("eth0", "10.0.0.5")
    (record,) = caplog.records
    line = f"{source} eth0: NCCL_SOCKET_IFNAME {value} makes NCCL use other interfaces; unset"
    assert record.getMessage().startswith(line)


NCCL_LO, EXACT_LO = {"NCCL_SOCKET_IFNAME": "lo"}, {"NCCL_SOCKET_IFNAME": "=lo"}
BOTH = {"GLOO_SOCKET_IFNAME": "eth0", **NCCL_LO}


@pytest.mark.parametrize(
    ("flag", "environ", "master", "message"),
    [
        ("eth7", {}, "127.0.0.1", "--net-interface eth7: no such interface here; there are lo, "),
        (None, {"GLOO_SOCKET_IFNAME": "x"}, "127.0.0.1", "GLOO_SOCKET_IFNAME x: no such interface"),
        ("down0", {}, "127.0.0.1", "--net-interface down0: this interface has no address"),
        ("eth0", NCCL_LO, "127.0.0.1", "--net-interface eth0: NCCL_SOCKET_IFNAME is lo; they must"),
        (None, BOTH, "127.0.0.1", "GLOO_SOCKET_IFNAME eth0: NCCL_SOCKET_IFNAME is lo"),
        ("eth0", EXACT_LO, "127.0.0.1", "--net-interface eth0: NCCL_SOCKET_IFNAME is =lo; they m"),
        (None, {"NCCL_SOCKET_IFNAME": "eno"}, "127.0.0.1", "NCCL_SOCKET_IFNAME eno: no such inter"),
        (None, {"NCCL_SOCKET_IFNAME": "=eth"}, "127.0.0.1", "NCCL_SOCKET_IFNAME =eth: no such int"),
        (None, {}, "no.such.host.invalid", "--dist-url: cannot resolve the host 'no.such.host"),
    ],
)
def test_mistakes(flag: str | None, environ: dict[str, str], master: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        choose_interface(flag=flag, master_host=master, environ=environ)


@pytest.mark.parametrize(
    ("towards", "expected"),
    [
        ("10.9.0.5", Interface("ib0", "10.9.0.5")),
        ("fd00::5", Interface("eth0", "fd00::5")),
        ("127.0.0.7", Interface("lo", "127.0.0.1")),
        ("::1", Interface("lo", "::1")),
    ],
)
def test_the_way_to_the_master(
    monkeypatch: pytest.MonkeyPatch, towards: str, expected: Interface
) -> None:
    monkeypatch.setattr(interface, "_local_address_towards", lambda host: towards)
    assert choose_interface(flag=None, master_host="10.0.0.9", environ={}) == expected


def test_an_address_that_no_interface_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_local_address_towards", lambda host: "10.5.5.5")
    with pytest.raises(ValueError, match=r"no interface holds 10\.5\.5\.5"):
        choose_interface(flag=None, master_host="10.0.0.9", environ={})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"}),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}),
        (
            {"GLOO_SOCKET_IFNAME": "ib0"},
            {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"},
        ),
    ],
)
def test_export_names_one_interface_and_keeps_what_the_user_set(
    environ: dict[str, str], expected: dict[str, str]
) -> None:
    """NCCL was given `ib0`, which is a prefix for NCCL: it took ib01 where that came first."""
    export(Interface("ib0", "10.9.0.5"), environ)
    assert environ == expected
