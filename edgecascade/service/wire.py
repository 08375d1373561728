# SPDX-License-Identifier: Apache-2.0
"""Strict JSON. json.loads lets through what no peer agrees on; a request with it is refused.

refused: not UTF-8, a byte order mark, NaN and Infinity, 1e400, an integer beyond 2^53, a key
         given twice, a lone surrogate, more than 32 levels, anything after the value
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import fields, is_dataclass
from typing import Any

from edgecascade.files import no_constant, unique_keys

MAX_DEPTH = 32
MAX_INTEGER = 2**53  # what a double, and so every other JSON reader, still tells from its neighbour

# Escapes are consumed whole, so that an escaped quote never ends a string. One pass, no nesting.
_STRUCTURE = re.compile(rb'\\.|["\[\]{}]', re.DOTALL)


class BadJson(ValueError):
    """The bytes are not JSON as this protocol reads it; the message says why."""


def decode(payload: bytes) -> Any:
    """The value in the bytes.

    Raises:
        BadJson: for anything that two readers could understand differently.
    """
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadJson(f"not UTF-8: {error.reason} at byte {error.start}") from error
    _check_depth(payload)
    try:
        value = json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=no_constant,
        )
    except json.JSONDecodeError as error:
        raise BadJson(f"not JSON: {error.msg} at character {error.pos}") from error
    except BadJson:
        raise
    except ValueError as error:
        raise BadJson(str(error)) from error
    return value


def encode(value: Any) -> bytes:
    """Compact UTF-8 JSON; a dataclass becomes an object of its fields."""
    return _ENCODER.encode(value).encode()


def fingerprint(value: Any) -> bytes:
    """Digest of a value, whatever the order of its keys.

    Raises:
        BadJson: for a lone surrogate, which has no UTF-8.
    """
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)
    try:
        return hashlib.sha256(text.encode("utf-8")).digest()
    except UnicodeEncodeError as error:
        raise BadJson("a string holds a lone surrogate, which has no UTF-8") from error


def _fields(value: Any) -> dict[str, Any]:
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return {field.name: getattr(value, field.name) for field in fields(value)}


# Once: json.dumps makes an encoder for each text.
_ENCODER = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_fields
)


def _check_depth(payload: bytes) -> None:
    # Before the parser sees them: a hundred thousand brackets would exhaust its stack.
    if payload.count(b"[") + payload.count(b"{") <= MAX_DEPTH:
        return  # too few, wherever they are
    depth, inside = 0, False
    for match in _STRUCTURE.finditer(payload):
        mark = match.group()
        if mark == b'"':
            inside = not inside
        elif not inside and mark in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise BadJson(f"nested deeper than {MAX_DEPTH} levels")
        elif not inside and mark in b"]}":
            depth -= 1


def _integer(digits: str) -> int:
    if len(digits) > 17 or abs(int(digits)) > MAX_INTEGER:
        raise BadJson(f"integer {digits[:20]} is beyond 2^53")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadJson(f"number {digits[:20]} is beyond a double")
    return value
