# SPDX-License-Identifier: Apache-2.0
"""State pools of a native backend: KV pages, SSM and conv state for each slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.errors import OutOfMemory, SnapshotError
from edgecascade.reserve import reserve_all
from edgecascade.tensors import KvState, KvType, State

Array = NDArray[Any]

KV_SHARE = 0.25  # of the memory that is available when the bundle is opened


def fit_pages(
    states: Sequence[State],
    *,
    slots: int,
    context: int,
    asked: bool,
    page_tokens: int,
    kv_type: KvType,
    available: int | None,
) -> tuple[int, int]:
    """Tokens that a slot may hold, and KV pages for all slots, in a share of `available` bytes.

    Raises:
        OutOfMemory: when the context was asked for and does not fit.
    """
    token_bytes = kv_token_bytes(states, kv_type)
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


def kv_token_bytes(states: Sequence[State], kv_type: KvType) -> int:
    """Bytes that a token's keys and values take in all layers."""
    layers = [state for state in states if isinstance(state, KvState)]
    return sum(2 * state.kv_heads * kv_type.row_bytes(state.head_dim) for state in layers)


def check_shapes(
    parts: Mapping[tuple[int, str], Array], tokens: int, states: Sequence[State]
) -> None:
    """Refuse parts that are not just those of a model's states: NumPy would spread a smaller one
    over the place of a whole.

    Raises:
        SnapshotError: naming the first that differs.
    """
    expected: dict[tuple[int, str], tuple[int, ...]] = {}
    for state in states:
        if isinstance(state, KvState):
            dtype = parts[state.layer, "kv"].dtype if (state.layer, "kv") in parts else None
            kind = next((kind for kind in KvType if kind.dtype == dtype), KvType.F32)
            row = kind.row_items(state.head_dim)
            expected[state.layer, "kv"] = (2, tokens, state.kv_heads, row)
        else:
            expected[state.layer, state.name] = state.snapshot_shape
    kinds = {kind.dtype for kind in KvType}
    for key in sorted(parts.keys() | expected):
        part = parts.get(key)
        known = kinds if key[1] == "kv" else {np.dtype(np.float32)}
        if part is None or part.shape != expected.get(key) or part.dtype not in known:
            shown = "absent" if part is None else f"{part.dtype} {list(part.shape)}"
            raise SnapshotError(
                f"the state holds {key[1]!r} of layer {key[0]} as {shown}, the model's is "
                f"{list(expected.get(key, ()))}; read the tokens again"
            )


