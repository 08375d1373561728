# SPDX-License-Identifier: Apache-2.0
"""The family file: config.json is read strictly; tensors and sizes are the checkpoint's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from edgecascade.errors import UnsupportedModel
from edgecascade.models import family, nemotron_h
from edgecascade.tensors import Role, SlotState

SHAPES = Path(__file__).parent.parent / "build_engine" / "shapes"


def raw(**changes: Any) -> dict[str, Any]:
    config = json.loads((SHAPES / "nemotron-3-nano-30b.json").read_text())
    config.update(changes)
    return {key: value for key, value in config.items() if value != "absent"}


def test_the_30b_has_the_published_number_of_parameters() -> None:
    """transformers 5.23 counts 31,577,937,344 parameters and 2,944 values of the routers' bias."""
    tensors = nemotron_h.tensors(nemotron_h.read_config(raw()))
    assert sum(math.prod(t.shape) for t in tensors) == 31_577_937_344 + 2_944
    assert len({t.name for t in tensors}) == len(tensors)


def test_the_30b_knows_which_mamba_layers_feed_attention() -> None:
    tensors = nemotron_h.tensors(nemotron_h.read_config(raw()))
    feeding = {t.name for t in tensors if t.role is Role.MAMBA_BEFORE_ATTENTION}
    assert feeding == {
        f"layers.{i}.{p}" for i in (4, 11, 18, 25, 32, 41) for p in ("in_proj", "out_proj")
    }


def test_the_inner_width_ignores_expand() -> None:
    config = nemotron_h.read_config(raw(expand=7))
    assert config.inner == 4096
    states = [s for s in nemotron_h.states(config) if isinstance(s, SlotState) and s.name == "ssm"]
    assert states[0].shape == (64, 64, 128)


@pytest.mark.parametrize(
    "layers",
    [
        {"hybrid_override_pattern": "ME*-", "num_hidden_layers": 4},
        {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "num_hidden_layers": 4},
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "num_hidden_layers": "absent",
        },
        {"layer_types": ["mamba", "moe", "full_attention", "mlp"], "num_hidden_layers": None},
    ],
)
def test_every_spelling_of_the_layer_list_is_read(layers: dict[str, Any]) -> None:
    changes = {"hybrid_override_pattern": "absent", **layers}
    assert nemotron_h.read_config(raw(**changes)).layers == "ME*-"


@pytest.mark.parametrize(
    "limit",
    [None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}], [0.001, math.inf], "absent"],
)
def test_an_infinite_time_step_limit_changes_nothing(limit: object) -> None:
    assert nemotron_h.read_config(raw(time_step_limit=limit)) == nemotron_h.read_config(raw())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, r"qk_norm = True"),
        ({"mystery": 1, "enigma": "x"}, r"enigma = 'x', mystery = 1"),
        ({"mlp_hidden_act": "silu"}, r"mlp_hidden_act is 'silu'; only 'relu2'"),
        ({"mamba_hidden_act": "gelu"}, r"mamba_hidden_act is 'gelu'"),
        ({"use_bias": True}, r"use_bias is True"),
        ({"attention_bias": True}, r"attention_bias is True"),
        ({"mlp_bias": True}, r"mlp_bias is True"),
        ({"sliding_window": 4096}, r"sliding_window is 4096"),
        ({"moe_latent_size": 1024}, r"moe_latent_size is 1024"),
        ({"n_shared_experts": 2}, r"n_shared_experts is 2"),
        ({"time_step_limit": [0.0, 0.1]}, r"time_step_limit is \[0.0, 0.1\]"),
        ({"time_step_limit": ["x", math.inf]}, r"time_step_limit is \['x', inf\]"),
        ({"hidden_size": "absent"}, r"lacks hidden_size"),
        ({"hidden_size": 0}, r"hidden_size is 0; expected a positive integer"),
        ({"hidden_size": 2688.0}, r"hidden_size is 2688.0"),
        ({"vocab_size": True}, r"vocab_size is True"),
        ({"layer_norm_epsilon": -1}, r"layer_norm_epsilon is -1"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings is 'no'"),
        ({"num_hidden_layers": 51}, r"num_hidden_layers is 51, but the pattern has 52"),
        ({"hybrid_override_pattern": "absent"}, r"neither hybrid_override_pattern nor"),
        ({"hybrid_override_pattern": "MEX"}, r"unknown letters \['X'\]"),
        ({"layers_block_type": ["mamba", "rwkv"]}, r"layer kinds \['rwkv'\]"),
        ({"layers_block_type": ["mamba"] * 52}, r"contradicts itself"),
        ({"layer_types": 5}, r"layer_types is 5; expected a list"),
        ({"layers_block_type": [["mamba"]]}, r"names layer kinds"),
        ({"layer_norm_epsilon": 10**400}, r"layer_norm_epsilon is 1000"),
        ({"n_groups": 7}, r"mamba_num_heads = 64 is not a multiple of n_groups = 7"),
        ({"num_key_value_heads": 3}, r"num_attention_heads = 32 is not a multiple"),
        ({"n_group": 3}, r"n_routed_experts = 128 is not a multiple of n_group = 3"),
        ({"num_experts_per_tok": 129}, r"num_experts_per_tok = 129 of 128 experts"),
        ({"n_group": 64, "topk_group": 2}, r"num_experts_per_tok = 6 of 4 experts"),
        ({"hybrid_override_pattern": "M" * 10**6}, r"lists 1000000 layers; at most 1000"),
        ({"n_routed_experts": 10**9}, r"n_routed_experts = 1000000000 in each of 23 layers"),
        ({"conv_kernel": 9}, r"conv_kernel = 9; 2 to 8"),
    ],
)
def test_what_could_change_the_result_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        nemotron_h.read_config(raw(**changes))


def test_harmless_keys_change_nothing() -> None:
    keys = {key: object() for group in nemotron_h.HARMLESS.values() for key in group}
    assert nemotron_h.read_config(raw(**keys)) == nemotron_h.read_config(raw())


def test_a_size_is_needed_only_where_a_layer_uses_it() -> None:
    dense = raw(hybrid_override_pattern="--", num_hidden_layers=2)
    for key in ("mamba_num_heads", "n_routed_experts", "num_attention_heads", "ssm_state_size"):
        del dense[key]
    assert nemotron_h.read_config(dense).layers == "--"


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match=r"model_type is 'llama'; this version reads nemo"):
        family("llama")
