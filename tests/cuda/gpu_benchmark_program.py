# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py on a tiny model, in processes whose driver and GPU are the stand-ins.

    python tests/cuda/gpu_benchmark_program.py STAND_INS KERNELS STREAM_READ FOLDER [ARGUMENT ...]

Does what the script does with these arguments; files of its own are in FOLDER. With FAULTS in the
environment the build fails, the second decode step loses the GPU, the comparison with the CPU ends
its process, and a prompt never ends. Without arguments it writes FOLDER/alone.json: the launches of
a whole 30B's step, and what LLM.generate makes of slots that were full. Times mean nothing here.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
L2_BYTES = 4096
TINY = {
    "hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "mamba_num_heads": 2, "mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 1,
    "expand": 1, "intermediate_size": 64, "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 128, "max_position_embeddings": 4096,
}  # fmt: skip


def main(stand_ins: str, kernels: str, stream_read: str, folder: str, *arguments: str) -> None:
    driver = ctypes.CDLL(f"{stand_ins}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    os.environ["EDGECASCADE_CUDA_LIBRARY"] = kernels
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    from build_engine.synthetic import config, write_random
    from edgecascade.backends._cuda import open_device
    from edgecascade.backends._lib import cuda_library
    from edgecascade.backends.base import Options
    from edgecascade.backends.cuda import CudaBackend
    from edgecascade.bundle import Bundle
    from edgecascade.llm import LLM

    def write(path: str | Path, pattern: str = "ME*") -> Path:
        layers = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
        return write_random(path, {**config(gpu.MODEL), **TINY, **layers}, {"tiny": True})

    open_device()
    facts = cuda_library().query()
    facts.l2_bytes, facts.sm_count = L2_BYTES, 2  # which the emulator lacks
    cuda_library().query = lambda: facts  # type: ignore[method-assign]

    gpu.PROGRAM = [sys.executable, __file__, stand_ins, kernels, stream_read, folder]
    gpu.ROOT = Path(folder)
    gpu.build = lambda limit_s: 1.0
    gpu.build_stream_read = lambda folder: Path(stream_read)
    gpu.write_synthetic = lambda path, model, layers: write(path)
    gpu.QUICK = gpu.Plan(batches=(1, 2), contexts=(0, 3), long=(5,), ops_context=3, prompts=(9,),
                         piece=4, prompt_ops=9, answer=2, compared=(5, 3), ceiling_bytes=1 << 16,
                         steps=1, least_s=0)  # fmt: skip
    if "FAULTS" in os.environ:
        break_parts(gpu, driver)
    if arguments:
        sys.argv = ["gpu.py", *arguments]
        sys.exit(gpu.main())

    # All layers of the 30B: captured, which runs nothing.
    pattern = config(gpu.MODEL)["hybrid_override_pattern"]
    whole = CudaBackend(Bundle.open(write(f"{folder}/whole", pattern)), Options(1, 64))
    graph = whole._device.capture(
        whole._stream, lambda: whole._run(whole._decode_calls, 1, 1, 1, 64)
    )
    whole.close()

    short = Bundle.open(write(f"{folder}/short"))
    backend = CudaBackend(short, Options(2, 40))
    answers = []
    with LLM(short, backend, "tested") as llm:
        for work in (
            lambda: gpu.generate(llm, gpu.QUICK, 2),
            lambda: gpu.first_token(llm, gpu.QUICK, 9),
        ):
            gpu.fill(backend, 2, 35)
            answers.append(work()["tokens"])
    made = {"launches": graph.nodes, "answers": answers}
    Path(folder, "alone.json").write_text(json.dumps(made))


def break_parts(gpu: Any, driver: ctypes.CDLL) -> None:
    """See FAULTS above."""
    decode = gpu.decode

    def no_build(limit_s: float) -> float:
        raise gpu.EdgeCascadeError("no compiler")

    def lost(backend: Any, plan: Any, batch: int, context: int) -> Any:
        if (batch, context) == (2, 0):
            driver.fakecuda_lose()
        return decode(backend, plan, batch, context)

    gpu.build, gpu.decode = no_build, lost
    gpu.compare = lambda *_: os._exit(7)
    gpu.prefill = lambda *_: threading.Event().wait()
    gpu.LIMITS["prefill"] = 15.0  # a slow machine has to come so far


if __name__ == "__main__":
    main(*sys.argv[1:])
