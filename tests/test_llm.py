# SPDX-License-Identifier: Apache-2.0
"""What a caller of LLM relies on, on every backend of this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from golden import Build, Golden

from edgecascade import LLM, Completion, SamplingParams
from edgecascade.backends import native, open_backend
from edgecascade.backends._lib import Library
from edgecascade.bundle import Bundle
from edgecascade.errors import (
    BackendError,
    BackendUnavailable,
    BundleError,
    ContextExceeded,
    InvalidRequest,
)

Load = Callable[..., LLM]
GO = "Drive to the charging dock."
END_THINK = 13


@pytest.fixture(params=["reference", "cpu"])
def load(request: pytest.FixtureRequest, build: Build) -> Iterator[Load]:
    """load(preset, golden, options) -> LLM on one backend, closed at the end."""
    opened: list[LLM] = []

    def open_one(preset: str = "exact", name: str = "tiny", **options: Any) -> LLM:
        opened.append(LLM.load(build(name, preset), request.param, **options))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()


@pytest.fixture
def llm(load: Load) -> LLM:
    return load()


def same(answer: Completion) -> tuple[Any, ...]:
    """Everything but times and what was kept."""
    usage = replace(answer.usage, cached_tokens=0)
    return (answer.token_ids, answer.text, answer.reasoning, answer.finish_reason, usage)


def test_greedy_answers_are_those_of_transformers(llm: LLM, tiny: Golden) -> None:
    want = tuple(tiny["greedy.ids"].tolist())
    answer = llm.generate(GO, temperature=0, max_tokens=len(want))
    assert answer.token_ids == want
    assert answer.finish_reason == "length"


def test_a_text_is_a_user_message_and_raw_text_is_not(llm: LLM) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    chat = llm.generate(GO, **options)
    assert same(chat) == same(llm.generate(messages=[{"role": "user", "content": GO}], **options))
    raw = llm.generate(GO, raw=True, **options)
    assert raw.usage.prompt_tokens == len(llm.tokenize(GO)) < chat.usage.prompt_tokens
    assert same(raw) == same(llm.generate(llm.tokenize(GO), **options))
    assert same(raw) == same(llm.generate(np.array(llm.tokenize(GO)), **options))
    assert same(raw) == same(llm.generate(GO.encode(), raw=True, **options))


def test_a_batch_of_any_size_gives_the_tokens_of_each_alone(load: Load) -> None:
    llm = load("speed", slots=8)
    prompts = [f"{GO} {'again ' * i}" for i in range(11)]
    options: dict[str, Any] = {"seed": 5, "max_tokens": 24}
    together = llm.generate(prompts, **options)
    assert len(together) == 11
    assert [same(answer) for answer in together] == [
        same(llm.generate(prompt, **options)) for prompt in prompts
    ]


def test_answers_of_different_lengths_share_the_slots(load: Load) -> None:
    llm = load(slots=2)
    ids = [[3 + i, 40] for i in range(5)]
    alone = [same(llm.generate(prompt, seed=1, max_tokens=3 + 9)) for prompt in ids]
    assert [same(answer) for answer in llm.generate(ids, seed=1, max_tokens=12)] == alone


def test_streaming_adds_up_to_the_answer(llm: LLM) -> None:
    options: dict[str, Any] = {"seed": 3, "max_tokens": 60, "thinking_budget": 10, "logprobs": 1}
    pieces = list(llm.stream(GO, **options))
    answer = pieces[-1].completion
    assert answer is not None
    assert same(answer) == same(llm.generate(GO, **options))
    assert "".join(piece.text for piece in pieces) == answer.text != ""
    assert "".join(piece.reasoning for piece in pieces) == answer.reasoning != ""
    assert sum((piece.token_ids for piece in pieces), ()) == answer.token_ids
    assert [piece.logprobs[0].token_id for piece in pieces if piece.logprobs] == list(
        answer.token_ids
    )
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert all(piece.completion is None for piece in pieces[:-1])


def test_a_seed_repeats_an_answer_and_is_reported(llm: LLM) -> None:
    first = llm.generate(GO, max_tokens=20)
    assert same(llm.generate(GO, max_tokens=20, seed=first.seed)) == same(first)
    assert llm.generate(GO, max_tokens=20).token_ids != first.token_ids


def test_logits_are_those_that_decoding_sees(llm: LLM) -> None:
    answer = llm.generate([5, 6, 7], temperature=0, max_tokens=8, ignore_eos=True, logprobs=3)
    rows = llm.logits([5, 6, 7, *answer.token_ids])
    assert rows.shape == (11, llm.vocab)
    assert rows.dtype == np.float32
    assert tuple(rows[2:-1].argmax(axis=1).tolist()) == answer.token_ids
    assert answer.logprobs is not None
    for row, entry in zip(rows[2:], answer.logprobs, strict=False):
        scores = row.astype(np.float64)
        want = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        assert entry.logprob == pytest.approx(want[entry.token_id], abs=1e-3)
        assert [token for token, _ in entry.top] == np.argsort(-row, kind="stable")[:3].tolist()
        assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob, abs=1e-6))


def test_usage_and_times_add_up(llm: LLM) -> None:
    answer = llm.generate(GO, seed=2, max_tokens=12, ignore_eos=True)
    assert answer.usage.prompt_tokens == 31
    assert answer.usage.cached_tokens == 0
    assert answer.usage.completion_tokens == len(answer.token_ids) == 12
    assert answer.usage.reasoning_tokens == 12
    times = answer.timings
    assert 0 <= times.queue_s <= times.first_token_s <= times.total_s
    assert times.queue_s + times.prefill_s <= times.first_token_s
    assert times.decode_tokens_per_s > 0
    assert answer.bundle_id == llm.bundle.id
    assert json.loads(json.dumps(answer.to_dict()))["usage"]["completion_tokens"] == 12


def test_a_stop_token_ends_the_answer_unless_ignored(llm: LLM) -> None:
    free = llm.generate([5, 6, 7], temperature=0, max_tokens=8, ignore_eos=True)
    token = free.token_ids[2]
    at = free.token_ids.index(token)
    stopped = llm.generate([5, 6, 7], temperature=0, max_tokens=8, stop_token_ids=[token])
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.text == llm.detokenize(free.token_ids[:at]) if at else stopped.text == ""


def test_the_bundle_s_own_stop_tokens_end_an_answer(load: Load) -> None:
    llm = load()
    ends = {2, 11}
    answers = [llm.generate([9 + i], seed=i, temperature=2, max_tokens=1500) for i in range(3)]
    stopped = [answer for answer in answers if answer.finish_reason == "stop"]
    assert stopped, "at this temperature an end of 512 tokens comes soon"
    for answer in stopped:
        assert answer.token_ids[-1] in ends
        assert not ends & set(answer.token_ids[:-1])
        assert "<|im_end|>" not in answer.text
    short = min(range(3), key=lambda i: len(answers[i].token_ids))
    options: dict[str, Any] = {"temperature": 2, "max_tokens": len(answers[short].token_ids) + 5}
    longer = llm.generate([9 + short], seed=short, ignore_eos=True, **options)
    assert longer.finish_reason == "length"
    assert longer.token_ids[:-5] == answers[short].token_ids


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(llm: LLM) -> None:
    options: dict[str, Any] = {"raw": True, "seed": 4, "ignore_eos": True, "max_tokens": 60}
    whole = llm.generate(GO, **options)
    stop = whole.text[10:13]
    cut = llm.generate(GO, stop=["never to be seen", stop], **options)
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.token_ids) < len(whole.token_ids)
    assert "".join(p.text for p in llm.stream(GO, stop=stop, **options)) == cut.text


def test_penalties_change_what_was_seen(llm: LLM) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    plain = llm.generate([5, 6, 7], **options).token_ids
    free = llm.generate([5, 6, 7], presence_penalty=2, frequency_penalty=2, **options).token_ids
    assert len(set(free)) > len(set(plain))
    assert free[0] == plain[0]


def test_thinking_off_makes_all_of_it_content(llm: LLM) -> None:
    answer = llm.generate(GO, thinking=False, seed=1, max_tokens=20, ignore_eos=True)
    assert answer.reasoning == ""
    assert answer.usage.reasoning_tokens == 0
    assert answer.text


@pytest.mark.parametrize("budget", [0, 1, 10])
def test_the_thinking_budget_closes_the_reasoning(llm: LLM, budget: int) -> None:
    answer = llm.generate(
        GO, thinking_budget=budget, seed=1, max_tokens=60, ignore_eos=True, logprobs=0
    )
    end = llm.tokenize("\n\n</think>")
    closes = answer.token_ids.index(END_THINK) + 1
    assert list(answer.token_ids[closes - len(end) : closes]) == end
    assert budget <= closes - len(end) <= budget + -(-budget // 10)
    assert answer.usage.reasoning_tokens == closes
    assert answer.usage.completion_tokens == 60
    assert answer.text
    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)


def test_max_tokens_bounds_reasoning_too(llm: LLM) -> None:
    answer = llm.generate(GO, thinking_budget=10, seed=1, max_tokens=5, ignore_eos=True)
    assert (answer.finish_reason, len(answer.token_ids), answer.text) == ("length", 5, "")


def test_an_answer_ends_where_the_context_does(load: Load) -> None:
    llm = load(max_context=40)
    assert llm.max_context == 40
    answer = llm.generate(list(range(20, 55)), seed=1, ignore_eos=True)
    # 35 tokens are held, 5 more fit, and the last one is never read back.
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 6)
    assert len(llm.generate(list(range(20, 60)), seed=1, ignore_eos=True).token_ids) == 1


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(load: Load) -> None:
    llm = load(max_context=40)
    for ask in (llm.generate, llm.stream, llm.logits):
        with pytest.raises(ContextExceeded, match="41 tokens, the context holds 40") as refused:
            ask(list(range(20, 61)))
        assert str(refused.value).endswith("or load with a max_context of up to 4096")
    with pytest.raises(ContextExceeded, match=r"the context holds 4096; shorten it$"):
        load().generate([20] * 4097)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        (b"a\xff", {}, "byte 0xff at offset 1"),
        ("\ud800", {}, r"lone surrogate U\+D800"),
        ([512], {}, "token 512 at position 0 is outside the vocabulary of 512"),
        ([5, -1], {}, "token -1 at position 1"),
        ([5, 2**40], {}, f"token {2**40}"),
        ([5, 10**5000], {}, "token beyond 64 bits at position 1 is outside the vocabulary of 512"),
        ([1.5], {}, "list of ids"),
        ([True], {}, "list of ids"),
        ([None], {}, "list of ids"),
        (5, {}, "prompt is int"),
        (np.array(5), {}, "list of ids"),
        (np.zeros((2, 0), int), {}, "prompt is empty"),
        ({"role": "user"}, {}, "prompt is dict"),
        (["a", ""], {}, "prompt is empty"),
        (["a", 5], {}, "prompt is int"),
        (None, {}, "give either a prompt or messages"),
        ("a", {"messages": [{"role": "user", "content": "b"}]}, "either a prompt or messages"),
        (None, {"messages": [{"role": "boss", "content": "b"}]}, "role 'boss'"),
        (None, {"messages": "hello"}, "messages is str"),
        ("a", {"temperature": -1}, "temperature is -1"),
        ("a", {"stop": ["x"] * 17}, "stop has 17 strings"),
        ("a", {"stop_token_ids": [512]}, "stop_token_ids holds 512; the vocabulary has 512"),
        ("a", {"temprature": 1}, "unknown parameter 'temprature'"),
        ("a", {"params": {"seed": 1}}, "params is dict; it must be SamplingParams"),
        ("a", {"tools": [{}]}, r"tools\[0\] has no function"),
        ("a", {"tools": [{"name": "b", "factor": float("nan")}]}, "tools must be plain JSON"),
        (None, {"messages": [{"role": "user", "content": "b"}], "raw": True}, "raw continues a"),
        ("a", {"thinking": False, "raw": True}, "thinking is False, which the chat template"),
        ([5], {"thinking": True}, "thinking is True, which the chat template"),
    ],
)
def test_a_request_that_cannot_be_is_refused_before_anything_runs(
    llm: LLM, prompt: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        llm.generate(prompt, **options)
    assert llm.generate([5], max_tokens=1).token_ids


def test_texts_where_one_is_wanted_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt holds texts; .* many only to generate\(\)"):
        llm.stream(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="token_ids holds texts; give token ids"):
        llm.detokenize(["a"])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="token_ids is empty"):
        llm.logits([])


def test_an_instruction_set_that_is_not_there_is_refused_with_those_that_are(build: Build) -> None:
    with pytest.raises(InvalidRequest, match="isa is 'avx512'; this machine has portable"):
        LLM.load(build("tiny", "exact"), isa="avx512")


def test_the_slow_reference_is_not_taken_without_a_warning(
    build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(isa: str | None) -> Library:
        raise BackendUnavailable("the kernel library is not built")

    monkeypatch.setattr(native, "cpu_library", missing)
    with LLM.load(build("tiny", "exact")) as llm:
        assert llm.backend == "reference"
    (warning,) = [one for one in caplog.records if one.levelname == "WARNING"]
    assert "cpu: the kernel library is not built" in warning.getMessage()


def test_streams_run_side_by_side_and_closing_one_frees_its_slot(load: Load) -> None:
    llm = load(slots=2)
    options: dict[str, Any] = {"seed": 1, "max_tokens": 10, "ignore_eos": True}
    alone = [piece.token_ids for piece in llm.stream([5, 6], **options)]
    first, second = llm.stream([5, 6], **options), llm.stream([5, 6], **options)
    both = [(next(first).token_ids, next(second).token_ids) for _ in range(4)]
    assert both == [(ids, ids) for ids in alone[:4]]
    assert llm.generate([5], max_tokens=1).token_ids
    first.close()
    assert llm.generate([5, 6], **options).token_ids == sum(alone, ())
    assert [piece.token_ids for piece in second] == alone[4:]


def test_a_forgotten_stream_frees_its_slot(load: Load) -> None:
    llm = load(slots=1)
    stream = llm.stream([5], max_tokens=10, ignore_eos=True)
    next(stream)
    del stream
    assert llm.generate([5], max_tokens=1).token_ids


def test_threads_wait_for_slots_and_get_their_own_answers(load: Load) -> None:
    llm = load(slots=2)
    prompts = [[5 + i, 30] for i in range(6)]
    want = [llm.generate(prompt, seed=7, max_tokens=10).token_ids for prompt in prompts]
    got: dict[int, Any] = {}

    def ask(index: int) -> None:
        got[index] = llm.generate(prompts[index], seed=7, max_tokens=10).token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(6)] == want


def test_a_closed_llm_says_so(load: Load) -> None:
    llm = load()
    stream = llm.stream([5], ignore_eos=True)
    next(stream)
    llm.close()
    llm.close()
    for use in (lambda: llm.generate([5]), lambda: llm.logits([5]), lambda: list(stream)):
        with pytest.raises(BackendError, match="closed"):
            use()


def test_load_says_which_backend_runs_and_why(build: Build) -> None:
    with LLM.load(build("tiny", "exact")) as llm:
        assert llm.backend == "cpu"
        first = "the first of tensorrt, cuda, cpu, reference that this machine has"
        assert llm.backend_reason == first
    with LLM.load(build("tiny", "exact"), "reference") as llm:
        assert (llm.backend, llm.backend_reason) == ("reference", "asked for")


@pytest.mark.parametrize("name", ["bos_token_id", "pad_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, True, "2", 2**63, [2, 10**30]])
def test_token_ids_of_a_bundle_that_cannot_be_are_named(
    build: Build, name: str, value: Any
) -> None:
    with (
        Bundle.open(build("tiny", "exact")) as bundle,
        closing(open_backend("reference", bundle)) as backend,
    ):
        bundle.generation[name] = value
        with pytest.raises(BundleError, match=f"generation.json: {name} is "):
            LLM(bundle, backend, "asked for")


def test_load_refuses_what_is_no_bundle_or_no_backend(build: Build, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        LLM.load(tmp_path / "nothing")
    with pytest.raises(InvalidRequest, match="backend is 'tpu'"):
        LLM.load(build("tiny", "exact"), "tpu")
    for option, words in (
        ({"slots": 0}, "slots is 0"),
        ({"max_context": 4097}, "max_context is 4097; the model holds at most 4096 tokens"),
        ({"verify": "no"}, "verify is 'no'; it must be True, False or None"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            LLM.load(build("tiny", "exact"), **option)


def test_a_bundle_without_a_tokenizer_takes_and_gives_ids(load: Load) -> None:
    llm = load("exact", "moe")
    answer = llm.generate([5, 6], seed=1, max_tokens=4, ignore_eos=True)
    assert (len(answer.token_ids), answer.text) == (4, "")
    for use in (
        lambda: llm.generate("a"),
        lambda: llm.generate([5], stop="x"),
        lambda: llm.tokenize("a"),
        lambda: llm.detokenize([5]),
        lambda: llm.session(),
    ):
        with pytest.raises(InvalidRequest, match=r"no tokenizer\.json"):
            use()


def test_text_and_tokens_turn_into_each_other(llm: LLM) -> None:
    text = "Straße ↔ 日本\n"
    assert llm.detokenize(llm.tokenize(text)) == text
    marked = llm.tokenize("<|im_start|>x")
    assert llm.detokenize(marked) == "x"
    assert llm.detokenize(marked, skip_special_tokens=False) == "<|im_start|>x"


def test_parameters_come_whole_or_by_name(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    by_name = llm.generate([5], temperature=0, max_tokens=3, ignore_eos=True)
    assert llm.generate([5], params=params).token_ids == by_name.token_ids
    assert len(llm.generate([5], params=params, max_tokens=2).token_ids) == 2


def test_a_tokenizer_that_panics_on_a_token_ends_the_request_and_not_the_engine(
    tmp_path: Path,
) -> None:
    """A panic of the tokenizers library is no Exception: the engine's thread ended in it."""
    from build_engine.pipeline import build as build_bundle

    folder = checkpoints.write(tmp_path / "checkpoint")
    words = {("b" if i < 4 else "a") * (i + 1): i for i in range(97)}
    spec = {**checkpoints.tokenizer(**words), **checkpoints.PANIC_DECODING}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    build_bundle(folder, tmp_path / "bundle", verify=False)
    with LLM.load(tmp_path / "bundle") as llm:
        for _ in range(2):
            with pytest.raises(BundleError, match=r"tokenizer\.json fails on token"):
                llm.generate([1, 2, 3], max_tokens=4, ignore_eos=True, temperature=0)
