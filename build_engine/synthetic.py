# SPDX-License-Identifier: Apache-2.0
"""Bundles of real shapes with random weights, made in packed form at the speed of the disk.

Every block is valid and scaled so that activations keep their size from layer to layer. Experts
differ: each matrix starts at another place of one pool of random blocks. Nothing is ever held in
float; 17 GB need some 30 MB.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_engine.bundle import BundleWriter, identity
from build_engine.pack import Progress
from build_engine.quantize import quantize
from build_engine.read import padding
from edgecascade.blocks import pack_blocks
from edgecascade.errors import InvalidRequest
from edgecascade.models import family
from edgecascade.tensors import (
    ALIGNMENT,
    BLOCK_BYTES,
    BLOCK_ROWS,
    GROUP_SIZE,
    Codec,
    Role,
    Tensor,
    Transform,
    matrix_bytes,
)
from edgecascade.verified import cache_folder

log = logging.getLogger(__name__)

POOL_BLOCKS = 8192  # of each codec: 9 MB of u4_64
POOL_VALUES = 1_000_003  # of normal floats; prime, so that no two rows of a matrix are equal
PIECE_BYTES = 16 << 20
SEED = 7
RESIDUAL_GAIN = 0.2  # of matrices that add to the residual stream, so that 52 layers keep it small

Array = NDArray[Any]


def shapes() -> list[str]:
    """Names that `write_synthetic` knows."""
    return sorted(
        entry.name.removesuffix(".json")
        for entry in files("build_engine").joinpath("shapes").iterdir()
        if entry.name.endswith(".json")
    )


def cached(name: str, layers: int | None, what: str) -> Path:
    """Where a model of random weights lies in the user's cache; `what`: its precision or format."""
    return cache_folder() / "synthetic" / f"{name}-{'all' if layers is None else layers}-{what}"


