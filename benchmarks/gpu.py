# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on this machine's GPU: built, checked, measured.

    python benchmarks/gpu.py [--quick] [--minutes N] [--bundle DIR] [--parts PART ...]
                             [--no-build] [--no-checks] [--out FILE]

build      the library for the GPU that is here (needs nvcc); one that is here already serves, too
suite      that of the ops, on the GPU, a process for each file of it
ceiling    what a device-to-device copy moves, and what a kernel that only reads gets
           (stream_read.cu); shares are of the larger
decode     1, 2, 4 and 8 sequences with contexts of 0 and 1k tokens: the graph alone, and a step of
           the backend with greedy tokens, and with drawn ones
cpu        the same tokens fed to the CPU backend: greedy choices equal where the lead allows; a row
           of 2, 4 and 8 sequences has the bits that it has alone; and steps whose launches begin
           early have those of the same steps launch after launch
prefill    128, 512 and 2048 tokens of one sequence: the backend alone in its largest chunks, the
           same in pieces as LLM cuts them, and LLM.generate up to the first token
generate   LLM.generate with the greedy rule, sampling included
long       decode with contexts of 16k
ops        each op of a decode step alone (gpu_ops.py), at a context of 1k; between two launches,
           and the whole step, with and without overlap and prefetch; each op of a prompt of 512
           tokens alone, and each launch of it
memcheck   a part of the suite under compute-sanitizer; racecheck, too

What is measured is Nemotron-3-Nano-30B's shapes with random weights: 17 GB under build/, written
meanwhile. Each part is a process of its own with a limit of its own: a GPU's fault takes everything
from the process that made it, and some do not end.

A line a figure, and JSON in benchmarks/results, which is there after every part; what the checks
say is in logs beside it. --quick: 8 layers, shorter contexts. --minutes: it ends by then with what
it has, and without the sanitizer. --parts: only these. What fails or does not fit is named, in the
JSON too, the rest goes on, and the status is 1.
"""

from __future__ import annotations

import argparse
import ctypes as c
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import numpy as np
from gpu_ops import OpTimer, seconds_of
from gpu_report import Report, run_within

from build_engine.synthetic import write_synthetic
from edgecascade.backends import _cuda
from edgecascade.backends._lib import OVERLAP, cuda_library
from edgecascade.backends.base import Backend, Options
from edgecascade.backends.cuda import CudaBackend
from edgecascade.backends.native import NativeBackend
from edgecascade.bench import circumstances
from edgecascade.bundle import Bundle
from edgecascade.errors import BackendUnavailable, EdgeCascadeError
from edgecascade.llm import LLM
from edgecascade.sampling import SampleRow, Sampling

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = "nemotron-3-nano-30b"
STREAM_READ = Path(__file__).with_name("stream_read.cu")
ON_GPU = "cuda and not emulated"
PROGRAM = [sys.executable, str(Path(__file__).resolve())]
NONE = np.zeros(0, np.int32)
SANITIZED = (
    f"{ON_GPU} and (tables or product or residual or masks or steps_are or moe or temperature"
    " or anywhere or few_and_none or magnitude)"
)
FOUND = re.compile(
    r"FAILED|ERROR|=+ +(ERROR|Error)"
    r"|=+ .*(Invalid|Race reported|[Hh]azard|Uninitialized|Program hit|\+0x)"
)
LIMITS = {  # of the parts, in their order: seconds at most
    "build": 600.0, "gpu": 60.0, "bundle": 1800.0, "suite": 400.0, "ceiling": 120.0,
    "decode": 180.0, "cpu": 180.0, "prefill": 120.0, "generate": 120.0, "long": 240.0,
    "ops": 400.0, "memcheck": 300.0, "racecheck": 300.0,
}  # fmt: skip
MEASURED = {"decode", "cpu", "prefill", "generate", "long", "ops"}  # with the bundle
SANITIZERS = {"memcheck", "racecheck"}


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long."""

    batches: tuple[int, ...] = (1, 2, 4, 8)
    contexts: tuple[int, ...] = (0, 1024)
    long: tuple[int, ...] = (16384,)  # contexts
    ops_context: int = 1024
    prompts: tuple[int, ...] = (128, 512, 2048)
    piece: int = 256  # of a prompt, for streams that shall wait less than LLM lets them
    prompt_ops: int = 512  # tokens of the prompt whose ops are timed
    answer: int = 128  # tokens that LLM.generate makes
    compared: tuple[int, int] = (64, 32)  # prompt and answer fed to both backends
    ceiling_bytes: int = 1 << 30
    steps: int = 32  # of a backend, timed together
    least_s: float = 0.2  # of a timed round; 0: one round of one
    ceiling: float | None = None  # bytes a second, once it is known


