# SPDX-License-Identifier: Apache-2.0
"""One table, edgecascade/ops.py, says what an op is. Header, reference, decomposition, plugins and
docs/tensorrt.md follow it, and each that is left behind by a change is noticed here.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import AttributeProto

from build_engine.decompose import DECOMPOSITIONS
from build_engine.onnx_body import Body
from edgecascade.backends import _lib, _trt_plugins
from edgecascade.backends._trt_plugins import NodeCall
from edgecascade.backends.reference import Evaluator
from edgecascade.errors import InvalidRequest
from edgecascade.manifest import StoredTensor
from edgecascade.nodes import LETTERS, NODES, PORT_KINDS, NodeSpec, evaluate
from edgecascade.ops import OPS, Activation, Field, Kind, Norm, Op
from edgecascade.tensors import Codec, Role
from edgecascade.trace import Tensor, Tracer, node_attributes

ROOT = Path(__file__).resolve().parent.parent.parent
HEADER = (ROOT / "plugins" / "include" / "edgecascade.h").read_text()
DOCS = ROOT / "docs" / "tensorrt.md"

# Numbers that every node of an op has in the checks below.
SIZES: dict[str, dict[str, Any]] = {
    "embed": {"table_n": 9, "table_k": 6},
    "linear": {"w_n": 10, "w_k": 6, "act": 1},
    "mamba": {"heads": 4, "head_dim": 3, "groups": 2, "state": 5, "kernel": 4, "chunk": 8},
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "scale": 0.5, "kv_type": 0},
    "moe": {"top_k": 2, "n_group": 2, "topk_group": 1, "normalize": 1, "force": 0, "scale": 2.5},
    "head": {"w_n": 10, "w_k": 6},
}
for _name, _n, _k in (("up", 7, 6), ("down", 6, 7), ("shared_up", 5, 6), ("shared_down", 6, 5)):
    SIZES["moe"] |= {f"{_name}_n": _n, f"{_name}_k": _k}
EXPERTS = 4
# What only the kernels need: how to cut a prompt, which routing to force, how the cache is stored,
# and what the reference sees by the shape of an array.
KERNELS_ONLY = {"chunk", "force", "kv_type", "kernel"}


def attributes(spec: NodeSpec) -> dict[str, Any]:
    """All of a node's attributes, every optional input present, float32 weights."""
    made: dict[str, Any] = {}
    for name, is_float in spec.attributes:
        _, _, part = name.rpartition("_")
        default = {"eps": 1e-5, "stride": 16, "type": Codec.F32.ec_type}.get(part, 1)
        made[name] = SIZES[spec.op.name].get(name, float(default) if is_float else default)
    if spec.op.name == "moe":
        made |= {"up_experts": EXPERTS, "down_experts": EXPERTS}
    return made


# What each follower of the table lacks; an empty list when it is up to date.


def header_gaps(op: Op) -> list[str]:
    """Fields of the op's struct that differ in plugins/include/edgecascade.h."""
    text = re.sub(r"//[^\n]*", "", HEADER)
    found = re.search(rf"typedef struct ec_{op.name} \{{(.*?)\}}", text, re.S)
    names = re.findall(r"(\w+);", found[1]) if found else []
    return [] if names == [f.name for f in op.fields] else [f"ec_{op.name} has {names}"]


