# SPDX-License-Identifier: Apache-2.0
"""A new engine must answer as the kernels that the bundle was verified with, or it is not kept.

TensorRT releases have miscompiled graphs that they built without a word, so the proof is in the
tokens: prompts are continued greedily by the verified backend, the engine reads the same tokens and
must prefer the same next one at every step.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from edgecascade.backends.base import Array, Backend, open_backend
from edgecascade.bundle import Bundle
from edgecascade.errors import BackendUnavailable, BuildError

log = logging.getLogger(__name__)

PROMPTS = (1, 7, 65)  # tokens: a decode step from nothing, a chunk, more than a page
STEPS = 8
SEED = 21
# Rounding may turn a choice between tokens whose logits are this close, in deviations of the row.
# The CPU rounds activations to int8 and CUDA's kernels to half: their logits are 2 to 3 % apart,
# and the CUDA ones are the better. A miscompiled layer is off by whole deviations.
TIE = 0.5


@dataclass(frozen=True)
class Accepted:
    """How often the engine preferred the same token, and where it had a choice to."""

    against: str  # the backend that set the tokens
    steps: int
    same: int
    ties: int


def accept(bundle: Bundle, name: str = "tensorrt") -> Accepted:
    """Compare a backend's tokens for a bundle with the verified ones.

    Raises:
        BuildError: when one differs, with the prompt and both tokens.
        BackendUnavailable: when the backend does not open.
    """
    longest = min(max(PROMPTS) + STEPS, bundle.max_context)
    with (
        closing(_truth(bundle, longest)) as truth,
        closing(open_backend(name, bundle, slots=1, max_context=longest)) as candidate,
    ):
        return compare(candidate, truth)


def compare(candidate: Backend, truth: Backend) -> Accepted:
    """Continue every prompt on both; the tokens are the truth's."""
    random = np.random.default_rng(SEED)
    same = ties = 0
    for length in PROMPTS:
        room = max(1, truth.max_context - STEPS)
        prompt = random.integers(0, truth.vocab, min(length, room), dtype=np.int32)
        rows = [np.asarray(backend.prefill(0, prompt)) for backend in (candidate, truth)]
        for step in range(STEPS):
            found, expected = rows
            token = int(expected.argmax())
            if not np.isfinite(found).all():
                raise BuildError(f"the engine was not kept: {length} tokens give no numbers")
            if int(found.argmax()) == token:
                same += 1
            elif _is_tie(found, expected):
                ties += 1
            else:
                raise BuildError(
                    f"the engine was not kept: after {length} tokens and {step} more it prefers "
                    f"token {int(found.argmax())}, the {truth.name} backend {token}; report this "
                    "with the output of: edgecascade doctor --engine"
                )
            if truth.tokens(0) == truth.max_context:
                break
            rows = [np.asarray(each.decode([0], [token])[0]) for each in (candidate, truth)]
        candidate.reset(0)
        truth.reset(0)
    return Accepted(truth.name, same + ties, same, ties)


def _is_tie(found: Array, expected: Array) -> bool:
    """Whether the token that was found instead is as good by the truth's own logits."""
    lost = float(expected.max() - expected[int(found.argmax())])
    return lost <= TIE * float(expected.std())


def _truth(bundle: Bundle, tokens: int) -> Backend:
    try:
        return open_backend("cpu", bundle, slots=1, max_context=tokens)
    except BackendUnavailable as error:
        log.warning("the engine is compared with the reference, which is slow: %s", error)
        return open_backend("reference", bundle, slots=1, max_context=tokens)
