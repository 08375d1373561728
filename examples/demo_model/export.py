# SPDX-License-Identifier: Apache-2.0
"""A training run becomes a Hugging Face checkpoint, and that an INT4 bundle.

python examples/demo_model/export.py RUN --checkpoint DIR [--bundle DIR]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from make_tokenizer import END, PAD
from model import CONFIG, initial
from torch import Tensor

HERE = Path(__file__).parent
KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe"}
# float32 as in the published checkpoints: a rounded selection bias picks other experts.
FLOAT32 = ("e_score_correction_bias",)


def hub_config() -> dict[str, Any]:
    """config.json as transformers reads it."""
    sizes = {k: v for k, v in CONFIG.items() if k != "layers"}
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": "bfloat16",
        "layers_block_type": [KINDS[kind] for kind in CONFIG["layers"]],
        **sizes,
        "intermediate_size": CONFIG["moe_shared_expert_intermediate_size"],
        "expand": 2,
        "mamba_hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "attention_bias": False,
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        # transformers clamps dt to time_step_min when it reads a prompt, but not when it writes.
        "time_step_min": 1e-6,
        "time_step_floor": 1e-6,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }


def hub_tensors(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names as published: each expert's matrices apart."""
    for name, value in weights.items():
        stored = value if name.endswith(FLOAT32) else value.to(torch.bfloat16)
        name = name.replace("model.", "backbone.", 1)
        experts = re.fullmatch(r"(.*\.experts)\.(up|down)_proj", name)
        if not experts:
            yield name, stored.contiguous()
            continue
        for index, matrix in enumerate(stored):
            yield f"{experts[1]}.{index}.{experts[2]}_proj.weight", matrix.contiguous()


def write_checkpoint(run: Path, out: Path) -> None:
    from safetensors.torch import save_file

    flat = torch.load(run / "state.pt", weights_only=True)["weights"]
    weights, at = {}, 0
    for name, value in initial(0).items():
        weights[name] = flat[at : at + value.numel()].view_as(value)
        at += value.numel()
    out.mkdir(parents=True, exist_ok=True)
    save_file(dict(hub_tensors(weights)), out / "model.safetensors", {"format": "pt"})
    write_json(out / "config.json", hub_config())
    ids = {"bos_token_id": 1, "eos_token_id": [2, END], "pad_token_id": PAD}
    write_json(out / "generation_config.json", {**ids, "do_sample": False})
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
        },
    )
    shutil.copy(run / "tokenizer.json", out / "tokenizer.json")
    shutil.copy(HERE / "chat_template.jinja", out / "chat_template.jinja")


def write_bundle(checkpoint: Path, out: Path) -> None:
    """As `edgecascade build --precision speed` does."""
    from build_engine.pipeline import build

    build(checkpoint, out, precision="speed", overwrite=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the training run")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path)
    args = parser.parse_args()
    write_checkpoint(args.run, args.checkpoint)
    if args.bundle:
        write_bundle(args.checkpoint, args.bundle)


if __name__ == "__main__":
    main()
