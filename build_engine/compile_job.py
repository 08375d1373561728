# SPDX-License-Identifier: Apache-2.0
"""The child process that runs NVIDIA's builder: `python -m build_engine.compile_job JOB.json`.

A process of its own, because a builder keeps what it allocated, plugin objects live for ever, and
libraries of NVIDIA end the process when they meet what they did not expect. It writes the plan into
the job's folder and tells its parent about progress, one JSON object a line on standard output.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from build_engine.rtx import import_rtx
from edgecascade.backends import _trt_plugins as plugins
from edgecascade.backends import _trt_versions as versions
from edgecascade.backends._lib import cpu_library, library_path
from edgecascade.bundle import Bundle
from edgecascade.engines import EngineKey, engine_key, plugin_hash, read_timing_cache
from edgecascade.errors import BuildError, EdgeCascadeError

log = logging.getLogger(__name__)

ONNX, PLAN, CACHE = "forward.onnx", "model.plan", "timing.cache"
QUIET_S = 0.1  # between two lines about one phase

Shapes = Sequence[Sequence[int]]  # least, likely, largest
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """What to compile. Files have fixed names in `folder`; ONNX is there already."""

    folder: str
    builder: str  # "tensorrt" or "rtx"
    profiles: list[dict[str, list[list[int]]]]
    workspace_bytes: int
    bundle: str | None = None  # None: a graph without weights, for checks


@dataclass(frozen=True)
class Toolkit:
    """A builder that is ready: the module, its stream, and the key of the plans it makes here."""

    trt: ModuleType
    stream: int | None
    key: EngineKey | None
    kit: plugins.Kit  # remembers what a plugin raised: TensorRT only says that one did


def main(path: str) -> int:
    """Compile the job in a file; 0 when the plan was written."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    job = Job(**json.loads(Path(path).read_text()))
    try:
        # The parent has just verified it.
        bundle = None if job.bundle is None else Bundle.open(job.bundle, verify=False)
        toolkit = (_open_rtx if job.builder == "rtx" else _open_tensorrt)(bundle)
        result = run(job, toolkit, bundle, _tell)
    except EdgeCascadeError as error:
        _tell({"error": [type(error).__name__, str(error)]})
        return 1
    _tell({"result": result})
    return 0


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)  # noqa: T201  the parent reads it


def _open_tensorrt(bundle: Bundle | None) -> Toolkit:
    """TensorRT of this device, with our CUDA kernels behind the plugins."""
    from edgecascade.backends._cuda import open_device
    from edgecascade.backends._lib import cuda_library
    from edgecascade.backends.tensorrt import key_here

    trt, device = versions.import_tensorrt(), open_device()
    kit = plugins.register(trt, cuda_library(), device.copy)
    key = None if bundle is None else key_here(bundle, trt, device)
    return Toolkit(trt, device.stream(), key, kit)


def _open_rtx(bundle: Bundle | None) -> Toolkit:
    """TensorRT-RTX without a device. Nothing runs; the CPU kernels say how much scratch memory."""
    trt = import_rtx()
    kit = plugins.register(trt, cpu_library(), _no_copy)
    key = None
    if bundle is not None:
        key = engine_key(
            bundle,
            builder="rtx",
            version=trt.__version__,
            sm=0,
            l4t=None,
            plugins=plugin_hash([library_path()]),
        )
    return Toolkit(trt, None, key, kit)


def _no_copy(*_: int) -> None:
    raise BuildError("a plugin ran while a plan was built without a GPU")


def run(job: Job, toolkit: Toolkit, bundle: Bundle | None, tell: Tell) -> dict[str, Any]:
    """Parse, build and write the plan; what was measured.

    Raises:
        BuildError: in the builder's own words.
    """
    trt, folder = toolkit.trt, Path(job.folder)
    logger = versions.make_logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(versions.network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    started = time.monotonic()
    if not parser.parse((folder / ONNX).read_bytes()):
        why = _why(parser) + _raised(toolkit.kit)
        raise BuildError(f"the ONNX parser of {trt.__version__} refuses the graph: {why}")
    parsed = time.monotonic()
    config = _configure(job, toolkit, builder, tell)
    cached = bundle and toolkit.key and read_timing_cache(bundle, toolkit.key)
    if not (cached and config.set_timing_cache(config.create_timing_cache(cached), False)):
        cached = None  # of another driver, or there is none
        config.set_timing_cache(config.create_timing_cache(b""), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(
            f"the builder of {trt.__version__} makes no plan: {logger.last}{_raised(toolkit.kit)}"
        )
    (folder / PLAN).write_bytes(plan)
    (folder / CACHE).write_bytes(config.get_timing_cache().serialize())
    return {
        "key": toolkit.key and asdict(toolkit.key),
        "facts": {
            "version": trt.__version__,
            "layers": network.num_layers,
            "plan_bytes": plan.nbytes,
            "parse_s": round(parsed - started, 3),
            "build_s": round(time.monotonic() - parsed, 3),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "workspace_limit_bytes": job.workspace_bytes,
            "from_timing_cache": bool(cached),
        },
    }


def _configure(job: Job, toolkit: Toolkit, builder: Any, tell: Tell) -> Any:
    trt = toolkit.trt
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    config.max_aux_streams = 0  # one stream, so that a step can be captured
    config.progress_monitor = make_monitor(trt, tell)
    if toolkit.stream is not None:
        config.profile_stream = toolkit.stream
    for ranges in job.profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *(tuple(shape) for shape in shapes))
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"the builder of {trt.__version__} refuses the profile {ranges}")
    return config


def make_monitor(trt: ModuleType, tell: Tell) -> Any:
    """TensorRT's progress as lines; phases inside phases are told too, the reader picks."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._told = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            tell({"phase": phase, "parent": parent, "step": 0, "steps": steps})

        def phase_finish(self, phase: str) -> None:
            steps = self._steps.pop(phase, 0)
            tell({"phase": phase, "step": steps, "steps": steps})

        def step_complete(self, phase: str, step: int) -> bool:
            if time.monotonic() - self._told > QUIET_S:
                self._told = time.monotonic()
                tell({"phase": phase, "step": step, "steps": self._steps.get(phase, 0)})
            return True  # go on

    return Monitor()


def _why(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"node {error.node()}: {error.desc()}" for error in errors)


def _raised(kit: plugins.Kit) -> str:
    return "" if kit.failure is None else f" ({type(kit.failure).__name__}: {kit.failure})"


def profile_of(ranges: Mapping[str, Shapes]) -> dict[str, list[list[int]]]:
    """A profile as JSON takes it."""
    return {name: [list(shape) for shape in shapes] for name, shapes in ranges.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
