"""The command line of dist_clm_train.py, parsed into settings. The module imports no torch."""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from arguments.checks import check_settings
from arguments.flag_table import FLAGS_BY_HEADING
from arguments.launcher import fill_defaults
from arguments.parser import OneLineParser, refuse
from arguments.settings import Settings
from tasks.source_spec import parse_task_name

VERSION = "0.2.0"


def train_parser(*, shows_all: bool = False) -> argparse.ArgumentParser:
    """Returns the parser; its help shows all flags if `shows_all`, else only common flags."""
    parser = OneLineParser(
        "Fine-tunes a model that is cut into layer-sharded stages; one process per rank.",
        epilog=None if shows_all else "--help-all lists every flag.",
    )
    parser.add_argument(
        "--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help="show every flag"
    )
    parser.add_argument("--version", action="version", version=f"dist_clm_train {VERSION}")
    for heading, flags in FLAGS_BY_HEADING.items():
        group = parser.add_argument_group(heading)
        for flag in flags:
            flag.add_to(group, is_shown=flag.common or shows_all)
    return parser


def parse_train(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Parses and checks the flags; if a flag is wrong, prints one line and exits with status 2.

    Args:
        argv: the command line without the program's name; None: the command line of this process.
        environ: the environment variables; None: the variables of this process.
    """
    try:
        values = vars(train_parser().parse_args(argv))
        fill_defaults(values, os.environ if environ is None else environ)
        reads_data = values["rank"] == 0
        values["sources"] = tuple(parse_task_name(values["task_name"])) if reads_data else ()
        settings = Settings.from_values(values)
        check_settings(settings)
    except ValueError as error:
        refuse(error)
    return settings


class _HelpAll(argparse.Action):
    """An argparse action that prints the help of all flags and ends the process."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        train_parser(shows_all=True).print_help()
        parser.exit()
