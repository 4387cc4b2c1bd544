"""The command line. The only part that prints or exits.

Results go to standard output, everything else to standard error. Everything heavy is imported
inside the commands, so that help and completion answer at once. A module registers its commands
when it is imported.
"""

from __future__ import annotations

import os
import sys

from aesthetic_filter.cli import score, select, report, learn, compare, heads, models  # isort: skip
from aesthetic_filter.cli.app import app

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = (score, select, report, learn, compare, heads, models)
"""The modules with the commands, in the order of the help."""


def main() -> None:
    """Run the command line."""
    try:
        app()
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
