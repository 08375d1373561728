# SPDX-License-Identifier: Apache-2.0
"""A node as a call of the kernel library, without TensorRT: sizes, addresses and refusals."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from kernels import cuda_emulated
from models import graph_of_shapes

from edgecascade.backends._lib import Library, cpu_library
from edgecascade.backends._trt_plugins import Kit, NodeCall
from edgecascade.errors import BackendError, InvalidRequest
from edgecascade.trace import dims, profiles

LIBRARIES = {"cpu": cpu_library, "cuda": cuda_emulated}


def nodes(library: Library) -> list[tuple[NodeCall, Any, Any]]:
    """One call of each kind of the 30B's nodes, with the node and both profiles."""
    graph, context = graph_of_shapes("nemotron-3-nano-30b")
    kinds = {node.spec.type: node for node in graph.nodes}
    kit = Kit(library, copy=lambda *arguments: None)
    return [
        (NodeCall(node.spec, node.attributes, kit), node, profiles(graph, context))
        for node in kinds.values()
    ]


@pytest.mark.parametrize("backend", LIBRARIES)
def test_the_workspace_of_the_largest_shapes_suffices_for_all_others(backend: str) -> None:
    """TensorRT asks once, for the largest shapes of a profile, and then runs any within it."""
    random = np.random.default_rng(4)
    for call, node, both in nodes(LIBRARIES[backend]()):
        for profile in both:
            largest = [dims(tensor, profile)[2] for tensor in node.inputs]
            reserved = call.workspace_bytes(largest)
            for _ in range(60):
                sizes = {
                    n: int(random.integers(low, high + 1)) for n, (low, _, high) in profile.items()
                }
                if profile["n_seq"][2] > 1:  # a decode step
                    sizes["n_seq"] = sizes["n_out"] = sizes["n_tok"]
                fixed = {name: (size,) * 3 for name, size in sizes.items()}
                shapes = [dims(tensor, fixed)[0] for tensor in node.inputs]
                call.reshape(shapes)
                records = 2 * call._record_bytes if node.spec.op.name == "moe" else 0
                assert records + call._step.workspace_bytes <= reserved, (node.spec.type, sizes)


def test_a_call_before_its_shapes_is_refused() -> None:
    call, *_ = nodes(cpu_library())[0]
    with pytest.raises(BackendError, match="EcEmbed was started before it learned its shapes"):
        call([1, 2], [3], 0, 0)


def test_shapes_of_another_node_are_refused_by_name() -> None:
    call, *_ = nodes(cpu_library())[0]
    with pytest.raises(InvalidRequest, match="EcEmbed: input table has shape"):
        call.reshape([(5,), (1, 7)])


def test_addresses_go_where_the_struct_wants_them_and_states_are_those_of_the_output() -> None:
    for call, node, both in nodes(cpu_library()):
        shapes = [dims(tensor, both[0])[1] for tensor in node.inputs]
        call.reshape(shapes)
        inputs = [4096 * (1 + i) for i in range(len(node.inputs))]
        outputs = [1 << 30 | 4096 * i for i in range(len(node.outputs))]
        call._bind(inputs, outputs, 1 << 20)
        places = dict(
            zip((p.name for p in node.spec.present(node.attributes)), inputs, strict=True)
        )
        places |= dict(zip((p.name for p in node.spec.outputs), outputs, strict=True))
        for name, address in places.items():
            owner = call._step if hasattr(call._step, name) else call._args
            value = getattr(owner, name)
            if isinstance(value, ctypes.Structure):
                value = getattr(value, "gamma" if name == "norm" else "data")
            assert value == address, (node.spec.type, name)
