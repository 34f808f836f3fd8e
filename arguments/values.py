"""Parsers of flag values; a wrong value raises ArgumentTypeError with a text of one line."""

import argparse
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from pipeline_parallel.partition.split import AUTO, Asked, parse_layers

MAX_RATE = 1e6  # a larger rate makes weights that fp32 cannot hold after one step
RECOMPUTE = ("true", "false", "selective", "auto")
MAX_SECONDS = 1e9  # the longest wait that clocks and locks support


def switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def recompute(text: str) -> str:
    if text.lower() not in RECOMPUTE:
        raise argparse.ArgumentTypeError(f"expected true, false, selective or auto, got {text!r}")
    return text.lower()


def whole(at_least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {at_least}, got {text!r}"
            )
        return value

    return parse


def layers(*, auto: bool) -> Callable[[str], Asked]:
    def parse(text: str) -> Asked:
        try:
            return AUTO if auto and text == AUTO else parse_layers(text)
        except ValueError:
            forms = "one number for each stage, as in 5,3" + (", or auto" if auto else "")
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least 1, or {forms}, got {text!r}"
            ) from None

    return parse


def real(
    *, positive: bool = False, finite: bool = True, at_most: float = math.inf
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value) or value < 0 or (positive and value == 0):
            kind = "above 0" if positive else "of at least 0"
            raise argparse.ArgumentTypeError(f"expected a number {kind}, got {text!r}")
        if finite and math.isinf(value):
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
        if value > at_most:
            raise argparse.ArgumentTypeError(f"expected at most {at_most:g}, got {text!r}")
        return value

    return parse


class LinkFlag(NamedTuple):
    """The speed of a network link: bytes per second, and the latency of a message in seconds."""

    bytes_per_second: float
    latency: float


def link(text: str) -> LinkFlag:
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"{number} ?([kmg])bit(?:/s)?(?:, ?{number} ?ms)?", text.lower())
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(
            "expected bits per second and, after a comma, the latency, such as 100mbit or "
            f"1gbit,20ms, got {text!r}"
        )
    bits = float(found[1]) * 1000 ** ("kmg".index(found[2]) + 1)
    return LinkFlag(bits / 8, float(found[3] or 0) / 1000)


def size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"expected a size above 0 with its unit, such as 24GB or 24GiB, got {text!r}"
        )
    power = " kMGT".index(found[2] or " ")
    unit: int = (1024 if found[3] else 1000) ** power
    return round(float(found[1]) * unit)
