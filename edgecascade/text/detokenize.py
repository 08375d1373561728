# SPDX-License-Identifier: Apache-2.0
"""Tokens to text as they come: never half a character, and nothing emitted is ever changed."""

from __future__ import annotations

import codecs
from collections.abc import Collection

from edgecascade.text.tokenizer import Tokenizer


class Detokenizer:
    """Text of one growing sequence of tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True

    def push(self, token: int, *, keep: Collection[int] = ()) -> str:
        """The characters that this token completes; none for a special token not in `keep`."""
        if token in self._tokenizer.special and token not in keep:
            return ""
        data = self._tokenizer.token_bytes(token, first=self._first)
        self._first = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character whose last bytes never came."""
        return self._utf8.decode(b"", final=True)
