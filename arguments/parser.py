"""The parser of every entry script: a mistake is a ValueError of one line. Needs no torch."""

import argparse
import re
import sys
from typing import NoReturn

from common.text import one_line


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of a flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises ValueError for a mistake and takes no abbreviated flags."""

    def __init__(self, description: str, *, epilog: str | None = None) -> None:
        super().__init__(
            usage="python %(prog)s [flags]",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=DefaultsFormatter,
        )
        # A text that begins like a negative number is a value, since no flag begins so.
        self._negative_number_matcher = re.compile(r"-[0-9.]")

    def error(self, message: str) -> NoReturn:
        hint = "; --help lists the flags" if message.startswith("unrecognized") else ""
        raise ValueError(message.removeprefix("argument ") + hint)


def refuse(error: BaseException) -> NoReturn:
    """Ends the process as a user's mistake: one line on stderr, exit status 2."""
    sys.stderr.write(one_line(error) + "\n")
    raise SystemExit(2)