class Watched(dict[str, Any]):
    """Fields of a call that remember who asked for them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


class DenseMatrix:
    """A weight of ones, as the reference takes it."""

    is_block = False

    def __init__(self, n: int, k: int) -> None:
        self.shape = (n, k)
        self.bundle, self.name = self, ""

    def dense(self, expert: int = 0) -> Any:
        return np.full(self.shape, 0.1 * (expert + 1), np.float32)

    def matrix(self, name: str) -> Any:
        return self.dense()


def reference_gaps(spec: NodeSpec, tokens: int = 3) -> list[str]:
    """Fields that the reference does not read, or reads but the table does not have."""
    known = attributes(spec)
    counts = {"n_tok": tokens, "n_out": tokens}
    fields = Watched()
    states: dict[str, Any] = {}
    for field in spec.op.fields:
        port = next((p for p in spec.inputs if p.name == field.name), None)
        if field.kind is Kind.STATE and field.name == "kv":
            states["kv"] = np.zeros((2, 0, known["kv_heads"], known["head_dim"]), np.float32)
        elif field.kind is Kind.STATE and port is not None:
            shape = [int(d) for d in spec.shape(port, known)[1:]]
            shape[0] -= field.name == "conv"
            states[field.name] = np.zeros(shape, np.float32)
        elif field.kind is Kind.WEIGHT:
            fields[field.name] = DenseMatrix(known[f"{field.name}_n"], known[f"{field.name}_k"])
        elif field.kind is Kind.NORM and port is not None:
            gamma = np.ones([int(d) for d in spec.shape(port, known)], np.float32)
            fields[field.name] = Norm(gamma, 1e-5)
        elif field.kind in (Kind.INPUT, Kind.VECTOR) and port is not None:
            shape = [counts[d] if isinstance(d, str) else d for d in spec.shape(port, known)]
            fields[field.name] = np.ones(shape, np.float32)
        elif field.kind in (Kind.INT, Kind.FLOAT):
            fields[field.name] = known[field.name]
    evaluator = Evaluator(np.zeros(tokens, np.int32), {0: states})
    try:
        evaluator.call(spec.op, 0, fields)
    except (KeyError, ValueError) as error:
        return [f"the reference fails: {error!r}"]
    return sorted(fields.keys() ^ fields.read - KERNELS_ONLY ^ KERNELS_ONLY & fields.keys())


def decomposition_gaps(spec: NodeSpec) -> list[str]:
    """Inputs that the standard operators do not read, and outputs that they do not make."""
    body = Body()
    try:
        results = DECOMPOSITIONS[spec.op.name](body, attributes(spec))
    except KeyError as error:
        return [f"no decomposition: {error}"]
    used = set(_names(body.nodes))
    lacking = [p.name for p in spec.inputs if p.name not in used]
    return lacking if len(results) == len(spec.outputs) else [*lacking, "an output"]


def _names(nodes: Any) -> Iterator[str]:
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _names(attribute.g.node)


def plugin_gaps(spec: NodeSpec) -> list[str]:
    """Fields of the op's struct that a plugin leaves empty."""
    known = attributes(spec)

    class Kit:
        library = None

    try:
        call = NodeCall(spec, known, Kit())
        everything = [256 * (i + 1) for i in range(len(spec.inputs) + len(spec.outputs))]
        call._bind(everything[: len(spec.inputs)], everything[len(spec.inputs) :], 1 << 20)
    except (AttributeError, KeyError) as error:
        return [str(error)]
    empty = []
    for field in spec.op.fields:
        value = getattr(call._args, field.name)
        if isinstance(value, _lib.Weight):
            value = value.data and value.n and value.k and value.experts and value.expert_stride
        elif isinstance(value, _lib.NormArgs):
            value = value.gamma and value.eps and value.groups
        if not value and field.name not in KERNELS_ONLY and field.kind is not Kind.TABLE:
            empty.append(field.name)
    return empty


def table(nodes: Mapping[str, NodeSpec]) -> str:
    """The table of docs/tensorrt.md."""
    lines = ["| node | inputs | outputs | attributes |", "| --- | --- | --- | --- |"]
    for spec in nodes.values():
        inputs = " ".join(f"`{p.name}`" + "?" * p.optional for p in spec.inputs)
        outputs = " ".join(f"`{p.name}`" for p in spec.outputs)
        numbers = " ".join(f"`{a.name}`" for a in spec.attributes)
        lines.append(f"| `{spec.type}` | {inputs} | {outputs} | {numbers} |")
    return "\n".join(lines)


def docs_gaps(nodes: Mapping[str, NodeSpec]) -> list[str]:
    """Rows of the table that docs/tensorrt.md lacks."""
    text = DOCS.read_text()
    return [line for line in table(nodes).splitlines() if line not in text]


@pytest.mark.parametrize("name", NODES)
def test_every_follower_of_the_table_is_up_to_date(name: str) -> None:
    spec = NODES[name]
    assert header_gaps(spec.op) == []
    assert reference_gaps(spec) == []
    assert decomposition_gaps(spec) == []
    assert plugin_gaps(spec) == []
    assert docs_gaps(NODES) == []


def renamed(op: Op) -> Op:
    """The op with its first array under another name."""
    at = next(i for i, f in enumerate(op.fields) if f.kind in (Kind.INPUT, Kind.WEIGHT))
    changed = op.fields[at]._replace(name="renamed")
    return replace(op, fields=(*op.fields[:at], changed, *op.fields[at + 1 :]))


def with_one_more(op: Op) -> Op:
    """The op with one more array of parameters."""
    return replace(op, fields=(*op.fields, Field("extra", Kind.VECTOR, "9")))