QUICK = Plan(long=(4096,), prompts=(128, 512), answer=32, steps=8, least_s=0.05)


def build(limit_s: float) -> float:
    """The library for this machine's GPU, in place; seconds that it took."""
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # CMake is the environment's
    environment = {"EDGECASCADE_CUDA_ARCHS": str(_cuda.open_device().sm), **os.environ}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    start = perf_counter()
    status, said = run_within(command, limit_s, cwd=ROOT, env={**environment, "PATH": tools})
    if status:
        raise EdgeCascadeError(f"the library was not built, status {status}:\n{said[-4000:]}")
    return perf_counter() - start


def built() -> str:
    """What the library that is here is built for.

    Raises:
        BackendUnavailable: when there is none, or it has no kernels for this GPU.
    """
    return cuda_library().query().isa.decode()


def build_stream_read(folder: Path) -> Path:
    """stream_read.cu as a library."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise EdgeCascadeError("nvcc is not on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "stream_read.so"
    includes = [f"-I{ROOT / 'plugins' / part}" for part in ("include", "common", "cuda")]
    target = f"-arch=sm_{_cuda.open_device().sm}"
    command = [nvcc, "-std=c++17", "-O3", target, "-shared", "-Xcompiler", "-fPIC"]
    sources = [str(STREAM_READ), str(ROOT / "plugins" / "common" / "checks.cpp")]
    status, said = run_within([*command, *includes, *sources, "-o", str(made)], LIMITS["ceiling"])
    if status:
        raise EdgeCascadeError(f"nvcc does not take stream_read.cu: {said[-2000:]}")
    return made


def checked(
    report: Report, name: str, limit_s: float, tests: str = ON_GPU, under: tuple[str, ...] = ()
) -> None:
    """The suite of the ops on the GPU, or those of its tests that are named. Each file has a
    process of its own, as many at a time as there are cores.
    """
    pytest = [sys.executable, "-m", "pytest", "-v", "--maxfail=20", "-p", "no:cacheprovider"]
    # Of the machine's other packages: plugins take seconds to load, and their warnings are errors.
    environment = {**os.environ, "EDGECASCADE_TEST_GPU": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ends = monotonic() + limit_s
    report.beside(f".{name}.log").unlink(missing_ok=True)

    def check(file: Path) -> str:
        command = [*under, *pytest, str(file), "-k", tests]
        left_s = max(ends - monotonic(), 0)
        status, said = run_within(command, left_s, cwd=ROOT, env=environment)
        report.keep(name, f"{file.name}, status {status}\n{said}\n")
        return verdict(status, said)

    def part(file: Path) -> None:
        label = f"{name}[{file.stem.split('_')[1]}]"
        if passed := report.take(label, lambda: check(file)):
            report.say(f"{label:20} {passed}")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(part, sorted((ROOT / "tests").glob("test_*_kernel*.py"))))


def verdict(status: int, said: str) -> str:
    """pytest's last line.

    Raises:
        EdgeCascadeError: when it failed, with what was found.
    """
    lines = said.strip().splitlines()
    counts = [line for line in lines if re.search(r"\d (passed|failed|error)", line)]
    last = counts[-1] if counts else ", ".join(lines[-2:])
    if status:
        found = list(dict.fromkeys(line for line in lines if FOUND.match(line)))
        raise EdgeCascadeError("\n  ".join([f"status {status}: {last}", *found[:30]]))
    return last.strip("= ")


def sanitized(report: Report, tool: str, limit_s: float) -> str | None:
    """Some of the suite under a tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        return "compute-sanitizer is not here"
    shown = ("--error-exitcode", "9", "--show-backtrace", "device", "--print-limit", "20")
    checked(report, tool, limit_s, SANITIZED, (program, "--tool", tool, *shown))
    return None


