# SPDX-License-Identifier: Apache-2.0
"""The forward pass as an ONNX graph whose nodes are our ops. Weights and states are its inputs.

    graph = trace("nemotron_h", config, tensors, kv_type)     pure: names, shapes, attributes
    model = to_onnx(graph)                                    a few hundred kB, whatever the model

Opset and IR version are what the parser of TensorRT 10.3 reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgecascade.bundle import Bundle
from edgecascade.errors import BuildError
from edgecascade.manifest import StoredTensor
from edgecascade.models import family
from edgecascade.nodes import (
    DOMAIN,
    NODES,
    PORT_KINDS,
    STRIDE_UNIT,
    VERSION,
    Dim,
    NodeSpec,
    Port,
    state_name,
    state_output,
)
from edgecascade.ops import Kind, Op, Ops
from edgecascade.tensors import Codec

if TYPE_CHECKING:
    import onnx

OPSET = 18
IR_VERSION = 9
LOGITS = "logits"
INT32_LIMIT = 2**31
# The kernel records routing there only for tests; inside an engine it lives in the workspace.
NO_FORCE = 0


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


def to_onnx(graph: Graph) -> onnx.ModelProto:
    """The graph as ONNX: every node is one of ours, for a runtime that has our plugins."""
    from onnx import helper

    nodes = [
        helper.make_node(
            node.spec.type,
            [tensor.name for tensor in node.inputs],
            [tensor.name for tensor in node.outputs],
            node.name,
            domain=DOMAIN,
            **{"plugin_version": VERSION, "plugin_namespace": DOMAIN, **node.attributes},
        )
        for node in graph.nodes
    ]
    between = [tensor for node in graph.nodes for tensor in node.outputs]
    made = helper.make_graph(
        nodes,
        "forward",
        [_value_info(tensor) for tensor in graph.inputs.values()],
        [_value_info(tensor) for tensor in graph.outputs.values()],
        value_info=[_value_info(t) for t in between if t.name not in graph.outputs],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, int(VERSION))]
    return helper.make_model(
        made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgecascade"
    )


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    from onnx import TensorProto, helper

    types = {
        "int32": TensorProto.INT32,
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
    }
    return helper.make_tensor_value_info(tensor.name, types[tensor.dtype], list(tensor.shape))
