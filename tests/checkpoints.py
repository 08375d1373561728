# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints in every spelling that the reader accepts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.models import nemotron_h
from edgecascade.tensors import Transform

Arrays = dict[str, tuple[str, NDArray[Any]]]  # name -> dtype word, array (BF16 as uint16)

CONFIG: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME*-",
    "num_hidden_layers": 4,
    "hidden_size": 72,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "ssm_state_size": 8,
    "conv_kernel": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "intermediate_size": 40,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 36,
    "moe_shared_expert_intermediate_size": 44,
    "eos_token_id": 2,
    "time_step_limit": [0.0, float("inf")],
}


def arrays(dtype: str = "F32", *, fused: bool = False, seed: int = 3, **config: Any) -> Arrays:
    """Every tensor that CONFIG asks for, without prefix. `config` replaces keys of it."""
    made: Arrays = {}
    for tensor in nemotron_h.tensors(nemotron_h.read_config({**CONFIG, **config})):
        stack = fused and tensor.transform is Transform.EXPERTS and tensor.instead is not None
        parts = []
        for i, (name, shape) in enumerate(tensor.sources):
            random = np.random.default_rng([seed, len(made) + i, *shape])
            values = (random.standard_normal(shape) * 0.3).astype(np.float32)
            parts.append(values)
            if not stack:
                made[name] = encode(values, dtype)
        if stack and tensor.instead is not None:
            made[tensor.instead[0]] = encode(np.stack(parts), dtype)
    return made


def encode(values: NDArray[np.float32], dtype: str) -> tuple[str, NDArray[Any]]:
    """float32 as BF16, F16 or F32."""
    if dtype == "BF16":
        return dtype, (values.view(np.uint32) >> 16).astype(np.uint16)
    return dtype, values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def hub(name: str) -> str:
    """The hub's name of a tensor."""
    return name if name.startswith(("lm_head", "mtp.")) else f"backbone.{name}"


def tokenizer(**ids: int) -> dict[str, Any]:
    """tokenizer.json of no words but these."""
    marks = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [{"id": token, "content": word, **marks} for word, token in ids.items()]
    return {"added_tokens": added, "model": {"type": "BPE", "vocab": ids, "merges": []}}


# Parts of a tokenizer.json on which the tokenizers library panics, which is no Exception.
PANIC_READING = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
PANIC_ENCODING = {
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "gone", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
}
PANIC_DECODING = {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 99}}  # only a's


def safetensors(tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, array) in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [begin, end]}
    return with_header(header, b"".join(array.tobytes() for _, array in tensors.values()))


def with_header(header: Any, data: bytes) -> bytes:
    """The bytes of a safetensors file with this header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(
    folder: Path,
    tensors: Arrays | None = None,
    *,
    rename: Callable[[str], str] = hub,
    shards: int = 1,
    **config: Any,
) -> Path:
    """A checkpoint folder. `config` replaces keys of CONFIG; None removes one."""
    folder.mkdir()
    raw = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))  # with a bare Infinity, as some writers do
    named = {rename(name): entry for name, entry in (tensors or arrays()).items()}
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(named))
        return folder
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(named.items())[i::shards])
        weight_map.update(dict.fromkeys(part, shard))
        (folder / shard).write_bytes(safetensors(part))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