def device_facts() -> dict[str, Any]:
    """The GPU and its driver."""
    properties, version = cuda_library().query(), c.c_int()
    _cuda._library().cuDriverGetVersion(c.byref(version))
    kernel = Path("/proc/driver/nvidia/version")
    return {
        "name": properties.name.decode(),
        "sm": properties.sm,
        "sm_count": properties.sm_count,
        "l2_bytes": properties.l2_bytes,
        "memory_bytes": properties.memory_bytes,
        "cuda_driver": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "kernel_driver": kernel.read_text().splitlines()[0] if kernel.exists() else None,
        "built_for": built(),
    }


def ceiling(plan: Plan, stream_read: Path) -> dict[str, float]:
    """Bytes a second: of a copy, read and written both counted, and of a kernel that only reads."""
    device = _cuda.open_device()
    read = c.CDLL(str(stream_read)).stream_read
    read.argtypes = [c.c_void_p, c.c_void_p, c.c_int64, c.c_void_p, c.c_int]
    try:
        stream, size = device.stream(), plan.ceiling_bytes
        one, two, sink = device.alloc(size), device.alloc(size), device.alloc(16)
        device.zero(one, size, stream)
        blocks = 4 * max(cuda_library().query().sm_count, 1)

        def reading() -> None:
            status = read(stream, one, size, sink, blocks)
            if status:
                raise EdgeCascadeError(f"stream_read: status {status}")

        def rate(moved: int, work: Callable[[], None]) -> float:
            return moved / seconds_of(work, lambda: device.synchronize(stream), plan.least_s)

        return {
            "copy": rate(2 * size, lambda: device.copy(two, one, size, stream)),
            "read": rate(size, reading),
        }
    finally:
        device.close()


def tokens(backend: Backend, count: int, seed: int = 5) -> Any:
    return np.random.default_rng(seed).integers(0, backend.vocab, count).astype(np.int32)


def empty(backend: Backend) -> None:
    """No slot holds a token, which is how LLM takes a backend over."""
    for slot in range(backend.slots):
        backend.reset(slot)


def fill(backend: Backend, batch: int, context: int) -> None:
    """Slots 0 to batch - 1 hold `context` tokens, other ones each; the rest is empty."""
    empty(backend)
    for slot in range(batch if context else 0):
        backend.prefill(slot, tokens(backend, context, seed=slot))


def decode(backend: CudaBackend, plan: Plan, batch: int, context: int) -> dict[str, Any]:
    """Tokens a second of all sequences together, and launches of a step."""
    fill(backend, batch, context)
    slots, fed = list(range(batch)), [int(t) for t in tokens(backend, batch)]
    backend.decode(slots, fed)  # captures
    if not backend.captured:
        raise EdgeCascadeError("decode steps are not captured as CUDA graphs; the log says why")
    greedy, drawn = (
        [SampleRow(how, 0.5, NONE, NONE)] * batch
        for how in (Sampling(temperature=0), Sampling(temperature=0.6, top_p=0.95))
    )
    step_s, drawn_s = (seconds_of_steps(backend, plan, slots, fed, how) for how in (greedy, drawn))
    graph = backend._captured[batch, backend.context_bound(batch)]
    graph_s = seconds_of(
        lambda: graph.launch(backend._stream),
        lambda: backend._device.synchronize(backend._stream),
        plan.least_s,
    )
    return {
        "batch": batch,
        "context": context,
        "launches": graph.nodes,
        "graph_us": graph_s * 1e6,
        "step_us": step_s * 1e6,
        "drawn_step_us": drawn_s * 1e6,
        "graph_tokens_per_s": batch / graph_s,
        "tokens_per_s": batch / step_s,
        "drawn_tokens_per_s": batch / drawn_s,
    }


def seconds_of_steps(
    backend: CudaBackend, plan: Plan, slots: list[int], fed: list[int], how: list[SampleRow]
) -> float:
    """A decode step with a token for each sequence, the mean of several."""
    backend.sample(backend.decode(slots, fed), how)
    start = perf_counter()
    for _ in range(plan.steps):
        backend.sample(backend.decode(slots, fed), how)
    return (perf_counter() - start) / plan.steps


