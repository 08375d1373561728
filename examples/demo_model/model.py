# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905  (words and names read best as one text)
"""The training forward of a small Nemotron-H in PyTorch, with the tensor names of transformers.

Rows are packed: several conversations stand in one row, and no layer sees across their borders.
docs/model.md has the equations; check_transformers.py holds the result to transformers' own code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONFIG: dict[str, Any] = {
    "layers": "MEM*EMEM*E",
    "vocab_size": 1280,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "ssm_state_size": 64,
    "conv_kernel": 4,
    "chunk_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 256,
    "routed_scaling_factor": 2.5,
    "layer_norm_epsilon": 1e-5,
}
EPS = CONFIG["layer_norm_epsilon"]
HALF = torch.bfloat16
EXPERT_ROWS = 64  # rows of an expert are padded to this: few shapes, few compiled matmuls


def is_matrix(name: str) -> bool:
    """Stored in INT4 later, multiplied in bfloat16 here."""
    return "proj" in name or name == "lm_head.weight"


def initial(seed: int) -> dict[str, Tensor]:
    """All parameters, float32."""
    c, random = CONFIG, torch.Generator().manual_seed(seed)
    d, out = c["hidden_size"], 1 / math.sqrt(2 * len(c["layers"]))

    def linear(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=random) * scale / math.sqrt(shape[-1])

    made = {
        "model.embeddings.weight": torch.randn(c["vocab_size"], d, generator=random) * 0.5,
        "lm_head.weight": linear(c["vocab_size"], d, scale=0.5),
        "model.norm_f.weight": torch.ones(d),
    }
    inner = c["mamba_num_heads"] * c["mamba_head_dim"]
    mixed = inner + 2 * c["n_groups"] * c["ssm_state_size"]
    heads, kv = (c[k] * c["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    experts, wide = c["n_routed_experts"], c["moe_intermediate_size"]
    shared = c["moe_shared_expert_intermediate_size"]
    for i, kind in enumerate(c["layers"]):
        made[f"model.layers.{i}.norm.weight"] = torch.ones(d)
        m = f"model.layers.{i}.mixer."
        if kind == "M":
            n = c["mamba_num_heads"]
            # Time steps of 1 to 100 thousandths, evenly by their logarithm.
            dt = torch.exp(torch.rand(n, generator=random) * math.log(100) + math.log(0.001))
            made |= {
                m + "in_proj.weight": linear(inner + mixed + n, d),
                m + "out_proj.weight": linear(d, inner, scale=out),
                m + "conv1d.weight": torch.rand(mixed, 1, c["conv_kernel"], generator=random) - 0.5,
                m + "conv1d.bias": torch.zeros(mixed),
                m + "dt_bias": dt + torch.log(-torch.expm1(-dt)),
                m + "A_log": torch.log(1 + 15 * torch.rand(n, generator=random)),
                m + "D": torch.ones(n),
                m + "norm.weight": torch.ones(inner),
            }
        elif kind == "*":
            made |= {
                m + "q_proj.weight": linear(heads, d),
                m + "k_proj.weight": linear(kv, d),
                m + "v_proj.weight": linear(kv, d),
                m + "o_proj.weight": linear(d, heads, scale=out),
            }
        else:
            down = 2 * out / c["routed_scaling_factor"]
            made |= {
                m + "gate.weight": torch.randn(experts, d, generator=random) * 0.02,
                m + "gate.e_score_correction_bias": torch.zeros(experts),
                m + "experts.up_proj": linear(experts, wide, d),
                m + "experts.down_proj": linear(experts, d, wide, scale=down),
                m + "shared_experts.up_proj.weight": linear(shared, d),
                m + "shared_experts.down_proj.weight": linear(d, shared, scale=out),
            }
    return made


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def mamba(
    x: Tensor,  # [B, T, d], the float32 residual
    same: Tensor,  # [B, T, K-1], 1 where the token k steps back is of the same conversation
    norm_weight: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    skip: Tensor,
    gate_norm: Tensor,
    out_proj: Tensor,
) -> Tensor:
    c = CONFIG
    (B, T, _), H, P = x.shape, c["mamba_num_heads"], c["mamba_head_dim"]
    G, N, K, Q = c["n_groups"], c["ssm_state_size"], c["conv_kernel"], c["chunk_size"]
    inner, C = H * P, T // Q
    projected = norm(x, norm_weight).to(HALF) @ in_proj.t()
    gate, xbc, dt = projected.split([inner, inner + 2 * G * N, H], -1)
    xbc = xbc.float()
    mixed = xbc * conv_weight[:, 0, K - 1] + conv_bias
    for k in range(1, K):
        past = F.pad(xbc, (0, 0, k, 0))[:, :T] * same[..., k - 1 : k]
        mixed = mixed + past * conv_weight[:, 0, K - 1 - k]
    xs, Bm, Cm = F.silu(mixed).split([inner, G * N, G * N], -1)
    dt = F.softplus(dt.float() + dt_bias)
    decay = -torch.exp(a_log) * dt - 60.0 * (
        1 - same[..., :1]
    )  # a new conversation wipes the state
    xs = xs.reshape(B, C, Q, H, P)
    xh = (xs * dt.reshape(B, C, Q, H, 1)).to(HALF).permute(0, 1, 3, 2, 4)
    a = decay.reshape(B, C, Q, H).permute(0, 1, 3, 2).cumsum(-1)  # [B, C, H, Q]
    Bm = Bm.reshape(B, C, Q, G, N).to(HALF).permute(0, 1, 3, 2, 4)
    Cm = Cm.reshape(B, C, Q, G, N).to(HALF).permute(0, 1, 3, 2, 4)
    past_only = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    weights = torch.where(past_only, a[..., :, None] - a[..., None, :], -1e30).exp()
    scores = torch.matmul(Cm, Bm.transpose(-1, -2))[:, :, :, None].float()
    within = (weights.reshape(B, C, G, H // G, Q, Q) * scores).to(HALF).reshape(B, C, H, Q, Q)
    y = torch.matmul(within, xh).float()
    if C > 1:  # what the chunks before left in the state

        def by_head(v: Tensor) -> Tensor:
            return v[:, :, :, None].expand(B, C, G, H // G, Q, N).reshape(B, C, H, Q, N)

        to_end = (a[..., -1:] - a).exp()[..., None].to(HALF)
        added = torch.matmul((xh * to_end).transpose(-1, -2), by_head(Bm)).float()
        kept = a[..., -1].exp()[..., None, None]
        states = [torch.zeros_like(added[:, 0])]
        for k in range(C - 1):
            states.append(states[-1] * kept[:, k] + added[:, k])
        before = torch.stack(states, 1).to(HALF).transpose(-1, -2)
        y = y + torch.matmul(by_head(Cm), before).float() * a.exp()[..., None]
    y = y.permute(0, 1, 3, 2, 4) + xs * skip[:, None]
    y = (y.reshape(B, T, inner) * F.silu(gate.float())).reshape(B, T, G, inner // G)
    y = norm(y, gate_norm.view(G, inner // G)).reshape(B, T, inner)
    return x + (y.to(HALF) @ out_proj.t()).float()


def attention(
    x: Tensor, mask: Tensor, norm_weight: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor
) -> Tensor:
    B, T, _ = x.shape
    heads, size = CONFIG["num_attention_heads"], CONFIG["head_dim"]
    shared_by = heads // CONFIG["num_key_value_heads"]
    h = norm(x, norm_weight).to(HALF)
    q, k, v = ((h @ w.t()).view(B, T, -1, size).transpose(1, 2) for w in (wq, wk, wv))
    k, v = k.repeat_interleave(shared_by, 1), v.repeat_interleave(shared_by, 1)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * size**-0.5 + mask
    y = torch.matmul(scores.softmax(-1).to(HALF), v).transpose(1, 2).reshape(B, T, heads * size)
    return x + (y @ wo.t()).float()


def route(
    x: Tensor, norm_weight: Tensor, gate: Tensor, bias: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input of the experts, their ids and weights, and the residual with the shared expert."""
    h = norm(x, norm_weight)
    scores = (h @ gate.t()).sigmoid()
    ids = torch.topk(scores + bias, CONFIG["num_experts_per_tok"], -1, sorted=False)[1]
    weights = scores.gather(-1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * CONFIG["routed_scaling_factor"]
    h = h.to(HALF)
    return h, ids, weights, x + (relu2(h @ up.t()) @ down.t()).float()


class Experts(torch.autograd.Function):
    """All routed experts: tokens sorted by expert, one matmul an expert, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
        n, k = ids.shape
        flat = ids.reshape(-1)
        count = torch.bincount(flat, minlength=up.shape[0])
        padded = (count + EXPERT_ROWS - 1) // EXPERT_ROWS * EXPERT_ROWS
        order = flat.argsort(stable=True)
        shift = (padded.cumsum(0) - padded) - (count.cumsum(0) - count)
        row = torch.arange(n * k, device=x.device) + shift[flat[order]]
        ends = padded.cumsum(0).tolist()
        xs = x.new_zeros(ends[-1], x.shape[1])
        xs[row] = x[order // k]
        hs, ys = x.new_empty(ends[-1], up.shape[1]), torch.empty_like(xs)
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                torch.mm(xs[start:end], up[e].t(), out=hs[start:end])
                torch.mm(relu2(hs[start:end]), down[e].t(), out=ys[start:end])
        back = torch.empty_like(order)
        back[order] = row
        ctx.save_for_backward(xs, hs, ys, back, w, up, down)
        ctx.ends = ends
        return (ys[back].view(n, k, -1) * w[..., None].to(x.dtype)).sum(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        xs, hs, ys, back, w, up, down = ctx.saved_tensors
        n, k = w.shape
        gw = torch.bmm(ys[back].view(n, k, -1).float(), g.float()[..., None])[..., 0]
        gy = torch.zeros_like(xs)
        gy[back] = (g[:, None] * w[..., None].to(g.dtype)).reshape(n * k, -1)
        gx, gup, gdown = torch.empty_like(xs), torch.zeros_like(up), torch.zeros_like(down)
        for e, (start, end) in enumerate(zip([0, *ctx.ends], ctx.ends, strict=False)):
            if end > start:
                r = F.relu(hs[start:end])
                torch.mm(gy[start:end].t(), r.square(), out=gdown[e])
                gh = (gy[start:end] @ down[e]) * (2 * r)
                torch.mm(gh.t(), xs[start:end], out=gup[e])
                torch.mm(gh, up[e], out=gx[start:end])
        return gx[back].view(n, k, -1).sum(1), None, gw, gup, gdown


def head(x: Tensor, norm_weight: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss of every token."""
    logits = (norm(x, norm_weight).to(HALF) @ weight.t()).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


class Forward:
    """The layers in a row; compiled for rows of one shape."""

    def __init__(self, compiled: bool) -> None:
        def maybe(layer: Any) -> Any:
            return torch.compile(layer, dynamic=False) if compiled else layer

        self.mamba, self.attention = maybe(mamba), maybe(attention)
        self.route, self.head = maybe(route), maybe(head)

    def losses(
        self, P: Mapping[str, Tensor], ids: Tensor, row_part: Tensor, targets: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of every token, and how many tokens each expert of each layer got.

        `row_part` [B, T] numbers the conversations of a row.
        """
        T = ids.shape[1]
        back = range(1, CONFIG["conv_kernel"])
        same = [row_part == F.pad(row_part, (k, 0), value=-1)[:, :T] for k in back]
        same_float = torch.stack(same, -1).float()
        at = torch.arange(T, device=ids.device)
        visible = (row_part[:, :, None] == row_part[:, None, :]) & (at[:, None] >= at[None])
        mask = torch.where(visible, 0.0, -1e30)[:, None]
        x, counts = P["model.embeddings.weight"][ids], []
        for i, kind in enumerate(CONFIG["layers"]):
            m = f"model.layers.{i}.mixer."
            first = P[f"model.layers.{i}.norm.weight"]
            if kind == "M":
                x = self.mamba(x, same_float, first, *(P[m + name] for name in MAMBA))
            elif kind == "*":
                x = self.attention(x, mask, first, *(P[m + name] for name in ATTENTION))
            else:
                h, chosen, w, x = self.route(x, first, *(P[m + name] for name in ROUTE))
                flat = (t.flatten(0, 1) for t in (h, chosen, w))
                y = Experts.apply(*flat, P[m + "experts.up_proj"], P[m + "experts.down_proj"])
                x = x + y.view_as(x).float()
                counts.append(
                    torch.bincount(chosen.flatten(), minlength=CONFIG["n_routed_experts"])
                )
        return self.head(x, P["model.norm_f.weight"], P["lm_head.weight"], targets), counts


MAMBA = """in_proj.weight conv1d.weight conv1d.bias dt_bias A_log D norm.weight
out_proj.weight""".split()
ATTENTION = "q_proj.weight k_proj.weight v_proj.weight o_proj.weight".split()
ROUTE = """gate.weight gate.e_score_correction_bias shared_experts.up_proj.weight
shared_experts.down_proj.weight""".split()


def as_int4(weight: Tensor) -> Tensor:
    """A matrix as the INT4 codec of the bundle would give it back: groups of 64, one scale each."""
    groups = weight.unflatten(-1, (-1, 64))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (largest / -8).half().float()
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return ((groups * inverse).round().clamp(-8, 7) * scale).flatten(-2)
