# SPDX-License-Identifier: Apache-2.0
"""Makes tests/goldens/ and examples/tiny/: random Nemotron-H checkpoints with what they answer.

    python -m venv .goldens && .goldens/bin/pip install torch==2.13.0 transformers==5.23.0
    .goldens/bin/python tests/make_goldens.py

Only this script needs torch and transformers; the tests read the files it leaves. A checkpoint is
accepted when transformers agrees with itself (one pass, prefill then steps) and no choice in it, of
an expert or of a token, is so close that rounding could turn it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DynamicCache, NemotronHConfig, NemotronHForCausalLM

ROOT = Path(__file__).resolve().parent
TINY = ROOT.parent / "examples" / "tiny"

PROMPT_TOKENS = (1, 3, 37, 129, 500)
MAX_ROWS = 40  # logits kept of a long prompt: the first ten, the last ten and others between
NUM_STEPS = 16
MIN_DT = 2e-3  # transformers clamps dt at 1e-3 in one of its two paths; stay clear of it
MIN_ROUTER_GAP = 5e-5  # between the last expert taken and the first one left out
MIN_TOKEN_GAP = 2e-2  # between the two best logits of a greedy step
SELF_AGREEMENT = 4e-5  # transformers' step decode against its own full pass


@dataclass(frozen=True)
class Case:
    """One checkpoint: its layers, its sizes, how it is stored."""

    name: str
    pattern: str
    sizes: dict[str, Any]
    store: (
        str  # "saved": as save_pretrained writes; "hub": sharded; "fused": model. and 3-D experts
    )
    dtype: torch.dtype = torch.float32
    folder: Path = field(default=ROOT / "goldens")


SIZES: dict[str, Any] = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96,
    num_attention_heads=6, num_key_value_heads=2, head_dim=16,
    mamba_num_heads=8, mamba_head_dim=12, n_groups=2, ssm_state_size=16,
    conv_kernel=4, chunk_size=16,
    moe_intermediate_size=64, moe_shared_expert_intermediate_size=128, n_routed_experts=8,
    num_experts_per_tok=2, routed_scaling_factor=2.5, max_position_embeddings=4096,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip

CASES = (
    Case("moe", "MEM*EM*E", {}, "saved"),
    Case("dense", "M-M*-", dict(hidden_size=72, intermediate_size=200), "hub", torch.float16),
    Case(
        "odd", "ME*-M",
        dict(vocab_size=251, hidden_size=100, intermediate_size=40, num_attention_heads=3,
             num_key_value_heads=1, head_dim=20, mamba_num_heads=6, mamba_head_dim=10,
             ssm_state_size=12, conv_kernel=3, use_conv_bias=False, chunk_size=7,
             moe_intermediate_size=40,
             moe_shared_expert_intermediate_size=44, n_routed_experts=5, num_experts_per_tok=3,
             norm_topk_prob=False, routed_scaling_factor=1.0),
        "fused",
    ),
    Case(
        "groups", "EM*ME",
        dict(n_groups=4, mamba_head_dim=10, n_routed_experts=12, num_experts_per_tok=3, n_group=2,
             topk_group=1),
        "saved", torch.bfloat16,
    ),
    Case(
        "checkpoint", "MEM*E", dict(vocab_size=512, n_routed_experts=16, num_experts_per_tok=4),
        "saved", torch.bfloat16, TINY,
    ),
)  # fmt: skip


def random_model(case: Case, seed: int) -> Any:
    """Every parameter away from the values that would hide a mistake (zero, one, all equal)."""
    config = NemotronHConfig(hybrid_override_pattern=case.pattern, **{**SIZES, **case.sizes})
    model = NemotronHForCausalLM(config).eval().float()
    draw = torch.Generator().manual_seed(seed)

    def uniform(shape: torch.Size, low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=draw) * (high - low) + low

    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        match name.rsplit(".", 2)[-2:]:
            case [_, "A_log"]:
                new = uniform(value.shape, 0.0, 2.7)
            case [_, "dt_bias"]:  # softplus of it is log-uniform in [0.05, 0.5]
                dt = torch.exp(uniform(value.shape, float(np.log(0.05)), float(np.log(0.5))))
                new = dt + torch.log(-torch.expm1(-dt))
            case [_, "D"] | [_, "norm_f" | "norm"] | ["norm" | "norm_f", "weight"]:
                new = uniform(value.shape, 0.5, 1.5)
            case ["gate", "e_score_correction_bias"]:
                new = uniform(value.shape, -0.3, 0.3)
            case ["conv1d", "bias"]:
                new = uniform(value.shape, -0.3, 0.3)
            case ["conv1d", "weight"]:
                new = uniform(value.shape, -0.6, 0.6)
            case _:
                new = torch.randn(value.shape, generator=draw) / value.shape[-1] ** 0.5
        value.copy_(new)
    for layer in model.model.layers:  # what moves dt with the input, small enough to keep MIN_DT
        if hasattr(layer.mixer, "dt_bias"):
            layer.mixer.in_proj.weight[-layer.mixer.num_heads :] *= 0.6
    # What a reader gets back from the stored numbers, except the bias, which stays float32.
    for value in model.parameters():
        value.copy_(value.to(case.dtype).float())
    return model


class Margins:
    """Hooks that record how near the model comes to what would make its answer ambiguous."""

    def __init__(self, model: Any) -> None:
        self.dt = self.router = float("inf")
        for layer in model.model.layers:
            if hasattr(layer.mixer, "dt_bias"):
                layer.mixer.in_proj.register_forward_hook(self.see_dt(layer.mixer))
            if hasattr(layer.mixer, "gate"):
                layer.mixer.gate.register_forward_hook(self.see_router)

    def see_dt(self, mixer: Any) -> Any:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            dt = torch.nn.functional.softplus(output[..., -mixer.num_heads :] + mixer.dt_bias)
            self.dt = min(self.dt, dt.min().item())

        return hook

    def see_router(self, gate: Any, _inputs: Any, output: Any) -> None:
        choice = output[0].sigmoid() + gate.e_score_correction_bias
        groups = choice.view(len(choice), gate.num_group, -1)
        if gate.num_group > gate.topk_group:
            score = groups.topk(2, -1).values.sum(-1)
            self.see_gap(score, gate.topk_group)
            keep = (
                torch.zeros_like(score).scatter(1, score.topk(gate.topk_group).indices, 1.0).bool()
            )
            choice = groups.masked_fill(~keep[..., None], float("-inf")).flatten(1)
        self.see_gap(choice, gate.top_k)

    def see_gap(self, score: torch.Tensor, taken: int) -> None:
        best = score.topk(min(taken + 1, score.shape[-1])).values
        self.router = min(self.router, (best[:, taken - 1] - best[:, -1]).min().item())


def goldens(model: Any, seed: int, prompt: list[int] | None = None) -> dict[str, np.ndarray]:
    """Prompts with logits, teacher-forced steps behind a prefill, and a greedy answer."""
    draw = np.random.default_rng(seed)
    vocab = model.config.vocab_size
    out: dict[str, np.ndarray] = {}
    for length in PROMPT_TOKENS:
        ids = draw.integers(3, vocab, length)
        rows = np.arange(length)
        if length > MAX_ROWS:
            inner = np.linspace(10, length - 11, MAX_ROWS - 20).astype(int)
            rows = np.concatenate([rows[:10], inner, rows[-10:]])
        out |= {
            f"{length}.ids": ids,
            f"{length}.rows": rows,
            f"{length}.logits": full(model, ids)[rows],
        }
    ids = draw.integers(3, vocab, 37 + NUM_STEPS)
    out |= {"step.prompt": ids[:37], "step.ids": ids[37:], "step.logits": steps(model, ids, 37)}
    start = draw.integers(3, vocab, 37) if prompt is None else np.array(prompt)
    out |= {"greedy.prompt": start, "greedy.ids": greedy(model, start)}
    return {k: v.astype(np.float32 if k.endswith("logits") else np.int32) for k, v in out.items()}


def full(model: Any, ids: np.ndarray) -> np.ndarray:
    return model(torch.as_tensor(ids)[None], use_cache=False).logits[0].numpy()


def steps(model: Any, ids: np.ndarray, prefill: int) -> np.ndarray:
    """Logits of ids[prefill:], one token at a time behind a prefill of the others."""
    cache = DynamicCache(config=model.config)
    model(torch.as_tensor(ids[None, :prefill]), past_key_values=cache, use_cache=True)
    rows = [
        model(torch.as_tensor(ids[None, t : t + 1]), past_key_values=cache, use_cache=True).logits[
            0
        ]
        for t in range(prefill, len(ids))
    ]
    return torch.cat(rows).numpy()


def greedy(model: Any, prompt: np.ndarray) -> np.ndarray:
    answer = model.generate(
        torch.as_tensor(prompt)[None],
        max_new_tokens=NUM_STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return answer[0, len(prompt) :].numpy()


def doubts(model: Any, margins: Margins, golden: dict[str, np.ndarray]) -> list[str]:
    """Reasons not to trust this checkpoint as a golden."""
    found = []
    if margins.dt < MIN_DT:
        found.append(f"dt falls to {margins.dt:.1e}")
    if margins.router < MIN_ROUTER_GAP:
        found.append(f"two experts within {margins.router:.1e}")
    answer = np.concatenate([golden["greedy.prompt"], golden["greedy.ids"]])
    best = np.sort(full(model, answer[:-1])[-NUM_STEPS:], -1)
    if (gap := (best[:, -1] - best[:, -2]).min()) < MIN_TOKEN_GAP:
        found.append(f"two tokens within {gap:.1e}")
    ids = np.concatenate([golden["step.prompt"], golden["step.ids"]])
    if (error := np.abs(golden["step.logits"] - full(model, ids)[37:]).max()) > SELF_AGREEMENT:
        found.append(f"steps and full pass differ by {error:.1e}")
    return found


def store(case: Case, model: Any, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for old in [*path.glob("*.json"), *path.glob("*.safetensors")]:
        old.unlink()
    bias = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("correction_bias")}
    if case.store == "fused":
        model.config.save_pretrained(path)
        tensors = {k: v.to(case.dtype).contiguous() for k, v in model.state_dict().items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        size = "100KB" if case.store == "hub" else "1GB"
        model.to(case.dtype).save_pretrained(path, max_shard_size=size)
        keep_float32(path, {k.replace("model.", "backbone.", 1): v for k, v in bias.items()})
    if case.store == "hub":
        hub_config(case, path)


def keep_float32(path: Path, bias: dict[str, torch.Tensor]) -> None:
    """As on the hub: rounding the selection bias would change which experts are chosen."""
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        tensors |= {k: v for k, v in bias.items() if k in tensors}
        save_file(tensors, shard, metadata={"format": "pt"})


def hub_config(case: Case, path: Path) -> None:
    """The older spelling: a pattern string, and keys that say nothing about the maths."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key in ("layers_block_type", "time_step_limit", "mtp_layers_block_type", "dtype"):
        config.pop(key, None)
    config |= {
        "hybrid_override_pattern": case.pattern, "num_hidden_layers": len(case.pattern),
        "norm_eps": 1e-5, "rope_theta": 10000, "partial_rotary_factor": 1.0,
        "torch_dtype": "float16",
    }  # fmt: skip
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


SPECIAL = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 10: "<|im_start|>", 11: "<|im_end|>",
    12: "<think>", 13: "</think>", 14: "<tool_call>", 15: "</tool_call>",
    16: "<tool_response>", 17: "</tool_response>",
}  # fmt: skip
VISIBLE = range(12, 18)  # marks that a parser reads: not dropped with the special tokens
WORDS = (
    "Drive to the charging dock and report the battery level. The robot arm picks up the red box, "
    "turns left and places it on shelf 12. Stop when a person is within 1.5 m. Where is a pallet? "
    "Follow the line, then wait for the next command. Navigation goal reached in 42 seconds. "
    "system user assistant tool function parameter name value true false. The camera sees three "
    "green bottles, a broken cable and somebody who waves from behind the conveyor belt. Please "
    "open gripper, lower speed, measure distance, check temperature and answer with one number. "
    "Emergency brake released; motors warm, wheels aligned, map updated, path planned around "
    "obstacles. Could you bring coffee before lunch? Yes, but first I must finish my inspection.\n"
)
PIECES = r"\s*[\r\n]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tokenizer(path: Path, vocab: int) -> Tokenizer:
    """Byte-level BPE with the family's special ids; a line feed is always a token of its own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    names = [SPECIAL.get(i, f"<SPECIAL_{i}>") for i in range(20)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(name, normalized=False) for name in names],
    )  # fmt: skip
    made.train_from_iterator([WORDS, WORDS.lower()], trainer)
    spec = json.loads(made.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["id"] not in VISIBLE
    (path / "tokenizer.json").write_text(json.dumps(spec, indent=1, ensure_ascii=False) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>",
        "unk_token": "<unk>", "clean_up_tokenization_spaces": False, "model_max_length": 4096,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return made


def dress(path: Path, vocab: int) -> list[int]:
    """What makes a checkpoint one that can chat, beside its template; answers the demo's prompt."""
    made = tokenizer(path, vocab)
    if joined := [word for word in made.get_vocab() if "\u010a" in word and len(word) > 1]:
        raise SystemExit(f"a line feed must stay a token of its own, but these join it: {joined}")
    generation = {
        "bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 11], "pad_token_id": 0,
        "temperature": 1.0, "top_p": 0.95,
    }  # fmt: skip
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    ids: list[int] = made.encode(DEMO_PROMPT).ids
    return ids


def make(case: Case) -> None:
    path = case.folder / case.name
    demo = case.folder == TINY
    prompt = dress(path, case.sizes["vocab_size"]) if demo else None
    for seed in range(100, 400):
        model = random_model(case, seed)
        margins = Margins(model)
        golden = goldens(model, seed + 1, prompt)
        found = doubts(model, margins, golden)
        if not found:
            break
    else:
        raise SystemExit(f"{case.name}: no seed gives clear goldens; the last one: {found}")
    store(case, model, path)
    if demo:
        dress(path, case.sizes["vocab_size"])
    np.savez_compressed((TINY if demo else path) / "golden.npz", **golden)
    reread = NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    error = np.abs(full(reread, golden["500.ids"])[golden["500.rows"]] - golden["500.logits"]).max()
    if error > SELF_AGREEMENT:
        raise SystemExit(f"{case.name}: the stored checkpoint answers otherwise, by {error:.1e}")
    kilobytes = sum(f.stat().st_size for f in path.iterdir()) / 1e3
    print(
        f"{case.name:10s} seed {seed}  {kilobytes:5.0f} kB"
        f"  |logits| < {np.abs(golden['500.logits']).max():.1f}  dt > {margins.dt:.1e}"
        f"  experts {margins.router:.1e} apart"
    )


# What the template renders for one user message with thinking on.
DEMO_PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nDrive to the charging dock.<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n"
)


if __name__ == "__main__":
    with torch.no_grad():
        for each in CASES:
            make(each)