@pytest.mark.parametrize("change", [renamed, with_one_more])
@pytest.mark.parametrize("name", NODES)
def test_a_change_of_the_table_is_followed_or_noticed(
    name: str, change: Callable[[Op], Op], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plugins and exporter are made from the table; who is written by hand is told."""
    op = change(OPS[name])
    spec = NodeSpec(op)
    monkeypatch.setitem(SIZES, name, {**SIZES[name], "renamed_n": 9, "renamed_k": 6})
    letters = {x: text.replace("table_", "renamed_") for x, text in LETTERS[name].items()}
    if change is renamed:  # the letters of shapes are names of the table too
        monkeypatch.setitem(LETTERS, name, letters)
    monkeypatch.setitem(_trt_plugins.ARGS, name, _lib._struct(op))
    assert plugin_gaps(spec) == []
    monkeypatch.setitem(NODES, name, spec)
    assert exported_inputs(op) == [port.name for port in spec.inputs]
    assert header_gaps(op)
    assert decomposition_gaps(spec)
    assert reference_gaps(spec)
    assert docs_gaps(NODES)


def exported_inputs(op: Op) -> list[str]:
    """The inputs that the exporter gives a node, every field named as itself."""
    spec = NODES[op.name]
    known = attributes(spec)
    fields: dict[str, Any] = {}
    for field in op.fields:
        port = next((p for p in spec.inputs if p.name == field.name), None)
        if field.kind is Kind.WEIGHT:
            sizes = [known[f"{field.name}_{part}"] for part in ("experts", "n", "k")]
            shape = tuple(sizes if sizes[0] > 1 else sizes[1:])
            role, codec = Role.EXPERT, Codec.F32
            fields[field.name] = StoredTensor(field.name, role, codec, shape, "", 0, 0)
        elif field.kind in (Kind.INT, Kind.FLOAT):
            fields[field.name] = known[field.name]
        elif port is not None and field.kind is not Kind.STATE:
            made = Tensor(field.name, "float32", ())
            fields[field.name] = Norm(made, 1e-5) if field.kind is Kind.NORM else made
    # An activation must have the very shape that the node expects.
    exact = node_attributes(spec, {"kv_type": 0, "force": 0, **fields})
    for port in spec.inputs:
        if port.kind is Kind.INPUT:
            fields[port.name] = Tensor(port.name, "float32", spec.shape(port, exact))
    tracer = Tracer(Codec.F32)
    tracer.call(op, 0, fields)
    return [tensor.name.rpartition(".")[2] for tensor in tracer.graph.nodes[0].inputs]


@pytest.mark.parametrize("name", NODES)
def test_the_plugins_struct_follows_the_table(name: str) -> None:
    fields = [field[0] for field in _lib.ARGS[name]._fields_]
    assert fields == [field.name for field in OPS[name].fields]
    assert ctypes.sizeof(_lib.ARGS[name]) > 0


@pytest.mark.parametrize(
    ("text", "value"), [("2HP+2GN+H", 2 * 6 + 2 * 20 + 2), ("(H+2G)P", 30), ("9", 9), ("HP", 6)]
)
def test_shapes_are_sums_of_products(text: str, value: int) -> None:
    assert evaluate(text, {"H": 2, "P": 3, "G": 4, "N": 5}) == value


@pytest.mark.parametrize("text", ["H-P", "H**P", "__import__('os')", "H/2", "'a'"])
def test_nothing_else_is_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match="sum of products"):
        evaluate(text, {"H": 2, "P": 3})


def shapes_of(name: str, sizes: Mapping[str, int]) -> list[list[int]]:
    spec, known = NODES[name], attributes(NODES[name])
    made = []
    for port in spec.present(known):
        shape = []
        for dim in spec.shape(port, known):
            if isinstance(dim, str):
                base, _, more = dim.partition(" + ")
                dim = sizes[base] + int(more or 0)
            shape.append(dim)
        made.append(shape)
    return made


STEP = {"n_tok": 5, "n_seq": 2, "n_out": 3, "slots": 4, "pages": 7, "max_pages": 2}


@pytest.mark.parametrize("name", NODES)
def test_sizes_come_back_from_shapes(name: str) -> None:
    sizes = NODES[name].sizes(attributes(NODES[name]), shapes_of(name, STEP))
    assert sizes
    assert {size: STEP[size] for size in sizes} == sizes


@pytest.mark.parametrize("name", NODES)
def test_every_wrong_shape_is_refused(name: str) -> None:
    """One more in any dimension that the attributes fix, or that another input fixes."""
    spec = NODES[name]
    shapes = shapes_of(name, STEP)
    free = _free_sizes(name)
    for at, (port, shape) in enumerate(zip(spec.present(attributes(spec)), shapes, strict=True)):
        for axis, dim in enumerate(spec.shape(port, attributes(spec))):
            wrong = [list(s) for s in shapes]
            wrong[at][axis] = shape[axis] + 1
            if isinstance(dim, str) and dim.partition(" + ")[0] in free:
                assert spec.sizes(attributes(spec), wrong)
                continue
            with pytest.raises(InvalidRequest, match=spec.type):
                spec.sizes(attributes(spec), wrong)
    with pytest.raises(InvalidRequest, match="inputs, expected"):
        spec.sizes(attributes(spec), shapes[1:])


def _free_sizes(name: str) -> set[str]:
    """Named sizes that stand in a single place of a node's inputs."""
    spec = NODES[name]
    dims = [
        str(dim).partition(" + ")[0]
        for port in spec.present(attributes(spec))
        for dim in spec.shape(port, attributes(spec))
        if isinstance(dim, str)
    ]
    return {dim for dim in dims if dims.count(dim) == 1}


def test_a_step_with_one_token_for_each_sequence_is_a_decode() -> None:
    for spec in NODES.values():
        assert spec.code(4, 4) == spec.op.codes[0]
        assert spec.code(5, 4) == spec.op.codes[1]


def test_ports_are_the_kinds_that_travel() -> None:
    assert {Kind.INPUT, Kind.WEIGHT, Kind.STATE} <= set(PORT_KINDS)
    assert not {Kind.OUTPUT, Kind.RECORD, Kind.TABLE} & set(PORT_KINDS)
    assert SIZES["linear"]["act"] == Activation.RELU2
