# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint of real shapes with random BF16 weights, sharded, in the hub's names.

    python benchmarks/make_checkpoint.py OUT --model nemotron-3-nano-30b --layers 2

It shows what a build needs in memory and time without a download: benchmarks/build_memory.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from build_engine.synthetic import config, shapes
from edgecascade.models import family

SHARD_BYTES = 5_000_000_000
POOL_VALUES = 16_000_057  # prime: rows of a matrix differ
Source = tuple[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="nemotron-3-nano-30b", choices=shapes())
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write_checkpoint(args.out, config(args.model, args.layers), args.seed)


def write_checkpoint(out: Path, raw: dict[str, Any], seed: int) -> None:
    """config.json, shards and their index."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(raw, indent=1))
    model = family(raw["model_type"])
    tensors = model.tensors(model.read_config(raw))
    shards = list(split([source for tensor in tensors for source in tensor.sources]))
    weight_map = {}
    pool = make_pool(seed)
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        weight_map.update({hub_name(source): name for source, _ in shard})
        write_shard(out / name, shard, pool, np.random.default_rng([seed, i]))
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
    )


def split(sources: list[Source]) -> Iterator[list[Source]]:
    shard: list[Source] = []
    size = 0
    for source in sources:
        size += 2 * math.prod(source[1])
        if shard and size > SHARD_BYTES:
            yield shard
            shard, size = [], 2 * math.prod(source[1])
        shard.append(source)
    yield shard


def hub_name(source: str) -> str:
    return source if source.startswith("lm_head") else f"backbone.{source}"


def make_pool(seed: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    values = np.random.default_rng(seed).standard_normal(POOL_VALUES, np.float32) * np.float32(0.02)
    pool: np.ndarray[Any, np.dtype[np.uint16]] = (values.view(np.uint32) >> 16).astype(np.uint16)
    return pool


def write_shard(
    path: Path,
    shard: list[Source],
    pool: np.ndarray[Any, np.dtype[np.uint16]],
    random: np.random.Generator,
) -> None:
    header, end = {}, 0
    for name, shape in shard:
        begin, end = end, end + 2 * math.prod(shape)
        header[hub_name(name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, shape in shard:
            left, at = math.prod(shape), int(random.integers(POOL_VALUES))
            while left:
                part = pool[at : at + left]
                out.write(part.data)
                left, at = left - len(part), 0


if __name__ == "__main__":
    main()
