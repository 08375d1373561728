# SPDX-License-Identifier: Apache-2.0
"""report.json: what a build measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from build_engine.pack import StoredError
from build_engine.presets import Planned
from build_engine.read import Model
from build_engine.verify import Checks
from edgecascade.files import canonical_json


@dataclass(frozen=True)
class TensorReport:
    """One tensor as stored; the error is the relative Frobenius norm over `error_rows` sampled
    rows.
    """

    codec: str
    bytes: int
    relative_error: float
    error_rows: int


@dataclass(frozen=True)
class Report:
    """What a build measured. Goes into the bundle as report.json."""

    checkpoint: str
    config_sha256: str
    precision: str
    source_bytes: int
    stored_bytes: int
    tensors: dict[str, TensorReport]
    verify: Checks | None
    pack_s: float
    verify_s: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def make_report(
    model: Model,
    precision: str,
    plan: Sequence[Planned],
    errors: Mapping[str, StoredError],
    checks: Checks | None,
    seconds: tuple[float, float],
) -> Report:
    """Gather the parts; `seconds` are those of packing and of verifying."""
    tensors = {
        tensor.name: TensorReport(
            codec.value,
            tensor.stored_bytes(codec),
            errors[tensor.name].relative,
            errors[tensor.name].rows,
        )
        for tensor, codec in plan
    }
    return Report(
        checkpoint=model.checkpoint.folder.resolve().name,
        config_sha256=hashlib.sha256(canonical_json(model.checkpoint.config)).hexdigest(),
        precision=precision,
        source_bytes=sum(source.bytes for source in model.checkpoint.tensors.values()),
        stored_bytes=sum(report.bytes for report in tensors.values()),
        tensors=tensors,
        verify=checks,
        pack_s=round(seconds[0], 3),
        verify_s=round(seconds[1], 3),
    )
