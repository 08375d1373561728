# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py on a tiny model, in a process whose driver and GPU are the stand-ins.

    python tests/cuda/gpu_benchmark_program.py STAND_INS KERNELS STREAM_READ FOLDER

Prints what the script prints, and leaves its JSON in FOLDER/seen.json with the launches of a
whole 30B's step. Times mean nothing here.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
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


def main(stand_ins: Path, kernels: Path, stream_read: Path, folder: Path) -> None:
    ctypes.CDLL(str(stand_ins / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    os.environ["EDGECASCADE_CUDA_LIBRARY"] = str(kernels)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    from build_engine.synthetic import config, write_random
    from edgecascade.backends._cuda import open_device
    from edgecascade.backends._lib import cuda_library
    from edgecascade.backends.base import Options
    from edgecascade.backends.cuda import CudaBackend
    from edgecascade.bundle import Bundle

    def tiny(name: str, pattern: str) -> Bundle:
        layers = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
        return Bundle.open(write_random(folder / name, {**config(gpu.MODEL), **TINY, **layers}, {}))

    open_device()
    facts = cuda_library().query()
    facts.l2_bytes, facts.sm_count = L2_BYTES, 2  # which the emulator lacks
    cuda_library().query = lambda: facts  # type: ignore[method-assign]

    gpu.build = lambda limit_s: "emulated"
    gpu.build_stream_read = lambda folder: stream_read
    gpu.QUICK = gpu.Plan(batches=(1, 2), contexts=(0, 3), ops_context=3, prompts=(9,), piece=4,
                         prompt_ops=9, answer=2, compared=(5, 3), ceiling_bytes=1 << 16,
                         steps=1, least_s=0)  # fmt: skip
    out, short = folder / "seen.json", tiny("short", "ME*").path
    sys.argv = ["gpu.py", "--quick", "--no-checks", "--bundle", str(short), "--out", str(out)]
    status = gpu.main()

    # All layers of the 30B: captured, which runs nothing.
    whole = CudaBackend(tiny("whole", config(gpu.MODEL)["hybrid_override_pattern"]), Options(1, 64))
    graph = whole._device.capture(
        whole._stream, lambda: whole._run(whole._decode_calls, 1, 1, 1, 64)
    )
    seen: dict[str, Any] = {**json.loads(out.read_text()), "launches": graph.nodes}
    out.write_text(json.dumps(seen))
    whole.close()
    sys.exit(status)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
