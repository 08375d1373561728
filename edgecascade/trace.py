# SPDX-License-Identifier: Apache-2.0
"""The forward pass as a graph of nodes with names, shapes and attributes; weights are inputs.

The exporter writes it as ONNX (build_engine/graph.py). Its hash, with the profiles, says whether an
engine is of this bundle and of this version of the package; no weight is read for it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from edgecascade.bundle import Bundle
from edgecascade.errors import BuildError
from edgecascade.manifest import StoredTensor
from edgecascade.models import family
from edgecascade.nodes import (
    NODES,
    PORT_KINDS,
    STRIDE_UNIT,
    Dim,
    NodeSpec,
    Port,
    state_name,
    state_output,
)
from edgecascade.ops import Kind, Op, Ops
from edgecascade.tensors import PAGE_TOKENS, Codec

LOGITS = "logits"
INT32_LIMIT = 2**31
NO_FORCE = 0  # the routing that moe records lives in the workspace: nobody can set it

MAX_SEQUENCES = 8  # of a decode step
SLOTS = MAX_SEQUENCES + 1  # one belongs to no sequence
PREFILL_CHUNK = 512
OUT_ROWS = 64  # of a prefill step: all of a small chunk, for teacher forcing

Profile = Mapping[str, tuple[int, int, int]]  # named size -> least, likely, most


@dataclass(frozen=True)
class Tensor:
    """A value of the graph; a string in `shape` is a size that is known at run time."""

    name: str
    dtype: str  # "int32", "float32" or "float16"
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Node:
    """One op of the pass."""

    name: str
    spec: NodeSpec
    attributes: Mapping[str, int | float]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass
class Graph:
    """Nodes in order, and what the engine takes and gives."""

    nodes: list[Node] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class Tracer(Ops):
    """An interpreter of `Ops` that writes a graph down."""

    def __init__(self, kv_type: Codec) -> None:
        self.graph = Graph()
        self._defaults = {"kv_type": kv_type.ec_type, "force": NO_FORCE}

    def call(self, op: Op, layer: int, fields: Mapping[str, Any]) -> Tensor:
        """Add the op's node; its output."""
        spec = NODES[op.name]
        values = {**self._defaults, **fields}
        attributes = node_attributes(spec, values)
        name = op.name if layer < 0 else f"layers.{layer}.{op.name}.{len(self.graph.nodes)}"
        inputs = tuple(
            self._input(spec, port, attributes, layer, values) for port in spec.present(attributes)
        )
        outputs = tuple(
            Tensor(
                _output_name(op, name, layer, port),
                spec.dtype(port, attributes),
                spec.shape(port, attributes),
            )
            for port in spec.outputs
        )
        self.graph.nodes.append(Node(name, spec, attributes, inputs, outputs))
        kept = outputs if op.name == "head" else outputs[1:]
        self.graph.outputs.update({tensor.name: tensor for tensor in kept})
        return outputs[0]

    def _input(
        self,
        spec: NodeSpec,
        port: Port,
        attributes: Mapping[str, Any],
        layer: int,
        values: Mapping[str, Any],
    ) -> Tensor:
        tensor = Tensor(
            _input_name(port, layer, values),
            spec.dtype(port, attributes),
            spec.shape(port, attributes),
        )
        if port.kind is Kind.INPUT:
            made: Tensor = values[port.name]
            if made.shape != tensor.shape:
                raise BuildError(
                    f"layer {layer}: {spec.type} takes {list(tensor.shape)} as {port.name}, "
                    f"{made.name} is {list(made.shape)}"
                )
            return made
        known = self.graph.inputs.setdefault(tensor.name, tensor)
        if known != tensor:
            raise BuildError(f"{tensor.name} is {known.shape} and {tensor.shape} in one graph")
        return known


def _input_name(port: Port, layer: int, values: Mapping[str, Any]) -> str:
    if port.kind is Kind.STATE:
        return state_name(layer, port.name)
    if port.kind in (None, Kind.TOKENS):
        return port.name
    value = values[port.name]
    return str((value.gamma if port.kind is Kind.NORM else value).name)


def _output_name(op: Op, name: str, layer: int, port: Port) -> str:
    if port.kind is Kind.STATE:
        return state_output(layer, port.name)
    return LOGITS if op.name == "head" else f"{name}.{port.name}"


