# SPDX-License-Identifier: Apache-2.0
"""State pools of a native backend: KV pages, SSM and conv state for each slot."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.errors import OutOfMemory
from edgecascade.tensors import KvState, State

Array = NDArray[Any]

KV_SHARE = 0.25  # of the memory that is available when the bundle is opened


def reserve(shape: tuple[int, ...], dtype: Any) -> Array:
    """A zeroed array whose pages cost memory only once touched, however large it is."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, max(size, 1), flags=flags)
    except OSError as error:
        raise OutOfMemory(f"{size / 1e9:.2f} GB of state cannot be reserved: {error}") from error
    return np.frombuffer(memory, dtype, count=int(np.prod(shape))).reshape(shape)


def fit_pages(
    states: Sequence[State],
    *,
    slots: int,
    context: int,
    asked: bool,
    page_tokens: int,
    itemsize: int,
    available: int | None,
) -> tuple[int, int]:
    """Tokens that a slot may hold, and KV pages for all slots, in a share of `available` bytes.

    Raises:
        OutOfMemory: when the context was asked for and does not fit.
    """
    kv_layers = [state for state in states if isinstance(state, KvState)]
    token_bytes = sum(2 * state.kv_heads * state.head_dim * itemsize for state in kv_layers)
    per_slot = -(-context // page_tokens)
    fitting = per_slot * slots
    if token_bytes and available is not None:
        fitting = int(available * KV_SHARE) // (token_bytes * page_tokens)
    if asked and fitting < per_slot:
        raise OutOfMemory(
            f"a context of {context} tokens needs "
            f"{per_slot * page_tokens * token_bytes / 1e9:.2f} GB of keys and values; "
            f"{fitting * page_tokens} tokens fit beside what runs here"
        )
    pages = max(1, min(per_slot * slots, fitting))
    return min(context, pages * page_tokens), pages


class PagePool:
    """Which pages of `page_tokens` tokens belong to which slot."""

    def __init__(self, pages: int, slots: int, max_pages: int, page_tokens: int) -> None:
        self.table = np.full((slots, max_pages), -1, np.int32)
        self.page_tokens = page_tokens
        self._free = list(range(pages - 1, -1, -1))
        self._owned = [0] * slots

    @property
    def free(self) -> int:
        """Pages that no slot owns."""
        return len(self._free)

    def grow(self, slot: int, tokens: int) -> None:
        """Give a slot the pages that `tokens` tokens need.

        Raises:
            OutOfMemory: when too few are free; the slot keeps what it had.
        """
        needed = -(-tokens // self.page_tokens) - self._owned[slot]
        if needed > len(self._free):
            raise OutOfMemory(
                f"{tokens} tokens need {needed} more KV pages of {self.page_tokens} tokens and "
                f"{len(self._free)} are free; end other sessions or load with a larger max_context"
            )
        for _ in range(needed):
            self.table[slot, self._owned[slot]] = self._free.pop()
            self._owned[slot] += 1

    def release(self, slot: int) -> None:
        """Take a slot's pages back."""
        owned = self._owned[slot]
        self._free.extend(int(page) for page in self.table[slot, :owned][::-1])
        self.table[slot, :owned] = -1
        self._owned[slot] = 0

    def pages(self, slot: int) -> Array:
        """The slot's pages in order."""
        return self.table[slot, : self._owned[slot]]


class StatePool:
    """Arrays behind the state fields of a model's ops, for a fixed number of slots.

    conv [slots, kernel, channels] (a ring: position p lives in row p mod kernel) and ssm [slots,
    heads, head_dim, state] in float32;
    kv [pages, 2, kv_heads, page_tokens, head_dim] in `kv_dtype`.
    """

    def __init__(
        self, states: Sequence[State], pages: PagePool, *, slots: int, num_pages: int, kv_dtype: Any
    ) -> None:
        self.pages = pages
        self._kv: dict[int, Array] = {}
        self._slots: dict[tuple[int, str], Array] = {}
        for state in states:
            if isinstance(state, KvState):
                shape = (num_pages, 2, state.kv_heads, pages.page_tokens, state.head_dim)
                self._kv[state.layer] = reserve(shape, kv_dtype)
            else:
                self._slots[state.layer, state.name] = reserve((slots, *state.shape), np.float32)

    def array(self, layer: int, name: str) -> Array:
        """The pool of one state field."""
        return self._kv[layer] if name == "kv" else self._slots[layer, name]

    def clear(self, slot: int) -> None:
        """Forget a slot. Pages need no zeroing: nobody reads beyond the tokens a slot holds."""
        for pool in self._slots.values():
            pool[slot] = 0
        self.pages.release(slot)

    def export(self, slot: int, tokens: int) -> dict[tuple[int, str], Array]:
        """The slot's state in the form of Snapshot."""
        parts: dict[tuple[int, str], Array] = {}
        for (layer, name), pool in self._slots.items():
            if name == "conv":
                parts[layer, name] = pool[slot][_ring_rows(pool.shape[1], tokens)]
            else:
                parts[layer, name] = pool[slot].copy()
        for layer, kv in self._kv.items():
            part = np.empty((2, tokens, kv.shape[2], kv.shape[4]), kv.dtype)
            for page, at, end in self._page_spans(slot, tokens):
                part[:, at:end] = kv[page, :, :, : end - at].transpose(0, 2, 1, 3)
            parts[layer, "kv"] = part
        return parts

    def load(self, slot: int, tokens: int, parts: Mapping[tuple[int, str], Array]) -> None:
        """Put a snapshot's parts into an empty slot."""
        self.pages.grow(slot, tokens)
        for (layer, name), part in parts.items():
            if name == "kv":
                kv = self._kv[layer]
                for page, at, end in self._page_spans(slot, tokens):
                    kv[page, :, :, : end - at] = part[:, at:end].transpose(0, 2, 1, 3)
            elif name == "conv":
                pool = self._slots[layer, name]
                pool[slot][_ring_rows(pool.shape[1], tokens)] = part
            else:
                self._slots[layer, name][slot] = part

    def _page_spans(self, slot: int, tokens: int) -> Iterator[tuple[int, int, int]]:
        """Each page of a slot with the tokens [at, end) that it holds."""
        size = self.pages.page_tokens
        for page, at in zip(self.pages.pages(slot).tolist(), range(0, tokens, size), strict=False):
            yield page, at, min(at + size, tokens)


def _ring_rows(kernel: int, tokens: int) -> Array:
    """Rows of a conv ring that hold the last kernel - 1 positions before `tokens`, oldest first."""
    return np.arange(tokens - kernel + 1, tokens) % kernel
