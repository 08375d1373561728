# SPDX-License-Identifier: Apache-2.0
"""The exported graph, judged by the ONNX project and by onnxruntime: it means what the reference
computes, for every op, codec and shape, and stays within what TensorRT's parsers read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from golden import Build
from graphs import Evaluate, GraphBackend, onnx_project, onnxruntime
from models import SHAPES, graph_of_shapes, random_shape, write_bundle, write_shape
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tolerances import EXACT_LOGITS

from build_engine.decompose import matrices, with_functions, without_functions
from build_engine.graph import to_onnx
from build_engine.onnx_body import Body
from edgecascade.backends import open_backend
from edgecascade.blocks import dequantize, pack_blocks
from edgecascade.bundle import Bundle
from edgecascade.errors import BuildError
from edgecascade.manifest import StoredTensor
from edgecascade.nodes import BY_TYPE, DOMAIN, NODES, STRIDE_UNIT
from edgecascade.tensors import Codec, Role
from edgecascade.trace import dims, graph_hash, node_attributes, profiles, trace, trace_bundle

EVALUATORS = {"onnx": onnx_project, "onnxruntime": onnxruntime}
SLOTS, CONTEXT = 8, 192
Tokens = NDArray[np.int32]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every shape with float weights, one also in each codec of blocks."""
    folder = tmp_path_factory.mktemp("shapes")
    made = {}
    for name in SHAPES:
        for precision in ("exact", "quality") if name == "odd" else ("exact",):
            place = folder / f"{name}-{precision}"
            place.mkdir()
            made[name, precision] = write_bundle(place, name, precision)
    return made


def play(bundle: Bundle, evaluator: str, lengths: dict[int, int], decodes: int) -> None:
    """Prefill several slots in one step, decode them all in another order; each row against the
    reference, which knows nothing of slots, pages and rings.
    """
    graph = GraphBackend(bundle, EVALUATORS[evaluator], SLOTS, CONTEXT)
    reference = open_backend("reference", bundle, slots=1, max_context=CONTEXT)
    random = np.random.default_rng(5)
    held = {s: random.integers(0, reference.vocab, n, np.int32) for s, n in lengths.items()}
    rows = np.split(
        graph.step(list(held), list(held.values())), np.cumsum([*lengths.values()])[:-1]
    )
    for slot, found in zip(held, rows, strict=True):
        np.testing.assert_allclose(found, reference.logits(held[slot]), atol=EXACT_LOGITS, rtol=0)
    for _ in range(decodes):
        order = list(held)[::-1]
        tokens = [random.integers(0, reference.vocab, 1, np.int32) for _ in order]
        found = graph.step(order, tokens)
        for slot, token, row in zip(order, tokens, found, strict=True):
            held[slot] = np.concatenate([held[slot], token])
            expected = reference.logits(held[slot])[-1]
            np.testing.assert_allclose(row, expected, atol=EXACT_LOGITS, rtol=0)


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("precision", ["exact", "quality", "balanced", "speed"])
def test_the_demos_graph_computes_what_the_reference_does(
    build: Build, precision: str, evaluator: str
) -> None:
    with Bundle.open(build("tiny", precision)) as bundle:
        play(bundle, evaluator, {0: 67, 2: 9, 1: 1}, decodes=3)


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("name", SHAPES)
def test_awkward_shapes(bundles: dict[tuple[str, str], Path], name: str, evaluator: str) -> None:
    with Bundle.open(bundles[name, "exact"]) as bundle:
        play(bundle, evaluator, {5: 3, 0: 12}, decodes=2)


@pytest.mark.parametrize("precision", ["exact", "speed"])
@pytest.mark.parametrize("seed", range(4))
def test_random_models(tmp_path: Path, seed: int, precision: str) -> None:
    with Bundle.open(write_shape(tmp_path, "random", random_shape(seed), precision)) as bundle:
        play(bundle, "onnxruntime", {5: 1, 3: 70, 0: 12}, decodes=2)


