# SPDX-License-Identifier: Apache-2.0
"""Bundles of small random models with awkward shapes, and graphs of real models without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np

from build_engine import synthetic
from build_engine.pipeline import build
from build_engine.quantize import quantize
from edgecascade.manifest import StoredTensor
from edgecascade.models import family, nemotron_h
from edgecascade.trace import Graph, trace

# What breaks things: sizes that are no multiple of a block, one key head and several, one group
# and several, routing over all experts or over groups of them, dense layers, no convolution bias.
SHAPES: dict[str, dict[str, Any]] = {
    "odd": {},
    "one-group": {"n_groups": 1, "num_key_value_heads": 3, "use_conv_bias": False},
    "expert-groups": {
        "hybrid_override_pattern": "EME",
        "num_hidden_layers": 3,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
    },
    "single-expert-groups": {
        "hybrid_override_pattern": "E",
        "num_hidden_layers": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
    },
    "dense": {
        "hybrid_override_pattern": "-*-",
        "num_hidden_layers": 3,
        "hidden_size": 33,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 7,
        "intermediate_size": 65,
    },
    "short-kernel": {"hybrid_override_pattern": "MM", "num_hidden_layers": 2, "conv_kernel": 2},
}


def random_shape(seed: int) -> dict[str, Any]:
    """A model of up to four layers that nobody would train."""
    random = np.random.default_rng([23, seed])

    def pick(low: int, high: int) -> int:
        return int(random.integers(low, high + 1))

    groups, kv_heads, n_group = pick(1, 3), pick(1, 3), pick(1, 3)
    topk_group, per_group = pick(1, n_group), pick(1, 4)
    layers = "".join(random.choice(list("ME*-"), pick(1, 4)))
    return {
        "hybrid_override_pattern": layers,
        "num_hidden_layers": len(layers),
        "hidden_size": pick(1, 140),
        "vocab_size": pick(2, 150),
        "mamba_num_heads": groups * pick(1, 3),
        "mamba_head_dim": pick(1, 20),
        "n_groups": groups,
        "ssm_state_size": pick(1, 20),
        "conv_kernel": pick(2, 8),
        "use_conv_bias": bool(pick(0, 1)),
        "num_attention_heads": kv_heads * pick(1, 3),
        "num_key_value_heads": kv_heads,
        "head_dim": pick(1, 40),
        "intermediate_size": pick(1, 140),
        "n_routed_experts": n_group * per_group,
        "n_group": n_group,
        "topk_group": topk_group,
        "num_experts_per_tok": pick(1, topk_group * per_group),
        "moe_intermediate_size": pick(1, 140),
        "moe_shared_expert_intermediate_size": pick(1, 140),
        "norm_topk_prob": bool(pick(0, 1)),
        "routed_scaling_factor": pick(1, 5) / 2,
    }


def write_bundle(folder: Path, name: str, precision: str) -> Path:
    """A bundle of one of SHAPES with weights of the size that training leaves."""
    return write_shape(folder, name, SHAPES[name], precision)


def write_shape(folder: Path, name: str, sizes: dict[str, Any], precision: str) -> Path:
    """A bundle of these sizes."""
    config = {**checkpoints.CONFIG, **sizes}
    tensors: checkpoints.Arrays = {}
    for i, tensor in enumerate(nemotron_h.tensors(nemotron_h.read_config(config))):
        for j, (source, shape) in enumerate(tensor.sources):
            random = np.random.default_rng([11, i, j])
            gain = np.sqrt(shape[-1]) if len(shape) > 1 else 2.0
            values = random.standard_normal(shape) / gain
            if source.endswith(("norm.weight", "norm_f.weight", ".D")):
                values += 1.0
            tensors[source] = checkpoints.encode(values.astype(np.float32), "F32")
    checkpoint = checkpoints.write(folder / f"{name}-checkpoint", tensors, **sizes)
    out = folder / f"{name}-{precision}"
    build(checkpoint, out, precision=precision, verify=False)
    return out


def graph_of_shapes(name: str, precision: str = "speed") -> tuple[Graph, int]:
    """The graph of a model that nobody has to download, and the context it is made for."""
    raw = synthetic.config(name)
    model = family(raw["model_type"])
    config = model.read_config(raw)
    tensors = {
        tensor.name: StoredTensor(
            tensor.name, tensor.role, codec, tensor.shape, "", 0, tensor.stored_bytes(codec)
        )
        for tensor, codec in quantize(model.tensors(config), precision)
    }
    kv_type = "f32" if precision == "exact" else "f16"
    return trace(raw["model_type"], raw, tensors, kv_type), config.max_context
