# SPDX-License-Identifier: Apache-2.0
"""A family that nobody has: attention, then a dense MLP, in each layer. Written as
docs/architecture.md says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgecascade.models.config import ConfigReader
from edgecascade.ops import Activation, Norm, Ops, Value
from edgecascade.tensors import KvState, Role, State, Tensor

HARMLESS = {"names": ("model_type",), "the build reads it": ("eos_token_id",)}


@dataclass(frozen=True)
class Config:
    """The numbers of config.json that the forward pass uses."""

    layers: int
    hidden: int
    vocab: int
    max_context: int
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    top_k: int = 0


def read_config(raw: Mapping[str, Any]) -> Config:
    """Read config.json strictly."""
    read = ConfigReader(raw)
    config = Config(
        layers=read.size("num_hidden_layers"),
        hidden=read.size("hidden_size"),
        vocab=read.size("vocab_size"),
        max_context=read.size("max_position_embeddings"),
        eps=read.number("rms_norm_eps"),
        heads=read.size("num_attention_heads"),
        kv_heads=read.size("num_key_value_heads"),
        head_dim=read.size("head_dim"),
        ff=read.size("intermediate_size"),
    )
    read.finish(HARMLESS)
    return config


def tensors(c: Config) -> list[Tensor]:
    """Every tensor, in the order of the forward pass; the head is the embeddings."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    embeddings = _tensor("embeddings", Role.EMBEDDING, (c.vocab, c.hidden), "embed_tokens.weight")
    made = [embeddings]
    for i in range(c.layers):
        to = f"layers.{i}."
        at = to + "self_attn."
        sources = tuple(
            (f"{at}{name}_proj.weight", (rows, c.hidden))
            for name, rows in (("q", q), ("k", kv), ("v", kv))
        )
        made += [
            _tensor(to + "norm", Role.VECTOR, (c.hidden,), to + "input_layernorm.weight"),
            Tensor(to + "qkv", Role.ATTENTION, (q + 2 * kv, c.hidden), sources),
            _tensor(to + "o_proj", Role.ATTENTION, (c.hidden, q), at + "o_proj.weight"),
            _tensor(to + "mlp_norm", Role.VECTOR, (c.hidden,), to + "mlp.norm.weight"),
            _tensor(to + "up", Role.MLP, (c.ff, c.hidden), to + "mlp.up_proj.weight"),
            _tensor(to + "down", Role.MLP, (c.hidden, c.ff), to + "mlp.down_proj.weight"),
        ]
    made.append(_tensor("norm_f", Role.VECTOR, (c.hidden,), "norm.weight"))
    return [*made, Tensor("lm_head", Role.HEAD, embeddings.shape, embeddings.sources)]


def _tensor(name: str, role: Role, shape: tuple[int, ...], source: str) -> Tensor:
    return Tensor(name, role, shape, ((source, shape),))


def states(c: Config) -> list[State]:
    """Keys and values of every layer."""
    return [KvState(i, c.kv_heads, c.head_dim) for i in range(c.layers)]


def forward(ops: Ops, c: Config, w: Mapping[str, Value]) -> Value:
    """x = x + attention(norm(x)); x = x + mlp(norm(x)), for each layer, then the head."""
    x = ops.embed(w["embeddings"])
    for i in range(c.layers):
        p = f"layers.{i}."
        qkv = ops.linear(i, x, w[p + "qkv"], norm=Norm(w[p + "norm"], c.eps))
        sizes = {"heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim}
        y = ops.attention(i, qkv, scale=c.head_dim**-0.5, **sizes)
        x = ops.linear(i, y, w[p + "o_proj"], residual=x)
        norm = Norm(w[p + "mlp_norm"], c.eps)
        up = ops.linear(i, x, w[p + "up"], norm=norm, act=Activation.RELU2)
        x = ops.linear(i, up, w[p + "down"], residual=x)
    return ops.head(x, w["lm_head"], norm=Norm(w["norm_f"], c.eps))