def prefill(backend: CudaBackend, plan: Plan, count: int, piece: int) -> dict[str, Any]:
    """Tokens a second of a prompt in an empty slot, logits of the last token of each piece
    fetched.
    """
    ids, seconds = tokens(backend, count), []
    for _ in range(4 if plan.least_s else 1):
        backend.reset(0)
        start = perf_counter()
        for at in range(0, count, piece):
            np.asarray(backend.prefill(0, ids[at : at + piece]))
        seconds.append(perf_counter() - start)
    best = float(np.median(seconds[1:] or seconds))
    return {"tokens": count, "piece": piece, "seconds": best, "tokens_per_s": count / best}


def first_token(llm: LLM, plan: Plan, count: int) -> dict[str, Any]:
    """Tokens of a prompt over the time from the call of LLM.generate to its first token."""
    prompt = [int(t) for t in np.random.default_rng(count).integers(0, llm.vocab, count)]
    rule: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "reuse": False}
    empty(llm._backend)
    seconds = [
        llm.generate(prompt, max_tokens=1, **rule).timings.first_token_s
        for _ in range(4 if plan.least_s else 1)
    ]
    best = float(np.median(seconds[1:] or seconds))
    return {"tokens": count, "seconds": best, "tokens_per_s": count / best}


def compare(cuda: Backend, cpu: Backend, plan: Plan) -> dict[str, Any]:
    """Both are fed the CPU's greedy answer. A row counts where its lead is above 4 times the
    difference of the rows.
    """
    prompt, count = plan.compared
    ids = tokens(cpu, prompt)
    for backend in (cuda, cpu):
        backend.reset(0)
    got, want = (np.asarray(each.prefill(0, ids)) for each in (cuda, cpu))
    equal, close, wrong, distances = 0, 0, 0, []
    for _ in range(count):
        a, b = got - got.mean(), want - want.mean()
        distances.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
        best, second = (int(i) for i in np.argsort(want)[::-1][:2])
        sure = want[best] - want[second] > 4 * np.sqrt(np.mean((a - b) ** 2))
        same = int(got.argmax()) == best
        equal, close, wrong = equal + same, close + (not sure), wrong + (not same and sure)
        got, want = (np.asarray(each.decode([0], [best])[0]) for each in (cuda, cpu))
    return {
        "rows": count,
        "equal": equal,
        "too_close_to_call": close,
        "wrong": int(wrong),
        "distance": float(np.median(distances)),
    }


def batches(backend: Backend, plan: Plan) -> dict[str, Any]:
    """How many rows of steps of several sequences have other bits than the same sequence alone:
    those of the first step, which is captured, and of two that replay it.
    """
    most = max(plan.batches)
    fed = tokens(backend, 3 * most).reshape(3, most).tolist()

    def rows(batch: int) -> list[bytes]:
        """Of all sequences in all steps, `batch` sequences a step."""
        fill(backend, most, plan.ops_context)
        groups = [range(at, min(at + batch, most)) for at in range(0, most, batch)]
        steps = [(group, [step[i] for i in group]) for step in fed for group in groups]
        return [row.tobytes() for step in steps for row in np.asarray(backend.decode(*step))]

    alone = rows(1)
    unequal = {batch: sum(map(bytes.__ne__, alone, rows(batch))) for batch in plan.batches}
    return {"rows": len(alone), "context": plan.ops_context, "unequal": unequal}


def overlap(backend: CudaBackend, plan: Plan) -> dict[str, Any]:
    """How many steps have other bits than without launches that begin early: what such a launch
    reads or writes too soon, no emulator shows.
    """
    most, step = max(plan.batches), backend._args_step
    fed = tokens(backend, plan.steps * most).reshape(plan.steps, most).tolist()

    def steps(batch: int, flags: int) -> list[bytes]:
        for graph in backend._captured.values():
            graph.close()
        backend._captured.clear()
        step.flags = flags
        fill(backend, batch, plan.ops_context)
        slots = list(range(batch))
        return [np.asarray(backend.decode(slots, each[:batch])).tobytes() for each in fed]

    asked, unequal = step.flags, {}
    for batch in (1, most):
        in_turn = steps(batch, asked & ~OVERLAP)
        unequal[batch] = sum(map(bytes.__ne__, in_turn, steps(batch, asked)))
    return {"steps": plan.steps, "context": plan.ops_context, "unequal": unequal}


