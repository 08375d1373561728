# SPDX-License-Identifier: Apache-2.0
"""Runs an exported graph step by step: weights from the bundle, states in pools, as an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_engine.decompose import with_functions
from build_engine.graph import to_onnx
from edgecascade.bundle import Bundle
from edgecascade.models import family
from edgecascade.nodes import state_name, state_output
from edgecascade.state import PagePool, StatePool
from edgecascade.tensors import PAGE_TOKENS, KvState, KvType
from edgecascade.trace import Graph, trace_bundle

Array = NDArray[Any]
Evaluate = Callable[[Mapping[str, Array]], dict[str, Array]]


def onnx_project(model: Any) -> Evaluate:
    """The ONNX project's own evaluator, in NumPy."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    return lambda feeds: dict(
        zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True)
    )


def onnxruntime(model: Any) -> Evaluate:
    """Microsoft's runtime, on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, dict(feeds)), strict=True))


def weight_input(bundle: Bundle, graph: Graph, name: str) -> Array:
    """A tensor of the bundle as the graph's input of that name."""
    tensor = graph.inputs[name]
    data = bundle.map(name)
    shape = [size for size in tensor.shape if isinstance(size, int)]
    count = int(np.prod(shape))
    return np.asarray(data.view(tensor.dtype)[:count].reshape(shape))


class GraphBackend:
    """Prefill and decode through the graph of a bundle."""

    def __init__(
        self, bundle: Bundle, evaluator: Callable[[Any], Evaluate], slots: int, max_context: int
    ) -> None:
        self.graph = trace_bundle(bundle)
        self._evaluate = evaluator(with_functions(to_onnx(self.graph)))
        model = family(bundle.family)
        states = model.states(model.read_config(bundle.config))
        max_pages = -(-max_context // PAGE_TOKENS)
        self._pages = PagePool(slots * max_pages, slots, max_pages, PAGE_TOKENS)
        self._pools = StatePool(
            states,
            self._pages,
            slots=slots,
            num_pages=slots * max_pages,
            kv_type=KvType(bundle.kv_type),
        )
        self._states = [(s.layer, "kv" if isinstance(s, KvState) else s.name) for s in states]
        self._held = [0] * slots
        self._weights = {
            name: weight_input(bundle, self.graph, name)
            for name in bundle.tensors
            if name in self.graph.inputs
        }

    def step(self, slots: Sequence[int], tokens: Sequence[Array]) -> Array:
        """Give each slot its tokens; logits of every row."""
        for slot, ids in zip(slots, tokens, strict=True):
            self._pages.grow(slot, self._held[slot] + len(ids))
        lengths = [len(ids) for ids in tokens]
        step = {
            "tokens": np.concatenate(tokens),
            "start": np.cumsum([0, *lengths]),
            "slot": np.array(slots),
            "past": np.array([self._held[slot] for slot in slots]),
            "page_table": self._pages.table,
            "out_row": np.arange(sum(lengths)),
        }
        feeds = dict(self._weights)
        feeds |= {k: v.astype(np.int32) for k, v in step.items() if k in self.graph.inputs}
        feeds |= {state_name(*key): self._pools.array(*key) for key in self._states}
        made = self._evaluate(feeds)
        for key in self._states:
            self._pools.array(*key)[:] = made[state_output(*key)]
        for slot, count in zip(slots, lengths, strict=True):
            self._held[slot] += count
        return made["logits"]
