# SPDX-License-Identifier: Apache-2.0
"""Kept states: where prompts are cut, which prefix is found, what stays in memory, and the file."""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecascade.backends.base import Snapshot, open_backend
from edgecascade.bundle import Bundle
from edgecascade.errors import BundleMismatch, EdgeCascadeError, InvalidRequest, SnapshotError
from edgecascade.files import canonical_json
from edgecascade.snapshots import MIN_PIECE_TOKENS, STRIDE_TOKENS, CutRule, PrefixCache
from edgecascade.statefile import MAGIC, SavedState, read_state, write_state

END = 7  # the token that ends a message
RULE = CutRule(chunk_tokens=64, boundary_ids=frozenset({END}))
MEGABYTE = 1 << 20

token_lists = st.lists(st.sampled_from([1, 2, 3, END]), min_size=1, max_size=400)


def state_of(tokens: np.ndarray) -> Snapshot:
    """A state that can be told from any other: 8 KB of its own, and 32 bytes a token."""
    digest = hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).digest()
    own = np.resize(np.frombuffer(digest, np.uint8), 2048).astype(np.float32)
    kv = np.repeat(np.asarray(tokens, np.float32), 8).reshape(2, len(tokens), 1, 4)
    return Snapshot(len(tokens), {(0, "ssm"): own, (1, "kv"): kv.copy()})


def prompt(*lengths: int, seed: int = 0) -> np.ndarray:
    """Messages of so many tokens."""
    draw = np.random.default_rng(seed)
    parts = [[*draw.integers(8, 100, length - 1), END] for length in lengths]
    return np.array([token for part in parts for token in part], np.int32)


def keep_all(cache: PrefixCache, tokens: np.ndarray) -> list[int]:
    cuts = [cut for cut in RULE.cuts(tokens) if cut < len(tokens)]
    for cut in cuts:
        assert cache.put(RULE.path(tokens).upto(cut), state_of(tokens[:cut]))
    return cuts


def found(cache: PrefixCache, tokens: np.ndarray) -> int:
    with cache.longest(RULE.path(tokens)) as entry:
        if entry is None:
            return 0
        expected = state_of(entry.tokens)
        assert entry.snapshot.tokens == len(entry.tokens)
        for name, part in expected.parts.items():
            kept = entry.snapshot.parts[name]
            if name[1] == "kv":  # not by value: state_of lays tokens out in halves
                assert kept.shape[1] == len(entry.tokens)
            else:
                np.testing.assert_array_equal(kept, part)
        return len(entry.tokens)


@given(token_lists)
def test_cuts_cover_the_prompt_in_pieces_that_are_not_too_long(tokens):
    cuts = (0, *RULE.cuts(np.array(tokens)))
    assert cuts[-1] == len(tokens)
    assert all(0 < end - start <= 64 for start, end in itertools.pairwise(cuts))


@given(token_lists, st.data())
def test_cuts_depend_on_nothing_that_comes_after_them(tokens, data):
    prefix = data.draw(st.integers(1, len(tokens)))
    whole, part = RULE.cuts(np.array(tokens)), RULE.cuts(np.array(tokens[:prefix]))
    assert part[:-1] == tuple(cut for cut in whole if cut < prefix)[: len(part) - 1]
    for at, cut in enumerate(whole):
        assert RULE.cuts(np.array(tokens[:cut])) == whole[: at + 1]


def test_a_question_is_in_one_piece_with_its_answer():
    rule = CutRule(chunk_tokens=64, boundary_ids=frozenset({END}), question=(1, 2))

    def chat(*messages: tuple[int, int]) -> np.ndarray:  # who says it, and how many tokens
        parts = [[1, who, *[50] * (length - 3), END] for who, length in messages]
        return np.array([token for part in parts for token in part], np.int32)

    you, it = 2, 3
    assert rule.cuts(chat((it, 40), (you, 40), (it, 20), (you, 34))) == (40, 100, 134)
    assert rule.cuts(chat((it, 40), (you, 63), (it, 20))) == (40, 104, 123), "a piece has its bound"
    assert rule.cuts(chat((it, 40), (you, 9), (it, 9), (you, 9), (it, 9))) == (40, 76)
    assert rule.boundaries(chat((you, 40), (you, 9), (it, 9), (you, 3))).tolist() == [58]
    assert rule.boundaries(np.array([5, END, 2, END, 1], np.int32)).tolist() == [2, 4]
    assert rule.boundaries(np.array([5, END, 2, END], np.int32)).tolist() == [2, 4]
    assert rule.boundaries(np.array([1, 2], np.int32)).tolist() == []


