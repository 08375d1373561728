# SPDX-License-Identifier: Apache-2.0
"""The same shapes in llama.cpp and here, in turn on the same cores.

    python benchmarks/llama_cpp.py BIN [--layers 8] [--rounds 5] [--json FILE]

BIN is the folder of `llama-bench` and `llama-server` of a llama.cpp built for this processor. Both
models have random weights: llama.cpp's are Q4_0 in every large matrix (4.5 bits a weight, the 4-bit
code that it repacks for vector units and AMX), ours the preset `speed`. Follow-ups are turns
of a conversation that drops what was thought from its history, so that what parts from a kept state
is read again; "after a rest" gives time to read ahead to whoever does. Needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import gguf
import numpy as np
from numpy.typing import NDArray
from prefix_reuse import ask, settle

from build_engine.synthetic import cached, config, shapes
from edgecascade import LLM
from edgecascade.bench import circumstances
from edgecascade.models import family
from edgecascade.service.broker import free_port
from edgecascade.tensors import Role, Tensor

Array = NDArray[Any]
Ask = Callable[[list[int], bool], tuple[float, list[int]]]  # ids, reuse; seconds, the answer
Q4_0 = gguf.GGMLQuantizationType.Q4_0
GROUP, BLOCK_BYTES = 32, 18  # a half of scale, 32 nibbles around 8
NIBBLE_STD = 4.61
POOL_BLOCKS = 1_000_003  # prime, so that no two rows of a matrix are equal
SEED = 7
RESIDUAL_GAIN = 0.2  # keeps the residual stream small over 52 layers
CONTEXT = 4096
SAID, ANSWER, THOUGHT = 30, 40, 10  # tokens of a question, of its answer, of that not kept
PLAIN, FEWEST = 100, 1000  # ids of questions, in every vocabulary
RESIDUAL = ("out_proj", "o_proj", "down_proj")

# The name of each source of a tensor in llama.cpp; experts are one tensor there.
NAMES = {
    r"embeddings\.weight": "token_embd.weight",
    r"norm_f\.weight": "output_norm.weight",
    r"lm_head\.weight": "output.weight",
    r"layers\.(\d+)\.norm\.weight": "blk.{}.attn_norm.weight",
    r"layers\.(\d+)\.mixer\.in_proj\.weight": "blk.{}.ssm_in.weight",
    r"layers\.(\d+)\.mixer\.out_proj\.weight": "blk.{}.ssm_out.weight",
    r"layers\.(\d+)\.mixer\.conv1d\.(weight|bias)": "blk.{}.ssm_conv1d.{}",
    r"layers\.(\d+)\.mixer\.A_log": "blk.{}.ssm_a",
    r"layers\.(\d+)\.mixer\.D": "blk.{}.ssm_d",
    r"layers\.(\d+)\.mixer\.dt_bias": "blk.{}.ssm_dt.bias",
    r"layers\.(\d+)\.mixer\.norm\.weight": "blk.{}.ssm_norm.weight",
    r"layers\.(\d+)\.mixer\.([qkv])_proj\.weight": "blk.{}.attn_{}.weight",
    r"layers\.(\d+)\.mixer\.o_proj\.weight": "blk.{}.attn_output.weight",
    r"layers\.(\d+)\.mixer\.gate\.weight": "blk.{}.ffn_gate_inp.weight",
    r"layers\.(\d+)\.mixer\.gate\.e_score_correction_bias": "blk.{}.exp_probs_b.bias",
    r"layers\.(\d+)\.mixer\.experts\.0\.(up|down)_proj\.weight": "blk.{}.ffn_{}_exps.weight",
    r"layers\.(\d+)\.mixer\.shared_experts\.(up|down)_proj\.weight": "blk.{}.ffn_{}_shexp.weight",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bin", type=Path)
    parser.add_argument("--model", default="nemotron-3-nano-30b", choices=shapes())
    parser.add_argument("--layers", type=int, help="all by default")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--history", type=int, default=2000, help="tokens before a conversation")
    parser.add_argument("--turns", type=int, default=3, help="of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    model = cached(args.model, args.layers, "q4_0.gguf")
    if not model.exists():
        print(f"writing {model}", file=sys.stderr)
        part = model.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(part, config(args.model, args.layers))
        part.rename(model)
    rounds = []
    for number in range(args.rounds):
        rounds.append({
            "llama.cpp": run_llama(model, args) | talk_to_llama(model, args, number),
            "edgecascade": run_ours(args) | talk_to_ours(args, number),
        })  # fmt: skip
        print(json.dumps(rounds[-1]), flush=True)
    ratios = report(rounds)
    if args.json:
        asked = {**vars(args)}
        del asked["json"], asked["bin"]
        result = {"asked": asked, "llama.cpp": version(model, args), "times_as_fast": ratios}
        result |= {"rounds": rounds, **circumstances()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def run_llama(model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds a token of one run of llama-bench."""
    rows = llama_bench(model, args, args.prompt_tokens, args.decode_tokens)
    return {"decode" if row["n_gen"] else "prefill": 1 / row["avg_ts"] for row in rows}


