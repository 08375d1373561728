# SPDX-License-Identifier: Apache-2.0
"""The truth: every op as a readable NumPy function in float32, and a backend that evaluates a
forward pass with them.

Sources: transformers 5.x models/nemotron_h (attention, MoE, layer order), Dao & Gu, arXiv
2405.21060 (Mamba-2 recurrence). Letters as in edgecascade/ops.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgecascade import sampling
from edgecascade.backends.base import (
    CPU_CHUNK_TOKENS,
    Array,
    Options,
    Parked,
    Snapshot,
    check_tokens,
    kv_type,
)
from edgecascade.blocks import dequantize, kv_rows, kv_values
from edgecascade.bundle import Bundle
from edgecascade.errors import ContextExceeded, InvalidRequest
from edgecascade.models import family
from edgecascade.ops import Activation, Norm, Op, Ops
from edgecascade.sampling import Logits, SampleRow
from edgecascade.tensors import ARRAYS, GROUP_SIZE, KvState, KvType, State


@dataclass(frozen=True)
class Matrix:
    """A weight as stored. `dense` widens one matrix on demand: 17 GB never become 120."""

    bundle: Bundle
    name: str

    @property
    def is_block(self) -> bool:
        """Whether the values are quantized."""
        return self.bundle.tensors[self.name].codec.is_block

    def dense(self, expert: int = 0) -> Array:
        """float32 [n, k]."""
        stored = self.bundle.tensors[self.name]
        n, k = stored.shape[-2:]
        if stored.codec.is_block:
            data = self.bundle.map(self.name)[expert * stored.stride :]
            return dequantize(stored.codec, data, n, k)
        values = self.bundle.matrix(self.name)
        return np.asarray(values[expert] if len(stored.shape) == 3 else values, np.float32)


def rms_norm(x: Array, norm: Norm | None) -> Array:
    """gamma * x / sqrt(mean(x^2) + eps), the mean over each of the norm's groups."""
    if norm is None:
        return x
    parts = x.reshape(len(x), norm.groups, -1)
    parts = parts / np.sqrt(np.mean(parts * parts, axis=-1, keepdims=True) + np.float32(norm.eps))
    scaled: Array = norm.gamma * parts.reshape(x.shape)
    return scaled


def activate(x: Array, act: int) -> Array:
    """relu(x)^2, or x."""
    return np.square(np.maximum(x, 0)) if act == Activation.RELU2 else x