def test_both_block_codecs_with_sizes_that_are_no_multiple_of_a_block(
    bundles: dict[tuple[str, str], Path],
) -> None:
    with Bundle.open(bundles["odd", "quality"]) as bundle:
        assert {t.codec for t in bundle.tensors.values()} >= {Codec.U4_64, Codec.I8_64, Codec.F16}
        play(bundle, "onnx", {3: 5}, decodes=1)


def test_one_hundred_and_twenty_nine_tokens(build: Build) -> None:
    """Past a page, past the chunk of the scan, past a power of two."""
    with Bundle.open(build("tiny", "exact")) as bundle:
        play(bundle, "onnxruntime", {4: 129}, decodes=1)


def test_eight_sequences_of_different_lengths(build: Build) -> None:
    with Bundle.open(build("tiny", "exact")) as bundle:
        lengths = dict(zip([6, 1, 7, 0, 3, 2, 5, 4], [1, 2, 3, 4, 30, 63, 64, 65], strict=True))
        play(bundle, "onnxruntime", lengths, decodes=3)


def test_a_prompt_in_two_pieces_is_the_prompt(build: Build) -> None:
    with Bundle.open(build("tiny", "exact")) as bundle:
        graph = GraphBackend(bundle, onnxruntime, SLOTS, CONTEXT)
        reference = open_backend("reference", bundle, slots=1, max_context=CONTEXT)
        tokens = np.random.default_rng(6).integers(0, reference.vocab, 70, np.int32)
        found = np.concatenate([graph.step([2], [tokens[:3]]), graph.step([2], [tokens[3:]])])
        np.testing.assert_allclose(found, reference.logits(tokens), atol=EXACT_LOGITS, rtol=0)


