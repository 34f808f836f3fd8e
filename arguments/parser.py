"""The flag parser of dist_clm_train.py and convert_*.py. The module imports no torch."""

import argparse
import re
import sys
from typing import NoReturn

from common.text import one_line


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that shows the default of each flag that has a default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises ValueError for a wrong flag and accepts no abbreviated flags."""

    def __init__(self, description: str, *, epilog: str | None = None) -> None:
        super().__init__(
            usage="python %(prog)s [flags]",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=DefaultsFormatter,
        )
        # No flag begins like a negative number, so a text that does is a value.
        self._negative_number_matcher = re.compile(r"-[0-9.]")

    def error(self, message: str) -> NoReturn:
        hint = "; --help lists the flags" if message.startswith("unrecognized") else ""
        raise ValueError(message.removeprefix("argument ") + hint)


def refuse(error: BaseException) -> NoReturn:
    """Prints a user's mistake as one line on stderr and ends the process with exit status 2."""
    sys.stderr.write(one_line(error) + "\n")
    raise SystemExit(2)
