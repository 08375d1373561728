# SPDX-License-Identifier: Apache-2.0
"""Precision presets: which codec each role of tensor gets. Data, not code.

Sensitive first: attention, then the Mamba layers that feed it, then the head. Routed experts are 90
% of the bytes and the least sensitive. The router and all vectors are float32 in every preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from edgecascade.errors import InvalidRequest
from edgecascade.tensors import Codec, Role, Tensor

F32, F16, I8, U4 = Codec.F32, Codec.F16, Codec.I8_64, Codec.U4_64


@dataclass(frozen=True)
class Preset:
    """Codec by role, and the type of cached keys and values."""

    codecs: Mapping[Role, Codec]
    kv_type: str


_SPEED = {
    Role.EMBEDDING: F16,
    Role.HEAD: U4,
    Role.ATTENTION: U4,
    Role.MAMBA: U4,
    Role.MAMBA_BEFORE_ATTENTION: U4,
    Role.EXPERT: U4,
    Role.SHARED_EXPERT: U4,
    Role.MLP: U4,
    Role.ROUTER: F32,
    Role.VECTOR: F32,
}
_BALANCED = {**_SPEED, Role.HEAD: I8}
_QUALITY = {**_BALANCED, Role.ATTENTION: I8, Role.MAMBA_BEFORE_ATTENTION: I8}

PRESETS = {
    "exact": Preset(dict.fromkeys(Role, F32), "f32"),
    "quality": Preset(_QUALITY, "f16"),
    "balanced": Preset(_BALANCED, "f16"),
    "speed": Preset(_SPEED, "f16"),
}


class Planned(NamedTuple):
    """A tensor of the bundle to be, and how it will be stored."""

    tensor: Tensor
    codec: Codec


def preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        InvalidRequest: for an unknown name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise InvalidRequest(f"precision is {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