def generate(llm: LLM, plan: Plan, batch: int) -> dict[str, Any]:
    """Tokens a second of greedy answers that run together."""
    prompts = [[int(t) for t in np.random.default_rng(i).integers(0, llm.vocab, 16)]
               for i in range(batch)]  # fmt: skip
    rule: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "reuse": False}
    empty(llm._backend)
    answers = llm.generate(prompts, max_tokens=plan.answer, **rule)
    rate = sum(answer.timings.decode_tokens_per_s for answer in answers)
    return {"batch": batch, "tokens": plan.answer, "tokens_per_s": rate}


def measure(name: str, bundle: Bundle, plan: Plan, report: Report) -> None:
    """One of MEASURED, on a backend of its own."""
    say, contexts = report.say, plan.long if name == "long" else plan.contexts
    most = max(*plan.contexts, *plan.long, *plan.prompts, sum(plan.compared)) + 2 * plan.steps + 64
    start = perf_counter()
    backend = CudaBackend(bundle, Options(slots=max(plan.batches), max_context=most))
    seconds, size = perf_counter() - start, bundle.weight_bytes
    with LLM(bundle, backend, "measured") as llm:
        report.rows("load", [name], lambda _: [{"part": name, "seconds": seconds, "bytes": size}])
        say(f"{'load':10} {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s")
        if name in ("decode", "long"):
            steps = [(batch, context) for context in contexts for batch in plan.batches]
            report.rows("decode", steps, lambda step: [told_decode(backend, plan, *step, say)])
        elif name == "cpu":
            report.take("cpu", lambda: told_compare(backend, bundle, plan, say))
            report.take("batches", lambda: told_batches(backend, plan, say))
            report.take("overlap", lambda: told_overlap(backend, plan, say))
        elif name == "prefill":
            sizes = {count: sorted({count, min(count, plan.piece)})[::-1] for count in plan.prompts}
            pieces = [(count, piece) for count in plan.prompts for piece in sizes[count]]
            report.rows("prefill", pieces, lambda piece: [told_prefill(backend, plan, *piece, say)])
            report.rows("first_token", plan.prompts, lambda n: [told_first(llm, plan, n, say)])
        elif name == "generate":
            report.rows("generate", plan.batches, lambda n: [told_generate(llm, plan, n, say)])
        else:
            instruments(backend, plan, report)


def instruments(backend: CudaBackend, plan: Plan, report: Report) -> None:
    """The ops of a step and of a prompt alone, and the border between launches."""
    say, ops = report.say, OpTimer(backend, plan.ceiling, plan.least_s)
    l2 = cuda_library().query().l2_bytes
    for batch in plan.batches:
        ready = report.take("ops_context", lambda batch=batch: stand(backend, plan, batch))
        for label in ops.labels if ready is not None else []:
            report.rows("ops", [f"{label}, batch {batch}"], lambda _, batch=batch, label=label:
                        told_ops(ops, label, batch, "op", l2, say))  # fmt: skip
        if batch == 1 and ready is not None:
            ways = [(overlap, prefetch) for overlap in (False, True) for prefetch in (False, True)]
            report.rows("boundary", ways, lambda way: [told_boundary(ops, *way, say)])
        if batch == plan.batches[0]:  # before the other batches, should time run out
            prompt_ops(backend, plan, report)


def prompt_ops(backend: CudaBackend, plan: Plan, report: Report) -> None:
    count = plan.prompt_ops
    if report.take("prompt_ops_tokens", lambda: read(backend, count)) is None:
        return
    ops = OpTimer(backend, plan.ceiling, plan.least_s, prompt=count)
    report.rows("prompt_ops", ops.labels,
                lambda label: told_ops(ops, label, count, "prompt op", 0, report.say))  # fmt: skip


def stand(backend: CudaBackend, plan: Plan, batch: int) -> int:
    """The backend's last step is a decode step of the batch at the ops' context, then."""
    fill(backend, batch, plan.ops_context)
    backend.decode(list(range(batch)), [int(t) for t in tokens(backend, batch)])
    return plan.ops_context


def read(backend: CudaBackend, count: int) -> int:
    """The backend's last step is the prompt's, then."""
    backend.reset(0)
    backend.prefill(0, tokens(backend, count))
    return count


