# SPDX-License-Identifier: Apache-2.0
"""An engine for a bundle: its graph through NVIDIA's builder, in a process of its own.

The builder reads no weight, so a 30B model needs as little memory and time as its graph does.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from build_engine.accept import Accepted, accept
from build_engine.compile_job import CACHE, ONNX, PLAN, Job, profile_of
from build_engine.graph import to_onnx
from build_engine.rtx import loader_path
from edgecascade import errors
from edgecascade.bundle import Bundle
from edgecascade.engines import (
    EngineKey,
    read_engine,
    read_timing_cache,
    remove_engine,
    write_engine,
)
from edgecascade.errors import BuildError, BundleError, EdgeCascadeError, InvalidRequest
from edgecascade.trace import Graph, dims, profiles, trace_bundle

log = logging.getLogger(__name__)

BUILDERS = ("tensorrt", "rtx")
WORKSPACE_BYTES = 1 << 30  # of a plugin; eight contexts of 262,144 tokens need 151 MB of it
# TensorRT 10.13 of JetPack 7.0 and 7.1 miscompiles a fusion of fully connected layers on SM 110.
# Our graph has none to fuse; the switch keeps it so.
ENVIRONMENT = {"__LUNOWUD": "-peep:fc_h_fusion=off"}

Progress = Callable[[str, int, int], None]  # phase, step, steps


@dataclass(frozen=True)
class Compiled:
    """A plan, and what its build measured; `key` where it was built for a bundle."""

    plan: bytes
    timing_cache: bytes
    key: EngineKey | None
    facts: dict[str, Any]
    accepted: Accepted | None = None


def build_engine(
    bundle: Bundle,
    *,
    builder: str = "tensorrt",
    workspace_bytes: int = WORKSPACE_BYTES,
    progress: Progress | None = None,
) -> tuple[Path, Compiled]:
    """Compile a bundle's engine, store it in the bundle, and prove it by its tokens.

    Raises:
        BackendUnavailable: when the builder, or what its plugins call, is not here.
        BuildError: when the builder refuses the graph, the engine cannot be written, or it answers
        with other tokens than the bundle was verified with. Then, or when that cannot be tried, the
        bundle keeps the engine that it had.
    """
    graph = trace_bundle(bundle)
    made = compile_graph(
        graph,
        bundle.max_context,
        bundle=bundle.path,
        builder=builder,
        workspace_bytes=workspace_bytes,
        progress=progress,
    )
    if made.key is None:
        raise BuildError("the builder does not say what its plan is for")
    put_back = _engine_before(bundle, made.key)
    try:
        path = write_engine(bundle, made.key, made.plan, made.facts, made.timing_cache)
    except OSError as error:
        raise BuildError(f"cannot write the engine into {bundle.path}: {error}") from error
    if builder == "rtx":  # nothing to run it on
        return path, made
    try:
        accepted = accept(bundle)
    except BaseException:
        try:
            put_back()
        except OSError as failed:
            log.error("the engine that was not proven is still in %s: %s", path, failed)
        raise
    return path, replace(made, accepted=accepted)


def _engine_before(bundle: Bundle, key: EngineKey) -> Callable[[], object]:
    """What leaves a bundle with the engine that it has now: one that is not proven is worth less
    than one that was.
    """
    try:
        old, cache = read_engine(bundle, key), read_timing_cache(bundle, key)
    except (BundleError, OSError):  # none, or a damaged one
        return lambda: remove_engine(bundle, key)
    return lambda: write_engine(bundle, key, old.plan, old.facts, cache)


def compile_graph(
    graph: Graph,
    max_context: int,
    *,
    bundle: Path | None = None,
    builder: str = "tensorrt",
    workspace_bytes: int = WORKSPACE_BYTES,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a graph, of a bundle or of shapes alone."""
    if builder not in BUILDERS:
        raise InvalidRequest(f"builder is {builder!r}; choose one of {', '.join(BUILDERS)}")
    try:
        model = to_onnx(graph)
    except ImportError as error:
        raise BuildError(
            f"an engine needs onnx: pip install '.[engine]' in the clone ({error})"
        ) from error
    ranges = [
        profile_of({t.name: dims(t, p) for t in graph.inputs.values()})
        for p in profiles(graph, max_context)
    ]
    job = Job("", builder, ranges, workspace_bytes, None if bundle is None else str(bundle))
    return compile_onnx(model.SerializeToString(), job, progress)


def compile_onnx(model: bytes, job: Job, progress: Progress | None = None) -> Compiled:
    """Compile an ONNX model as the job says, in a folder of its own."""
    with TemporaryDirectory(prefix="edgecascade-engine-") as folder:
        Path(folder, ONNX).write_bytes(model)
        Path(folder, "job.json").write_text(json.dumps(asdict(replace(job, folder=folder))))
        with environment(job.builder) as variables:
            result = _run(Path(folder, "job.json"), variables, progress)
        key = result["key"]
        return Compiled(
            Path(folder, PLAN).read_bytes(),
            Path(folder, CACHE).read_bytes(),
            None if key is None else EngineKey(**key),
            result["facts"],
        )


@contextmanager
def environment(builder: str) -> Iterator[dict[str, str]]:
    """The variables that a process with this builder must start with."""
    variables = {**os.environ, **ENVIRONMENT}
    # The child imports this very package, wherever it was found.
    ours = str(Path(__file__).parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])
    if builder != "rtx":
        yield variables
        return
    with loader_path() as folder:
        paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        yield {**variables, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def _run(job: Path, variables: dict[str, str], progress: Progress | None) -> dict[str, Any]:
    """Start the child, follow what it tells, and raise what it raised."""
    command = [sys.executable, "-m", "build_engine.compile_job", str(job)]
    said = job.with_name("stderr.txt")
    result: dict[str, Any] | None = None
    with (
        open(said, "wb") as messages,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, env=variables) as child,
    ):
        try:
            for line in child.stdout or ():
                result = _heard(line, progress) or result
            status = child.wait()
        except BaseException:
            child.kill()
            raise
    tail = said.read_text(errors="replace")[-2000:].strip()
    if status == 0 and result is not None:
        if tail:
            log.info("the builder says: %s", tail)
        return result
    if status < 0:
        raise BuildError(
            f"the builder's process was ended by signal {-status}; 9 means that memory ran out. "
            f"It said: {tail or 'nothing'}"
        )
    raise BuildError(f"the builder's process ended with status {status}: {tail or 'no message'}")


def _heard(line: bytes, progress: Progress | None) -> dict[str, Any] | None:
    """One line of the child: progress, the result, or an error, which is raised here."""
    message: Any = None
    with suppress(ValueError):
        message = json.loads(line)
    match message:
        case {"error": [str(name), str(text)]}:
            kind = getattr(errors, name, BuildError)
            raise kind(text) if issubclass(kind, EdgeCascadeError) else BuildError(text)
        case {"result": dict(found)}:
            return found
        case {"phase": str(phase), "step": int(step), "steps": int(steps)}:
            if progress is not None:
                progress(phase, step, steps)
        case _:  # a library printed something
            log.info("%s", line.decode(errors="replace").rstrip())
    return None