def test_a_message_ends_a_piece_unless_the_piece_is_very_short():
    short = MIN_PIECE_TOKENS - 10
    assert RULE.cuts(prompt(40, short, 40)) == (40, 40 + short + 40)


@given(token_lists, token_lists, token_lists)
def test_what_is_found_is_the_longest_kept_prefix_and_never_the_whole(start, one, other):
    cache = PrefixCache(MEGABYTE, RULE)
    first, second = np.array([*start, *one], np.int32), np.array([*start, *other], np.int32)
    keep_all(cache, first)
    same = np.minimum(len(first), len(second))
    differ = np.flatnonzero(first[:same] != second[:same])
    common = int(differ[0]) if len(differ) else int(same)
    kept = set(RULE.cuts(first)[:-1])
    expected = max((c for c in RULE.cuts(second)[:-1] if c <= common and c in kept), default=0)
    assert found(cache, second) == expected < len(second)


def test_a_single_other_token_in_the_middle_is_seen():
    cache = PrefixCache(MEGABYTE, RULE)
    tokens = prompt(50, 50, 50, 50)
    keep_all(cache, tokens)
    assert found(cache, tokens) == 150
    tokens[75] += 1
    assert found(cache, tokens) == 50


def test_the_counters_say_what_reuse_was_worth():
    cache = PrefixCache(MEGABYTE, RULE)
    tokens = prompt(50, 50)
    found(cache, tokens)
    keep_all(cache, tokens)
    found(cache, tokens)
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.prompt_tokens, stats.reused_tokens) == (1, 1, 200, 50)
    assert stats.hit_rate == 0.25


def test_memory_stays_within_the_bound_and_the_least_recently_used_goes_first():
    cache = PrefixCache(40_000, RULE)
    chats = [prompt(40, 40, seed=seed) for seed in range(10)]
    for tokens in chats:
        keep_all(cache, tokens)
        found(cache, chats[0])
        assert cache.nbytes <= 40_000
    assert found(cache, chats[0]) == 40
    assert found(cache, chats[1]) == 0
    assert found(cache, chats[-1]) == 40
    assert cache.stats.dropped == 10 - len(cache) > 0


@given(st.integers(9_000, 60_000), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10))))
def test_the_bound_holds_and_no_memory_outlives_its_state(max_bytes, puts):
    cache = PrefixCache(max_bytes, RULE)
    paths = [RULE.path(prompt(*[40] * 12, seed=seed)) for seed in range(3)]
    stored = 0
    for which, cut in puts:
        path = paths[which].upto(paths[which].cuts[cut])
        stored -= cache.has(path)
        kept = cache.put(path, state_of(path.tokens))
        stored += kept
        assert cache.has(path) == kept
        every = [cache.find(path.upto(cut)) for path in paths for cut in path.cuts]
        entries = {entry.key: entry for entry in every if entry is not None}.values()
        runs = {id(entry.run): entry.run for entry in entries}.values()
        held = [*(entry.own for entry in entries), *(run.parts for run in runs)]
        assert sum(part.nbytes for parts in held for part in parts.values()) == cache.nbytes
        assert cache.nbytes <= max_bytes
        for run in runs:
            assert run.tokens == max(len(entry.tokens) for entry in entries if entry.run is run)
    assert (cache.stats.stored, cache.stats.dropped) == (stored, stored - len(cache))


def test_a_longer_state_takes_the_place_of_others_before_that_of_its_own_prefixes():
    cache = PrefixCache(2 * 8192 + 80 * 32, RULE)
    paths = [RULE.path(prompt(40, 40, 40, seed=seed)) for seed in range(2)]
    for path in paths:  # the second is the later one
        assert cache.put(path.upto(40), state_of(path.tokens[:40]))
    assert cache.put(paths[0].upto(80), state_of(paths[0].tokens[:80]))
    assert [cache.has(path.upto(40)) for path in paths] == [True, False]


def test_states_along_one_prompt_share_their_keys_and_values():
    cache = PrefixCache(MEGABYTE, RULE)
    cuts = keep_all(cache, prompt(*[60] * 10))
    assert cache.nbytes == len(cuts) * 8192 + cuts[-1] * 32


