# SPDX-License-Identifier: Apache-2.0
"""How well a bundle answers a suite, and how far it is from another bundle.

    with LLM.load("bundle") as llm, LLM.load("float") as other:
        result = evaluate(llm, read_suite("robot.jsonl"), against=other)
    print(result.figures().exact.share, result.figures().divergence)

Answers are decoded greedily, as many side by side as the LLM has slots; they do not depend on
their company. Perplexity, divergence and agreement are measured on given tokens, one text at a
time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from edgecascade.completion import Completion
from edgecascade.errors import BundleMismatch, InvalidRequest
from edgecascade.llm import LLM
from edgecascade.sampling import SamplingParams
from edgecascade.scoring import (
    Answer,
    Figures,
    Floats,
    Result,
    contrast,
    likelihood,
    log_softmax,
    score,
    summarize,
)
from edgecascade.suite import Sample, Suite
from edgecascade.text.prompt import Prompt
from edgecascade.ticket import Queueing, Ticket

ONCE = Queueing(read_ahead=False)  # no sample goes on
QUEUED_PER_SLOT = 4  # so that no slot idles while the oldest answer is awaited
GREEDY: dict[str, Any] = {
    "temperature": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """All results of a suite. The rates count the tokens made while all slots were busy."""

    suite: Suite
    results: tuple[Result, ...]
    tokens_per_s: float
    other_tokens_per_s: float | None

    def figures(self, split: str | None = None, skill: str | None = None) -> Figures:
        """Of all samples, of a split, of a skill in it."""
        return summarize(
            result
            for result in self.results
            if split in (None, result.sample.split) and skill in (None, result.sample.skill)
        )

    @property
    def splits(self) -> list[str]:
        """The splits that have samples, in the suite's order."""
        return [split for split in self.suite.splits if self.skills(split)]

    def skills(self, split: str) -> list[str]:
        """The skills of a split, by name."""
        return sorted({r.sample.skill for r in self.results if r.sample.split == split})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return {
            "suite": self.suite.name,
            "suite_sha256": self.suite.sha256,
            "tokens_per_s": self.tokens_per_s,
            "other_tokens_per_s": self.other_tokens_per_s,
            "total": self.figures().to_dict(),
            "splits": {
                split: {
                    **self.figures(split).to_dict(),
                    "skills": {
                        skill: self.figures(split, skill).to_dict() for skill in self.skills(split)
                    },
                }
                for split in self.splits
            },
            "answers": [_row(result) for result in self.results],
        }


def evaluate(
    llm: LLM, suite: Suite, *, against: LLM | None = None, progress: Progress | None = None
) -> Evaluation:
    """Run a suite. `progress` is told how many steps of how many are done.

    Raises:
        InvalidRequest: for a sample that this bundle cannot be asked, with its line.
        BundleMismatch: when `against` reads the samples as other tokens.
    """
    llms = [llm] if against is None else [llm, against]
    steps = _Steps(len(suite.samples) * (len(llms) + 1), progress)
    prompts = [_prompts(each, suite) for each in llms]
    if against is not None:
        _check_alike(llm, against, suite, prompts[0], prompts[1])
    answered = [
        _answers(each, suite, asked, steps) for each, asked in zip(llms, prompts, strict=True)
    ]
    results = []
    for index, sample in enumerate(suite.samples):
        completions = [completions[index] for completions, _ in answered]
        with _where(suite, sample):
            results.append(_result(llms, sample, prompts[0][index], completions))
        steps.done()
    rates = [rate for _, rate in answered]
    return Evaluation(suite, tuple(results), rates[0], rates[1] if against else None)


def _prompts(llm: LLM, suite: Suite) -> list[Prompt]:
    prompts = []
    for sample in suite.samples:
        with _where(suite, sample):
            if sample.raw is not None:
                prompt = llm.prompter.from_text(sample.raw, sample.tools, raw=True, thinking=None)
            else:
                messages, tools = list(sample.messages), sample.tools
                prompt = llm.prompter.from_messages(messages, tools, thinking=sample.thinking)
            size, target = len(prompt.tokens), _target(llm, sample, prompt)
            llm.check_fits(size)
            llm.check_fits(size + max(len(target) - 1, 0), "the prompt with its target")
        prompts.append(prompt)
    return prompts


