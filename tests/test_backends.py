# SPDX-License-Identifier: Apache-2.0
"""Every backend on the same bundles: equal to the reference and to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from golden import GOLDENS, Build, Golden
from numpy.typing import NDArray
from tolerances import (
    EXACT_LOGITS,
    INT8_ACTIVATIONS,
    LOGITS_BETWEEN_ISAS,
    PACKED_LOGITS,
)

from edgecascade.backends import open_backend
from edgecascade.backends._lib import cpu_isas
from edgecascade.backends.reference import Evaluator
from edgecascade.bundle import Bundle
from edgecascade.errors import (
    BackendError,
    ContextExceeded,
    InvalidRequest,
    OutOfMemory,
    SnapshotError,
)
from edgecascade.ops import Norm
from edgecascade.sampling import SampleRow, Sampling
from edgecascade.trace import OUT_ROWS, PREFILL_CHUNK

Open = Callable[..., Any]
EXECUTORS = ["reference", *(f"cpu:{isa}" for isa in cpu_isas())]
PRESETS = ["exact", "quality", "balanced", "speed"]


@pytest.fixture
def opened(build: Build) -> Iterator[Open]:
    """opened(golden, preset, "reference" or "cpu:ISA", options) -> backend, closed at the end."""
    closing: list[Any] = []

    def open_one(name: str, preset: str, executor: str, **options: Any) -> Any:
        bundle = Bundle.open(build(name, preset))
        backend, _, isa = executor.partition(":")
        made = open_backend(backend, bundle, **({"isa": isa} if isa else {}), **options)
        closing.extend([made, bundle])
        return made

    yield open_one
    for thing in closing:
        thing.close()


def relative(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Frobenius distance of logits without their row means, which no softmax sees."""
    a, b = (x.astype(np.float64) - x.mean(axis=-1, keepdims=True) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def median(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The middle of the rows' distances: one row may sit on a rounding tie or a router's."""
    return float(np.median([relative(x[None], y[None]) for x, y in zip(a, b, strict=True)]))


def prompt(tokens: int, vocab: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(3, vocab, tokens).astype(np.int32)


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", sorted(GOLDENS))
def test_packed_logits_are_the_references_with_int8_activations(
    opened: Open, name: str, preset: str, isa: str
) -> None:
    """The reference rounds activations as the kernels do, so only float32 rounding remains."""
    reference, backend = opened(name, preset, "reference"), opened(name, preset, f"cpu:{isa}")
    reference.int8_activations = True
    tokens = prompt(37, backend.vocab)
    logits, expected = backend.logits(tokens), reference.logits(tokens)
    assert median(logits, expected) <= PACKED_LOGITS
    assert relative(logits, expected) <= INT8_ACTIVATIONS


@dataclass(frozen=True)
class Dense:
    """A weight as the reference takes it."""

    values: NDArray[np.float32]  # [experts, n, k]
    is_block: bool = False

    def dense(self, expert: int = 0) -> NDArray[np.float32]:
        return self.values[expert]


def test_the_references_experts_need_no_shared_one() -> None:
    """The op's table says so; the kernels' own tests hold them to it."""
    draw = np.random.default_rng(0).standard_normal
    x, router, up, down = (
        draw(shape).astype(np.float32) for shape in ((5, 8), (3, 8), (3, 4, 8), (3, 8, 4))
    )
    fields = {"router": router, "bias": np.zeros(3), "up": Dense(up), "down": Dense(down)}
    sizes = {"top_k": 1, "n_group": 1, "topk_group": 1, "normalize": 1, "scale": 1.0}
    ops = Evaluator(np.zeros(5, np.int32), {})
    found = ops.moe(0, x, norm=Norm(np.ones(8, np.float32), 0.0), **fields, **sizes)
    for token, row in enumerate(x):
        h = row / np.sqrt(np.mean(row * row))
        expert = (router @ h).argmax()
        expected = row + down[expert] @ np.square(np.maximum(up[expert] @ h, 0))
        np.testing.assert_allclose(found[token], expected, rtol=1e-4)


@pytest.mark.parametrize("preset", PRESETS[1:])
@pytest.mark.parametrize("name", sorted(GOLDENS))
def test_int8_activations_cost_little(opened: Open, name: str, preset: str) -> None:
    reference, backend = opened(name, preset, "reference"), opened(name, preset, "cpu:")
    tokens = prompt(129, backend.vocab)
    assert median(backend.logits(tokens), reference.logits(tokens)) <= INT8_ACTIVATIONS


@pytest.mark.parametrize("preset", ["exact", "speed"])
@pytest.mark.parametrize("name", sorted(GOLDENS))
def test_every_isa_gives_close_logits(opened: Open, name: str, preset: str) -> None:
    tokens = prompt(65, 250)
    first, *others = (opened(name, preset, f"cpu:{isa}").logits(tokens) for isa in cpu_isas())
    for other in others:
        assert median(other, first) <= LOGITS_BETWEEN_ISAS


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("preset", ["exact", "speed"])
def test_eight_sequences_together_get_the_logits_of_each_alone(
    golden: Golden, opened: Open, preset: str, isa: str
) -> None:
    backend = opened(golden.name, preset, f"cpu:{isa}")
    prompts = [prompt(3 + 11 * i, backend.vocab, seed=i) for i in range(8)]
    steps = np.random.default_rng(5).integers(3, backend.vocab, (6, 8))
    alone = []
    for tokens, column in zip(prompts, steps.T, strict=True):
        backend.prefill(0, tokens)
        alone.append([backend.decode([0], [int(t)])[0] for t in column])
        backend.reset(0)
    for slot, tokens in enumerate(prompts):
        backend.prefill(slot, tokens)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    for step, row in enumerate(steps):
        together = backend.decode(order, [int(row[slot]) for slot in order])
        for logits, slot in zip(together, order, strict=True):
            np.testing.assert_array_equal(logits, alone[slot][step])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    "cuts", [[1, 2, 3, 20, 129], [64, 128], [127, 128], [7], list(range(1, 30))]
)
def test_a_prompt_in_pieces_is_the_prompt_in_one(
    golden: Golden, opened: Open, executor: str, cuts: list[int]
) -> None:
    backend, whole = opened(golden.name, "speed", executor), prompt(140, 250)
    expected = backend.prefill(0, whole)
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        logits = backend.prefill(1, whole[start:end])
    assert relative(logits[None], expected[None]) <= LOGITS_BETWEEN_ISAS


@pytest.mark.parametrize("name", ["moe", "odd"])
def test_long_prompts_cross_the_chunks(opened: Open, name: str) -> None:
    """Longer than one prefill chunk, and not a multiple of either chunk."""
    backend = opened(name, "exact", "cpu:")
    tokens = prompt(PREFILL_CHUNK + OUT_ROWS + 13, backend.vocab)
    all_rows = backend.logits(tokens)
    assert all_rows.shape == (len(tokens), backend.vocab)
    last = backend.prefill(0, tokens)
    assert np.abs(last - all_rows[-1]).max() <= EXACT_LOGITS
    reference = opened(name, "exact", "reference").logits(tokens)
    assert np.abs(all_rows - reference).max() <= EXACT_LOGITS


@pytest.mark.parametrize("preset", ["exact", "speed"])
def test_the_number_of_threads_changes_no_bit(golden: Golden, opened: Open, preset: str) -> None:
    tokens = prompt(129, 250)
    one, two, five = (
        opened(golden.name, preset, "cpu:", threads=n).logits(tokens) for n in (1, 2, 5)
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, five)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_slot_does_not_see_its_neighbours_or_its_past(
    golden: Golden, opened: Open, executor: str
) -> None:
    backend = opened(golden.name, "speed", executor)
    tokens = prompt(70, backend.vocab)
    expected = backend.prefill(2, tokens)
    for slot in (1, 3):
        backend.prefill(slot, prompt(90, backend.vocab, seed=slot))
    before = backend.save(1)
    backend.reset(2)
    np.testing.assert_array_equal(backend.prefill(2, tokens), expected)
    after = backend.save(1)
    for key, part in before.parts.items():
        np.testing.assert_array_equal(part, after.parts[key])
    backend.logits(prompt(33, backend.vocab))
    np.testing.assert_array_equal(backend.save(2).parts.keys(), after.parts.keys())


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 64, 65, 130])
@pytest.mark.parametrize("source", ["reference", "cpu:"])
@pytest.mark.parametrize("target", ["reference", "cpu:"])
def test_a_snapshot_continues_on_any_backend(
    opened: Open, golden: Golden, source: str, target: str, tokens: int
) -> None:
    first, second = (opened(golden.name, "exact", e) for e in (source, target))
    whole = prompt(tokens + 4, first.vocab)
    first.prefill(0, whole[:tokens])
    snapshot = first.save(0)
    assert snapshot.tokens == tokens
    second.prefill(5, whole[:7])
    second.restore(5, snapshot)
    for token in whole[tokens:]:
        expected = first.decode([0], [int(token)])[0]
        actual = second.decode([5], [int(token)])[0]
        assert np.abs(actual - expected).max() <= EXACT_LOGITS


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("name", ["tiny", "moe"])
def test_int8_keys_and_values_are_the_references(opened: Open, name: str, isa: str) -> None:
    reference, backend = (
        opened(name, "exact", executor, kv="int8") for executor in ("reference", f"cpu:{isa}")
    )
    tokens = prompt(150, backend.vocab)
    assert np.abs(backend.logits(tokens) - reference.logits(tokens)).max() <= EXACT_LOGITS
    reference.prefill(0, tokens)
    state = reference.save(0)
    backend.restore(3, state)
    again = backend.save(3)
    for key, part in state.parts.items():
        np.testing.assert_array_equal(part, again.parts[key])
    step = (np.asarray(b.decode([slot], [9])) for b, slot in ((backend, 3), (reference, 0)))
    assert np.abs(np.subtract(*step)).max() <= EXACT_LOGITS


@pytest.mark.parametrize("executor", ["reference", "cpu:"])
def test_a_snapshot_of_another_type_of_keys_and_values_is_refused(
    opened: Open, executor: str
) -> None:
    halves, codes = (opened("tiny", "speed", executor, kv=kv) for kv in (None, "int8"))
    halves.prefill(0, prompt(20, halves.vocab))
    codes.prefill(0, prompt(5, codes.vocab))
    with pytest.raises(SnapshotError, match=r"as f16, they are int8 here; .* kv='f16'"):
        codes.restore(0, halves.save(0))


def test_int8_holds_twice_the_tokens_in_the_same_memory(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgecascade.backends.native.memory_bytes", lambda: 4_000_000)
    halves, codes = (opened("tiny", "speed", "cpu:", kv=kv).kv_tokens for kv in ("f16", "int8"))
    assert 1.7 * halves < codes <= 2 * halves


def test_a_snapshot_is_a_copy(opened: Open) -> None:
    backend = opened("moe", "speed", "cpu:")
    backend.prefill(0, prompt(20, backend.vocab))
    snapshot = backend.save(0)
    expected = backend.decode([0], [9])[0]
    backend.prefill(0, prompt(50, backend.vocab, seed=4))
    backend.restore(1, snapshot)
    np.testing.assert_array_equal(backend.decode([1], [9])[0], expected)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_who_was_parked_goes_on_as_if_nothing_had_been(
    golden: Golden, opened: Open, executor: str
) -> None:
    backend = opened(golden.name, "speed", executor)
    prompts = {slot: prompt(70 + slot, backend.vocab, seed=slot) for slot in (1, 2)}
    for slot, tokens in prompts.items():
        backend.prefill(slot, tokens)
    expected = {slot: backend.decode([slot], [9])[0] for slot in prompts}
    for slot, tokens in prompts.items():
        backend.reset(slot)
        backend.prefill(slot, tokens)
    parked = {slot: backend.park(slot) for slot in prompts}  # the first one is copied
    for slot in prompts:
        assert backend.tokens(slot) == 0
        backend.prefill(slot, prompt(90, backend.vocab, seed=7))
    backend.logits(prompt(9, backend.vocab))  # where the second one was
    for slot, other in ((1, 2), (2, 1)):
        backend.resume(slot, parked[other])
        assert backend.tokens(slot) == len(prompts[other])
        np.testing.assert_array_equal(backend.decode([slot], [9])[0], expected[other])


def test_parking_and_resuming_copies_nothing(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened("moe", "speed", "cpu:")
    backend.prefill(0, prompt(70, backend.vocab))
    expected = backend.decode([0], [9])[0]
    backend.reset(0)
    backend.prefill(0, prompt(70, backend.vocab))
    for name in ("export", "load"):
        monkeypatch.setattr(backend._states, name, None)
    parked = backend.park(0)
    backend.prefill(0, prompt(20, backend.vocab, seed=3))
    backend.resume(0, parked)
    np.testing.assert_array_equal(backend.decode([0], [9])[0], expected)


def test_what_is_copied_already_is_not_copied_again(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened("moe", "speed", "cpu:", slots=1, max_context=128)
    backend.prefill(0, prompt(70, backend.vocab))
    copy = backend.save(0)
    expected = backend.decode([0], [9])[0]
    backend.restore(0, copy)
    monkeypatch.setattr(backend._states, "export", None)
    parked = backend.park(0, copy)
    backend.logits(prompt(9, backend.vocab))  # where it was
    backend.resume(0, parked)
    np.testing.assert_array_equal(backend.decode([0], [9])[0], expected)


def test_pages_of_the_parked_are_there_for_who_needs_them(opened: Open) -> None:
    backend = opened("moe", "speed", "cpu:", slots=1, max_context=128)
    pool = backend._pages
    pages = pool.free
    backend.prefill(0, prompt(70, backend.vocab))
    expected = backend.decode([0], [9])[0]
    backend.reset(0)
    backend.prefill(0, prompt(70, backend.vocab))
    parked = backend.park(0)
    assert pool.free == pages - 2
    others, pool._free = pool._free, []  # as if other slots had the rest
    backend.prefill(0, prompt(100, backend.vocab, seed=3))
    pool._free = others
    backend.resume(0, parked)
    np.testing.assert_array_equal(backend.decode([0], [9])[0], expected)
    parked = backend.park(0)
    for _ in range(2):
        backend.drop(parked)
        assert pool.free == pages


def test_a_parked_sequence_that_cannot_be_copied_is_lost_alone(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened("moe", "speed", "cpu:")

    def fail(row: int, tokens: int) -> None:
        raise OutOfMemory("no room for a copy")

    for slot in (0, 1):
        backend.prefill(slot, prompt(20, backend.vocab))
    first = backend.park(0)
    with monkeypatch.context() as broken:
        broken.setattr(backend._states, "export", fail)
        second = backend.park(1)
    with pytest.raises(OutOfMemory, match="no room for a copy"):
        backend.resume(0, first)
    backend.resume(1, second)
    assert backend.tokens(1) == 20


def test_routing_of_the_last_step_can_be_read(opened: Open) -> None:
    backend = opened("moe", "exact", "cpu:")
    backend.prefill(0, prompt(9, backend.vocab))
    ids, weights = backend.routing(1, 9)
    assert ids.shape == weights.shape == (9, 2)
    assert (np.diff(ids, axis=1) > 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 2.5, rtol=1e-5)


@pytest.mark.parametrize("executor", ["reference", "cpu:"])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"non-empty list of ids, got shape \(0,\)"),
        ([[1, 2]], r"got shape \(1, 2\)"),
        ([1.5], r"of float64"),
        ([3, -1], r"token -1 at position 1 is outside the vocabulary of 256"),
        ([256], r"token 256 at position 0 is outside the vocabulary of 256"),
        ([2**40], r"token 1099511627776 at position 0"),
    ],
)
def test_bad_tokens_are_refused_by_value(
    opened: Open, executor: str, tokens: list[Any], message: str
) -> None:
    backend = opened("moe", "speed", executor)
    for call in (lambda: backend.prefill(0, tokens), lambda: backend.logits(tokens)):
        with pytest.raises(InvalidRequest, match=message):
            call()
    assert backend.tokens(0) == 0


@pytest.mark.parametrize("executor", ["reference", "cpu:"])
def test_a_full_context_is_refused_and_nothing_is_lost(opened: Open, executor: str) -> None:
    backend = opened("moe", "speed", executor, max_context=100)
    assert backend.max_context == 100
    with pytest.raises(ContextExceeded, match=r"0 tokens held and 101 more exceed .* of 100"):
        backend.prefill(0, prompt(101, 256))
    expected = backend.prefill(0, prompt(100, 256))
    with pytest.raises(ContextExceeded, match=r"100 tokens held and 1 more"):
        backend.decode([0], [5])
    backend.reset(0)
    np.testing.assert_array_equal(backend.prefill(0, prompt(100, 256)), expected)


@pytest.mark.parametrize("slots", [[], [0, 0], [8], [-1], list(range(9))])
def test_impossible_slots_are_refused(opened: Open, slots: list[int]) -> None:
    backend = opened("moe", "speed", "cpu:")
    with pytest.raises(InvalidRequest, match="slot"):
        backend.decode(slots, [5] * len(slots))


@pytest.mark.parametrize("executor", ["reference", "cpu"])
@pytest.mark.parametrize(
    "options",
    [
        {"slots": 0}, {"slots": 9}, {"slots": "8"}, {"slots": 1.5}, {"slots": None},
        {"threads": 0}, {"threads": 1000}, {"threads": True}, {"threads": 1.5},
        {"max_context": 0}, {"max_context": float("nan")}, {"max_context": 10**30},
        {"isa": 5}, {"isa": b"avx2"}, {"kv": "int4"}, {"kv": 8}, {"kv": ""},
    ],
)  # fmt: skip
def test_impossible_options_are_refused(
    build: Build, executor: str, options: dict[str, Any]
) -> None:
    with (
        Bundle.open(build("moe", "speed")) as bundle,
        pytest.raises(InvalidRequest, match=next(iter(options))),
    ):
        open_backend(executor, bundle, **options)


@pytest.mark.parametrize("executor", ["reference", "cpu:"])
def test_logits_without_a_number_are_the_backends_failure(opened: Open, executor: str) -> None:
    backend = opened("moe", "speed", executor)
    row = SampleRow(Sampling(), 0.5, np.zeros(0, np.int32), np.zeros(0, np.int32))
    logits = np.full((1, backend.vocab), np.nan, np.float32)
    with pytest.raises(BackendError, match="all 256 logits are NaN"):
        backend.sample(logits, [row])


def test_an_unknown_backend_is_refused_with_the_known_ones(build: Build) -> None:
    with (
        Bundle.open(build("moe", "speed")) as bundle,
        pytest.raises(InvalidRequest, match=r"'tpu'; choose auto, tensorrt, cuda, cpu, reference"),
    ):
        open_backend("tpu", bundle)


def test_an_impossible_context_says_what_fits(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgecascade.backends.native.memory_bytes", lambda: 4_000_000)
    with pytest.raises(OutOfMemory, match=r"a context of 4096 tokens needs .* tokens fit beside"):
        opened("moe", "exact", "cpu:", max_context=4096)
    small = opened("moe", "exact", "cpu:")
    assert 64 <= small.max_context < 4096


def test_a_closed_backend_says_so(opened: Open) -> None:
    backend = opened("moe", "speed", "cpu:")
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.prefill(0, [5])
