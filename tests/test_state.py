# SPDX-License-Identifier: Apache-2.0
"""KV pages and slot state: nothing leaks, nothing is shared, a snapshot puts everything back."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecascade.blocks import kv_rows, kv_values
from edgecascade.errors import OutOfMemory, SnapshotError
from edgecascade.state import PagePool, StatePool, fit_pages, kv_token_bytes
from edgecascade.tensors import KvState, KvType, SlotState


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


@pytest.mark.parametrize("kv_type", [KvType.F16, KvType.INT8])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 63, 64, 65, 129])
def test_export_and_load_move_a_sequence_between_slots(tokens: int, kv_type: KvType) -> None:
    states = [SlotState(0, "conv", (4, 6)), SlotState(0, "ssm", (2, 3, 5)), KvState(1, 2, 8)]
    pages = PagePool(pages=8, slots=3, max_pages=4, page_tokens=64)
    pool = StatePool(states, pages, slots=3, num_pages=8, kv_type=kv_type)
    rng = np.random.default_rng(tokens)
    pages.grow(0, tokens)
    columns = rng.normal(size=(tokens, 6)).astype(np.float32)
    for position in range(tokens):
        pool.array(0, "conv")[0, position % 4] = columns[position]
    pool.array(0, "ssm")[0] = rng.normal(size=(2, 3, 5))
    values = rng.normal(size=(2, tokens, 2, 8)).astype(np.float32)
    rows = kv_rows(values, kv_type)
    kv = pool.array(1, "kv").reshape(8, 2, 2, -1)
    for position in range(tokens):
        page, at = pages.pages(0)[position // 64], position % 64
        kv[page, :, :, 8 * at : 8 * at + 8] = rows[:, position, :, :8]
        if kv_type is KvType.INT8:
            behind = 64 * 8 + 2 * at
            kv[page, :, :, behind : behind + 2] = rows[:, position, :, 8:]
    parts = pool.export(0, tokens)
    np.testing.assert_array_equal(parts[1, "kv"], rows)
    past = np.concatenate([np.zeros((3, 6), np.float32), columns])[-3:]
    np.testing.assert_array_equal(parts[0, "conv"], past)
    pool.load(2, tokens, parts)
    again = pool.export(2, tokens)
    assert parts.keys() == again.keys()
    for key, part in parts.items():
        np.testing.assert_array_equal(part, again[key])
    pool.clear(2)
    assert not pool.array(0, "ssm")[2].any()
    assert not pool.array(0, "conv")[2].any()
    np.testing.assert_array_equal(pool.export(0, tokens)[0, "ssm"], parts[0, "ssm"])


def test_keys_and_values_of_a_snapshot_are_freed_without_the_rest() -> None:
    states = [SlotState(0, "ssm", (2, 3, 5)), KvState(1, 2, 8)]
    pages = PagePool(pages=512, slots=1, max_pages=512, page_tokens=64)
    pool = StatePool(states, pages, slots=1, num_pages=512, kv_type=KvType.F16)
    pages.grow(0, 512 * 64)
    parts = pool.export(0, 512 * 64)
    kept = weakref.ref(parts[1, "kv"].base)
    del parts[1, "kv"]
    assert kept() is None


def test_a_state_of_another_type_of_keys_and_values_is_refused_with_both() -> None:
    states, pages = [KvState(0, 2, 8)], PagePool(pages=2, slots=1, max_pages=2, page_tokens=64)
    pool = StatePool(states, pages, slots=1, num_pages=2, kv_type=KvType.F16)
    part = np.zeros((2, 3, 2, KvType.INT8.row_items(8)), np.int8)
    with pytest.raises(SnapshotError, match=r"as int8, they are f16 here; .* kv='int8'"):
        pool.load(0, 3, {(0, "kv"): part})
    assert pages.free == 2


def test_a_state_that_lacks_keys_of_its_tokens_is_refused() -> None:
    states, pages = [KvState(0, 2, 8)], PagePool(pages=2, slots=1, max_pages=2, page_tokens=64)
    pool = StatePool(states, pages, slots=1, num_pages=2, kv_type=KvType.F16)
    part = np.zeros((2, 3, 2, 8), np.float16)
    with pytest.raises(SnapshotError, match=r"state of 5 tokens holds keys and values of 3"):
        pool.load(0, 5, {(0, "kv"): part})
    assert pages.free == 2


def test_int8_takes_half_the_memory_of_halves() -> None:
    cascade = [KvState(layer, 2, 128) for layer in range(6)]  # the 30B's attention layers
    assert [kv_token_bytes(cascade, kind) for kind in KvType] == [12288, 6144, 3120]
    fixed = {"slots": 1, "context": 1 << 20, "asked": False, "page_tokens": 64}
    held = [
        fit_pages(cascade, **fixed, kv_type=kind, available=1 << 30)[1]
        for kind in (KvType.F16, KvType.INT8)
    ]
    assert held[1] / held[0] == pytest.approx(6144 / 3120, rel=1e-3)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 300.0]))
def test_int8_rows_are_within_half_a_code_and_survive_a_second_time(seed: int, size: float) -> None:
    values = (size * np.random.default_rng(seed).standard_normal((5, 16))).astype(np.float32)
    rows = kv_rows(values, KvType.INT8)
    back = kv_values(rows)
    step = np.abs(values).max(axis=-1, keepdims=True) / 127
    assert (np.abs(back - values) <= 0.51 * step).all()
    np.testing.assert_array_equal(kv_rows(back, KvType.INT8), rows)
