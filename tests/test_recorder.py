# SPDX-License-Identifier: Apache-2.0
"""Recording a forward pass: buffers are shared only by values that never live together."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from edgecascade.backends.recorder import Recorder, assign_buffers
from edgecascade.models import nemotron_h
from edgecascade.ops import Activation, Kind


@dataclass(frozen=True)
class Shape:
    n: int
    k: int


def config(layers: str) -> nemotron_h.Config:
    raw = {
        "model_type": "nemotron_h", "hybrid_override_pattern": layers, "hidden_size": 96,
        "vocab_size": 50, "max_position_embeddings": 512, "layer_norm_epsilon": 1e-5,
        "mamba_num_heads": 6, "mamba_head_dim": 20, "n_groups": 2, "ssm_state_size": 16,
        "conv_kernel": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "intermediate_size": 100, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 40, "moe_shared_expert_intermediate_size": 80,
    }  # fmt: skip
    return nemotron_h.read_config(raw)


def record(layers: str) -> Recorder:
    model = config(layers)
    weights = {
        t.name: Shape(*t.shape[-2:]) if len(t.shape) > 1 else None
        for t in nemotron_h.tensors(model)
    }
    recorder = Recorder()
    nemotron_h.forward(recorder, model, weights)
    return recorder


@pytest.mark.parametrize("layers", ["M", "*", "E", "-", "MEM*EM*E", "M-M*-", "EEEE", "**M*"])
def test_no_value_is_overwritten_before_its_last_use(layers: str) -> None:
    """Replay the pass with value identities in the buffers: every input must still be there."""
    recorder = record(layers)
    columns = assign_buffers(recorder.calls)
    holds: dict[int, object] = {}
    for call in recorder.calls:
        for field in call.op.fields_of(Kind.INPUT):
            value = call.fields.get(field.name)
            if value is not None:
                assert holds[value.buffer] is value, (call.op.name, field.name)
        if not call.output.of_head:
            assert call.output.columns <= columns[call.output.buffer]
            holds[call.output.buffer] = call.output


def test_output_never_takes_the_memory_of_an_input_that_the_op_still_reads() -> None:
    """Only the field named in_place may share the output's buffer."""
    recorder = record("MEM*EM*E-")
    assign_buffers(recorder.calls)
    for call in recorder.calls:
        for field in call.op.fields_of(Kind.INPUT):
            value = call.fields.get(field.name)
            if value is not None and field.name != call.op.in_place and not call.output.of_head:
                assert value.buffer != call.output.buffer


def test_the_residual_stream_stays_in_one_buffer() -> None:
    recorder = record("MEM*EM*E-")
    columns = assign_buffers(recorder.calls)
    streams = {
        c.output.buffer for c in recorder.calls if c.op.in_place and c.fields.get(c.op.in_place)
    }
    assert len(streams) == 1
    assert len(columns) <= 3


def test_relu_squared_is_recorded_for_the_dense_layer_only() -> None:
    acts = [c.fields["act"] for c in record("M-").calls if c.op.name == "linear"]
    assert acts == [Activation.IDENTITY, Activation.IDENTITY, Activation.RELU2, Activation.IDENTITY]
