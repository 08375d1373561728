# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on this machine's GPU: built, checked, measured.

    python benchmarks/gpu.py [--quick] [--bundle DIR] [--no-checks] [--out FILE]

build      the library for the GPU that is here (needs nvcc)
checks     the suite of the ops on the GPU; a part of it under compute-sanitizer, where that is
ceiling    what a device-to-device copy moves, and what a kernel that only reads gets
           (stream_read.cu); shares are of the larger
bundle     Nemotron-3-Nano-30B's shapes with random weights, written here: 17 GB under build/
decode     1, 2, 4 and 8 sequences with contexts of 0, 1k and 16k tokens: the graph alone, and a
           step of the backend with greedy tokens, and with drawn ones
ops        each op of a decode step alone (gpu_ops.py), at a context of 1k
prefill    128, 512 and 2048 tokens of one sequence: the backend alone in its largest chunks, the
           same in pieces as LLM cuts them, and LLM.generate up to the first token
prompt ops each op of a prompt of 512 tokens alone, and each launch of it
generate   LLM.generate with the greedy rule, sampling included
cpu        the same tokens fed to the CPU backend: greedy choices equal where the lead allows

A line a figure, then JSON in benchmarks/results. --quick: 8 layers, shorter contexts. What fails or
does not fit is named, in the JSON too, the rest goes on, and the status is 1.
"""

from __future__ import annotations

import argparse
import ctypes as c
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from gpu_ops import OpTimer, seconds_of

from build_engine.synthetic import write_synthetic
from edgecascade.backends import _cuda
from edgecascade.backends._lib import cuda_library
from edgecascade.backends.base import Backend, Options
from edgecascade.backends.cuda import CudaBackend
from edgecascade.backends.native import NativeBackend
from edgecascade.bench import circumstances
from edgecascade.bundle import Bundle
from edgecascade.errors import EdgeCascadeError
from edgecascade.llm import CHUNK_TOKENS, LLM
from edgecascade.sampling import SampleRow, Sampling

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = "nemotron-3-nano-30b"
STREAM_READ = Path(__file__).with_name("stream_read.cu")
ON_GPU = "cuda and not emulated"
NONE = np.zeros(0, np.int32)
SANITIZED = (
    f"{ON_GPU} and (tables or product or residual or masks or steps_are or moe or temperature"
    " or anywhere or few_and_none or magnitude)"
)


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long."""

    batches: tuple[int, ...] = (1, 2, 4, 8)
    contexts: tuple[int, ...] = (0, 1024, 16384)
    ops_context: int = 1024
    prompts: tuple[int, ...] = (128, 512, 2048)
    piece: int = CHUNK_TOKENS  # of a prompt, as LLM cuts it
    prompt_ops: int = 512  # tokens of the prompt whose ops are timed
    answer: int = 128  # tokens that LLM.generate makes
    compared: tuple[int, int] = (64, 32)  # prompt and answer fed to both backends
    ceiling_bytes: int = 1 << 30
    steps: int = 32  # of a backend, timed together
    least_s: float = 0.2  # of a timed round; 0: one round of one


QUICK = Plan(contexts=(0, 1024), prompts=(128, 512), answer=32, steps=8, least_s=0.05)


def build() -> None:
    """The library for this machine's GPU, in place."""
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # CMake is the environment's
    environment = {**os.environ, "PATH": tools}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    if not (ROOT / "edgecascade" / "_lib" / "libedgecascade_cuda.so").exists():
        raise SystemExit("the CUDA library was not built: nvcc and a GPU are needed")


