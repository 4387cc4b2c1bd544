"""What a selection rule is. Imports nothing heavy: the command line builds its help from here."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aesthetic_filter.database import Database


@dataclass(frozen=True)
class Condition:
    """Which rows a rule keeps.

    Attributes:
        keep: a SQL condition over a row ``r`` (and ``c``, where something is joined); NULL is no.
        join: a SQL join clause, ``LEFT JOIN ... c ON ...``, with at most one match for each row.
    """

    keep: str
    join: str = ""


class Rule(Protocol):
    """One rule of a selection.

    Rules are applied in the order of ``order``, each to the rows that those before it left.
    """

    @property
    def order(self) -> int:
        """Where the rule stands: conditions on single rows first, then ranks, then samples."""

    @property
    def label(self) -> str:
        """The rule in a few words, as in ``dropped_by`` and in summaries."""

    def condition(self, rows: str, database: Database, scratch: str) -> Condition:
        """Work out which rows to keep.

        Args:
            rows: a parenthesised query giving the rows that came this far, scored ones only.
            database: to ask, and to make temporary tables in.
            scratch: a name that no other rule's temporary tables begin with.

        Raises:
            SelectionError: the rule makes no sense for these rows.
        """


@dataclass(frozen=True)
class Modifiers:
    """Options that change what rules mean.

    Attributes:
        per: a column; ranks and samples are then taken within each of its values.
        seed: of random choices.
    """

    per: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Option:
    """A rule's option on the command line.

    Attributes:
        flag: such as ``--min-score``.
        metavar: how the help names its value.
        help: one line.
        build: makes the rule from the option's text; raises SelectionError.
    """

    flag: str
    metavar: str
    help: str
    build: Callable[[str, Modifiers], Rule]

    @property
    def parameter(self) -> str:
        """The flag as a Python name."""
        return self.flag.lstrip("-").replace("-", "_")


@cache
def options() -> tuple[Option, ...]:
    """The options of all rules, in the order in which their modules are named."""
    from aesthetic_filter.selection import rules

    modules = [module.name for module in pkgutil.iter_modules(rules.__path__)]
    return tuple(import_module(f"{rules.__name__}.{name}").OPTION for name in modules)
