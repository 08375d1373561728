# SPDX-License-Identifier: Apache-2.0
"""Random Nemotron-H models of random sizes, answered by transformers and by every backend here.

    .goldens/bin/python -m pip install --editable .      # beside torch and transformers
    .goldens/bin/python tests/fuzz_transformers.py --seed 100 --models 40

Prints one line a model, the largest difference of logits for each backend, and fails on the first
that is too large. Needs what make_goldens.py needs, so it is no part of the suite.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_goldens import PROMPT_TOKENS, Case, goldens, random_model, store
from tolerances import EXACT_LOGITS
from transformers.utils import logging

from build_engine.pipeline import build
from edgecascade.backends import Backend, open_backend
from edgecascade.backends._lib import cpu_isas
from edgecascade.bundle import Bundle


def random_case(seed: int, folder: Path) -> Case:
    """Sizes that are multiples of nothing, in every combination transformers accepts."""
    pick = random.Random(seed)
    groups, kv_heads = pick.randint(1, 4), pick.randint(1, 3)
    expert_groups, experts_each = pick.choice([1, 1, 2, 4]), pick.choice([2, 3, 5, 8])
    kept_groups = pick.randint(1, expert_groups)
    layers = pick.choices("MME*-", k=pick.randint(1, 6))
    layers.insert(pick.randint(0, len(layers)), "*")  # transformers' cache needs one
    sizes = dict(
        vocab_size=pick.choice([33, 100, 251, 300]),
        hidden_size=pick.choice([20, 33, 64, 72, 100, 130]),
        intermediate_size=pick.choice([1, 40, 65, 200]),
        num_attention_heads=kv_heads * pick.choice([1, 2, 3, 5]),
        num_key_value_heads=kv_heads,
        head_dim=pick.choice([4, 16, 20, 33, 64]),
        mamba_num_heads=groups * pick.choice([1, 2, 3]),
        mamba_head_dim=pick.choice([1, 5, 10, 16, 24, 64]),
        n_groups=groups,
        ssm_state_size=pick.choice([1, 3, 16, 20, 64, 128]),
        conv_kernel=pick.choice([2, 3, 4, 4, 5]),
        use_conv_bias=pick.random() < 0.7,
        chunk_size=pick.choice([1, 7, 16, 64, 128, 256]),
        moe_intermediate_size=pick.choice([1, 30, 64, 100]),
        moe_shared_expert_intermediate_size=pick.choice([1, 44, 128]),
        n_routed_experts=expert_groups * experts_each,
        num_experts_per_tok=pick.randint(1, min(kept_groups * experts_each, 6)),
        n_group=expert_groups,
        topk_group=kept_groups,
        norm_topk_prob=pick.random() < 0.7,
        routed_scaling_factor=pick.choice([1.0, 2.5]),
        layer_norm_epsilon=pick.choice([1e-6, 1e-5, 1e-3]),
    )
    how = pick.choice(["saved", "hub", "fused"])
    dtype = pick.choice([torch.float32, torch.float16, torch.bfloat16])
    return Case(f"model-{seed}", "".join(layers), sizes, how, dtype, folder)


def worst_difference(backend: Backend, golden: dict[str, Any]) -> float:
    """Over all prompts in one pass, and over steps behind a prefill."""
    found = [
        np.abs(
            backend.logits(golden[f"{n}.ids"])[golden[f"{n}.rows"]] - golden[f"{n}.logits"]
        ).max()
        for n in PROMPT_TOKENS
    ]
    backend.prefill(0, golden["step.prompt"])
    for token, wanted in zip(golden["step.ids"], golden["step.logits"], strict=True):
        found.append(np.abs(backend.decode([0], [int(token)])[0] - wanted).max())
    return float(max(found))


def compare(case: Case, seed: int) -> None:
    model = random_model(case, seed)
    if case.store == "fused":  # stored as one dtype, the selection bias too
        for bias in model.buffers():
            bias.copy_(bias.to(case.dtype).float())
    model.set_experts_implementation(
        "eager"
    )  # the others want sizes that are multiples of 16 bytes
    golden = goldens(model, seed + 1)
    store(case, model, case.folder / case.name)
    out = case.folder / f"{case.name}.bundle"
    build(case.folder / case.name, out, precision="exact", verify=False)
    line = f"{case.name} {case.pattern:7s} {case.store:5s} {str(case.dtype)[6:]:8s}"
    with Bundle.open(out) as bundle:
        for isa in (None, *cpu_isas()):
            name = "cpu" if isa else "reference"
            backend = open_backend(name, bundle, isa=isa)
            error = worst_difference(backend, golden)
            backend.close()
            line += f"  {isa or name} {error:.0e}"
            if not error <= EXACT_LOGITS:
                raise SystemExit(f"{line}: more than {EXACT_LOGITS}; sizes {case.sizes}")
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=int, default=10)
    args = parser.parse_args()
    logging.disable_progress_bar()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seed, args.seed + args.models):
            compare(random_case(seed, Path(folder)), seed)


if __name__ == "__main__":
    main()