def build_stream_read(folder: Path) -> Path:
    """stream_read.cu as a library."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise SystemExit("nvcc is not on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "stream_read.so"
    includes = [f"-I{ROOT / 'plugins' / part}" for part in ("include", "common", "cuda")]
    command = [nvcc, "-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler", "-fPIC"]
    sources = [str(STREAM_READ), str(ROOT / "plugins" / "common" / "checks.cpp")]
    subprocess.run([*command, *includes, *sources, "-o", str(made)], check=True)
    return made


def checks() -> dict[str, Any]:
    """The suite of the ops on the GPU, then some of it under compute-sanitizer."""
    environment = {**os.environ, "EDGECASCADE_TEST_GPU": "1"}
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_*_kernel*.py"))
    suite = [sys.executable, "-m", "pytest", "-q", *files, "-k"]
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    commands = {"ops": [*suite, ON_GPU]}
    if tool:
        for check in ("memcheck", "racecheck"):
            sanitizer = [tool, "--tool", check, "--error-exitcode", "9"]
            commands[check] = [*sanitizer, *suite, SANITIZED]
    seen: dict[str, Any] = {} if tool else {"memcheck": "compute-sanitizer is not here"}
    for name, command in commands.items():
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        lines = done.stdout.strip().splitlines()
        last = next((s for s in reversed(lines) if re.search(r"passed|failed|error", s)), "")
        seen[name] = f"status {done.returncode}: {last}"
        if done.returncode:
            print("\n".join(lines[-30:]), done.stderr[-2000:], file=sys.stderr)
            raise EdgeCascadeError(f"{name}: {seen[name]}")
    return seen


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


def fill(backend: CudaBackend, batch: int, context: int) -> None:
    """Slots 0 to batch - 1 hold `context` tokens, other ones each; the rest is empty."""
    for slot in range(backend.slots):
        backend.reset(slot)
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
    graph = backend._captured[max(key for key in backend.captured if key[0] == batch)]
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


def generate(llm: LLM, plan: Plan, batch: int) -> dict[str, Any]:
    """Tokens a second of greedy answers that run together."""
    prompts = [[int(t) for t in np.random.default_rng(i).integers(0, llm.vocab, 16)]
               for i in range(batch)]  # fmt: skip
    rule: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "reuse": False}
    answers = llm.generate(prompts, max_tokens=plan.answer, **rule)
    rate = sum(answer.timings.decode_tokens_per_s for answer in answers)
    return {"batch": batch, "tokens": plan.answer, "tokens_per_s": rate}


class Report:
    """What was measured, said at once and kept for the file."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.values, self.failed = say, dict[str, Any](), list[str]()

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of one part; an error of ours is told, and the rest goes on."""
        try:
            self.values[name] = work()
        except EdgeCascadeError as error:
            self.failed.append(f"{name}: {error}")
            self.say(f"{name}: {error}")
        return self.values.get(name)


def measure(bundle: Bundle, plan: Plan, stream_read: Path, report: Report) -> None:
    """All but the build and the checks."""
    say = report.say
    say(f"{'load':10} {bundle.weight_bytes / 1e9:.2f} GB of weights")
    context = max(*plan.contexts, *plan.prompts, sum(plan.compared)) + 2 * plan.steps + 64
    options = Options(slots=max(plan.batches), max_context=context)
    rates = report.take("ceiling", lambda: ceiling(plan, stream_read)) or {}
    for name, rate in rates.items():
        say(f"{'ceiling':10} {name:26} {rate / 1e9:10.1f} GB/s")
    start = perf_counter()
    backend = CudaBackend(bundle, options)
    load_s = perf_counter() - start
    try:
        report.values["gpu"] = device_facts()
        report.values["load"] = {"seconds": load_s, "bytes": bundle.weight_bytes}
        say(f"{'load':10} {load_s:.2f} s, {bundle.weight_bytes / load_s / 1e9:.2f} GB/s")
        report.take("decode", lambda: list(decoding(backend, plan, rates, report)))
        report.take("prefill", lambda: list(prefilling(backend, plan, say)))
        report.take("prompt_ops", lambda: list(prompt_ops(backend, plan, rates, say)))
        report.take("cpu", lambda: told_compare(backend, bundle, plan, say))
        with LLM(bundle, backend, "measured") as llm:
            read = report.take("first_token", lambda: [first_token(llm, plan, n)
                                                       for n in plan.prompts])  # fmt: skip
            made = report.take("generate", lambda: [generate(llm, plan, n) for n in plan.batches])
        for row in read or []:
            told_prompt(row, "LLM.generate", say)
        for row in made or []:
            say(f"{'generate':10} batch {row['batch']} {row['tokens_per_s']:29.1f} tokens/s")
    finally:
        backend.close()


def decoding(
    backend: CudaBackend, plan: Plan, rates: dict[str, float], report: Report
) -> Iterator[dict[str, Any]]:
    """All batches and contexts; the ops at one of the contexts."""
    timer = OpTimer(backend, max(rates.values(), default=None), plan.least_s)
    l2 = cuda_library().query().l2_bytes
    ops = report.values.setdefault("ops", [])
    for batch in plan.batches:
        for context in plan.contexts:
            row = decode(backend, plan, batch, context)
            report.say(
                f"{'decode':10} batch {batch}, context {context:6} {row['tokens_per_s']:14.1f} "
                f"tokens/s, drawn {row['drawn_tokens_per_s']:.1f}, "
                f"graph alone {row['graph_tokens_per_s']:.1f}, "
                f"{row['launches']} launches"
            )
            yield row
            if context != plan.ops_context:
                continue
            for time in timer.times(batch):
                in_l2 = 0 < time.replayed_bytes < 2 * l2
                ops.append(time.row() | {"in_l2": in_l2})
                report.say(f"{'op':10} {told_op(time.row())}{'  (in part from L2)' * in_l2}")
            if batch == 1:
                told_boundary(timer, report)


def told_boundary(timer: OpTimer, report: Report) -> None:
    """What the border between two launches costs, and the whole step, with and without overlap."""
    rows = report.values["boundary"] = [
        {"overlap": on, "us": timer.boundary_us(on), "step_us": timer.step_us(on, 1)}
        for on in (False, True)
    ]
    for row in rows:
        report.say(
            f"{'boundary':10} {row['us']:.2f} us for a launch that does nothing, "
            f"{row['step_us']:.1f} us a step of batch 1, with{'' if row['overlap'] else 'out'} "
            "launches that begin early"
        )


def told_op(row: dict[str, Any]) -> str:
    share = f"{row['gb_per_s']:8.1f} GB/s {row['share']:4.0%}" if row["share"] else ""
    return (
        f"{row['op']:28} batch {row['batch']}  {row['calls']:3} x {row['us']:8.2f} us "
        f"{row['bytes'] / 1e6:9.2f} MB {share}"
    )


def prefilling(
    backend: CudaBackend, plan: Plan, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """All prompts, in one call, and in pieces where LLM's are smaller."""
    for count in plan.prompts:
        for piece in sorted({count, min(count, plan.piece)}, reverse=True):
            row = prefill(backend, plan, count, piece)
            told_prompt(row, "one call" if piece == count else f"pieces of {piece}", say)
            yield row