def node_attributes(spec: NodeSpec, fields: Mapping[str, Any]) -> dict[str, int | float]:
    """The attributes of a node whose op is called with these fields.

    Raises:
        BuildError: for a value that the parser would cut to 32 bits.
    """
    made: dict[str, int | float] = {}
    for each in spec.op.fields:
        name, value = each.name, fields.get(each.name)
        if each.optional and each.kind in PORT_KINDS:
            made[f"has_{name}"] = int(value is not None)
        if each.kind is Kind.NORM:
            made[f"{name}_eps"] = 0.0 if value is None else float(value.eps)
            made[f"{name}_groups"] = 1 if value is None else int(value.groups)
        elif each.kind is Kind.WEIGHT:
            made.update(_weight_attributes(name, value))
        elif each.kind is Kind.INT:
            made[name] = int(fields[name])
        elif each.kind is Kind.FLOAT:
            made[name] = float(fields[name])
    large = {name: value for name, value in made.items() if abs(value) >= INT32_LIMIT}
    if large:
        raise BuildError(f"{spec.type}: {large} do not fit 32 bits, which is all a parser passes")
    return made


def _weight_attributes(name: str, weight: StoredTensor | None) -> dict[str, int]:
    if weight is None:
        parts = {"type": 0, "n": 0, "k": 0, "experts": 0, "stride": 0}
    else:
        n, k = weight.matrix
        parts = {
            "type": weight.codec.ec_type,
            "n": n,
            "k": k,
            "experts": weight.experts,
            "stride": weight.stride // STRIDE_UNIT,
        }
    return {f"{name}_{part}": value for part, value in parts.items()}


def trace(
    model_type: str, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], kv_type: str
) -> Graph:
    """The graph of a model whose tensors are stored like this; no weight is read."""
    model = family(model_type)
    tracer = Tracer(Codec(kv_type))
    model.forward(tracer, model.read_config(config), tensors)
    return tracer.graph


def trace_bundle(bundle: Bundle) -> Graph:
    """The graph of a bundle."""
    return trace(bundle.family, bundle.config, bundle.tensors, bundle.kv_type)


def profiles(graph: Graph, max_context: int) -> tuple[Profile, Profile]:
    """Ranges of the named sizes for a decode and for a prefill step.

    How many pages a device has memory for is decided when the engine is loaded; the range ends
    where the largest state would pass 2^31 values, which TensorRT 10.3 cannot count.
    """
    max_pages = -(-max_context // PAGE_TOKENS)
    page_values = max((_values(t) for t in graph.inputs.values() if "pages" in t.shape), default=1)
    most = max(1, min(SLOTS * max_pages, (INT32_LIMIT - 1) // page_values))
    state = {
        "slots": (1, SLOTS, SLOTS),
        "pages": (1, most, most),
        "max_pages": (1, max_pages, max_pages),
    }
    step, chunk = (1, 1, MAX_SEQUENCES), (1, PREFILL_CHUNK, PREFILL_CHUNK)
    decode = {**state, "n_tok": step, "n_seq": step, "n_out": step}
    prefill = {**state, "n_tok": chunk, "n_seq": (1, 1, 1), "n_out": (1, 1, OUT_ROWS)}
    return decode, prefill


def dims(tensor: Tensor, profile: Profile) -> tuple[tuple[int, ...], ...]:
    """Least, likely and largest shape of a tensor."""
    return tuple(tuple(_size(dim, profile, which) for dim in tensor.shape) for which in range(3))


def _size(dim: Dim, profile: Profile, which: int) -> int:
    if isinstance(dim, int):
        return dim
    name, _, more = dim.partition(" + ")
    return profile[name][which] + int(more or 0)


def _values(tensor: Tensor) -> int:
    return math.prod(dim for dim in tensor.shape if isinstance(dim, int))


def graph_hash(graph: Graph, max_context: int) -> str:
    """Digest of all that a plan is made from."""
    content = {
        "nodes": [
            [n.name, n.spec.type, n.attributes, [t.name for t in n.inputs], [*n.outputs]]
            for n in graph.nodes
        ],
        "inputs": list(graph.inputs.values()),
        "outputs": list(graph.outputs),
        "profiles": profiles(graph, max_context),
    }
    text = json.dumps(content, sort_keys=True, default=astuple)
    return hashlib.sha256(text.encode()).hexdigest()
