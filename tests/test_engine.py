# SPDX-License-Identifier: Apache-2.0
"""The engine on a real backend: whatever else happens, a job's tokens are those of a lone run."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecascade.backends.base import open_backend
from edgecascade.backends.native import NativeBackend
from edgecascade.bundle import Bundle
from edgecascade.engine import MAX_AHEAD, Engine
from edgecascade.errors import (
    BackendError,
    ContextExceeded,
    DeadlineExceeded,
    OutOfMemory,
    Overloaded,
)
from edgecascade.sampling import Draws, SampleRow, Sampling
from edgecascade.scheduler import Limits
from edgecascade.snapshots import CutRule, PrefixCache

CONTEXT = 512
RULE = CutRule(chunk_tokens=64, boundary_ids=frozenset({11}))
NOTHING = np.zeros(0, np.int32)


class Job:
    """Samples with its own seed and remembers all it was told."""

    def __init__(self, prompt, max_tokens=8, seed=0, temperature=1.0, on_token=None):
        self.prompt = np.array(prompt, np.int32)
        self.max_tokens = max_tokens
        self.tokens: list[int] = []
        self.cached = 0
        self.told: list[str] = []
        self.error = None
        self.over = threading.Event()
        self._draws = Draws(seed)
        self._sampling = Sampling(temperature=temperature)
        self._on_token = on_token

    def accepted(self, id, ahead):
        self.told.append("accepted")

    def placed(self, cached_tokens):
        self.cached = cached_tokens
        self.told.append("placed")

    def prefilled(self):
        self.told.append("prefilled")

    def row(self):
        return SampleRow(self._sampling, self._draws.next(), NOTHING, NOTHING)

    def accept(self, token, logprob, logits):
        self.tokens.append(token)
        if self._on_token:
            self._on_token(self)
        if len(self.tokens) < self.max_tokens:
            return token
        return None

    def ended(self, reason, error):
        self.told.append(reason)
        self.error = error
        self.over.set()

    def wait(self):
        assert self.over.wait(60), f"no end after {self.told}"
        return self.told[-1]


class Faulty(NativeBackend):
    """A real backend that fails where a test says so."""

    fault = watch = None

    def prefill(self, slot, tokens):
        self._maybe("prefill", tokens)
        return super().prefill(slot, tokens)

    def decode(self, slots, tokens):
        self._maybe("decode", tokens)
        return super().decode(slots, tokens)

    def restore(self, slot, snapshot):
        self._maybe("restore", snapshot)
        super().restore(slot, snapshot)

    def park(self, slot, copy=None):
        self._maybe("park", slot)
        return super().park(slot, copy)

    def resume(self, slot, parked):
        self._maybe("resume", slot)
        super().resume(slot, parked)

    def _maybe(self, where, what):
        if self.watch:
            self.watch(where, what)
        if self.fault and self.fault[0] == where and self.fault[1](what):
            raise self.fault[2]


@pytest.fixture(scope="module")
def bundle(build):
    with Bundle.open(build("tiny", "speed")) as opened:
        yield opened


@pytest.fixture
def engine(bundle):
    """make(slots=..., fault=..., ...) -> an engine that is closed after the test."""
    made = []

    def make(*, slots=2, fault=None, watch=None, cache_bytes=64 << 20, backend=None, **limits):
        backend = backend or open_backend("cpu", bundle, slots=slots, max_context=CONTEXT)
        if fault or watch:
            backend.__class__ = Faulty
            backend.fault, backend.watch = fault, watch
        values = {"kv_tokens": slots * CONTEXT, "max_context": CONTEXT, "promise_tokens": 64}
        opened = Engine(
            backend, PrefixCache(cache_bytes, RULE), Limits(slots=slots, **{**values, **limits})
        )
        made.append((opened, backend))
        return opened

    yield make
    for opened, backend in made:
        opened.close()
        backend.close()


@pytest.fixture(scope="module")
def alone(bundle):
    """alone(prompt, max_tokens, seed) -> the tokens of a run with nothing else, piece by piece."""
    backend = open_backend("cpu", bundle, slots=1, max_context=CONTEXT)
    known = {}

    def run(prompt, max_tokens=8, seed=0):
        key = (tuple(prompt), max_tokens, seed)
        if key not in known:
            job = Job(prompt, max_tokens, seed)
            backend.reset(0)
            start = 0
            for cut in RULE.cuts(job.prompt):
                logits = backend.prefill(0, job.prompt[start:cut])
                start = cut
            token = job.accept(*backend.sample(logits[None], [job.row()])[0], logits)
            while token is not None:
                logits = backend.decode([0], [token])
                token = job.accept(*backend.sample(logits, [job.row()])[0], logits[0])
            known[key] = job.tokens
        return known[key]

    yield run
    backend.close()


def words(count, seed=0):
    return [int(token) for token in np.random.default_rng(seed).integers(12, 200, count)]


def at(count, do):
    return lambda job: len(job.tokens) == count and do()


def wait_until(holds):
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def test_jobs_together_get_the_tokens_of_lone_runs(engine, alone):
    running = engine(slots=3)
    jobs = [Job(words(5 + 30 * n, n), 6 + n, seed=n) for n in range(8)]
    for job in jobs:
        running.submit(job)
    for n, job in enumerate(jobs):
        assert job.wait() == "done"
        assert job.told == ["accepted", "placed", "prefilled", "done"]
        assert job.tokens == alone(job.prompt, job.max_tokens, n)
    stats = running.stats()
    assert (stats.running, stats.waiting, stats.parked) == (0, 0, 0)
    assert stats.decoded_tokens == sum(job.max_tokens - 1 for job in jobs)


def test_a_preempted_job_ends_with_the_same_tokens(engine, alone):
    running = engine(slots=1)
    meanwhile = []
    high = Job(words(80, 1), 4, seed=1, on_token=lambda job: meanwhile.append(len(low.tokens)))
    low = Job(words(20), 40, on_token=at(10, lambda: running.submit(high, priority=0)))
    running.submit(low, priority=2)
    assert high.wait() == "done"
    assert low.wait() == "done"
    assert meanwhile == [10] * 4
    assert high.tokens == alone(high.prompt, 4, 1)
    assert low.tokens == alone(low.prompt, 40)


def test_answers_that_outgrow_the_memory_are_parked_and_come_out_right(engine, alone):
    running = engine(slots=3, kv_tokens=CONTEXT)
    parked = set()
    jobs = [
        Job(words(60, n), 150, seed=n, on_token=lambda job: parked.add(running.stats().parked))
        for n in range(3)
    ]
    for job in jobs:
        running.submit(job)
    for n, job in enumerate(jobs):
        assert job.wait() == "done"
        assert job.tokens == alone(job.prompt, 150, n)
    assert max(parked) > 0


def test_a_kept_prefix_is_restored_and_gives_the_same_tokens(engine, alone):
    running = engine()
    history = [*words(60), 11, *words(40, 1), 11]
    first, second = Job([*history, 5, 11, 6]), Job([*history, *words(30, 2), 11, 6])
    for job, cached in ((first, 0), (second, 102)):
        running.submit(job)
        assert job.wait() == "done"
        assert job.cached == cached
        assert job.tokens == alone(job.prompt)
    stats = running.stats()
    assert (stats.reuse.hits, stats.reuse.misses) == (1, 1)
    assert stats.snapshot_bytes > 0


def test_a_prompt_can_be_prepared_in_advance(engine, alone):
    running = engine()
    history = [*words(60), 11, *words(40, 1), 11]
    for _ in range(2):
        warm = running.prepare(np.array([*history, 12], np.int32))
        assert warm.over.wait(60)
        assert warm.error is None
        assert running.stats().prefilled_tokens == len(history)
    asked = Job([*history, *words(9, 3), 11, 12])
    running.submit(asked)
    assert asked.wait() == "done"
    assert asked.cached == len(history)
    assert asked.tokens == alone(asked.prompt)


def test_the_latest_is_read_ahead_first_and_only_while_nothing_else_is_to_be_done(engine):
    running = engine()
    prompts = [np.array([*words(40, n), 11, 12], np.int32) for n in range(MAX_AHEAD + 4)]
    asked = []

    def look(job):  # a step in which all of them are waiting
        if len(job.tokens) == 1:
            for n in range(len(prompts)):
                running.read_ahead(lambda n=n: asked.append(n) or prompts[n])
        assert not asked
        assert len(job.tokens) == 1 or running.stats().ahead == MAX_AHEAD

    busy = Job(words(10), 30, on_token=look)
    running.submit(busy)
    assert busy.wait() == "done"
    assert busy.error is None
    wait_until(lambda: running.stats().idle)
    assert asked == list(range(MAX_AHEAD + 3, 3, -1)), "the oldest are too many"
    assert running.stats().snapshots == MAX_AHEAD
    for n in asked:
        job = Job([*prompts[n], *words(3), 11, 12])
        running.submit(job)
        assert job.wait() == "done"
        assert job.cached == 41


def test_who_asks_for_what_is_being_read_ahead_goes_on_where_that_is(engine, alone):
    history = [*words(60), 11, *words(150, 1), 11]
    turn = Job([*history, *words(9, 3), 11, 12])
    restored = []

    def watch(where, what):
        if where == "restore":
            restored.append(what)
        elif where == "prefill" and running.stats().prefilled_tokens == 61 and not turn.told:
            running.submit(turn)  # on the engine's thread, in the second piece of four

    running = engine(watch=watch)

    running.read_ahead(lambda: np.array([*history, 12], np.int32))
    assert turn.wait() == "done"
    assert turn.cached == 61 + 64
    assert turn.tokens == alone(turn.prompt)
    wait_until(lambda: running.stats().idle)
    assert running.stats().prefilled_tokens == len(turn.prompt), "nothing was read twice"
    assert not restored, "nor copied"


@pytest.mark.parametrize("disturbed", [None, "parked", "logits"])
def test_what_was_read_ahead_is_at_hand_and_nothing_is_copied(engine, alone, disturbed):
    restored = []
    running = engine(watch=lambda where, what: where == "restore" and restored.append(what))
    history = [*words(60), 11, *words(40, 1), 11]
    running.read_ahead(lambda: np.array([*history, 12], np.int32))
    wait_until(lambda: running.stats().idle)
    if disturbed == "parked":  # it takes the place
        high = Job(words(20, 5))
        low = [Job(words(20, n), 40) for n in range(2)]
        low[1]._on_token = at(10, lambda: running.submit(high, priority=0))
        for job in low:
            running.submit(job, priority=2)
        assert [job.wait() for job in (high, *low)] == ["done"] * 3
        assert low[1].tokens == alone(low[1].prompt, 40)
    elif disturbed == "logits":
        running.call(lambda backend: backend.logits(np.arange(12, 40)))
    for again in range(2):
        asked = Job([*history, *words(9, 3), 11, 12])
        running.submit(asked)
        assert asked.wait() == "done"
        assert asked.cached == len(history)
        assert asked.tokens == alone(asked.prompt)
        assert len(restored) == again + (disturbed is not None), "only a state that was left"


def test_what_cannot_be_read_ahead_costs_nobody_anything(engine, caplog):
    running = engine()

    def fail():
        raise ValueError("a template with a bug")

    too_long = np.array([*words(2 * CONTEXT), 11, 12], np.int32)
    with caplog.at_level("ERROR"):
        for tokens in (fail, lambda: too_long, lambda: np.array(words(5), np.int32)):
            running.read_ahead(tokens)
        wait_until(lambda: running.stats().idle)
    assert "a template with a bug" in caplog.text
    job = Job(words(5))
    running.submit(job)
    assert job.wait() == "done"
    assert running.stats().prefilled_tokens == 5


def test_without_room_for_states_nothing_is_read_ahead(engine):
    running = engine(cache_bytes=0)
    running.read_ahead(lambda: np.array([*words(60), 11, 12], np.int32))
    assert running.stats().idle


def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(engine, alone):
    running = engine(slots=1)
    first = Job(words(10), 500, on_token=at(5, lambda: running.cancel(ids[0])))
    waiting, last = Job(words(11)), Job(words(12))
    ids = []
    with running._wake:  # nothing starts before all are queued
        ids += [running.submit(job) for job in (first, waiting, last)]
        running.cancel(ids[1])
        running.cancel(ids[1])
    assert [job.wait() for job in (first, waiting, last)] == ["cancelled", "cancelled", "done"]
    assert first.tokens == alone(first.prompt, 5)
    assert waiting.told == ["accepted", "cancelled"]
    running.cancel(ids[0])
    running.cancel(12345)


def test_a_deadline_ends_a_job_that_waits_and_one_that_runs(engine):
    running = engine(slots=1)
    long = Job(words(10), 500, on_token=lambda job: time.sleep(0.01))
    behind = Job(words(10))
    running.submit(long, deadline_s=0.5)
    running.submit(behind, deadline_s=0.1)
    assert behind.wait() == "deadline"
    assert not long.over.is_set()
    assert long.wait() == "deadline"
    assert 0 < len(long.tokens) < 500


def test_an_engine_without_work_sleeps(engine):
    running = engine()
    job = Job(words(5))
    running.submit(job)
    job.wait()
    wait_until(lambda: running.stats().running == 0)
    before = running.stats().steps
    time.sleep(0.2)
    assert running.stats().steps == before


@pytest.mark.parametrize(
    "fault", [BackendError("the device failed"), ValueError("a bug")], ids=["known", "unknown"]
)
def test_a_failing_prompt_fails_alone(engine, alone, fault):
    running = engine(fault=("prefill", lambda tokens: 199 in tokens, fault))
    good, bad = Job(words(10), 30), Job([13, 199, 14])
    running.submit(good)
    running.submit(bad)
    assert bad.wait() == "failed"
    assert isinstance(bad.error, BackendError)
    assert str(fault) in str(bad.error)
    assert good.wait() == "done"
    assert good.tokens == alone(good.prompt, 30)
    after = Job(words(12))
    running.submit(after)
    assert after.wait() == "done"


def test_a_failing_step_fails_those_in_it_and_the_next_ones_run(engine, alone):
    failing = []
    fault = ("decode", lambda tokens: failing and failing.pop(), OutOfMemory("gone"))
    running = engine(fault=fault)
    trigger = at(5, lambda: failing.append(True))
    jobs = [Job(words(10, n), 400, on_token=trigger if n == 1 else None) for n in range(3)]
    for job in jobs:
        running.submit(job)
    assert [job.wait() for job in jobs[:2]] == ["failed", "failed"]
    assert jobs[0].error.code == "out-of-memory"
    wait_until(lambda: len(jobs[2].tokens) > 20)
    assert jobs[2].tokens[:20] == alone(jobs[2].prompt, 20)


def test_a_row_that_cannot_be_sampled_fails_alone(engine, alone):
    running = engine()
    backend = running._backend
    decode = backend.decode

    def poisoned(slots, tokens):
        logits = decode(slots, tokens)
        if backend.tokens(slots[-1]) > 20:
            logits[-1] = np.nan
        return logits

    backend.decode = poisoned
    good, bad = Job(words(5), 12), Job(words(12), 100)
    with running._wake:
        running.submit(good)
        running.submit(bad)
    assert bad.wait() == "failed"
    assert good.wait() == "done"
    assert good.tokens == alone(good.prompt, 12)


def test_a_job_that_raises_fails_alone(engine, alone):
    def raises(job):
        raise RuntimeError("in the listener")

    running = engine()
    good, bad = Job(words(10), 20), Job(words(10), on_token=raises)
    running.submit(good)
    running.submit(bad)
    assert bad.wait() == "failed"
    assert "in the listener" in str(bad.error)
    assert good.wait() == "done"


def test_a_kept_state_that_cannot_be_restored_costs_only_time(engine, alone):
    running = engine(fault=("restore", lambda state: True, OutOfMemory("no room")))
    prompt = [*words(60), 11, *words(20, 1)]
    for _ in range(2):
        job = Job(prompt)
        running.submit(job)
        assert job.wait() == "done"
        assert job.cached == 0
        assert job.tokens == alone(prompt)


@pytest.mark.parametrize("where", ["park", "resume"])
def test_a_job_that_cannot_be_parked_or_resumed_fails_and_its_slot_is_used(engine, where):
    running = engine(slots=1, fault=(where, lambda slot: True, BackendError("no")))
    high = Job(words(10))
    low = Job(words(10), 400, on_token=at(3, lambda: running.submit(high, priority=0)))
    running.submit(low, priority=2)
    assert high.wait() == "done"
    assert low.wait() == "failed"
    last = Job(words(10))
    running.submit(last)
    assert last.wait() == "done"


def test_what_is_cancelled_while_parked_leaves_nothing_in_the_backend(engine):
    running = engine(slots=1, cache_bytes=0)
    free = running._backend._pages.free

    def cancel_low(job):
        running.cancel(low.id)

    high = Job(words(100), on_token=cancel_low)
    low = Job(words(100), 400, on_token=at(3, lambda: running.submit(high, priority=0)))
    low.id = running.submit(low, priority=2)
    assert high.wait() == "done"
    assert low.wait() == "cancelled"
    assert running._backend._pages.free == free


def test_calls_run_between_steps_and_their_errors_come_back(engine, bundle):
    running = engine(slots=1)
    long = Job(words(10), 300)
    running.submit(long)
    logits = running.call(lambda backend: backend.logits(np.array(words(9), np.int32)), tokens=9)
    assert logits.shape == (9, running._backend.vocab)
    with pytest.raises(ZeroDivisionError):
        running.call(lambda backend: 1 / 0)
    assert long.wait() == "done"


def test_who_waits_for_room_gets_in_and_who_does_not_is_refused(engine):
    running = engine(slots=1, max_queue=2)
    first = [Job(words(5), 3) for _ in range(2)]
    with running._wake:
        for job in first:
            running.submit(job)
        with pytest.raises(Overloaded):
            running.submit(Job(words(5)))
        with pytest.raises(Overloaded):
            running.submit(Job(words(5)), deadline_s=10)
    patient = [Job(words(5), 3) for _ in range(10)]
    for job in patient:
        running.submit(job, wait=True)
    assert [job.wait() for job in first + patient] == ["done"] * 12


def test_who_waits_for_room_until_its_deadline_is_told(engine):
    running = engine(slots=1, max_queue=1)
    hold = Job(words(5), 500, on_token=lambda job: time.sleep(0.01))
    running.submit(hold)
    wait_until(lambda: hold.tokens)
    running.submit(Job(words(5)))
    with pytest.raises(DeadlineExceeded):
        running.submit(Job(words(5)), wait=True, deadline_s=0.1)


def test_what_never_fits_is_refused_at_once(engine):
    with pytest.raises(ContextExceeded):
        engine().submit(Job(words(500), 100))


def test_close_ends_everything_and_refuses_more(engine):
    before = threading.active_count()
    running = engine(slots=2)
    jobs = [Job(words(10, n), 400, on_token=lambda job: time.sleep(0.01)) for n in range(5)]
    for job in jobs:
        running.submit(job)
    wait_until(lambda: jobs[0].tokens)
    running.close()
    running.close()
    assert [job.wait() for job in jobs] == ["failed"] * 5
    assert {str(job.error) for job in jobs} == {"the LLM is closed; load the bundle again"}
    assert threading.active_count() == before
    with pytest.raises(BackendError, match="closed"):
        running.submit(Job(words(5)))
    with pytest.raises(BackendError, match="closed"):
        running.call(lambda backend: None)


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1))
def test_any_mixture_from_many_threads_gives_the_tokens_of_lone_runs(bundle, alone, seed):
    draw = np.random.default_rng(seed)
    backend = open_backend("cpu", bundle, slots=3, max_context=CONTEXT)
    limits = Limits(
        slots=3, kv_tokens=640, max_context=CONTEXT, promise_tokens=64, max_queue_per_client=256
    )
    running = Engine(backend, PrefixCache(200_000, RULE), limits)
    plans = [
        [
            (int(draw.integers(0, 3)), int(draw.integers(1, 100)), int(draw.integers(1, 20)), fate)
            for fate in draw.choice(["run", "run", "cancel", "deadline"], 8)
        ]
        for _ in range(4)
    ]
    jobs: list[tuple[Job, str]] = []

    def client(name, plan):
        for priority, prompt, length, fate in plan:
            job = Job([*words(40), 11, *words(prompt, prompt)], length, seed=prompt)
            late = 0.05 if fate == "deadline" else None
            try:
                id = running.submit(job, priority=priority, client=name, deadline_s=late)
            except DeadlineExceeded:  # before it was queued, where threads wait for a core
                assert late
                continue
            jobs.append((job, fate))
            if fate == "cancel":
                running.cancel(id)

    threads = [threading.Thread(target=client, args=(str(n), plan)) for n, plan in enumerate(plans)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job, fate in jobs:
        end = job.wait()
        assert end == "done" or fate == {"cancelled": "cancel"}.get(end, end)
        whole = alone(job.prompt, job.max_tokens, int(job._draws.seed))
        assert job.tokens == (whole if end == "done" else whole[: len(job.tokens)])
        ends = [word for word in job.told if word not in ("accepted", "placed", "prefilled")]
        assert len(ends) == 1
    wait_until(lambda: running.stats().running == 0)
    assert [backend.tokens(slot) for slot in range(3)] == [0, 0, 0]
    running.close()
    backend.close()
