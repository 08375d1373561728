# SPDX-License-Identifier: Apache-2.0
"""The NumPy quantizer: its error, its limits, and that the library computes the same bits."""

from __future__ import annotations

from typing import Any

import checkpoints
import numpy as np
import pytest
import tolerances
from numpy.typing import NDArray

from build_engine.pack import numpy_packer
from build_engine.presets import PRESETS, preset
from build_engine.quantize import LARGEST, codes_and_scales, quantize
from build_engine.read import Piece, widen
from edgecascade.backends._lib import cpu_isas, cpu_library
from edgecascade.blocks import dequantize, pack_blocks
from edgecascade.errors import InvalidRequest
from edgecascade.models import nemotron_h
from edgecascade.tensors import Codec, Role, matrix_bytes

Array = NDArray[Any]
BLOCKS = [Codec.U4_64, Codec.I8_64]


def rows(kind: str, n: int, k: int) -> Array:
    random = np.random.default_rng([n, k])
    normal = random.standard_normal((n, k)).astype(np.float32)
    if kind == "heavy tails":
        return random.standard_t(3, (n, k)).astype(np.float32)
    if kind == "many magnitudes":
        return normal * np.float32(10) ** random.integers(-12, -2, (n, k)).astype(np.float32)
    if kind == "at the limit":
        return np.clip(normal * 3e5, -LARGEST[Codec.U4_64], LARGEST[Codec.U4_64])
    if kind == "ties":
        return np.round(normal * 2) / 2
    if kind == "sparse":
        return normal * (random.random((n, k)) < 0.02)
    return normal


def relative(codec: Codec, values: Array) -> float:
    data = pack_blocks(codec, *codes_and_scales(codec, values))
    stored = dequantize(codec, data, *values.shape)
    return float(np.linalg.norm(stored - values) / np.linalg.norm(values))


def test_error_of_gaussian_rows_is_that_of_the_format() -> None:
    values = rows("normal", 256, 1024)
    assert relative(Codec.U4_64, values) <= tolerances.U4_GAUSSIAN
    assert relative(Codec.I8_64, values) <= tolerances.I8_GAUSSIAN


def test_searched_scale_is_never_worse_than_the_largest_value_on_minus_eight() -> None:
    values = rows("heavy tails", 64, 512)
    groups = values.reshape(-1, 64)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    scale = (peak / -8).astype(np.float16).astype(np.float32)
    plain = np.clip(np.rint(groups / scale), -8, 7) * scale
    found = dequantize(
        Codec.U4_64, pack_blocks(Codec.U4_64, *codes_and_scales(Codec.U4_64, values)), 64, 512
    ).reshape(-1, 64)
    error = np.square(found - groups).sum(axis=1)
    # Both sums round; equal choices differ in the last bits.
    assert (error <= np.square(plain - groups).sum(axis=1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("codec", BLOCKS)
def test_values_that_have_codes_survive_exactly(codec: Codec) -> None:
    top = 7 if codec is Codec.U4_64 else 127
    codes = np.random.default_rng(1).integers(-top, top + 1, (40, 130)).astype(np.float32)
    codes[:, ::64] = top  # each group shows its scale
    values = codes * np.float32(0.25)
    data = pack_blocks(codec, *codes_and_scales(codec, values))
    np.testing.assert_array_equal(dequantize(codec, data, 40, 130), values)


@pytest.mark.parametrize("codec", BLOCKS)
def test_zeros_stay_zero_with_scale_zero(codec: Codec) -> None:
    codes, scales = codes_and_scales(codec, np.zeros((3, 70), np.float32))
    assert not scales.view(np.uint16).any()
    assert (codes == (8 if codec is Codec.U4_64 else 0)).all()


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("codec", BLOCKS)
@pytest.mark.parametrize(
    "kind", ["normal", "heavy tails", "many magnitudes", "at the limit", "ties", "sparse"]
)
@pytest.mark.parametrize("shape", [(32, 64), (33, 65), (7, 3), (70, 200)])
def test_library_packs_the_same_bytes(
    isa: str, codec: Codec, kind: str, shape: tuple[int, int]
) -> None:
    library = cpu_library(isa)
    stream = library.stream(2)
    values = rows(kind, *shape)
    for dtype in ("f32", "bf16", "f16"):
        if dtype == "f16" and kind == "at the limit":
            continue  # beyond float16 itself
        source = values if dtype == "f32" else checkpoints.encode(values, dtype.upper())[1]
        found = np.empty(matrix_bytes(codec, *shape), np.uint8)
        library.pack(stream, source, dtype, codec, found)
        expected = pack_blocks(codec, *codes_and_scales(codec, widen(source, dtype)))
        np.testing.assert_array_equal(found, expected)
    stream.close()


@pytest.mark.parametrize("codec", BLOCKS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_library_and_numpy_refuse_what_has_no_scale(codec: Codec, bad: float) -> None:
    values = rows("normal", 40, 100)
    values[35, 70] = bad
    with pytest.raises(InvalidRequest, match="a value is beyond"):
        numpy_packer(Piece(0, 0, values, "f32"), codec)
    library = cpu_library()
    stream = library.stream(1)
    out = np.empty(matrix_bytes(codec, 40, 100), np.uint8)
    with pytest.raises(InvalidRequest, match="row 35, column 70"):
        library.pack(stream, values, "f32", codec, out)
    stream.close()


def test_presets_keep_router_and_vectors_in_float32_and_cover_every_role() -> None:
    for chosen in PRESETS.values():
        assert chosen.codecs.keys() == set(Role)
        assert chosen.codecs[Role.ROUTER] is chosen.codecs[Role.VECTOR] is Codec.F32
    assert set(preset("exact").codecs.values()) == {Codec.F32}
    assert preset("exact").kv_type == "f32"


def test_quality_spends_bytes_on_what_is_sensitive() -> None:
    tensors = nemotron_h.tensors(nemotron_h.read_config(checkpoints.CONFIG))
    codec = {tensor.name: codec for tensor, codec in quantize(tensors, "quality")}
    assert codec["layers.2.qkv"] is codec["lm_head"] is Codec.I8_64
    assert codec["layers.1.experts_up"] is codec["layers.3.up"] is Codec.U4_64
    pattern = {**checkpoints.CONFIG, "hybrid_override_pattern": "MM*-"}
    tensors = nemotron_h.tensors(nemotron_h.read_config(pattern))
    codec = {tensor.name: codec for tensor, codec in quantize(tensors, "quality")}
    assert codec["layers.0.in_proj"] is Codec.U4_64
    assert codec["layers.1.in_proj"] is codec["layers.1.out_proj"] is Codec.I8_64


def test_unknown_preset_is_refused_with_the_choices() -> None:
    with pytest.raises(
        InvalidRequest, match="'fp8'; choose one of exact, quality, balanced, speed"
    ):
        quantize([], "fp8")
