# SPDX-License-Identifier: Apache-2.0
"""A checkpoint becomes a bundle: read, quantize, pack, verify, bundle. Each step is the file of
that name.
"""

from __future__ import annotations

import time
from pathlib import Path

from build_engine.bundle import BundleWriter, identity
from build_engine.pack import Progress, pack
from build_engine.quantize import quantize
from build_engine.read import read
from build_engine.report import Report, make_report
from build_engine.texts import generation, texts
from build_engine.verify import compare


def build(
    checkpoint: str | Path,
    out: str | Path,
    *,
    precision: str = "speed",
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Build a bundle from a Hugging Face checkpoint folder.

    `progress(done, total)` is told the bytes stored so far. On any error nothing is left behind.

    Raises:
        UnsupportedModel: when the checkpoint needs what this version does not implement.
        CheckpointError: when it is damaged, incomplete or holds values that are no numbers.
        BuildError: when the bundle cannot be written.
        InvalidRequest: for an unknown preset.
    """
    started = time.monotonic()
    model = read(checkpoint)
    plan = quantize(model.tensors, precision)
    vocab = model.config.vocab
    small_files = texts(model.checkpoint, vocab), generation(model.checkpoint, vocab)
    facts = identity(model.family, model.checkpoint.config, model.config.max_context, precision)
    with BundleWriter(out, facts, plan, overwrite=overwrite) as writer:
        errors = pack(model, plan, writer, progress)
        packed = time.monotonic()
        checks = compare(model, writer.draft()) if verify else None
        seconds = packed - started, time.monotonic() - packed
        report = make_report(model, precision, plan, errors, checks, seconds)
        writer.finish(*small_files, report.to_json())
    return report