@pytest.mark.parametrize("codec", [Codec.U4_64, Codec.I8_64])
@pytest.mark.parametrize(("n", "k", "experts"), [(32, 64, 1), (33, 65, 3), (1, 1, 2)])
def test_unpacking_is_exact_for_every_code_and_scale(
    codec: Codec, n: int, k: int, experts: int
) -> None:
    """Negative, subnormal, zero and the largest scales; every code that a block can hold."""
    random = np.random.default_rng(n)
    low, high = (0, 16) if codec is Codec.U4_64 else (-127, 128)
    scales = np.array([6e-8, 3e-5, 6.1e-5, 1.0, -2.5, 0.0, 65504.0], np.float16)
    packed, dense = [], []
    for _ in range(experts):
        codes = random.integers(low, high, (n, k)).astype(np.int16)
        blocks = pack_blocks(codec, codes, random.choice(scales, (n, -(-k // 64))))
        packed.append(np.pad(blocks, (0, -len(blocks) % STRIDE_UNIT)))
        dense.append(dequantize(codec, blocks, n, k))
    words = np.stack(packed).view(np.int32)
    body = Body()
    attributes = {"w_type": codec.ec_type, "w_n": n, "w_k": k, "w_experts": experts}
    body.give(matrices(body, attributes, "w"), "dense")
    graph = helper.make_graph(
        body.nodes,
        "unpack",
        [helper.make_tensor_value_info("w", TensorProto.INT32, words.shape)],
        [helper.make_tensor_value_info("dense", TensorProto.FLOAT, [experts, n, k])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    run: Evaluate
    for run in (onnx_project(model), onnxruntime(model)):
        np.testing.assert_array_equal(run({"w": words})["dense"], np.stack(dense))


def test_with_functions_it_is_plain_onnx_and_without_them_it_is_what_it_was(build: Build) -> None:
    with Bundle.open(build("tiny", "speed")) as bundle:
        model = to_onnx(trace_bundle(bundle))
    plain = with_functions(model)
    onnx.checker.check_model(plain, full_check=True)
    assert {f.name for f in plain.functions} == {node.op_type for node in plain.graph.node}
    assert without_functions(plain) == model


def test_a_wrong_decomposition_is_noticed(build: Build) -> None:
    """The comparison can fail: one constant of one function off by one bit of meaning."""
    with Bundle.open(build("tiny", "exact")) as bundle:
        plain = with_functions(to_onnx(trace_bundle(bundle)))
        (head,) = (f for f in plain.functions if f.name.startswith("EcHead"))
        eps = next(
            node.attribute[0].t
            for node in head.node
            if node.op_type == "Constant" and numpy_helper.to_array(node.attribute[0].t).ndim == 0
        )
        eps.CopyFrom(numpy_helper.from_array(np.float32(1e-2)))
        evaluate = onnx_project(plain)
        backend = GraphBackend(bundle, lambda _: evaluate, SLOTS, CONTEXT)
        reference = open_backend("reference", bundle, slots=1, max_context=CONTEXT)
        tokens = np.arange(5, dtype=np.int32)
        found = backend.step([0], [tokens])
        assert np.abs(found - reference.logits(tokens)).max() > EXACT_LOGITS


@pytest.mark.parametrize(
    "name", ["nemotron-3-nano-30b", "nemotron-3-nano-4b", "nemotron-nano-9b-v2"]
)
def test_real_models_stay_within_what_the_parsers_read(name: str) -> None:
    graph, _ = graph_of_shapes(name)
    model = to_onnx(graph)
    assert 18 <= model.opset_import[0].version <= 20
    assert model.ir_version <= 10
    assert model.ByteSize() < 1 << 20
    assert not model.graph.initializer
    allowed = {TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT16}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        assert value.type.tensor_type.elem_type in allowed
        assert len(value.type.tensor_type.shape.dim) <= 8
    for node in model.graph.node:
        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        spec = BY_TYPE[node.op_type]
        assert (node.domain, found.pop("plugin_version")) == (DOMAIN, b"1")
        assert found.pop("plugin_namespace") == DOMAIN.encode()
        assert found.keys() == {a.name for a in spec.attributes}
        assert all(abs(value) < 2**31 for value in found.values())
        assert all(node.input)
        assert len(node.input) == len(spec.present(found))


def test_every_state_feeds_one_node_and_leaves_it(build: Build) -> None:
    with Bundle.open(build("tiny", "speed")) as bundle:
        graph = trace_bundle(bundle)
    states = [name for name in graph.inputs if ".state." in name]
    assert states
    for name in states:
        (owner,) = (n for n in graph.nodes if name in [t.name for t in n.inputs])
        assert name + ".out" in [t.name for t in owner.outputs]
        assert graph.inputs[name].shape == graph.outputs[name + ".out"].shape
        assert graph.inputs[name].dtype == graph.outputs[name + ".out"].dtype


@pytest.mark.parametrize("name", ["nemotron-3-nano-30b", "nemotron-nano-9b-v2"])
def test_no_tensor_of_a_profile_has_more_values_than_tensorrt_10_3_counts(name: str) -> None:
    graph, context = graph_of_shapes(name)
    decode, prefill = profiles(graph, context)
    for tensor in graph.inputs.values():
        for profile in (decode, prefill):
            least, likely, most = dims(tensor, profile)
            assert all(0 < a <= b <= c for a, b, c in zip(least, likely, most, strict=True))
            assert np.prod(most, dtype=np.int64) < 2**31


def test_an_attribute_that_a_parser_would_cut_is_refused() -> None:
    table = StoredTensor("embeddings", Role.EMBEDDING, Codec.F32, (2**31, 1), "", 0, 2**33)
    with pytest.raises(BuildError, match=r"table_n.*32 bits"):
        node_attributes(NODES["embed"], {"table": table})


def test_the_hash_changes_with_anything_that_a_plan_is_made_from(build: Build) -> None:
    with Bundle.open(build("tiny", "speed")) as bundle:
        args = (bundle.family, bundle.config, bundle.tensors, bundle.kv_type)
        base = graph_hash(trace(*args), 4096)
        assert base == graph_hash(trace_bundle(bundle), 4096)
        changed = {
            base,
            graph_hash(trace(*args), 8192),
            graph_hash(trace(*args[:3], "f32"), 4096),
            graph_hash(
                trace(*args[:1], {**bundle.config, "layer_norm_epsilon": 1e-6}, *args[2:]), 4096
            ),
        }
        assert len(changed) == 4
    with Bundle.open(build("tiny", "quality")) as other:
        assert graph_hash(trace_bundle(other), 4096) not in changed
