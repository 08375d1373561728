# SPDX-License-Identifier: Apache-2.0
"""State pools in device memory, with the layout of edgecascade/state.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from edgecascade.backends._cuda import Device
from edgecascade.backends.base import Array
from edgecascade.state import PagePool, StatePool
from edgecascade.tensors import KvState, KvType, State


class DeviceStates:
    """KV pages, SSM and conv states of all slots. Copies go through a host pool of one slot."""

    def __init__(
        self,
        device: Device,
        stream: int,
        states: Sequence[State],
        pages: PagePool,
        *,
        slots: int,
        num_pages: int,
        kv_type: KvType,
    ) -> None:
        self._device, self._stream = device, stream
        self._states, self._pages, self._kv_type = states, pages, kv_type
        self._parts: dict[tuple[int, str], tuple[int, int]] = {}  # address, bytes of a slot or page
        for state in states:
            if isinstance(state, KvState):
                rows = 2 * state.kv_heads * pages.page_tokens
                name, size, count = "kv", rows * kv_type.row_bytes(state.head_dim), num_pages
            else:
                name, size, count = state.name, math.prod(state.shape) * 4, slots
            self._parts[state.layer, name] = (device.alloc(size * count), size)
        for slot in range(slots):
            self.clear(slot)

    def address(self, layer: int, name: str) -> int:
        """Where a pool starts."""
        return self._parts[layer, name][0]

    def clear(self, slot: int) -> None:
        """Forget a slot. Pages need no zeroing: nobody reads beyond the tokens a slot holds."""
        for (_, name), (address, size) in self._parts.items():
            if name != "kv":
                self._device.zero(address + slot * size, size, self._stream)
        self._pages.release(slot)

    def export(self, slot: int, tokens: int) -> dict[tuple[int, str], Array]:
        """The slot's state in the form of Snapshot."""
        host = self._host(tokens)
        host.pages.grow(0, tokens)
        for array, address in self._pieces(host, slot):
            self._device.download(array, address, self._stream)
        self._device.synchronize(self._stream)
        return host.export(0, tokens)

    def load(self, slot: int, tokens: int, parts: Mapping[tuple[int, str], Array]) -> None:
        """Put a snapshot's parts into an empty slot."""
        host = self._host(tokens)
        host.load(0, tokens, dict(parts))
        self._pages.grow(slot, tokens)
        for array, address in self._pieces(host, slot):
            self._device.upload(address, array, self._stream)
        self._device.synchronize(self._stream)

    def _host(self, tokens: int) -> StatePool:
        count = max(1, -(-tokens // self._pages.page_tokens))
        pages = PagePool(count, 1, count, self._pages.page_tokens)
        return StatePool(self._states, pages, slots=1, num_pages=count, kv_type=self._kv_type)

    def _pieces(self, host: StatePool, slot: int) -> Iterator[tuple[Array, int]]:
        """Each part of a slot on the host, and where it lies on the device."""
        owned = list(zip(host.pages.pages(0), self._pages.pages(slot), strict=True))
        for (layer, name), (address, size) in self._parts.items():
            pool = host.array(layer, name)
            for here, there in owned if name == "kv" else [(0, slot)]:
                yield pool[here], address + int(there) * size