def test_dropping_the_longest_leaves_its_prefixes_whole_and_smaller():
    cache = PrefixCache(3 * 8192 + 180 * 32, RULE)
    tokens = prompt(60, 60, 60, 60)
    keep_all(cache, tokens)
    assert found(cache, tokens[:150]) == 120
    assert found(cache, tokens[:100]) == 60
    other = prompt(40, 40, seed=5)
    keep_all(cache, other)
    assert found(cache, tokens) == 120
    assert cache.nbytes == 3 * 8192 + (120 + 40) * 32


def test_a_state_in_use_is_not_dropped():
    cache = PrefixCache(10_000, RULE)
    tokens, other = prompt(40, 40), prompt(40, 40, seed=1)
    keep_all(cache, tokens)
    with cache.longest(RULE.path(tokens)) as entry:
        assert entry is not None
        assert not cache.put(RULE.path(other[:40]), state_of(other[:40]))
        cache.clear()
        assert len(cache) == 1
    assert cache.put(RULE.path(other[:40]), state_of(other[:40]))
    assert found(cache, tokens) == 0


def test_what_exceeds_the_bound_alone_is_not_kept():
    cache = PrefixCache(100, RULE)
    assert not cache.put(RULE.path(prompt(40)), state_of(prompt(40)))
    assert len(cache) == 0
    assert not PrefixCache(0, RULE).worth_keeping(RULE.path(prompt(40, 40)))


def test_states_are_worth_keeping_at_the_system_prompt_and_at_the_last_messages():
    cache = PrefixCache(MEGABYTE, RULE)
    tokens = prompt(*[40] * 10)
    assert cache.worth_keeping(RULE.path(tokens)) == {40, 320, 360}


def test_a_long_prompt_leaves_a_state_now_and_then():
    cache = PrefixCache(MEGABYTE, RULE)
    tokens = prompt(3 * STRIDE_TOKENS + 100)
    expected = {STRIDE_TOKENS, 2 * STRIDE_TOKENS, 3 * STRIDE_TOKENS, 3 * STRIDE_TOKENS + 64}
    assert cache.worth_keeping(RULE.path(tokens)) == expected


def test_where_prompts_part_is_worth_keeping():
    cache = PrefixCache(MEGABYTE, RULE)
    tokens = prompt(*[40] * 12)
    cache.worth_keeping(RULE.path(tokens))
    other = np.concatenate([tokens[:210], prompt(*[40] * 8, seed=1)])
    assert 200 in cache.worth_keeping(RULE.path(other))


@settings(max_examples=8)
@given(st.data())
def test_a_reused_state_gives_the_bits_of_a_cold_run(build, data):
    with Bundle.open(build("tiny", "speed")) as bundle:
        backend = open_backend("cpu", bundle, slots=1)
        cache = PrefixCache(64 * MEGABYTE, RULE)
        lengths = st.lists(st.integers(2, 90), min_size=1, max_size=4)
        history = prompt(*data.draw(lengths), seed=data.draw(st.integers(0, 99)))
        for turn in range(2):
            logits = run(backend, cache, history)
            np.testing.assert_array_equal(logits, run(backend, PrefixCache(0, RULE), history))
            history = np.concatenate([history, prompt(*data.draw(lengths), seed=turn)])
        backend.close()


def run(backend, cache, tokens):
    path = RULE.path(tokens)
    keep = cache.worth_keeping(path)
    backend.reset(0)
    start = 0
    with cache.longest(path) as entry:
        if entry is not None:
            backend.restore(0, entry.snapshot)
            start = len(entry.tokens)
    for cut in path.cuts:
        if cut > start:
            logits = backend.prefill(0, tokens[start:cut])
            start = cut
            if cut in keep:
                cache.put(path.upto(cut), backend.save(0))
    return logits


def saved(tokens: np.ndarray | None = None) -> SavedState:
    tokens = prompt(30, 20) if tokens is None else tokens
    return SavedState("b" * 64, "nemotron_h", tokens, state_of(tokens), {"messages": ["hé"]})


def read(path: Path) -> SavedState:
    return read_state(path, bundle_id="b" * 64, family="nemotron_h")


def test_a_state_comes_back_as_it_was(tmp_path):
    state = saved()
    half = np.arange(6, dtype=np.float16).reshape(2, 3, 1, 1)
    state.snapshot.parts[12, "kv"] = half
    write_state(tmp_path / "warm.state", state)
    back = read(tmp_path / "warm.state")
    np.testing.assert_array_equal(back.tokens, state.tokens)
    assert back.snapshot.tokens == 50
    assert back.extra == {"messages": ["hé"]}
    assert back.snapshot.parts.keys() == state.snapshot.parts.keys()
    for name, part in state.snapshot.parts.items():
        assert back.snapshot.parts[name].dtype == part.dtype
        np.testing.assert_array_equal(back.snapshot.parts[name], part)


