"""A flag of dist_clm_train.py: its help text, its type, and its rules for resume and ranks."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from arguments.values import RECOMPUTE, recompute, switch


@dataclass(frozen=True)
class Flag:
    """A flag in the table of `arguments.flag_table`.

    Attributes:
        common: whether most runs need the flag. --help shows only the common flags; --help-all
            shows every flag.
        resume: the rule for a resumed run. "must match": a value that differs from the value in the
            checkpoint is an error; "may change": a changed value is logged in one line; "not kept":
            neither rule saves or compares the value; for some flags, such as --pack, other code
            does both.
        ranks: the rule for the ranks. "same": the job starts only if all ranks have the same value;
            "own": the ranks' values may differ, because the flag names something on one machine or
            only rank 0 reads it; "proven": all ranks need the same secret, and each rank proves
            that it has the secret without sending it.
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
        """Returns the name of the settings field that holds the flag's value."""
        return self.name.removeprefix("--").replace("-", "_")

    def add_to(self, group: Any, *, is_shown: bool) -> None:
        """Adds the flag to an argparse group; the help hides the flag if `is_shown` is false."""
        options: dict[str, Any] = {"help": self.help if is_shown else argparse.SUPPRESS}
        if self.type is not None and self.type in SWITCHES:
            const = self.type("true")
            options |= {"nargs": "?", "const": const, "metavar": "|".join(SWITCHES[self.type])}
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


# The flags whose value is optional and true by default, by their type, with the allowed values.
SWITCHES: dict[Callable[[str], Any], Sequence[str]] = {
    switch: ("true", "false"),
    recompute: RECOMPUTE,
}

fixed = partial(Flag, resume="must match")
free = partial(Flag, resume="may change")
unkept = partial(Flag, resume="not kept")