def round_to_int8(x: Array) -> Array:
    """x [T, K] as int8 kernels see it: 64 columns share the scale max|x| / 127."""
    tokens, columns = x.shape
    padded = np.zeros((tokens, -(-columns // GROUP_SIZE) * GROUP_SIZE), np.float32)
    padded[:, :columns] = x
    groups = padded.reshape(tokens, -1, GROUP_SIZE)
    peak = np.abs(groups).max(axis=-1, keepdims=True)
    codes = np.rint(
        groups * np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    )
    rounded: Array = (codes * (peak / np.float32(127))).reshape(padded.shape)
    return rounded[:, :columns]


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(x))
    value: Array = np.where(x >= 0, 1, small) / (1 + small)
    return value


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def mamba(f: Mapping[str, Any], state: dict[str, Array]) -> Array:
    """One token after the other: conv, SiLU, S = exp(dt A) S + dt x B^T, y = S C + D x, gate.

    zxbcdt [T, 2HP + 2GN + H]; state "conv" [K - 1, C], oldest first, and "ssm" [H, P, N] are
    replaced. Returns [T, HP].
    """
    heads, head_dim, groups, n = f["heads"], f["head_dim"], f["groups"], f["state"]
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * n
    z, xbc, dt = np.split(f["zxbcdt"], [inner, inner + channels], axis=1)
    tokens, taps = len(xbc), f["conv_weight"]
    past = np.concatenate([state["conv"], xbc])  # before the activation
    bias = 0 if f.get("conv_bias") is None else f["conv_bias"]
    xbc = silu(sum(past[j : j + tokens] * taps[j] for j in range(len(taps))) + bias)
    x, b, c = np.split(xbc, [inner, inner + groups * n], axis=1)
    x = x.reshape(tokens, heads, head_dim)
    per_head = [m.reshape(tokens, groups, n).repeat(heads // groups, axis=1) for m in (b, c)]
    dt = np.logaddexp(0, dt + f["dt_bias"]).astype(np.float32)  # softplus, never clamped
    ssm, y = state["ssm"], np.empty_like(x)
    for t, (bt, ct) in enumerate(zip(*per_head, strict=True)):
        decay = np.exp(dt[t] * f["a"])
        ssm = decay[:, None, None] * ssm + (dt[t][:, None] * x[t])[:, :, None] * bt[:, None, :]
        y[t] = np.einsum("hpn,hn->hp", ssm, ct)
    state["conv"], state["ssm"] = past[len(past) - len(taps) + 1 :].copy(), ssm
    y += f["d"][:, None] * x
    return y.reshape(tokens, inner) * silu(z)


def attention(f: Mapping[str, Any], state: dict[str, Array]) -> Array:
    """softmax(q k^T scale) v, causal, no positional encoding; query head h reads key head h //
    (heads / kv_heads).

    qkv [T, (heads + 2 kv_heads) head_dim]; state "kv" [2, past, kv_heads, row_items], rows of
    a KvType, grows by T, and what is read is what was stored. Returns [T, heads head_dim].
    """
    heads, kv_heads, head_dim = f["heads"], f["kv_heads"], f["head_dim"]
    tokens = len(f["qkv"])
    parts = f["qkv"].reshape(tokens, heads + 2 * kv_heads, head_dim)
    q, new = parts[:, :heads], parts[:, heads:].reshape(tokens, 2, kv_heads, head_dim)
    rows = kv_rows(new.transpose(1, 0, 2, 3), KvType.of(state["kv"].dtype))
    state["kv"] = kv = np.concatenate([state["kv"], rows], axis=1)
    k, v = kv_values(kv).repeat(heads // kv_heads, axis=2)  # [past + T, heads, head_dim]
    scores = np.einsum("thd,shd->hts", q, k) * np.float32(f["scale"])
    ahead = np.arange(len(k)) > np.arange(len(k) - tokens, len(k))[:, None]
    scores = np.where(ahead, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    y: Array = np.einsum("hts,shd->thd", weights, v)
    return y.reshape(tokens, heads * head_dim)


def route(f: Mapping[str, Any], h: Array) -> tuple[Array, Array]:
    """Expert ids [T, top_k], ascending, and their weights. The bias chooses; it does not weigh."""
    scores = sigmoid(h @ f["router"].T)
    choice = scores + f["bias"]
    tokens, experts = choice.shape
    if f["n_group"] > 1:
        grouped = choice.reshape(tokens, f["n_group"], -1)
        strength = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
        kept = np.argsort(-strength, axis=-1, kind="stable")[:, : f["topk_group"]]
        allowed = np.zeros(strength.shape, bool)
        np.put_along_axis(allowed, kept, True, axis=1)
        choice = np.where(allowed.repeat(experts // f["n_group"], axis=1), choice, -np.inf)
    ids = np.sort(np.argsort(-choice, axis=-1, kind="stable")[:, : f["top_k"]], axis=-1)
    weights = np.take_along_axis(scores, ids, axis=1)
    if f["normalize"]:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + np.float32(1e-20))
    return ids, weights * np.float32(f["scale"])


States = dict[int, dict[str, Array]]  # by layer and name


def empty_states(states: Sequence[State], kv: KvType) -> States:
    """Of a sequence without tokens."""
    made: States = {}
    for state in states:
        part = made.setdefault(state.layer, {})
        if isinstance(state, KvState):
            part["kv"] = np.zeros((2, 0, state.kv_heads, kv.row_items(state.head_dim)), kv.dtype)
        else:
            part[state.name] = np.zeros(state.snapshot_shape, np.float32)
    return made


@dataclass
class Evaluator(Ops):
    """Evaluates a pass for one sequence. `int8_activations` rounds what int8 kernels round."""

    tokens: Array
    states: States
    int8_activations: bool = False
    # The residual stream after each addition to it, for `verify`.
    residuals: list[Array] = field(default_factory=list)

    def call(self, op: Op, layer: int, fields: Mapping[str, Any]) -> Array:
        """Evaluate one op."""
        if op.name == "mamba":
            y = mamba(fields, self.states[layer])
        elif op.name == "attention":
            y = attention(fields, self.states[layer])
        else:
            y = getattr(self, "_" + op.name)(fields)
        if op.in_place is not None and fields.get(op.in_place) is not None:
            self.residuals.append(y)
        return y

    def _embed(self, f: Mapping[str, Any]) -> Array:
        return np.asarray(f["table"].bundle.matrix(f["table"].name)[self.tokens], np.float32)

    def _linear(self, f: Mapping[str, Any]) -> Array:
        y = activate(self._product(rms_norm(f["x"], f["norm"]), f["w"]), f["act"])
        return y if f["residual"] is None else y + f["residual"]

    def _moe(self, f: Mapping[str, Any]) -> Array:
        """x + the chosen experts, in ascending order of ids, + the shared one if there is one."""
        h = rms_norm(f["x"], f["norm"])
        ids, weights = route(f, h)
        y = np.zeros_like(h)
        for expert in np.unique(ids):
            token, choice = np.nonzero(ids == expert)
            up = activate(self._product(h[token], f["up"], int(expert)), Activation.RELU2)
            y[token] += weights[token, choice][:, None] * self._product(up, f["down"], int(expert))
        rest = f["x"]
        if f.get("shared_up") is not None:
            up = activate(self._product(h, f["shared_up"]), Activation.RELU2)
            rest = self._product(up, f["shared_down"]) + rest
        y += rest
        return y

    def _head(self, f: Mapping[str, Any]) -> Array:
        return self._product(rms_norm(f["x"], f["norm"]), f["w"])

    def _product(self, x: Array, w: Matrix, expert: int = 0) -> Array:
        rounded = round_to_int8(x) if self.int8_activations and w.is_block else x
        product: Array = rounded @ w.dense(expert).T
        return product


@dataclass(frozen=True)
class _Moved(Parked):
    states: States
    held: int


class ReferenceBackend:
    """Evaluates the forward pass with NumPy, one sequence at a time: the measure of others."""

    name = "reference"
    page_tokens = 1
    chunk_tokens = CPU_CHUNK_TOKENS

    def __init__(self, bundle: Bundle, options: Options) -> None:
        model = family(bundle.family)
        self._bundle, self._model = bundle, model
        self._config = model.read_config(bundle.config)
        self._weights = {name: self._load(name) for name in bundle.tensors}
        self.kv_type = kv_type(bundle, options)
        self.int8_activations = False
        self.vocab: int = self._config.vocab
        self.slots = options.slots
        self.max_context: int = options.max_context or self._config.max_context
        self.kv_tokens = self.slots * self.max_context
        self._states = [self._empty() for _ in range(self.slots)]
        self._held = [0] * self.slots

    def _load(self, name: str) -> Matrix | Array:
        """Matrices stay as stored; vectors and the router are small and read by name everywhere."""
        as_array = self._bundle.tensors[name].role in ARRAYS
        return self._bundle.matrix(name) if as_array else Matrix(self._bundle, name)

    def _empty(self) -> States:
        return empty_states(self._model.states(self._config), self.kv_type)

    def evaluate(self, tokens: Array, states: States) -> tuple[Array, list[Array]]:
        """Logits of every token, and the residual stream after each layer."""
        ops = Evaluator(tokens, states, self.int8_activations)
        logits: Array = self._model.forward(ops, self._config, self._weights)
        return logits, ops.residuals

    def prefill(self, slot: int, tokens: Array) -> Array:
        """See Backend."""
        ids = self._check(slot, tokens)
        logits, _ = self.evaluate(ids, self._states[slot])
        self._held[slot] += len(ids)
        last: Array = logits[-1]
        return last

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Array:
        """See Backend."""
        return np.stack(
            [self.prefill(s, np.array([t])) for s, t in zip(slots, tokens, strict=True)]
        )

    def logits(self, tokens: Array) -> Array:
        """See Backend."""
        return self.evaluate(check_tokens(tokens, self.vocab), self._empty())[0]

    def sample(self, logits: Logits, rows: Sequence[SampleRow]) -> list[tuple[int, float]]:
        """See Backend."""
        values = np.asarray(logits)
        return [sampling.sample(one, row) for one, row in zip(values, rows, strict=True)]

    def tokens(self, slot: int) -> int:
        """See Backend."""
        return self._held[slot]

    def reset(self, slot: int) -> None:
        """See Backend."""
        self._states[slot], self._held[slot] = self._empty(), 0

    def save(self, slot: int) -> Snapshot:
        """See Backend."""
        parts = {
            (i, name): part.copy()
            for i, s in self._states[slot].items()
            for name, part in s.items()
        }
        return Snapshot(self._held[slot], parts)

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """See Backend."""
        snapshot.check(self.kv_type)
        self.reset(slot)
        for (layer, name), part in snapshot.parts.items():
            self._states[slot][layer][name] = part.copy()
        self._held[slot] = snapshot.tokens

    def park(self, slot: int, copy: Snapshot | None = None) -> Parked:
        """See Backend."""
        parked = _Moved(self._states[slot], self._held[slot])
        self.reset(slot)
        return parked

    def resume(self, slot: int, parked: Parked) -> None:
        """See Backend."""
        assert isinstance(parked, _Moved)
        self._states[slot], self._held[slot] = parked.states, parked.held

    def drop(self, parked: Parked) -> None:
        """See Backend."""

    def close(self) -> None:
        """See Backend."""
        self._states, self._weights = [], {}

    def _check(self, slot: int, tokens: Array) -> Array:
        if not 0 <= slot < self.slots:
            raise InvalidRequest(f"slot is {slot}; this backend has {self.slots}")
        ids = check_tokens(tokens, self.vocab)
        if self._held[slot] + len(ids) > self.max_context:
            raise ContextExceeded(
                f"{self._held[slot]} tokens held and {len(ids)} more exceed the context "
                f"of {self.max_context}"
            )
        return ids