def llama_bench(
    model: Path, args: argparse.Namespace, prompt: int, decode: int
) -> list[dict[str, Any]]:
    what = ["-m", model, "-p", prompt, "-n", decode, "-t", args.threads, "-r", 1, "-o", "json"]
    command = [str(word) for word in (args.bin / "llama-bench", *what)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def version(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What llama-bench says of itself and of the model."""
    row = llama_bench(model, args, 1, 0)[0]
    names = ("build_commit", "build_number", "model_type", "model_size", "model_n_params")
    return {name: row[name] for name in names}


def run_ours(args: argparse.Namespace) -> dict[str, float]:
    """Seconds a token of one run of `edgecascade bench`, which writes the bundle first."""
    layers = ["--layers", args.layers] if args.layers else []
    sizes = ["--prompt-tokens", args.prompt_tokens, "--decode-tokens", args.decode_tokens]
    how = ["--threads", args.threads, "--repeats", 1, "--backend", "cpu", "--json"]
    command = ["-m", "edgecascade", "bench", "--synthetic", args.model, *layers, *sizes, *how]
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, check=True)
    row = json.loads(done.stdout)
    return {name: 1 / row[f"{name}_tokens_per_s"] for name in ("prefill", "decode")}


def talk_to_llama(model: Path, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """A conversation with llama-server."""
    port = free_port()
    what = ["-m", model, "-c", CONTEXT, "-np", 1, "-t", args.threads, "--port", port]
    command = [str(word) for word in (args.bin / "llama-server", *what)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while True:
                try:
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:  # not yet
                    if server.poll() is not None:
                        raise SystemExit(f"{' '.join(command)} ended") from None
                    time.sleep(0.1)
            return conversation(partial(ask_llama, port), lambda ids: None, args, seed)
        finally:
            server.kill()


def ask_llama(port: int, ids: list[int], reuse: bool) -> tuple[float, list[int]]:
    """Seconds to the first token, and the answer."""
    asked = {"prompt": ids, "n_predict": ANSWER, "cache_prompt": reuse, "temperature": 0}
    how = {"ignore_eos": True, "stream": True, "return_tokens": True}
    request = Request(f"http://127.0.0.1:{port}/completion", json.dumps(asked | how).encode())
    began, times, answer = time.perf_counter(), [], list[int]()
    with urlopen(request) as lines:
        for line in lines:
            if line.startswith(b"data: "):
                answer += json.loads(line[6:])["tokens"]
                times.append(time.perf_counter() - began)
    return times[0], answer


def talk_to_ours(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """The same conversation with `LLM`."""
    bundle = cached(args.model, args.layers, "speed")
    with LLM.load(bundle, "cpu", threads=args.threads, max_context=CONTEXT) as llm:

        def tell(ids: list[int], reuse: bool) -> tuple[float, list[int]]:
            first_s, answer = ask(llm, {"prompt": ids}, ANSWER, reuse=reuse)
            return first_s, answer.token_ids

        def rest(ids: list[int]) -> None:
            llm.prepare([*ids, 0])
            settle(llm)

        return conversation(tell, rest, args, seed)


def conversation(
    tell: Ask, rest: Callable[[list[int]], None], args: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Median seconds to the first token of follow-ups, and of the last prompt cold."""
    draw = np.random.default_rng(seed)
    end = config(args.model)["eos_token_id"]
    ids: list[int] = [*draw.integers(PLAIN, FEWEST, size=args.history).tolist(), end]
    times: dict[str, list[float]] = {"first": [], "at once": [], "after a rest": []}
    for turn in range(2 * args.turns + 1):
        ids += [*draw.integers(PLAIN, FEWEST, size=SAID).tolist(), end]
        first_s, answer = tell(ids, True)
        times["first" if not turn else "at once" if turn % 2 else "after a rest"].append(first_s)
        ids += [*answer[THOUGHT:], end]
        if turn % 2:
            rest(ids)
    del times["first"]  # it maps the weights
    times["cold turn"] = [tell(ids, False)[0] for _ in range(2)]
    return {name: statistics.median(each) for name, each in times.items()}


def report(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians of the times, and how many times as fast ours is within a round."""
    ratios = {}
    print(f"{'':10s} llama.cpp  edgecascade   times as fast (least, most)")
    for name in rounds[0]["edgecascade"]:
        theirs, ours = ([row[who][name] for row in rounds] for who in ("llama.cpp", "edgecascade"))
        each = [other / mine for mine, other in zip(ours, theirs, strict=True)]
        ratio = {"median": statistics.median(each), "least": min(each), "most": max(each)}
        ratios[name] = ratio
        both = (f"{1e3 * statistics.median(times):8.1f} ms" for times in (theirs, ours))
        least_most = f"({ratio['least']:.2f}, {ratio['most']:.2f})"
        print(f"{name:10s}", *both, f"  {ratio['median']:.2f} {least_most}")
    return ratios


def write_gguf(path: Path, raw: dict[str, Any]) -> None:
    """A model of these shapes with random weights, in the names and the layout of llama.cpp."""
    model = family(raw["model_type"])
    writer = gguf.GGUFWriter(path, "nemotron_h_moe")
    facts(writer, raw)
    parts: list[Callable[[], Iterator[Array]]] = []
    rng = np.random.default_rng(SEED)
    pool = rng.integers(0, 256, (POOL_BLOCKS, BLOCK_BYTES), np.uint8)
    for tensor in model.tensors(model.read_config(raw)):
        for source, shape in sources(tensor):
            name = llama_name(source)
            if tensor.role in (Role.VECTOR, Role.ROUTER):
                values = vector(source, shape, raw, rng)
                writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
                parts.append(lambda values=values: iter([values]))
            else:
                size = math.prod(shape) // GROUP * BLOCK_BYTES
                bytes_shape = (*shape[:-1], shape[-1] // GROUP * BLOCK_BYTES)
                writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), size, Q4_0)
                gain = RESIDUAL_GAIN if any(part in source for part in RESIDUAL) else 1.0
                parts.append(lambda shape=shape, gain=gain: matrix(pool, shape, gain))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out = writer.fout[0]
    for part in parts:
        writer.write_padding(out, out.tell())
        for piece in part():
            piece.tofile(out)
    writer.write_padding(out, out.tell())
    writer.close()


def facts(writer: gguf.GGUFWriter, raw: dict[str, Any]) -> None:
    """The metadata of a Nemotron-H with experts."""
    pattern = raw["hybrid_override_pattern"]
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(len(pattern))
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv([raw["num_key_value_heads"] * (kind == "*") for kind in pattern])
    writer.add_key_length(raw["head_dim"])
    writer.add_value_length(raw["head_dim"])
    writer.add_rope_scaling_finetuned(False)
    writer.add_layer_norm_eps(raw["layer_norm_epsilon"])
    writer.add_layer_norm_rms_eps(raw["layer_norm_epsilon"])
    writer.add_feed_forward_length([raw["moe_intermediate_size"] * (k == "E") for k in pattern])
    writer.add_expert_feed_forward_length(raw["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(raw["moe_shared_expert_intermediate_size"])
    writer.add_expert_count(raw["n_routed_experts"])
    writer.add_expert_used_count(raw["num_experts_per_tok"])
    writer.add_expert_shared_count(raw["n_shared_experts"])
    writer.add_expert_weights_norm(raw["norm_topk_prob"])
    writer.add_expert_weights_scale(raw["routed_scaling_factor"])
    writer.add_expert_group_count(raw["n_group"])
    writer.add_ssm_conv_kernel(raw["conv_kernel"])
    writer.add_ssm_state_size(raw["ssm_state_size"])
    writer.add_ssm_group_count(raw["n_groups"])
    writer.add_ssm_inner_size(raw["mamba_num_heads"] * raw["mamba_head_dim"])
    writer.add_ssm_time_step_rank(raw["mamba_num_heads"])
    writer.add_tokenizer_model("gpt2")  # llama-server wants words, if only to write tokens
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(raw["vocab_size"])])
    writer.add_token_merges(["t 1"])


def sources(tensor: Tensor) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the checkpoint's matrices; the experts of a layer are one."""
    name, shape = tensor.sources[0]
    if tensor.role is Role.EXPERT:
        yield name, (len(tensor.sources), *shape)
    else:
        yield from tensor.sources


def llama_name(source: str) -> str:
    """The name in llama.cpp of a checkpoint's tensor."""
    for pattern, name in NAMES.items():
        if match := re.fullmatch(pattern, source):
            return name.format(*match.groups())
    raise SystemExit(f"{source} has no name in llama.cpp; only models with experts are compared")


def vector(source: str, shape: tuple[int, ...], raw: dict[str, Any], rng: Any) -> Array:
    """Random values as a trained model's might be, in the shape that llama.cpp wants."""
    if source.endswith("A_log"):
        values = -np.exp(rng.uniform(0, math.log(16), (shape[0], 1)))
    elif source.endswith("mixer.D"):
        values = np.ones((shape[0], 1))
    elif source.endswith("dt_bias"):
        values = rng.uniform(-6.9, -2.2, shape)  # steps between 0.001 and 0.1
    elif source.endswith("conv1d.weight"):
        values = rng.standard_normal((shape[0], shape[-1])) * 0.5
    elif source.endswith("mixer.norm.weight"):
        values = np.ones((raw["n_groups"], shape[0] // raw["n_groups"]))
    elif source.endswith("norm.weight") or source == "norm_f.weight":
        values = np.ones(shape)
    elif source.endswith("gate.weight"):
        values = rng.standard_normal(shape) / math.sqrt(shape[-1])
    else:
        values = np.zeros(shape)
    return values.astype(np.float32)


def matrix(pool: Array, shape: tuple[int, ...], gain: float) -> Iterator[Array]:
    """Blocks of random nibbles, scaled so that activations keep their size."""
    scale = np.float16(gain / (NIBBLE_STD * math.sqrt(shape[-1])))
    pool[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    left = math.prod(shape) // GROUP
    while left:
        count = min(left, len(pool))
        yield pool[:count]
        left -= count


if __name__ == "__main__":
    sys.exit(main())
