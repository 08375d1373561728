# SPDX-License-Identifier: Apache-2.0
"""Strict reading of config.json: every key is used, known to be harmless, or an error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from edgecascade.errors import UnsupportedModel


class ConfigReader:
    """Hands out the values of config.json and remembers which keys were asked for."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw
        self._used: set[str] = set()

    def optional(self, key: str) -> Any:
        """The value, or None."""
        self._used.add(key)
        return self._raw.get(key)

    def size(self, key: str, *, needed: bool = True) -> int:
        """A positive integer; 0 where it is not needed and missing or null."""
        value = self.optional(key)
        if value is None and not needed:
            return 0
        self._require(key, value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise UnsupportedModel(f"config.json {key} is {value!r}; expected a positive integer")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A positive number."""
        value = self.optional(key)
        if value is None and default is not None:
            return default
        self._require(key, value)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value <= sys.float_info.max
        ):
            raise UnsupportedModel(f"config.json {key} is {value!r}; expected a positive number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean."""
        value = self.optional(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UnsupportedModel(f"config.json {key} is {value!r}; expected true or false")
        return value

    def only(self, key: str, allowed: object) -> None:
        """Refuse any value but `allowed`; a missing key means `allowed`."""
        value = self.optional(key)
        if value is not None and value != allowed:
            raise UnsupportedModel(
                f"config.json {key} is {value!r}; only {allowed!r} is implemented"
            )

    def finish(self, harmless: Mapping[str, Iterable[str]]) -> None:
        """Refuse keys that nobody asked for and that are not listed as harmless."""
        known = self._used.union(*harmless.values())
        unknown = sorted(self._raw.keys() - known)
        if unknown:
            shown = ", ".join(f"{key} = {self._raw[key]!r}"[:120] for key in unknown)
            raise UnsupportedModel(
                "config.json sets keys that this version does not read and that could change the "
                f"result: {shown}"
            )

    def _require(self, key: str, value: object) -> None:
        if value is None:
            raise UnsupportedModel(f"config.json lacks {key}")
