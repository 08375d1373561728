# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H: Mamba-2, attention, mixture-of-experts and dense layers, one mixer each, pre-norm,
no positional encoding.

Nemotron-Cascade-2-30B-A3B, Nemotron-3-Nano-30B-A3B, Nemotron-Nano-9B-v2 and Nemotron-3-Nano-4B are
configurations of it. The maths follows transformers 5.x `models/nemotron_h` but for one point: dt
is never clamped (docs/model.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgecascade.errors import UnsupportedModel
from edgecascade.models.config import ConfigReader
from edgecascade.ops import Activation, Norm, Ops, Value
from edgecascade.tensors import KvState, Role, SlotState, State, Tensor, Transform

# Ten times what the largest members have. A size that nobody has would list tensors until memory is
# out, before the first one is found missing.
MAX_LAYERS = 1000
MAX_EXPERTS = 200_000  # of all layers together

KINDS = {  # both spellings of the layer list, and the pattern's letters
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}

# Keys of config.json that change nothing in the forward pass, by the reason why.
HARMLESS: dict[str, tuple[str, ...]] = {
    "names of files, classes and versions": (
        "architectures",
        "auto_map",
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "torch_dtype",
        "dtype",
        "model_type",
    ),
    "no layer reads them: the family has no positional encoding": (
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "partial_rotary_factor",
    ),
    "initialisation and training only": (
        "initializer_range",
        "rescale_prenorm_residual",
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "attention_dropout",
        "hidden_dropout",
        "dropout",
        "output_router_logits",
        "router_aux_loss_coef",
        "gradient_checkpointing",
        "use_return_dict",
    ),
    "how another runtime executes, not what it computes": (
        "use_cache",
        "use_mamba_kernels",
        "num_logits_to_keep",
        "mamba_ssm_cache_dtype",
        "moe_shared_expert_overlap",
        "residual_in_fp32",
        "_attn_implementation",
        "_experts_implementation",
        "attn_implementation",
        "experts_implementation",
        "is_decoder",
        "is_encoder_decoder",
        "add_cross_attention",
        "chunk_size_feed_forward",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        "pruned_heads",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "finetuning_task",
        "tokenizer_class",
        "prefix",
        "sep_token_id",
        "decoder_start_token_id",
        "task_specific_params",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ),
    "the inner width is mamba_num_heads x mamba_head_dim": ("expand",),
    "layer_norm_epsilon is the one that every norm uses": ("norm_eps", "rms_norm_eps"),
    "the draft head for speculation is not loaded": (
        "num_nextn_predict_layers",
        "mtp_layers_block_type",
        "mtp_hybrid_override_pattern",
    ),
}


@dataclass(frozen=True)
class Config:
    """The numbers of config.json that the forward pass uses."""

    layers: str  # one letter a layer: M Mamba-2, * attention, E mixture of experts, - dense
    hidden: int
    vocab: int
    max_context: int
    eps: float
    tied: bool
    mamba_heads: int
    mamba_head_dim: int
    groups: int
    state: int
    conv_kernel: int
    conv_bias: bool
    chunk: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    experts: int
    top_k: int
    expert_ff: int
    shared_ff: int
    n_group: int
    topk_group: int
    normalize: bool
    routed_scale: float

    @property
    def inner(self) -> int:
        """Channels of x and z in a Mamba-2 layer: heads x head_dim, not expand x hidden."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state


def read_config(raw: Mapping[str, Any]) -> Config:
    """Read config.json strictly.

    Raises:
        UnsupportedModel: for a key that is neither used nor known to be harmless, a missing key, a
            value out of range, or one that asks for maths which is not implemented; the message
            names the key and the value.
    """
    read = ConfigReader(raw)
    layers = _layers(read)
    has: Callable[[str], bool] = layers.__contains__
    for key, allowed in (
        ("mamba_hidden_act", "silu"),
        ("mlp_hidden_act", "relu2"),
        ("use_bias", False),
        ("mamba_proj_bias", False),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("sliding_window", None),
        ("moe_latent_size", None),
        ("n_shared_experts", 1),
    ):
        read.only(key, allowed)
    _check_time_step_limit(read)
    config = Config(
        layers=layers,
        hidden=read.size("hidden_size"),
        vocab=read.size("vocab_size"),
        max_context=read.size("max_position_embeddings"),
        eps=read.number("layer_norm_epsilon"),
        tied=read.flag("tie_word_embeddings", default=False),
        mamba_heads=read.size("mamba_num_heads", needed=has("M")),
        mamba_head_dim=read.size("mamba_head_dim", needed=has("M")),
        groups=read.size("n_groups", needed=has("M")),
        state=read.size("ssm_state_size", needed=has("M")),
        conv_kernel=read.size("conv_kernel", needed=has("M")),
        conv_bias=read.flag("use_conv_bias", default=True),
        chunk=read.size("chunk_size", needed=False) or 128,
        heads=read.size("num_attention_heads", needed=has("*")),
        kv_heads=read.size("num_key_value_heads", needed=has("*")),
        head_dim=read.size("head_dim", needed=has("*")),
        ff=read.size("intermediate_size", needed=has("-")),
        experts=read.size("n_routed_experts", needed=has("E")),
        top_k=read.size("num_experts_per_tok", needed=has("E")),
        expert_ff=read.size("moe_intermediate_size", needed=has("E")),
        shared_ff=read.size("moe_shared_expert_intermediate_size", needed=has("E")),
        n_group=read.size("n_group", needed=False) or 1,
        topk_group=read.size("topk_group", needed=False) or 1,
        normalize=read.flag("norm_topk_prob", default=True),
        routed_scale=read.number("routed_scaling_factor", default=1.0),
    )
    read.finish(HARMLESS)
    _check(config)
    return config


def _layers(read: ConfigReader) -> str:
    """The layer kinds, from `hybrid_override_pattern` or from either spelling of the list."""
    spellings = {}
    pattern = read.optional("hybrid_override_pattern")
    if pattern is not None:
        spellings["hybrid_override_pattern"] = str(pattern)
    for key in ("layers_block_type", "layer_types"):
        names = read.optional(key)
        if names is not None:
            if not isinstance(names, list):
                raise UnsupportedModel(f"config.json {key} is {names!r}; expected a list of kinds")
            unknown = sorted({str(name) for name in names} - KINDS.keys())
            if unknown:
                raise UnsupportedModel(
                    f"config.json {key} names layer kinds {unknown}; known: {sorted(KINDS)}"
                )
            spellings[key] = "".join(KINDS[name] for name in names)
    if not spellings:
        raise UnsupportedModel(
            "config.json has neither hybrid_override_pattern nor layers_block_type"
        )
    if len(set(spellings.values())) > 1:
        raise UnsupportedModel(
            f"config.json contradicts itself about the layers: {str(spellings)[:1000]}"
        )
    (layers,) = set(spellings.values())
    if len(layers) > MAX_LAYERS:
        raise UnsupportedModel(
            f"config.json lists {len(layers)} layers; at most {MAX_LAYERS} are read"
        )
    unknown = sorted(set(layers) - set(KINDS.values()))
    if unknown or not layers:
        raise UnsupportedModel(
            f"config.json layer pattern {layers!r} has unknown letters {unknown}; known: M * E -"
        )
    count = read.size("num_hidden_layers", needed=False) or len(layers)
    if count != len(layers):
        raise UnsupportedModel(
            f"config.json num_hidden_layers is {count}, but the pattern has {len(layers)}"
        )
    return layers


def _check_time_step_limit(read: ConfigReader) -> None:
    """Only an upper limit changes the maths; the lower one is a clamp others do not apply."""
    limit = read.optional("time_step_limit")
    if limit is None:
        return
    pair = isinstance(limit, list | tuple) and len(limit) == 2
    lower, upper = limit if pair else (0.0, limit)
    if isinstance(upper, dict):  # transformers writes {"__float__": "Infinity"}
        upper = upper.get("__float__")
    if upper not in (float("inf"), "Infinity", "inf") or type(lower) not in (int, float):
        raise UnsupportedModel(
            f"config.json time_step_limit is {limit}; only an infinite upper limit is implemented"
        )


def _check(c: Config) -> None:
    """Relations between sizes that the kernels rely on."""

    def multiple(what: str, value: int, of: str, divisor: int) -> None:
        if value % divisor:
            raise UnsupportedModel(
                f"config.json: {what} = {value} is not a multiple of {of} = {divisor}"
            )

    if "M" in c.layers:
        multiple("mamba_num_heads", c.mamba_heads, "n_groups", c.groups)
        if not 2 <= c.conv_kernel <= 8:
            raise UnsupportedModel(
                f"config.json: conv_kernel = {c.conv_kernel}; 2 to 8 are implemented"
            )
    if "*" in c.layers:
        multiple("num_attention_heads", c.heads, "num_key_value_heads", c.kv_heads)
    if "E" in c.layers:
        if c.experts * c.layers.count("E") > MAX_EXPERTS:
            raise UnsupportedModel(
                f"config.json: n_routed_experts = {c.experts} in each of {c.layers.count('E')} "
                f"layers; at most {MAX_EXPERTS} in all are read"
            )
        multiple("n_routed_experts", c.experts, "n_group", c.n_group)
        kept = c.experts // c.n_group * c.topk_group
        if c.topk_group > c.n_group or c.top_k > kept:
            raise UnsupportedModel(
                f"config.json: num_experts_per_tok = {c.top_k} of {kept} experts in "
                f"topk_group = {c.topk_group} of n_group = {c.n_group} groups is impossible"
            )


def tensors(c: Config) -> list[Tensor]:
    """Every tensor of the bundle, in the order in which a forward pass reads them."""
    vector, linear = Role.VECTOR, _linear
    made = [linear("embeddings", Role.EMBEDDING, c.vocab, c.hidden, "embeddings.weight")]
    for i, kind in enumerate(c.layers):
        to, at = f"layers.{i}.", f"layers.{i}.mixer."
        made.append(_vector(to + "norm", c.hidden, f"layers.{i}.norm.weight"))
        if kind == "M":
            feeds_attention = c.layers[i + 1 : i + 2] == "*"
            role = Role.MAMBA_BEFORE_ATTENTION if feeds_attention else Role.MAMBA
            rows = 2 * c.inner + 2 * c.groups * c.state + c.mamba_heads
            conv = ((at + "conv1d.weight", (c.channels, 1, c.conv_kernel)),)
            bias = _vector(to + "conv_bias", c.channels, at + "conv1d.bias")
            a_log = ((at + "A_log", (c.mamba_heads,)),)
            made += [
                linear(to + "in_proj", role, rows, c.hidden, at + "in_proj.weight"),
                Tensor(
                    to + "conv_weight", vector, (c.conv_kernel, c.channels), conv, Transform.CONV
                ),
                *([bias] if c.conv_bias else []),
                Tensor(to + "a", vector, (c.mamba_heads,), a_log, Transform.NEG_EXP),
                _vector(to + "d", c.mamba_heads, at + "D"),
                _vector(to + "dt_bias", c.mamba_heads, at + "dt_bias"),
                _vector(to + "gate_norm", c.inner, at + "norm.weight"),
                linear(to + "out_proj", role, c.hidden, c.inner, at + "out_proj.weight"),
            ]
        elif kind == "*":
            q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
            sources = tuple(
                (f"{at}{name}_proj.weight", (rows, c.hidden))
                for name, rows in (("q", q), ("k", kv), ("v", kv))
            )
            made += [
                Tensor(to + "qkv", Role.ATTENTION, (q + 2 * kv, c.hidden), sources),
                linear(to + "o_proj", Role.ATTENTION, c.hidden, q, at + "o_proj.weight"),
            ]
        elif kind == "E":
            shared, f = at + "shared_experts.", c.shared_ff
            role, routed, count = Role.SHARED_EXPERT, at + "experts.", c.experts
            made += [
                linear(to + "router", Role.ROUTER, c.experts, c.hidden, at + "gate.weight"),
                _vector(to + "router_bias", c.experts, at + "gate.e_score_correction_bias"),
                _experts(to + "experts_up", count, c.expert_ff, c.hidden, routed, "up_proj"),
                _experts(to + "experts_down", count, c.hidden, c.expert_ff, routed, "down_proj"),
                linear(to + "shared_up", role, f, c.hidden, shared + "up_proj.weight"),
                linear(to + "shared_down", role, c.hidden, f, shared + "down_proj.weight"),
            ]
        else:
            made += [
                linear(to + "up", Role.MLP, c.ff, c.hidden, at + "up_proj.weight"),
                linear(to + "down", Role.MLP, c.hidden, c.ff, at + "down_proj.weight"),
            ]
    made.append(_vector("norm_f", c.hidden, "norm_f.weight"))
    # transformers ties no weights in this family, whatever the config says: a stored head counts.
    # One that was tied when it was saved equals the embeddings; they replace one that was not.
    head = linear("lm_head", Role.HEAD, c.vocab, c.hidden, "lm_head.weight")
    return [*made, replace(head, instead=made[0].sources[0] if c.tied else None)]


def _linear(name: str, role: Role, rows: int, columns: int, source: str) -> Tensor:
    return Tensor(name, role, (rows, columns), ((source, (rows, columns)),))


def _vector(name: str, size: int, source: str) -> Tensor:
    return Tensor(name, Role.VECTOR, (size,), ((source, (size,)),))


def _experts(name: str, experts: int, rows: int, columns: int, prefix: str, proj: str) -> Tensor:
    sources = tuple((f"{prefix}{j}.{proj}.weight", (rows, columns)) for j in range(experts))
    shape = (experts, rows, columns)
    return Tensor(
        name, Role.EXPERT, shape, sources, Transform.EXPERTS, instead=(prefix + proj, shape)
    )


def states(c: Config) -> list[State]:
    """What a sequence carries from token to token, by layer."""
    made: list[State] = []
    for i, kind in enumerate(c.layers):
        if kind == "M":
            conv, ssm = (c.conv_kernel, c.channels), (c.mamba_heads, c.mamba_head_dim, c.state)
            made += [SlotState(i, "conv", conv), SlotState(i, "ssm", ssm)]
        elif kind == "*":
            made.append(KvState(i, c.kv_heads, c.head_dim))
    return made


def forward(ops: Ops, c: Config, w: Mapping[str, Value]) -> Value:
    """The forward pass: h = h + mixer(norm(h)) for each layer, then the head."""
    x = ops.embed(w["embeddings"])
    for i, kind in enumerate(c.layers):
        x = MIXERS[kind](ops, c, w, i, Norm(w[f"layers.{i}.norm"], c.eps), x)
    return ops.head(x, w["lm_head"], norm=Norm(w["norm_f"], c.eps))


def _mamba(ops: Ops, c: Config, w: Mapping[str, Value], i: int, norm: Norm, x: Value) -> Value:
    p = f"layers.{i}."
    zxbcdt = ops.linear(i, x, w[p + "in_proj"], norm=norm)
    y = ops.mamba(
        i,
        zxbcdt,
        conv_weight=w[p + "conv_weight"],
        conv_bias=w.get(p + "conv_bias"),
        a=w[p + "a"],
        d=w[p + "d"],
        dt_bias=w[p + "dt_bias"],
        heads=c.mamba_heads,
        head_dim=c.mamba_head_dim,
        groups=c.groups,
        state=c.state,
        kernel=c.conv_kernel,
        chunk=c.chunk,
    )
    # The gate came first, inside the op; the norm is over each group, not over the row.
    return ops.linear(
        i, y, w[p + "out_proj"], norm=Norm(w[p + "gate_norm"], c.eps, c.groups), residual=x
    )


def _attention(ops: Ops, c: Config, w: Mapping[str, Value], i: int, norm: Norm, x: Value) -> Value:
    p = f"layers.{i}."
    qkv = ops.linear(i, x, w[p + "qkv"], norm=norm)
    scale = c.head_dim**-0.5
    y = ops.attention(i, qkv, heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, scale=scale)
    return ops.linear(i, y, w[p + "o_proj"], residual=x)


def _moe(ops: Ops, c: Config, w: Mapping[str, Value], i: int, norm: Norm, x: Value) -> Value:
    p = f"layers.{i}."
    return ops.moe(
        i,
        x,
        norm=norm,
        router=w[p + "router"],
        bias=w[p + "router_bias"],
        up=w[p + "experts_up"],
        down=w[p + "experts_down"],
        shared_up=w[p + "shared_up"],
        shared_down=w[p + "shared_down"],
        top_k=c.top_k,
        n_group=c.n_group,
        topk_group=c.topk_group,
        normalize=int(c.normalize),
        scale=c.routed_scale,
    )


def _mlp(ops: Ops, c: Config, w: Mapping[str, Value], i: int, norm: Norm, x: Value) -> Value:
    p = f"layers.{i}."
    up = ops.linear(i, x, w[p + "up"], norm=norm, act=Activation.RELU2)
    return ops.linear(i, up, w[p + "down"], residual=x)


MIXERS = {"M": _mamba, "*": _attention, "E": _moe, "-": _mlp}