def config(name: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a model by name, cut to its first `layers` layers.

    Raises:
        InvalidRequest: for an unknown name or an impossible number of layers.
    """
    if name not in shapes():
        raise InvalidRequest(
            f"synthetic model {name!r} is unknown; choose one of {', '.join(shapes())}"
        )
    raw: dict[str, Any] = json.loads(
        files("build_engine").joinpath("shapes").joinpath(f"{name}.json").read_text()
    )
    pattern = raw["hybrid_override_pattern"]
    if layers is not None and not 1 <= layers <= len(pattern):
        raise InvalidRequest(f"layers is {layers}; {name} has 1 to {len(pattern)}")
    cut = pattern[:layers]
    return {**raw, "hybrid_override_pattern": cut, "num_hidden_layers": len(cut)}


def write_synthetic(
    path: str | Path,
    name: str = "nemotron-3-nano-30b",
    layers: int | None = None,
    *,
    precision: str = "speed",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a bundle with the shapes of a model and random weights; the same every time.

    Raises:
        InvalidRequest: for an unknown name, preset or an impossible number of layers.
        BuildError: when the bundle cannot be written.
    """
    raw = config(name, layers)
    facts = {"synthetic": name, "layers": len(raw["hybrid_override_pattern"]), "seed": SEED}
    return write_random(
        path, raw, facts, precision=precision, overwrite=overwrite, progress=progress
    )


def write_random(
    path: str | Path,
    raw: dict[str, Any],
    report: dict[str, Any],
    *,
    precision: str = "speed",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a bundle for a config.json with random weights."""
    model = family(raw["model_type"])
    c = model.read_config(raw)
    plan = quantize(model.tensors(c), precision)
    pools = {codec: _pool(codec) for codec in {p.codec for p in plan} if codec.is_block}
    done = 0
    facts = identity(raw["model_type"], raw, c.max_context, precision)
    with BundleWriter(path, facts, plan, overwrite=overwrite) as writer:
        for tensor, codec in plan:
            for data in _tensor(tensor, codec, pools):
                writer.write(tensor.name, data)
                done += data.nbytes
                if progress is not None:
                    progress(done, writer.total_bytes)
        return writer.finish({}, {"eos_token_id": [raw["eos_token_id"]]}, report)


def _pool(codec: Codec) -> Array:
    """Random blocks [POOL_BLOCKS, bytes] with codes of mean zero and scales near 1 of a unit
    normal.
    """
    random = np.random.default_rng(SEED)
    rows = POOL_BLOCKS * BLOCK_ROWS
    low, high = (1, 16) if codec is Codec.U4_64 else (-127, 128)
    codes = random.integers(low, high, (rows, GROUP_SIZE), np.int16)
    spread = float(np.std(np.arange(low, high)))
    scales = random.uniform(0.8, 1.2, (rows, 1)) / spread
    return pack_blocks(codec, codes, scales.astype(np.float16)).reshape(POOL_BLOCKS, -1)


def _tensor(tensor: Tensor, codec: Codec, pools: dict[Codec, Array]) -> Iterator[Array]:
    """The tensor's bytes, a few megabytes at a time."""
    random = np.random.default_rng([SEED, zlib.crc32(tensor.name.encode())])
    size = matrix_bytes(codec, *tensor.matrix)
    pool = _scaled(pools[codec], codec, _deviation(tensor)) if codec.is_block else None
    for _ in range(tensor.experts):
        if pool is not None:
            yield from _blocks(pool, size, int(random.integers(POOL_BLOCKS)))
        else:
            yield from _floats(tensor, codec, random)
        tail = padding(size, ALIGNMENT)
        if tail.nbytes:
            yield tail


def _deviation(tensor: Tensor) -> float:
    """Standard deviation of a matrix's weights that keeps a normed input's size."""
    adds = tensor.name.endswith(("out_proj", "o_proj", "down"))
    return float((RESIDUAL_GAIN if adds else 1.0) / np.sqrt(tensor.matrix[1]))


def _scaled(pool: Array, codec: Codec, deviation: float) -> Array:
    made: Array = pool.copy()
    scales = made[:, BLOCK_BYTES[codec.value] - 2 * BLOCK_ROWS :].view(np.float16)
    scales[:] = (scales.astype(np.float32) * np.float32(deviation)).astype(np.float16)
    return made


def _blocks(pool: Array, size: int, first: int) -> Iterator[Array]:
    """`size` bytes of the pool, going round and round from block `first`."""
    block = pool.shape[1]
    left = size // block
    while left:
        part = pool[first : first + min(left, PIECE_BYTES // block)]
        yield part.reshape(-1)
        left -= len(part)
        first = (first + len(part)) % POOL_BLOCKS


def _floats(tensor: Tensor, codec: Codec, random: np.random.Generator) -> Iterator[Array]:
    rows, columns = tensor.matrix
    step = max(1, PIECE_BYTES // (4 * columns))
    for start in range(0, rows, step):
        values = _values(tensor, random, (min(step, rows - start), columns))
        yield (
            values.astype(np.float16 if codec is Codec.F16 else np.float32)
            .reshape(-1)
            .view(np.uint8)
        )


def _values(tensor: Tensor, random: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Plausible parameters: gains near 1, decays and steps as initialised in training, the rest
    normal.
    """
    if tensor.transform is Transform.NEG_EXP:
        return -random.uniform(1, 16, shape)
    if tensor.name.endswith("dt_bias"):
        step = np.exp(random.uniform(np.log(0.001), np.log(0.1), shape))
        bias: Array = step + np.log(-np.expm1(-step))  # softplus of it is the step
        return bias
    if tensor.role is Role.VECTOR:
        gain = tensor.name.endswith(("norm", "norm_f", ".d"))
        return random.uniform(0.9, 1.1, shape) if gain else random.normal(0, 0.1, shape)
    scale = 1.0 if tensor.role is Role.EMBEDDING else _deviation(tensor)
    normal = random.standard_normal(min(POOL_VALUES, shape[0] * shape[1]), np.float32)
    return np.resize(normal * np.float32(scale), shape)
