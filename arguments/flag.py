"""One flag of dist_clm_train.py: its text, its value and the rules that hold for it."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from arguments.values import switch


@dataclass(frozen=True)
class Flag:
    """A flag, as `arguments.flag_table` lists it.

    Attributes:
        common: most runs need the flag, so that --help shows it; --help-all shows every flag.
        resume: "must match": a resumed run has the checkpoint's value, else it is an error;
            "may change": a change is logged in one line; "not kept": the checkpoint does not hold
            the value, or logs its changes in another way.
        ranks: "same": every rank has the same value, else the job does not start; "own": the value
            may differ, since it names things of one machine or is read by rank 0 alone; "proven":
            the same everywhere, but secret, so that ranks prove it and never send it.
    """

    name: str
    help: str
    default: Any = None
    type: Callable[[str], Any] | None = None
    choices: Sequence[Any] | None = None
    metavar: str | None = None
    required: bool = False
    common: bool = False
    resume: Literal["must match", "may change", "not kept"] = "not kept"
    ranks: Literal["same", "own", "proven"] = "same"

    @property
    def dest(self) -> str:
        """The field of a settings group that holds the value."""
        return self.name.removeprefix("--").replace("-", "_")

    def add_to(self, group: Any, *, is_shown: bool) -> None:
        """Adds the flag to an argparse group; help leaves it out if `is_shown` is false."""
        options: dict[str, Any] = {"help": self.help if is_shown else argparse.SUPPRESS}
        if self.type is switch:
            options |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif self.metavar is not None:
            options["metavar"] = self.metavar
        group.add_argument(
            self.name,
            default=self.default,
            type=self.type,
            choices=self.choices,
            required=self.required,
            **options,
        )


fixed = partial(Flag, resume="must match")
free = partial(Flag, resume="may change")
unkept = partial(Flag, resume="not kept")
