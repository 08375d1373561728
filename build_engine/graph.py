# SPDX-License-Identifier: Apache-2.0
"""A traced forward pass as an ONNX model, a few hundred kilobytes for any size of model.

Opset and IR version are what the parser of TensorRT 10.3 reads. build_engine/decompose.py makes the
same model run where our plugins are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgecascade.nodes import DOMAIN, VERSION
from edgecascade.trace import Graph, Node, Tensor

if TYPE_CHECKING:
    import onnx

OPSET = 18
IR_VERSION = 9


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
            **_attributes(node),
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


def _attributes(node: Node) -> dict[str, Any]:
    return {"plugin_version": VERSION, "plugin_namespace": DOMAIN, **node.attributes}


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    from onnx import TensorProto, helper

    types = {
        "int32": TensorProto.INT32,
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
    }
    return helper.make_tensor_value_info(tensor.name, types[tensor.dtype], list(tensor.shape))
