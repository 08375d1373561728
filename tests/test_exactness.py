# SPDX-License-Identifier: Apache-2.0
"""With float32 weights every backend answers what transformers answered."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from golden import Build, Golden
from tolerances import EXACT_LOGITS, SAME_MATHS

from edgecascade.backends import Backend, open_backend
from edgecascade.backends._lib import cpu_isas
from edgecascade.bundle import Bundle

PROMPT_TOKENS = (1, 3, 37, 129, 500)


@pytest.fixture(scope="module", params=["reference", *cpu_isas()])
def backend(request: pytest.FixtureRequest, golden: Golden, build: Build) -> Iterator[Backend]:
    with Bundle.open(build(golden.name, "exact")) as bundle:
        name, isa = ("reference", None) if request.param == "reference" else ("cpu", request.param)
        opened = open_backend(name, bundle, isa=isa)
        yield opened
        opened.close()


@pytest.mark.parametrize("tokens", PROMPT_TOKENS)
def test_logits_are_those_of_transformers(backend: Backend, golden: Golden, tokens: int) -> None:
    logits = backend.logits(golden[f"{tokens}.ids"])
    assert logits.shape == (tokens, backend.vocab)
    assert logits.dtype == np.float32
    kept = logits[golden[f"{tokens}.rows"]]
    np.testing.assert_allclose(kept, golden[f"{tokens}.logits"], rtol=0, atol=EXACT_LOGITS)


def test_steps_behind_a_prefill_are_those_of_transformers(backend: Backend, golden: Golden) -> None:
    backend.reset(0)
    backend.prefill(0, golden["step.prompt"])
    rows = [backend.decode([0], [int(token)])[0] for token in golden["step.ids"]]
    np.testing.assert_allclose(rows, golden["step.logits"], rtol=0, atol=EXACT_LOGITS)
    assert backend.tokens(0) == len(golden["step.prompt"]) + len(golden["step.ids"])


def test_greedy_answer_is_that_of_transformers(backend: Backend, golden: Golden) -> None:
    backend.reset(0)
    logits = backend.prefill(0, golden["greedy.prompt"])
    answer = []
    for _ in golden["greedy.ids"]:
        answer.append(int(logits.argmax()))
        logits = backend.decode([0], answer[-1:])[0]
    assert answer == golden["greedy.ids"].tolist()


@pytest.mark.parametrize("cut", [1, 2, 63, 64, 65, 128])
def test_prefill_in_pieces_equals_one_pass(backend: Backend, golden: Golden, cut: int) -> None:
    ids = golden["129.ids"]
    whole = backend.logits(ids)[-1]
    backend.reset(0)
    for start in range(0, len(ids), cut):
        last = backend.prefill(0, ids[start : start + cut])
    np.testing.assert_allclose(last, whole, rtol=0, atol=SAME_MATHS)
