# SPDX-License-Identifier: Apache-2.0
"""Tokens of a conversation, of which only what is new goes through the tokenizer.

The mark that ends a message is a token of its own: what stands before it does not change the tokens
behind it. Where a tokenizer sees it otherwise, which is tried at the start, every text is new.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgecascade.text.tokenizer import Tokenizer

REMEMBERED = 16  # conversations

# What could reach over a mark: blanks that it swallows, a word that it must not touch, an accent
# that would be joined to it, the beginning of a text.
_PROBES = (("a ", "\n b"), (".", "b c"), ("a", "\u0338b"), ("a", " b"), ("", "b"))


Array = NDArray[np.int32]
_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class _Known:
    text: str
    tokens: Array
    ends: NDArray[np.intp]  # where the marks are in `tokens`


class TurnEncoder:
    """Text to token ids as the tokenizer's encode() gives them. From any thread."""

    def __init__(self, tokenizer: Tokenizer, mark: str) -> None:
        self._tokenizer, self._mark = tokenizer, mark
        self._mark_id = tokenizer.token_id(mark)
        self._recent: deque[_Known] = deque(maxlen=REMEMBERED)
        self._lock = threading.Lock()
        self._separates = self._mark_id is not None and all(
            tokenizer.encode(before + mark + after)
            == tokenizer.encode(before + mark) + tokenizer.encode(after)
            for before, after in _PROBES
        )

    def encode(self, text: str) -> Array:
        """int32 token ids of a text."""
        if not self._separates or self._mark not in text:
            return self._encode(text)
        begin, known = self._known(text)
        tokens = np.concatenate([known, self._encode(text[begin:])])
        ends = np.flatnonzero(tokens == self._mark_id)
        if len(ends) == text.count(self._mark):  # else another special token overlaps with it
            with self._lock:
                self._recent.append(_Known(text, tokens, ends))
        return tokens

    def _encode(self, text: str) -> Array:
        return np.array(self._tokenizer.encode(text), np.int32)

    def _known(self, text: str) -> tuple[int, Array]:
        """How far a text was seen before, up to behind a mark, and the tokens of that."""
        with self._lock:
            recent = list(self._recent)
        begin, best = 0, None
        for known in reversed(recent):
            at = text.rfind(self._mark, 0, _common(text, known.text))
            if at >= 0 and at + len(self._mark) > begin:
                begin, best = at + len(self._mark), known
                if text.count(self._mark, begin) < 2:  # one message is left: good enough
                    break
        if best is None:
            return 0, _NONE
        last = best.ends[text.count(self._mark, 0, begin) - 1]
        if self._mark not in best.text[begin:]:  # all of it goes on here
            with self._lock, contextlib.suppress(ValueError):
                self._recent.remove(best)
        return begin, best.tokens[: last + 1]


def common_length(a: Array, b: Array) -> int:
    """How many tokens two sequences share at the beginning."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def _common(a: str, b: str) -> int:
    """How many characters two texts share at the beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