def check_parts(parts: Mapping[tuple[int, str], Array], tokens: int, kv_type: KvType) -> None:
    """Refuse a state whose keys and values are stored otherwise than here, or not those of all its
    tokens.

    Raises:
        SnapshotError: with both types, or both numbers.
    """
    for (layer, name), part in parts.items():
        if name == "kv" and part.shape[1] != tokens:
            raise SnapshotError(
                f"the state of {tokens} tokens holds keys and values of {part.shape[1]} in layer "
                f"{layer}; read the tokens again"
            )
    kinds = {part.dtype for (_, name), part in parts.items() if name == "kv"} - {kv_type.dtype}
    if kinds:
        theirs = KvType.of(kinds.pop()).value
        raise SnapshotError(
            f"the state holds keys and values as {theirs}, they are {kv_type.value} here; load the "
            f"bundle with kv={theirs!r}, or read the tokens again"
        )


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
    heads, head_dim, state] in float32; kv [pages, 2, kv_heads, page_tokens, row_items] in items of
    `kv_type`; the last two axes of int8 are page_tokens rows of codes, then as many scales.
    """

    def __init__(
        self,
        states: Sequence[State],
        pages: PagePool,
        *,
        slots: int,
        num_pages: int,
        kv_type: KvType,
    ) -> None:
        self.pages, self.kv_type = pages, kv_type
        self._kv: dict[int, Array] = {}
        self._head_dim: dict[int, int] = {}
        self._slots: dict[tuple[int, str], Array] = {}
        wanted: list[tuple[tuple[int, ...], Any]] = []
        for state in states:
            if isinstance(state, KvState):
                row = (pages.page_tokens, kv_type.row_items(state.head_dim))
                wanted.append(((num_pages, 2, state.kv_heads, *row), kv_type.dtype))
            else:
                wanted.append(((slots, *state.shape), np.float32))
        for state, pool in zip(states, reserve_all(wanted), strict=True):
            if isinstance(state, KvState):
                self._kv[state.layer] = pool
                self._head_dim[state.layer] = state.head_dim
            else:
                self._slots[state.layer, state.name] = pool

    def array(self, layer: int, name: str) -> Array:
        """The pool of one state field."""
        return self._kv[layer] if name == "kv" else self._slots[layer, name]

    def clear(self, slot: int) -> None:
        """Forget a slot. Pages need no zeroing: nobody reads beyond the tokens a slot holds."""
        for pool in self._slots.values():
            pool[slot] = 0
        self.pages.release(slot)

    def export(self, slot: int, tokens: int) -> dict[tuple[int, str], Array]:
        """The slot's state in the form of Snapshot. Keys and values are freed apart from the rest:
        who keeps several states of a conversation needs only the longest.
        """
        own = {
            (layer, name): pool[slot][_ring_rows(pool.shape[1], tokens)]
            if name == "conv"
            else pool[slot]
            for (layer, name), pool in self._slots.items()
        }
        copies = reserve_all([(array.shape, array.dtype) for array in own.values()])
        parts = dict(zip(own, copies, strict=True))
        for key, part in parts.items():
            part[...] = own[key]
        shapes = [((2, tokens, kv.shape[2], kv.shape[4]), kv.dtype) for kv in self._kv.values()]
        for layer, part in zip(self._kv, reserve_all(shapes), strict=True):
            for (pages, held), into in self._spans(slot, part):
                for columns, piece in self._pieces(layer):
                    into[..., columns] = piece[pages, :, :, :held].transpose(1, 0, 3, 2, 4)
            parts[layer, "kv"] = part
        return parts

    def load(self, slot: int, tokens: int, parts: Mapping[tuple[int, str], Array]) -> None:
        """Put a snapshot's parts into an empty slot."""
        check_parts(parts, tokens, self.kv_type)
        self.pages.grow(slot, tokens)
        for (layer, name), part in parts.items():
            if name == "kv":
                for (pages, rows), given in self._spans(slot, part):
                    for columns, piece in self._pieces(layer):
                        piece[pages, :, :, :rows] = given[..., columns].transpose(1, 0, 3, 2, 4)
            elif name == "conv":
                pool = self._slots[layer, name]
                pool[slot][_ring_rows(pool.shape[1], tokens)] = part
            else:
                self._slots[layer, name][slot] = part

    def _pieces(self, layer: int) -> Iterator[tuple[slice, Array]]:
        """What pages are made of: columns of a snapshot's rows, and where they are in the pages, as
        [pages, 2, kv_heads, page_tokens, columns].
        """
        kv, tokens, head_dim = self._kv[layer], self.pages.page_tokens, self._head_dim[layer]
        flat = kv.reshape(*kv.shape[:3], -1)
        for start, end in ((0, head_dim), (head_dim, kv.shape[4])):
            if start < end:
                piece = flat[..., tokens * start : tokens * end]
                yield slice(start, end), piece.reshape(*kv.shape[:3], tokens, end - start)

    def _spans(self, slot: int, part: Array) -> Iterator[tuple[tuple[Array, int], Array]]:
        """Pages of a slot and how many tokens each holds, all full ones first; and where those are
        in a snapshot's part [2, tokens, ...], as [2, pages, tokens in each, ...].
        """
        size = self.pages.page_tokens
        full, rest = divmod(part.shape[1], size)
        pages = self.pages.pages(slot)
        for first, count, rows in ((0, full, size), (full, 1, rest)):
            if count and rows:
                held = part[:, first * size : first * size + count * rows]
                each = held.reshape(2, count, rows, *part.shape[2:])  # a view
                yield (pages[first : first + count], rows), each


def _ring_rows(kernel: int, tokens: int) -> Array:
    """Rows of a conv ring that hold the last kernel - 1 positions before `tokens`, oldest first."""
    return np.arange(tokens - kernel + 1, tokens) % kernel
