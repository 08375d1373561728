# SPDX-License-Identifier: Apache-2.0
"""JSON documents as frozen dataclasses: every key known, every type exact, every size bounded.

A dataclass says what may be in a document: its annotations are the types, its `__post_init__` the
ranges, given as ValueError. Types may be str, bool, int, float, dict, Literal, tuple[T, ...],
`T | None` and dataclasses of these.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from edgecascade.service import wire

T = TypeVar("T")


class BadDocument(ValueError):
    """A document is not what its dataclass says; the message names the place."""


def parse(kind: type[T], data: bytes, what: str, *, schema: int, limit: int) -> T:
    """The document in the bytes: an object with a `schema` and the dataclass's keys.

    Raises:
        BadDocument: for anything else, or more than `limit` bytes.
    """
    if len(data) > limit:
        raise BadDocument(f"{what} has {len(data)} bytes; at most {limit} are read")
    raw = json_object(data, what)
    found = raw.pop("schema", None)
    if found != schema or type(found) is not int:
        raise BadDocument(f"{what} has schema {found!r}, this version reads {schema}")
    return read(kind, raw, what)


def json_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in the bytes.

    Raises:
        BadDocument: for anything else.
    """
    try:
        raw = wire.decode(data)
    except wire.BadJson as error:
        raise BadDocument(f"{what} is {error}") from None
    if not isinstance(raw, dict):
        raise BadDocument(f"{what} is {type(raw).__name__}; expected an object")
    return raw


def read(kind: type[T], value: Any, what: str, *, defaults: bool = False) -> T:
    """A value from JSON as `kind`; with `defaults`, keys that have one may be left out.

    Raises:
        BadDocument: naming the place.
    """
    made: T = _read(kind, value, what, defaults)
    return made


def _read(kind: Any, value: Any, what: str, defaults: bool) -> Any:
    if is_dataclass(kind):
        return _read_object(kind, value, what, defaults)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = next(each for each in arguments if each is not type(None))
        return None if value is None else _read(inner, value, what, defaults)
    if origin is tuple:
        if not isinstance(value, list):
            raise BadDocument(f"{what} is {value!r:.60}; expected a list")
        return tuple(
            _read(arguments[0], each, f"{what}[{i}]", defaults) for i, each in enumerate(value)
        )
    if origin is Literal:
        if type(value) is not str or value not in arguments:
            raise BadDocument(f"{what} is {value!r:.60}; expected one of {', '.join(arguments)}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    expected = origin or kind
    if type(value) is not expected:
        raise BadDocument(f"{what} is {value!r:.60}; expected {expected.__name__}")
    return value


def _read_object(kind: Any, value: Any, what: str, defaults: bool) -> Any:
    if not isinstance(value, dict):
        raise BadDocument(f"{what} is {value!r:.60}; expected an object")
    known = {field.name: field for field in fields(kind)}
    missing = {
        name for name in known.keys() - value.keys() if not (defaults and _has_default(known[name]))
    }
    unknown = value.keys() - known.keys()
    if missing or unknown:
        raise BadDocument(f"{what}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
    hints = _hints(kind)
    read_fields = {
        name: _read(hints[name], each, f"{what}.{name}", defaults) for name, each in value.items()
    }
    make: Callable[..., Any] = kind
    try:
        return make(**read_fields)
    except BadDocument:
        raise
    except ValueError as error:
        raise BadDocument(f"{what}: {error}") from None


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _has_default(field: Any) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING
