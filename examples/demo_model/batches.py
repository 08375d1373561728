# SPDX-License-Identifier: Apache-2.0
"""Training data as tensors. A batch is a pure function of seed, step and shard: training resumes
anywhere, and workers share nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from conversation import Sample
from make_data import long_sample, sample
from make_tokenizer import PAD
from tokenizers import Tokenizer
from torch import Tensor

LENGTH = 320  # tokens of a row, in which several conversations stand
LONG = 2048  # tokens of the rare long rows
MISSES = 6  # conversations that no longer fit before the rows count as full


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, the number of the conversation in its row, next tokens, their weights."""

    ids: Tensor
    part: Tensor
    targets: Tensor
    weights: Tensor

    def split(self, rows: int) -> list[Batch]:
        pieces = (t.split(rows) for t in (self.ids, self.part, self.targets, self.weights))
        return [Batch(*each) for each in zip(*pieces, strict=True)]


@dataclass(frozen=True)
class Mixture:
    """What a step draws: the curriculum's progress, the part of the training, and the weight of a
    prompt's tokens in the loss, where the answer's weigh 1.
    """

    progress: float
    part: int
    prompt_weight: float


def rows_of(
    tokenizer: Tokenizer, seed: int, step: int, shard: int, rows: int, mixture: Mixture
) -> Batch:
    """Conversations packed into rows, each into the fullest row that still takes it."""
    rng = random.Random(f"{seed}/{step}/{shard}")
    packed: list[list[tuple[list[int], int]]] = [[] for _ in range(rows)]
    left, misses = [LENGTH] * rows, 0
    while misses < MISSES:
        made = encoded(tokenizer, sample(rng, progress=mixture.progress, part=mixture.part))
        room = [(free, row) for row, free in enumerate(left) if free >= len(made[0])]
        if not room:
            misses += 1
            continue
        free, row = min(room)
        packed[row].append(made)
        left[row] = free - len(made[0])
    return to_batch(packed, LENGTH, mixture.prompt_weight)


def long_row(tokenizer: Tokenizer, seed: int, step: int, shard: int, part: int) -> Batch:
    """One row with a long text that asks for nothing. Only the answer counts."""
    rng = random.Random(f"{seed}/{step}/{shard}/long")
    words = rng.randint(150, 700) if part < 4 else rng.randint(100, 1100)
    while True:
        ids, start = encoded(tokenizer, long_sample(rng, words, part))
        if len(ids) <= LONG:
            return to_batch([[(ids, start)]], LONG, 0.0)
        words = words * 9 // 10


def encoded(tokenizer: Tokenizer, drawn: Sample) -> tuple[list[int], int]:
    """Token ids, and where the answer begins. Both parts are cut apart, as when generating."""
    prompt, target = tokenizer.encode_batch([drawn.prompt(), drawn.target()])
    return prompt.ids + target.ids, len(prompt.ids)


def to_batch(packed: list[list[tuple[list[int], int]]], length: int, prompt: float) -> Batch:
    shape = len(packed), length
    batch = Batch(
        torch.full(shape, PAD), torch.full(shape, -2), torch.full(shape, PAD), torch.zeros(shape)
    )
    for row, conversations in enumerate(packed):
        at = 0
        for part, (ids, start) in enumerate(conversations):
            end, tokens = at + len(ids), torch.tensor(ids)
            batch.ids[row, at:end] = tokens
            batch.part[row, at:end] = part
            batch.targets[row, at : end - 1] = tokens[1:]
            batch.weights[row, at : end - 1] = prompt
            batch.weights[row, at + start - 1 : end - 1] = 1.0
            at = end
    return batch