def told_decode(
    backend: CudaBackend, plan: Plan, batch: int, context: int, say: Callable[[str], None]
) -> dict[str, Any]:
    row = decode(backend, plan, batch, context)
    say(
        f"{'decode':10} batch {batch}, context {context:6} {row['tokens_per_s']:14.1f} "
        f"tokens/s, drawn {row['drawn_tokens_per_s']:.1f}, "
        f"graph alone {row['graph_tokens_per_s']:.1f}, {row['launches']} launches"
    )
    return row


def told_boundary(
    timer: OpTimer, overlap: bool, prefetch: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """What the border between two launches costs, and the whole step, with and without launches
    that begin early, and what is wanted next brought into the L2.
    """
    ways = [name for name, on in (("overlap", overlap), ("prefetch", prefetch)) if on]
    us, step_us = timer.boundary_us(overlap), timer.step_us(1, overlap=overlap, prefetch=prefetch)
    say(
        f"{'boundary':10} {us:.2f} us for a launch that does nothing, {step_us:.1f} us a step of "
        f"batch 1, with {' and '.join(ways) or 'neither overlap nor prefetch'}"
    )
    return {"overlap": overlap, "prefetch": prefetch, "us": us, "step_us": step_us}


def told_ops(
    timer: OpTimer, label: str, batch: int, what: str, l2: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Of a kind of call, the whole and its launches; l2: bytes, to say what may come from there."""
    for time in timer.time(label, batch):
        in_l2 = 0 < time.replayed_bytes < 2 * l2
        say(f"{what:10} {told_op(time.row())}{'  (in part from L2)' * in_l2}")
        yield time.row() | {"in_l2": in_l2}


def told_op(row: dict[str, Any]) -> str:
    share = f"{row['gb_per_s']:8.1f} GB/s {row['share']:4.0%}" if row["share"] else ""
    return (
        f"{row['op']:28} batch {row['batch']}  {row['calls']:3} x {row['us']:8.2f} us "
        f"{row['bytes'] / 1e6:9.2f} MB {share}"
    )


def told_prefill(
    backend: CudaBackend, plan: Plan, count: int, piece: int, say: Callable[[str], None]
) -> dict[str, Any]:
    row = prefill(backend, plan, count, piece)
    told_prompt(row, "one call" if piece == count else f"pieces of {piece}", say)
    return row


def told_first(llm: LLM, plan: Plan, count: int, say: Callable[[str], None]) -> dict[str, Any]:
    row = first_token(llm, plan, count)
    told_prompt(row, "LLM.generate", say)
    return row


def told_generate(llm: LLM, plan: Plan, batch: int, say: Callable[[str], None]) -> dict[str, Any]:
    row = generate(llm, plan, batch)
    say(f"{'generate':10} batch {batch} {row['tokens_per_s']:29.1f} tokens/s")
    return row


def told_ceiling(plan: Plan, say: Callable[[str], None]) -> dict[str, float]:
    rates = ceiling(plan, build_stream_read(ROOT / "build" / "bench"))
    for name, rate in rates.items():
        say(f"{'ceiling':10} {name:26} {rate / 1e9:10.1f} GB/s")
    return rates


def told_prompt(row: dict[str, Any], how: str, say: Callable[[str], None]) -> None:
    say(f"{'prefill':10} {row['tokens']:5} tokens, {how:13} {row['tokens_per_s']:14.1f} tokens/s")


def told_compare(
    backend: CudaBackend, bundle: Bundle, plan: Plan, say: Callable[[str], None]
) -> dict[str, Any]:
    cpu = NativeBackend(bundle, Options(slots=1, max_context=sum(plan.compared) + 64))
    try:
        seen = compare(backend, cpu, plan)
    finally:
        cpu.close()
    say(f"{'cpu':10} {seen}")
    if seen["wrong"]:
        raise EdgeCascadeError(f"{seen['wrong']} greedy tokens differ from the CPU's: {seen}")
    return seen


def told_batches(backend: Backend, plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    seen = batches(backend, plan)
    say(f"{'batches':10} {seen}")
    if any(seen["unequal"].values()):
        raise EdgeCascadeError(f"rows have other bits in company than alone: {seen}")
    return seen


def told_overlap(backend: CudaBackend, plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    seen = overlap(backend, plan)
    say(f"{'overlap':10} {seen}")
    if any(seen["unequal"].values()):
        raise EdgeCascadeError(f"steps have other bits with launches that begin early: {seen}")
    return seen


def open_bundle(args: argparse.Namespace, *, write: bool = False) -> Bundle:
    """The one that was asked for, else random weights; written where it is not yet."""
    layers = 8 if args.quick else None
    folder = args.bundle or ROOT / "build" / "bench" / f"{MODEL}-{layers or 'all'}"
    if write and not folder.exists():
        print(f"writing {folder}", flush=True)
        write_synthetic(folder, MODEL, layers)
    return Bundle.open(folder, verify=False)


def part_here(args: argparse.Namespace, plan: Plan) -> int:
    """A part in this process, which reports beside the report of the one that started it."""
    known = json.loads(args.out.read_text()).get("ceiling", {})
    plan = replace(plan, ceiling=max(known.values(), default=None))
    report = Report(partial(print, flush=True), args.out.with_suffix(f".{args.here}.json"))
    works: dict[str, Callable[[], Any]] = {
        "gpu": device_facts,
        "bundle": lambda: open_bundle(args, write=True).report or str(args.bundle),
        "ceiling": lambda: told_ceiling(plan, report.say),
    }
    own = works.get(args.here)
    report.take(args.here, own or (lambda: measure(args.here, open_bundle(args), plan, report)))
    return 1 if report.failed else 0


def part_apart(report: Report, name: str, limit_s: float) -> None:
    """A part in a process of its own, and what it found, whatever became of it."""
    out = report.beside(f".{name}.json")
    out.unlink(missing_ok=True)
    command = [*PROGRAM, *sys.argv[1:], "--here", name, "--out", str(report.out)]
    status, said = run_within(command, limit_s, stdout=None, stderr=None)
    at = report.adopt(out)
    if at or status not in (0, 1):
        why = f"status {status}, {said.strip()}" if said else f"status {status}"
        raise EdgeCascadeError(f"{why}, at {at or 'its end'}")


def run(report: Report, name: str, limit_s: float) -> Any:
    """A part of LIMITS."""
    if name == "build":
        return build(limit_s)
    if name == "suite":
        return checked(report, name, limit_s)
    return (sanitized if name in SANITIZERS else part_apart)(report, name, limit_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 layers, shorter contexts")
    parser.add_argument("--minutes", type=float, help="end by then, with what there is")
    parser.add_argument("--bundle", type=Path, help="measure this one; default: a synthetic 30B")
    parser.add_argument(
        "--parts", nargs="+", choices=LIMITS, help="default: all; in --minutes, no sanitizer"
    )
    parser.add_argument("--no-build", action="store_true", help="the library is there already")
    parser.add_argument("--no-checks", action="store_true", help="only measure")
    parser.add_argument("--out", type=Path, help="the JSON; default: in benchmarks/results")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan()
    if args.here:
        return part_here(args, plan)
    here = circumstances()
    try:
        gpu = re.sub(r"\W+", "-", _cuda.open_device().name).lower()
    except BackendUnavailable as error:
        raise SystemExit(f"nothing to measure: {error}") from error
    kind = "".join(f"-{word}" for word in (*["quick"] * args.quick, *(args.parts or ())))
    out = args.out or RESULTS / f"{here['date']}-{gpu}-30b-speed{kind}.json"
    report = Report(partial(print, flush=True), out, 60 * (args.minutes or float("inf")))
    report.values |= here
    chosen = {"gpu", *(args.parts or LIMITS.keys() - (SANITIZERS if args.minutes else set()))}
    chosen -= {"build"} if args.no_build else set()
    chosen -= {"suite", *SANITIZERS} if args.no_checks else set()
    chosen |= {"bundle"} if chosen & MEASURED else set()
    parts = [part for part in LIMITS if part in chosen]

    def taken(part: str) -> None:
        last = part == parts[-1]
        report.take(part, lambda: run(report, part, report.within(LIMITS[part], last=last)))

    with ThreadPoolExecutor(1) as meanwhile:
        for part in parts:
            if part == "bundle":
                bundle = meanwhile.submit(taken, part)
                continue
            if part in MEASURED:
                bundle.result()
            taken(part)
            if part == "gpu" and part not in report.values:
                break  # no library
    report.say(f"{out}: {len(report.failed)} parts failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
