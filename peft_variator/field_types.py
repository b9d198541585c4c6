"""Values of a configuration held against the types that its dataclass declares."""

from __future__ import annotations

import math
import operator
import os
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import fields
from enum import Enum
from numbers import Integral
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np


__all__ = [
    "ENTRIES_LIMIT",
    "check_choice",
    "check_field_types",
    "check_memory",
    "check_regex",
    "is_whole",
    "name_some",
    "shown",
    "whole_number",
]

INTEGER_LIMIT = 2**31  # sizes and counts end up in 32-bit indices of kernels
NAMES_SHOWN = 3
SEED_LIMIT = 2**32  # of NumPy's generators
FLOAT_LIMIT = float(np.finfo(np.float32).max)  # beyond it a number is infinite once it meets a tensor
ENTRIES_LIMIT = 2**24
"""How many numbers a module may get because of a field whose value is larger than is of use."""
CONFIG_LIBRARIES = ("transformers", "accelerate")  # which make objects of dicts that they are given
SHOWN_CHARACTERS = 200


def check_field_types(config: Any, inherited_from: type | None = None) -> None:
    """Checks every field of a dataclass instance; what JSON or NumPy write in another way becomes the declared type.

    NumPy integers become ints, tuples become lists where a list is declared, lists become sets where a set is.
    Nothing changes unless all fields are right.

    Args:
        config: instance of a dataclass.
        inherited_from: a base class of another library. Of its fields those of plain types and enums are checked;
            paths pass for strings.

    Raises:
        ValueError: a field has a value of another type, an integer of 2**31 or more (a seed: of 2**32), or a float
            that is not finite in single precision.
    """
    hints = get_type_hints(type(config))
    inherited = {item.name for item in fields(inherited_from)} if inherited_from is not None else set()
    checked = {}
    for item in fields(config):
        if item.init:
            convert = _inherited if item.name in inherited else _converted
            checked[item.name] = convert(item.name, getattr(config, item.name), hints[item.name])
    for name, value in checked.items():
        if value is not getattr(config, name):
            setattr(config, name, value)


def is_whole(value: Any) -> bool:
    """Whether it is an integer, NumPy's among them; `True` and `False` are none."""
    return isinstance(value, Integral) and not isinstance(value, (bool, np.bool_))


def whole_number(name: str, value: Any, minimum: int) -> int:
    """The integer that a value is.

    Args:
        name: what the caller knows it as.
        value: the value.
        minimum: the least that is allowed.

    Raises:
        ValueError: it is none, is smaller, or is 2**31 or more.
    """
    if not is_whole(value) or value < minimum:
        raise ValueError(f"{name}={shown(value)} has to be an integer of at least {minimum}.")
    return _integer(name, value)


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError, with the name and what is allowed, if a value is not one of several."""
    choices = list(allowed)
    if value not in choices:
        raise ValueError(f"{name}={shown(value)} is not one of {', '.join(map(repr, choices))}.")


def check_memory(name: str, value: int, entries: int, enough: int, where: str) -> None:
    """Refuse a width or rank that takes much memory for nothing, before it is taken.

    Args:
        name: field of the configuration.
        value: its value.
        entries: how many numbers one module gets because of it.
        enough: the largest value that the module can make use of.
        where: full name of the module.

    Raises:
        ValueError: it is larger than that, and takes more than 2**24 numbers.
    """
    if value > enough and entries > ENTRIES_LIMIT:
        raise ValueError(
            f"{name}={value} takes {entries:,} numbers for {where!r} alone, where nothing above {enough} is of use. "
            "Choose a smaller one."
        )


def check_regex(name: str, pattern: str, around: str = "{}") -> re.Pattern[str]:
    """The regular expression in a field.

    Args:
        name: what the caller of the configuration knows it as.
        pattern: the expression.
        around: what it becomes a part of.

    Raises:
        ValueError: it is none.
    """
    try:
        re.compile(pattern)  # by itself: ")(" is none, whatever is around it
        return re.compile(around.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{name} has {shown(pattern)}, which is neither the name of a module nor a regular expression: "
            f"{str(error) or type(error).__name__}."
        ) from error


def _inherited(name: str, value: Any, hint: Any) -> Any:
    """The value of a field of another library as its type, if that is one of Python's own or an enum."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any((get_origin(kind) or kind) is dict for kind in kinds):  # or an object that the library makes of one
        allowed = tuple(get_origin(kind) or kind for kind in kinds)
        if not isinstance(value, allowed) and type(value).__module__.partition(".")[0] not in CONFIG_LIBRARIES:
            raise _wrong(name, value, hint)
        return value
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if enums:
        if not isinstance(value, (str, Enum)):
            raise _wrong(name, value, hint)
        check_choice(name, value, [member.value for kind in enums for member in kind])
        return value
    if str in kinds and isinstance(value, os.PathLike):
        return value
    if name == "max_grad_norm" and isinstance(value, float) and value == math.inf:  # measured and never clipped
        return value
    loose: dict[str, Any] = {"fsdp": (bool, list), "debug": (list, type(None))}  # whatever they are annotated
    if isinstance(value, loose.get(name, ())):
        return value
    return _converted(name, value, hint)