def _check_alike(
    llm: LLM, other: LLM, suite: Suite, mine: Sequence[Prompt], theirs: Sequence[Prompt]
) -> None:
    """Distributions can only be compared over the same tokens."""
    if llm.vocab != other.vocab:
        raise BundleMismatch(
            f"{llm.bundle.path} has {llm.vocab} tokens, {other.bundle.path} has {other.vocab}; "
            "compare bundles of one model"
        )
    for sample, one, two in zip(suite.samples, mine, theirs, strict=True):
        same = np.array_equal(one.tokens, two.tokens)
        if not same or _target(llm, sample, one) != _target(other, sample, two):
            raise BundleMismatch(
                f"{llm.bundle.path} and {other.bundle.path} read {suite.file}:{sample.line} as "
                "other tokens: their tokenizers or chat templates differ; compare bundles of one "
                "model"
            )


def _answers(
    llm: LLM, suite: Suite, prompts: Sequence[Prompt], steps: _Steps
) -> tuple[list[Completion], float]:
    """Greedy answers in order, and the tokens made in a second."""
    params = SamplingParams(max_tokens=suite.max_tokens, **GREEDY)
    answers: list[Completion] = []
    under_way: deque[Ticket] = deque()

    def collect() -> None:
        answers.append(under_way.popleft().result())
        steps.done()

    start = perf_counter()
    try:
        for sample, prompt in zip(suite.samples, prompts, strict=True):
            with _where(suite, sample):
                under_way.append(llm.ticket(prompt, params).submit(ONCE, wait=True))
            if len(under_way) >= QUEUED_PER_SLOT * llm.slots:
                collect()
        while under_way:
            collect()
    finally:
        for ticket in under_way:
            ticket.cancel()
    made = sum(answer.usage.completion_tokens for answer in answers)
    return answers, made / (perf_counter() - start)


def _result(
    llms: Sequence[LLM], sample: Sample, prompt: Prompt, completions: Sequence[Completion]
) -> Result:
    target = _target(llms[0], sample, prompt)
    # Without a target two bundles are compared along the other one's answer.
    given = target or (completions[-1].token_ids if len(llms) > 1 else ())
    # The other one's context may hold more; the last token is not read.
    given = given[: min(llm.max_context for llm in llms) - len(prompt.tokens) + 1]
    rows = [_given(llm, prompt, given) for llm in llms] if given else []
    answers = [
        Answer(done, score(sample, done), likelihood(rows[index], target) if target else None)
        for index, done in enumerate(completions)
    ]
    if len(llms) == 1:
        return Result(sample, answers[0])
    return Result(sample, answers[0], answers[1], contrast(rows[0], rows[1]) if rows else None)


def _target(llm: LLM, sample: Sample, prompt: Prompt) -> tuple[int, ...]:
    """The tokens to measure the perplexity on; none where the whole answer is not known."""
    known = not sample.calls and not prompt.reasoning
    text = sample.target or (sample.content if known else "")
    return tuple(llm.tokenize(text)) if text else ()


def _given(llm: LLM, prompt: Prompt, tokens: Sequence[int]) -> Floats:
    """Log probabilities at the places of these tokens behind the prompt."""
    rows = llm.logits([*prompt.tokens, *tokens[:-1]])
    return log_softmax(rows[len(prompt.tokens) - 1 :])


@contextmanager
def _where(suite: Suite, sample: Sample) -> Iterator[None]:
    """What cannot be asked is reported with the sample's place."""
    try:
        yield
    except InvalidRequest as error:  # or a kind of it: the code stays
        raise type(error)(f"{suite.file}:{sample.line}: {error}") from error


class _Steps:
    def __init__(self, total: int, tell: Progress | None) -> None:
        self._total, self._tell, self._done = total, tell, 0
        self._say()

    def done(self) -> None:
        self._done += 1
        self._say()

    def _say(self) -> None:
        if self._tell is not None:
            self._tell(self._done, self._total)


def _row(result: Result) -> dict[str, Any]:
    sample, answer = result.sample, result.answer.completion
    return {
        "id": sample.id,
        "split": sample.split,
        "skill": sample.skill,
        "exact": result.answer.score.exact,
        "valid": result.answer.score.valid,
        "why": result.answer.score.why,
        "reasoning": answer.reasoning,
        "content": answer.text,
        "tool_calls": [vars(call) for call in answer.tool_calls],
        "finish_reason": answer.finish_reason,
        "other_exact": None if result.other is None else result.other.score.exact,
    }
