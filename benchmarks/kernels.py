# SPDX-License-Identifier: Apache-2.0
"""Speed of the CPU kernels beside what the core can do.

    python benchmarks/kernels.py [--isa NAME] [--threads N] [--json]

decode   one token through a 131072 x 2688 matrix, GB/s, beside the rate at which the same threads
         read memory
prefill  16 to 256 tokens through an expert of 1856 x 2688, GFLOPS, beside a loop of nothing but the
         ISA's integer dot product (measured where g++ is there)
moe      a layer of Nemotron-3-Nano-30B: 128 experts, 6 of them and the shared one per token
pack     bfloat16 to 4-bit blocks, million weights per second

With one thread, times are the thread's own CPU time, so that a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import ctypes as c
import json
import mmap
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgecascade.backends._lib import (
    ARGS,
    Call,
    Library,
    NormArgs,
    Step,
    Stream,
    Weight,
    address,
    cpu_isas,
    cpu_library,
)
from edgecascade.tensors import ALIGNMENT, BLOCK_BYTES, BLOCK_ROWS, Codec, matrix_bytes, round_up

D, FF, SHARED_FF, EXPERTS, TOP_K, VOCAB = 2688, 1856, 3712, 128, 6, 131072
CODEC = Codec.U4_64
PEAK_SOURCE = Path(__file__).with_name("dot_peak.cpp")
PEAK_FLAGS = {
    "avx2": ["-mavx2"],
    "avx512vnni": ["-mavx512f", "-mavx512vnni", "-mprefer-vector-width=512"],
}


@dataclass(frozen=True)
class Result:
    """One line: a rate, what it is compared with, and their ratio."""

    isa: str
    threads: int
    kernel: str
    rate: float
    unit: str
    ceiling: float | None = None

    @property
    def share(self) -> float | None:
        return self.rate / self.ceiling if self.ceiling else None


@dataclass(frozen=True)
class Bench:
    """One ISA with its threads."""

    library: Library
    stream: Stream

    def best_seconds(self, body: Callable[[], None], repeat: int) -> float:
        clock = time.thread_time if self.stream.threads == 1 else time.perf_counter
        best = float("inf")
        for _ in range(repeat):
            start = clock()
            body()
            best = min(best, clock() - start)
        return best

    def seconds(self, code: int, args: c.Structure, tokens: int, repeat: int) -> float:
        """The fastest of `repeat` runs of an op."""
        step = Step(n_tok=tokens, n_seq=1)
        calls = (Call * 1)(Call(c.addressof(args), code, 0))
        workspace = np.zeros(self.library.workspace_size(step, calls) + 256, np.uint8)
        step.workspace, step.workspace_bytes = address(workspace), workspace.nbytes
        return self.best_seconds(lambda: self.library.run_op(code, self.stream, step, args), repeat)

    def result(self, kernel: str, rate: float, unit: str, ceiling: float | None = None) -> Result:
        return Result(self.library.isa, self.stream.threads, kernel, rate, unit, ceiling)


def random_weight(n: int, k: int, experts: int = 1) -> tuple[Weight, NDArray[np.uint8]]:
    """Random codes with one plausible scale, and their memory."""
    size, block = matrix_bytes(CODEC, n, k), BLOCK_BYTES[CODEC.value]
    stride = round_up(size, ALIGNMENT)
    memory = mmap.mmap(-1, stride * experts)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # as the pages of a mapped bundle are
    data = np.frombuffer(memory, np.uint8)
    blocks = np.random.default_rng(0).integers(0, 256, (size // block, block), np.uint8)
    blocks[:, -2 * BLOCK_ROWS :] = np.full(BLOCK_ROWS, 0.003, np.float16).view(np.uint8)
    for expert in range(experts):
        data[expert * stride : expert * stride + size] = blocks.reshape(-1)
    return Weight(address(data), stride, n, k, CODEC.ec_type, experts), data


def rows(tokens: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng(tokens).standard_normal((tokens, columns), np.float32)


def read_rate(data: NDArray[np.uint8]) -> float:
    """GB/s at which one thread of NumPy reads the memory."""
    words = data.view(np.int32)
    start = time.thread_time()
    words.max()
    return data.nbytes / (time.thread_time() - start) / 1e9


def dot_peak(isa: str) -> float | None:
    """GOPS of one core in the integer dot product alone; None without a compiler or a recipe."""
    if isa not in PEAK_FLAGS:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "dot_peak")
        command = ["g++", "-O3", "-std=c++17", *PEAK_FLAGS[isa], str(PEAK_SOURCE), "-o", program]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except FileNotFoundError:
            return None
        return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)


def linear(bench: Bench, weight: Weight, tokens: int, repeat: int) -> float:
    x, y = rows(tokens, weight.k), np.empty((tokens, weight.n), np.float32)
    args = ARGS["linear"](x=address(x), w=weight, y=address(y))
    return bench.seconds(1, args, tokens, repeat)


def decode(bench: Bench) -> Iterator[Result]:
    weight, data = random_weight(VOCAB, D)
    shared = bench.library.query().read_bytes_per_s / 1e9
    for tokens in (1, 4, 8):
        # In turn, because the memory of a shared machine is not equally fast all the time.
        runs = [(read_rate(data), linear(bench, weight, tokens, 1)) for _ in range(6)]
        rate = matrix_bytes(CODEC, VOCAB, D) / min(seconds for _, seconds in runs) / 1e9
        ceiling = max(read for read, _ in runs) if bench.stream.threads == 1 else shared
        yield bench.result(f"decode, {tokens} tokens", rate, "GB/s", ceiling)
    del data


def prefill(bench: Bench, peak: float | None) -> Iterator[Result]:
    weight, data = random_weight(FF, D)
    for tokens in (16, 32, 64, 128, 256):
        seconds = linear(bench, weight, tokens, 8)
        rate = 2 * tokens * FF * D / seconds / 1e9
        yield bench.result(f"expert, {tokens} tokens", rate, "GFLOPS", peak)
    del data


def moe(bench: Bench, peak: float | None) -> Iterator[Result]:
    pairs = [
        random_weight(n, k, e)
        for n, k, e in ((FF, D, EXPERTS), (D, FF, EXPERTS), (SHARED_FF, D, 1), (D, SHARED_FF, 1))
    ]
    router, bias, gamma = rows(EXPERTS, D), np.zeros(EXPERTS, np.float32), np.ones(D, np.float32)
    router *= np.float32(0.02)
    for tokens in (1, 8, 128, 512):
        x, ids = rows(tokens, D), np.empty((tokens, TOP_K), np.int32)
        y, weights = np.empty_like(x), np.empty((tokens, TOP_K), np.float32)
        args = ARGS["moe"](
            x=address(x), y=address(y), ids=address(ids), weights=address(weights),
            norm=NormArgs(address(gamma), 1e-5, 1), router=address(router), bias=address(bias),
            up=pairs[0][0], down=pairs[1][0], shared_up=pairs[2][0], shared_down=pairs[3][0],
            top_k=TOP_K, n_group=1, topk_group=1, normalize=1, scale=2.5,
        )  # fmt: skip
        seconds = bench.seconds(6, args, tokens, 5)
        flops = 4 * tokens * D * (TOP_K * FF + SHARED_FF)
        yield bench.result(f"moe, {tokens} tokens", seconds * 1e3, "ms")
        yield bench.result(f"moe, {tokens} tokens", flops / seconds / 1e9, "GFLOPS", peak)


def pack(bench: Bench) -> Iterator[Result]:
    source = (rows(1024, D).view(np.uint32) >> 16).astype(np.uint16)
    blocks = np.empty(matrix_bytes(CODEC, *source.shape), np.uint8)
    seconds = bench.best_seconds(
        lambda: bench.library.pack(bench.stream, source, "bf16", CODEC, blocks), 3
    )
    yield bench.result("pack", source.size / seconds / 1e6, "Mweights/s")


def measure(isa: str, threads: int) -> Iterator[Result]:
    library = cpu_library(isa)
    bench = Bench(library, library.stream(threads))
    peak = dot_peak(isa)
    total = peak * bench.stream.threads if peak else None
    yield from decode(bench)
    yield from prefill(bench, total)
    yield from moe(bench, total)
    yield from pack(bench)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--isa", choices=cpu_isas(), help="default: all but portable")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    isas = [options.isa] if options.isa else [isa for isa in cpu_isas() if isa != "portable"]
    device = cpu_library().query()
    if not options.json:
        print(f"{device.name.decode()}, {device.threads} threads read "
              f"{device.read_bytes_per_s / 1e9:.1f} GB/s")  # fmt: skip
    results = []
    for isa in isas:
        for result in measure(isa, options.threads):
            results.append(asdict(result) | {"share": result.share})
            if not options.json:
                beside = f"{result.share:5.0%} of {result.ceiling:.0f}" if result.share else ""
                print(f"{result.isa:12} {result.threads:2} {result.kernel:20} "
                      f"{result.rate:8.1f} {result.unit:10} {beside}")  # fmt: skip
    if options.json:
        print(json.dumps({"cpu": device.name.decode(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
