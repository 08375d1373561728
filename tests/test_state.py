# SPDX-License-Identifier: Apache-2.0
"""KV pages and slot state: nothing leaks, nothing is shared, a snapshot puts everything back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecascade.errors import OutOfMemory
from edgecascade.state import PagePool, StatePool
from edgecascade.tensors import KvState, SlotState


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 700)), max_size=40))
def test_pages_are_owned_once_and_come_back(events: list[tuple[int, int]]) -> None:
    pool, held = PagePool(pages=20, slots=4, max_pages=12, page_tokens=64), [0] * 4
    for slot, tokens in events:
        if tokens < 100:
            pool.release(slot)
            held[slot] = 0
        else:
            try:
                pool.grow(slot, max(held[slot], tokens))
                held[slot] = max(held[slot], tokens)
            except OutOfMemory:
                pass
        owned = np.concatenate([pool.pages(s) for s in range(4)])
        assert len(set(owned.tolist())) == len(owned)
        assert len(owned) + pool.free == 20
        assert all(len(pool.pages(s)) == -(-held[s] // 64) for s in range(4))


def test_a_refused_growth_changes_nothing_and_says_what_is_missing() -> None:
    pool = PagePool(pages=2, slots=1, max_pages=8, page_tokens=64)
    pool.grow(0, 65)
    with pytest.raises(OutOfMemory, match=r"200 tokens need 2 more KV pages .* 0 are free"):
        pool.grow(0, 200)
    assert len(pool.pages(0)) == 2


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 63, 64, 65, 129])
def test_export_and_load_move_a_sequence_between_slots(tokens: int) -> None:
    states = [SlotState(0, "conv", (4, 6)), SlotState(0, "ssm", (2, 3, 5)), KvState(1, 2, 8)]
    pages = PagePool(pages=8, slots=3, max_pages=4, page_tokens=64)
    pool = StatePool(states, pages, slots=3, num_pages=8, kv_dtype=np.float16)
    rng = np.random.default_rng(tokens)
    pages.grow(0, tokens)
    columns = rng.normal(size=(tokens, 6)).astype(np.float32)
    for position in range(tokens):
        pool.array(0, "conv")[0, position % 4] = columns[position]
    pool.array(0, "ssm")[0] = rng.normal(size=(2, 3, 5))
    for position in range(tokens):
        page = pages.pages(0)[position // 64]
        pool.array(1, "kv")[page, :, :, position % 64] = rng.normal(size=(2, 2, 8))
    parts = pool.export(0, tokens)
    past = np.concatenate([np.zeros((3, 6), np.float32), columns])[-3:]
    np.testing.assert_array_equal(parts[0, "conv"], past)
    assert parts[1, "kv"].shape == (2, tokens, 2, 8)
    pool.load(2, tokens, parts)
    again = pool.export(2, tokens)
    assert parts.keys() == again.keys()
    for key, part in parts.items():
        np.testing.assert_array_equal(part, again[key])
    pool.clear(2)
    assert not pool.array(0, "ssm")[2].any()
    assert not pool.array(0, "conv")[2].any()
    np.testing.assert_array_equal(pool.export(0, tokens)[0, "ssm"], parts[0, "ssm"])