def test_a_state_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "warm.state"
    write_state(path, saved())
    write_state(path, saved(prompt(10, 10)))
    assert read(path).snapshot.tokens == 20
    assert os.listdir(tmp_path) == ["warm.state"]


def test_a_state_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    path = tmp_path / "warm.state"
    write_state(path, saved())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidRequest, match="No space left"):
        write_state(path, saved(prompt(10, 10)))
    assert read(path).snapshot.tokens == 50
    assert os.listdir(tmp_path) == ["warm.state"]


def test_every_damage_of_a_file_is_seen(tmp_path):
    path = tmp_path / "warm.state"
    write_state(path, saved(prompt(10, 10)))
    good = path.read_bytes()
    draw = np.random.default_rng(0)
    for at in [*range(200), *draw.integers(200, len(good), 200), len(good) - 1]:
        bad = bytearray(good)
        bad[at] ^= 1 << int(draw.integers(8))
        path.write_bytes(bad)
        with pytest.raises(SnapshotError, match=r"warm\.state"):
            read(path)
    for bad in (b"", good[:8], good[:40], good[:-1], good + b"\0", good[: len(good) // 2]):
        path.write_bytes(bad)
        with pytest.raises(SnapshotError, match=r"warm\.state"):
            read(path)


def test_a_file_of_another_kind_is_not_read_to_be_told_so(tmp_path):
    path = tmp_path / "weights.bin"
    with open(path, "wb") as file:
        file.truncate(1 << 42)  # more than any memory
    with pytest.raises(SnapshotError, match=r"weights\.bin is not a saved state"):
        read(path)


def forged(path: Path, header: object, payload: bytes = b"", size: int | None = None) -> None:
    """A file whose checksum is right and whose content is not."""
    text = header if isinstance(header, bytes) else canonical_json(header)
    body = MAGIC + struct.pack("<Q", len(text) if size is None else size) + text + payload
    path.write_bytes(body + hashlib.sha256(body).digest())


def entry(**changes: object) -> dict[str, object]:
    return {"name": "tokens", "type": "i4", "shape": [2], **changes}


def document(*arrays: object, **changes: object) -> dict[str, object]:
    ours = {"version": 1, "bundle": "b" * 64, "family": "nemotron_h", "extra": {}}
    return {**ours, "arrays": list(arrays), **changes}


@pytest.mark.parametrize(
    ("header", "payload", "size", "message"),
    [
        (b"{", b"", None, "not JSON"),
        ([1], b"", None, "version None"),
        (document(version=2), b"", None, "version 2, this program reads 1"),
        (document(entry()), b"x" * 8, 1 << 60, "promises a header"),
        (document(entry(shape=[1, 2])), b"x" * 8, None, "no list of ids"),
        (document(entry(type="f4")), b"x" * 8, None, "no list of ids"),
        (document(entry(type="O8")), b"x" * 8, None, "type O8"),
        (document(entry(shape=[-1])), b"x" * 8, None, "shape"),
        (document(entry(shape="2")), b"x" * 8, None, "shape"),
        (document(entry(shape=[1 << 62, 4])), b"x" * 8, None, "beyond the file"),
        (document(entry(shape=[3])), b"x" * 8, None, "beyond the file"),
        (document(entry(shape=[1])), b"x" * 8, None, "no array claims"),
        (document(entry(), entry(name="ssm")), b"x" * 16, None, "no layer"),
        (document("tokens"), b"", None, "array"),
        (document(arrays=5), b"", None, "arrays"),
    ],
)
def test_a_file_with_a_right_checksum_and_a_wrong_content_is_refused(
    tmp_path, header, payload, size, message
):
    path = tmp_path / "forged.state"
    forged(path, header, payload, size)
    with pytest.raises(SnapshotError, match=message):
        read(path)


def test_a_state_of_another_bundle_is_refused_with_both_names(tmp_path):
    write_state(tmp_path / "warm.state", saved())
    with pytest.raises(BundleMismatch, match=r"b{64}.*c{64}"):
        read_state(tmp_path / "warm.state", bundle_id="c" * 64, family="nemotron_h")


def test_a_missing_file_is_the_callers_mistake(tmp_path):
    with pytest.raises(InvalidRequest, match=r"none\.state") as error:
        read(tmp_path / "none.state")
    assert isinstance(error.value, EdgeCascadeError)