def told_prompt(row: dict[str, Any], how: str, say: Callable[[str], None]) -> None:
    say(f"{'prefill':10} {row['tokens']:5} tokens, {how:13} {row['tokens_per_s']:14.1f} tokens/s")


def prompt_ops(
    backend: CudaBackend, plan: Plan, rates: dict[str, float], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The ops of a prompt, and their launches."""
    count = plan.prompt_ops
    backend.reset(0)
    backend.prefill(0, tokens(backend, count))
    timer = OpTimer(backend, max(rates.values(), default=None), plan.least_s, prompt=count)
    for time in timer.times(count):
        say(f"{'prompt op':10} {told_op(time.row())}")
        yield time.row()


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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 layers, shorter contexts")
    parser.add_argument("--bundle", type=Path, help="measure this one; default: a synthetic 30B")
    parser.add_argument("--no-checks", action="store_true", help="only measure")
    parser.add_argument("--out", type=Path, help="the JSON; default: in benchmarks/results")
    args = parser.parse_args()
    report = Report(print)
    build()
    stream_read = build_stream_read(ROOT / "build" / "bench")
    if not args.no_checks:
        print(report.take("checks", checks))
    layers = 8 if args.quick else None
    folder = args.bundle or ROOT / "build" / "bench" / f"{MODEL}-{layers or 'all'}"
    if not folder.exists():
        print(f"writing {folder}")
        write_synthetic(folder, MODEL, layers)
    bundle = Bundle.open(folder, verify=False)
    report.values |= {"bundle": bundle.report or str(folder), **circumstances()}
    report.take("measured", lambda: measure(bundle, QUICK if args.quick else Plan(),
                                            stream_read, report))  # fmt: skip
    report.values["failed"] = report.failed
    gpu = re.sub(r"\W+", "-", report.values.get("gpu", {}).get("name", "gpu")).lower()
    suffix = "-quick" if args.quick else ""
    out = args.out or RESULTS / f"{report.values['date']}-{gpu}-30b-speed{suffix}.json"
    out.write_text(json.dumps(report.values, indent=1) + "\n")
    print(f"{out}: {len(report.failed)} parts failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