def _converted(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or ValueError that calls it `name`."""
    if hint is Any:
        return value
    origin = get_origin(hint) or hint
    if origin is Union or origin is types.UnionType:
        return _one_of(name, value, get_args(hint))
    if origin is Literal:
        # by type too, since 1 == True
        if any(type(value) is type(choice) and value == choice for choice in get_args(hint)):
            return value
    elif origin is int:
        return _integer(name, value)
    elif origin is float:
        return _float(name, value)
    elif origin is dict:
        if isinstance(value, dict):
            return _mapping(name, value, get_args(hint))
    elif origin in (list, Sequence):
        if isinstance(value, (list, tuple, set, frozenset)):
            entries = sorted(value, key=shown) if isinstance(value, (set, frozenset)) else value
            return _unless_equal(value, list(_entries(name, entries, get_args(hint))))
    elif origin is set:
        if isinstance(value, (list, tuple, set, frozenset)):
            return _unless_equal(value, set(_entries(name, value, get_args(hint))))
    elif isinstance(value, origin) and not isinstance(value, np.generic):
        return str.__str__(value) if origin is str else value  # a subclass may not be written to a file
    raise _wrong(name, value, hint)


def _one_of(name: str, value: Any, hints: tuple[Any, ...]) -> Any:
    """The value as the first of several types that takes it."""
    if type(value) in hints:  # such as a member of an enum, where a string is possible too
        return _converted(name, value, type(value))
    if int in hints and is_whole(value):
        return _integer(name, value)  # one that is too large is no float
    errors = []
    for hint in hints:
        try:
            return _converted(name, value, hint)
        except ValueError as error:
            if _is_meant(value, hint):
                errors.append(error)
    if len(errors) == 1:  # a list with one wrong entry: name the entry
        raise errors[0]
    raise _wrong(name, value, Union[hints])  # noqa: UP007


def _is_meant(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind of a type, whatever it holds."""
    if isinstance(value, bool):
        return hint is bool
    origin = get_origin(hint) or hint
    kinds = {list: (list, tuple), set: (list, tuple, set), Sequence: (list, tuple), dict: (dict,)}
    return isinstance(value, kinds.get(origin, origin if isinstance(origin, type) else ()))


def _entries(name: str, values: Iterable[Any], hints: tuple[Any, ...]) -> Iterable[Any]:
    for index, entry in enumerate(values):
        yield _converted(f"{name}[{index}]", entry, hints[0]) if hints else entry


def _mapping(name: str, values: dict[Any, Any], hints: tuple[Any, ...]) -> dict[Any, Any]:
    if not hints:
        return values
    key_hint, value_hint = hints
    return _unless_equal(
        values,
        {
            _converted(f"a key of {name}", key, key_hint): _converted(f"{name}[{shown(key)}]", value, value_hint)
            for key, value in values.items()
        },
    )


def _unless_equal(before: Any, after: Any) -> Any:
    """The object that was passed, unless something in it changed: other code may hold it."""
    if type(before) is not type(after):
        return after
    if isinstance(before, set):
        return before if {(type(entry), entry) for entry in before} == {(type(e), e) for e in after} else after
    old, new = (list(items.values() if isinstance(items, dict) else items) for items in (before, after))
    return before if all(map(operator.is_, old, new)) else after


def _integer(name: str, value: Any) -> int:
    if not is_whole(value):
        raise _wrong(name, value, int)
    value = int(value)  # NumPy's, and members of an IntEnum
    limit = SEED_LIMIT if name.endswith("seed") else INTEGER_LIMIT
    if abs(value) >= limit:
        raise ValueError(
            f"{name}={shown(value)} is too large: an integer has to be below 2**{limit.bit_length() - 1} here."
        )
    return value


def _float(name: str, value: Any) -> float:
    if isinstance(value, np.integer):
        value = int(value)
    if isinstance(value, (bool, np.generic)) or not isinstance(value, (int, float)):
        raise _wrong(name, value, float)
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        finite = False
    if not finite or abs(value) > FLOAT_LIMIT:
        raise ValueError(f"{name}={shown(value)} has to be a finite number, of at most {FLOAT_LIMIT:.1e}.")
    if type(value) in (int, float):
        return value
    return float(value) if isinstance(value, float) else int(value)  # members of enums, too


def _wrong(name: str, value: Any, hint: Any) -> ValueError:
    advice = " Convert it with .item() first." if isinstance(value, np.generic) else ""
    return ValueError(
        f"{name}={shown(value)} has to be {_described(hint)}; it is of type {type(value).__name__}.{advice}"
    )


def _described(hint: Any) -> str:
    """A type in words that a caller of the configuration knows."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Union or origin is types.UnionType:
        none_first = sorted(args, key=lambda arg: arg is not type(None))  # "or None" would read as of a list's entries
        return " or ".join(dict.fromkeys(_described(arg) for arg in none_first))
    if origin is Literal:
        return f"one of {list(args)}"
    if origin is dict and args:
        return f"a dict from {_described(args[0])} to {_described(args[1])}"
    if origin in (list, set, Sequence):
        kind = "set" if origin is set else "list"
        return f"a {kind}, each entry {_described(args[0])}" if args else f"a {kind}"
    words = {
        bool: "True or False",
        int: "an integer",
        float: "a number",
        str: "a string",
        type(None): "None",
    }
    return words.get(origin, f"a {getattr(origin, '__name__', origin)}")


def shown(value: object) -> str:
    """What to show of a value or an error, whatever it is and however long."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except Exception:  # integers of more digits than Python writes out, nested too deeply, a broken repr
        return f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def name_some(names: Iterable[str]) -> str:
    """The first of some names in alphabetical order, and how many more there are, for a message."""
    first, rest = (ordered := sorted(names))[:NAMES_SHOWN], ordered[NAMES_SHOWN:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")
