# SPDX-License-Identifier: Apache-2.0
"""What is in a bundle, what one token costs, and which Jetson modules hold it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgecascade import manifest as layout
from edgecascade.bundle import Bundle
from edgecascade.manifest import StoredTensor
from edgecascade.models import family
from edgecascade.state import kv_token_bytes
from edgecascade.tensors import PAGE_TOKENS, KvState, KvType, Role, State, round_up

if TYPE_CHECKING:
    from rich.table import Table

GIB = 1 << 30
RESERVED_BYTES = 2 * GIB  # for the system, the runtime's scratch memory and logits
SESSION_TOKENS = (2048, 8192, 32768)


@dataclass(frozen=True)
class Module:
    """A Jetson module. `memory_bytes` is what Linux reports as MemTotal."""

    name: str
    memory_bytes: int
    read_bytes_per_s: float
    measured: bool  # seen on a device, or taken from a module of the same size


# MemTotal as users report it, which is less than the nominal size: carve-outs of the firmware.
MODULES = (
    Module("Orin Nano 8GB", int(7.4 * GIB), 102.0e9, measured=True),
    Module("Orin NX 16GB", int(15.3 * GIB), 102.4e9, measured=False),
    Module("AGX Orin 32GB", int(30.0 * GIB), 204.8e9, measured=False),
    Module("AGX Orin 64GB", 62_780 << 20, 204.8e9, measured=True),
    Module("Thor T4000", 62_780 << 20, 273.0e9, measured=False),
    Module("Thor T5000", 125_772 << 20, 273.0e9, measured=True),
)


@dataclass(frozen=True)
class Share:
    """Tensors of one role in one codec."""

    role: str
    codec: str
    tensors: int
    parameters: int
    stored_bytes: int
    read_bytes: int  # per decoded token


@dataclass(frozen=True)
class Cost:
    """What a bundle asks of a machine, in bytes."""

    weights: int
    read: int  # of weights, per decoded token
    session: int  # state that a sequence holds whatever its length
    token: int  # state for each token of its context
    max_context: int


@dataclass(frozen=True)
class Fit:
    """Whether a module holds the bundle, and how many sessions of each length beside it."""

    module: str
    usable_bytes: int
    measured: bool  # the module's memory was read on a device
    fits: bool
    sessions: dict[int, int | None]  # None: longer than the model's context
    tokens_per_s_limit: float  # memory bandwidth over bytes read per token: no runtime is faster


def describe(bundle: Bundle) -> dict[str, Any]:
    """All of it as JSON values."""
    model = family(bundle.family)
    config = model.read_config(bundle.config)
    states: list[State] = model.states(config)
    shares = _shares(bundle, config.top_k)
    session, token = _state_bytes(states, bundle.kv_type)
    read = sum(share.read_bytes for share in shares)
    cost = Cost(bundle.weight_bytes, read, session, token, bundle.max_context)
    return {
        "path": str(bundle.path),
        "id": bundle.id,
        "family": bundle.family,
        "precision": bundle.precision,
        "generator": bundle.manifest.generator,
        "max_context": bundle.max_context,
        "kv_type": bundle.kv_type,
        "parameters": sum(share.parameters for share in shares),
        "weight_bytes": cost.weights,
        "shares": [asdict(share) for share in shares],
        "read_bytes_per_token": cost.read,
        "state_bytes_per_session": cost.session,
        "state_bytes_per_token": cost.token,
        "modules": [asdict(_fit(module, cost)) for module in MODULES],
        "tokenizer": layout.TOKENIZER in bundle.manifest.files,
        "chat_template": bundle.chat_template is not None,
    }


def _shares(bundle: Bundle, top_k: int) -> list[Share]:
    groups: dict[tuple[str, str], list[StoredTensor]] = {}
    for tensor in bundle.tensors.values():
        groups.setdefault((tensor.role.value, tensor.codec.value), []).append(tensor)
    made = [
        Share(
            role=role,
            codec=codec,
            tensors=len(tensors),
            parameters=sum(math.prod(tensor.shape) for tensor in tensors),
            stored_bytes=sum(tensor.bytes for tensor in tensors),
            read_bytes=sum(_read_bytes(tensor, top_k) for tensor in tensors),
        )
        for (role, codec), tensors in groups.items()
    ]
    return sorted(made, key=lambda share: -share.stored_bytes)


def _read_bytes(tensor: StoredTensor, top_k: int) -> int:
    """Bytes of a tensor that one decoded token reads."""
    if tensor.role is Role.EMBEDDING:
        return tensor.matrix_bytes // tensor.matrix[0]
    return tensor.matrix_bytes * (top_k if tensor.role is Role.EXPERT else 1)


def _state_bytes(states: list[State], kv_type: str) -> tuple[int, int]:
    """Bytes that a session holds whatever its length, and bytes for each of its tokens."""
    fixed = sum(4 * math.prod(s.shape) for s in states if not isinstance(s, KvState))
    return fixed, kv_token_bytes(states, KvType(kv_type))


def _fit(module: Module, cost: Cost) -> Fit:
    usable = module.memory_bytes - RESERVED_BYTES
    # Recurrent state is read and written once per token.
    limit = module.read_bytes_per_s / (cost.read + 2 * cost.session)
    return Fit(
        module=module.name,
        usable_bytes=usable,
        measured=module.measured,
        fits=usable >= cost.weights,
        sessions={tokens: _sessions(tokens, usable, cost) for tokens in SESSION_TOKENS},
        tokens_per_s_limit=round(limit, 1),
    )


def _sessions(tokens: int, usable: int, cost: Cost) -> int | None:
    if tokens > cost.max_context:
        return None
    each = cost.session + cost.token * round_up(tokens, PAGE_TOKENS)
    return max(0, usable - cost.weights) // max(1, each)


def tables(description: dict[str, Any]) -> list[Table]:
    """The description for a terminal."""
    from rich.table import Table

    weights = Table("role", "codec", "tensors", "parameters", "stored", "read per token")
    for share in description["shares"]:
        weights.add_row(
            share["role"],
            share["codec"],
            str(share["tensors"]),
            f"{share['parameters'] / 1e6:,.2f} M",
            _megabytes(share["stored_bytes"]),
            _megabytes(share["read_bytes"]),
        )
    weights.add_row(
        "all",
        description["precision"],
        "",
        f"{description['parameters'] / 1e6:,.2f} M",
        _megabytes(description["weight_bytes"]),
        _megabytes(description["read_bytes_per_token"]),
    )
    modules = Table("module", "usable", "fits", "tokens/s at most")
    for tokens in SESSION_TOKENS:
        modules.add_column(f"sessions of {tokens // 1024}k")
    for fit in description["modules"]:
        counts = [
            f"{count:,}" if fit["fits"] and count is not None else "-"
            for count in fit["sessions"].values()
        ]
        modules.add_row(
            fit["module"],
            f"{'' if fit['measured'] else '~'}{fit['usable_bytes'] / 1e9:.1f} GB",
            "yes" if fit["fits"] else "no",
            f"{fit['tokens_per_s_limit']:,.0f}" if fit["fits"] else "-",
            *counts,
        )
    for table in (weights, modules):
        for column in table.columns[2:]:
            column.justify = "right"
    return [weights, modules]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
