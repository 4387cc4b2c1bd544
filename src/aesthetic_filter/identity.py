"""What an object of the user's is, as text by which another process knows it again."""

from __future__ import annotations

import dis
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np

FUNCTIONS = (FunctionType, MethodType, partial)
"""What has no ``repr`` that tells anything."""


def told(thing: Any) -> str:
    """A thing as text, the same in every process: of a function its code and what it captured.

    Of an object whose ``repr`` tells nothing, the class and the code of its ``__call__``: what it
    holds may be there to change, such as a count or a model that is loaded later.
    """
    return _told(thing, {})


def short_digest(text: str) -> str:
    """Enough of a text's sha256 to tell it from others: 12 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _told(thing: Any, seen: dict[int, Any]) -> str:
    if isinstance(thing, (*FUNCTIONS, list, dict)) or is_dataclass(thing):
        if id(thing) in seen:  # a function that calls itself, say
            return "..."
        seen[id(thing)] = thing  # and holds it: another may not get its id

    def all_of(parts: Iterable[Any]) -> str:
        return ", ".join([_told(part, seen) for part in parts])

    match thing:
        case FunctionType():
            given = thing.__defaults__, thing.__kwdefaults__, _captured(thing)
            return f"{thing.__qualname__}[{_told(thing.__code__, seen)}, {all_of(given)}]"
        case CodeType():
            return f"code {thing.co_code.hex()} {thing.co_names} ({all_of(thing.co_consts)})"
        case MethodType():
            return f"method({all_of((thing.__func__, thing.__self__))})"
        case partial():
            return f"partial({all_of((thing.func, thing.args, thing.keywords))})"
        case tuple() | list():
            return f"{type(thing).__name__}({all_of(thing)})"
        case set() | frozenset():
            return f"{{{', '.join(sorted(_told(part, seen) for part in thing))}}}"
        case dict():
            return f"{{{all_of(thing.items())}}}"
        case np.ndarray() if not thing.dtype.hasobject:
            digest = hashlib.sha256(thing.tobytes()).hexdigest()
            return f"array({thing.dtype}, {thing.shape}, {digest})"
    described = repr(thing)
    if is_dataclass(thing) and described.startswith(f"{type(thing).__qualname__}("):
        values = [(f.name, getattr(thing, f.name)) for f in fields(thing) if f.repr]
        inner = ", ".join(f"{name}={_told(value, seen)}" for name, value in values)
        return f"{type(thing).__qualname__}({inner})"
    name = _ADDRESS.sub("", described)
    if name == described or not callable(thing):
        return name
    call = type(thing).__call__
    if not isinstance(call, FunctionType):
        return name
    return f"{name} {short_digest(_told(call.__code__, seen))}"


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def _captured(function: FunctionType) -> dict[str, Any]:
    """What a function has from around it, less what is set while it runs: that is no setting."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not set, and perhaps never needed
            found[name] = cell.cell_contents
    own = set(_rebound(function.__code__))
    for value in found.values():
        if isinstance(value, FunctionType):
            own |= set(_rebound(value.__code__))
    return {name: value for name, value in found.items() if name not in own}


def _rebound(code: CodeType) -> Iterator[str]:
    """The names from around it that a function sets, or one within it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_DEREF":
            yield instruction.argval
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _rebound(part)
