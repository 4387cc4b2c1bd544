"""Selection rules. Each module here is one, found by being here.

A rule module has:

- ``OPTION``: how the command line spells it, an :class:`~aesthetic_filter.selection.rule.Option`.
- a frozen dataclass that satisfies :class:`~aesthetic_filter.selection.rule.Rule`.
"""
