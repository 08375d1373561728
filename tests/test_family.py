# SPDX-License-Identifier: Apache-2.0
"""A family is one file and one name: with them everything else works, and is what the file says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import toyformer
from numpy.typing import NDArray
from test_backends import median, relative
from tolerances import EXACT_LOGITS, INT8_ACTIVATIONS, PACKED_LOGITS

from build_engine.pipeline import build
from edgecascade import LLM, models
from edgecascade.backends import open_backend
from edgecascade.bundle import Bundle
from edgecascade.inspect import describe
from edgecascade.trace import trace_bundle

CONFIG = {
    "model_type": "toyformer",
    "num_hidden_layers": 3,
    "hidden_size": 72,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 100,
    "eos_token_id": 2,
}
TOKENS = (np.arange(37) * 7 % 97).astype(np.int32)

Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What adding the file and its name does."""
    monkeypatch.setitem(sys.modules, "edgecascade.models.toyformer", toyformer)
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, "toyformer"))


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    random = np.random.default_rng(5)
    return {
        name: (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        if len(shape) > 1
        else random.uniform(0.5, 1.5, shape).astype(np.float32)
        for tensor in toyformer.tensors(toyformer.read_config(CONFIG))
        for name, shape in tensor.sources
    }


@pytest.fixture
def checkpoint(arrays: Arrays, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    stored = {f"model.{name}": ("F32", array) for name, array in arrays.items()}
    (folder / "model.safetensors").write_bytes(checkpoints.safetensors(stored))
    return folder


def expected(w: Arrays, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """The family's equations, without ops."""

    def norm(x: NDArray[np.float32], gamma: NDArray[np.float32]) -> NDArray[np.float32]:
        return gamma * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(1e-5))

    x, past = w["embed_tokens.weight"][tokens], np.tri(len(tokens), dtype=bool)
    for i in range(3):
        p = f"layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{p}self_attn.{name}_proj.weight"].T).reshape(len(h), -1, 16) for name in "qkv"
        )
        k, v = k.repeat(2, axis=1), v.repeat(2, axis=1)
        scores = np.where(past, np.einsum("thd,shd->hts", q, k) / 4, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(h), -1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "mlp.norm.weight"])
        up = np.maximum(h @ w[p + "mlp.up_proj.weight"].T, 0)
        x = x + np.square(up) @ w[p + "mlp.down_proj.weight"].T
    logits: NDArray[np.float32] = norm(x, w["norm.weight"]) @ w["embed_tokens.weight"].T
    return logits


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_every_backend_computes_the_familys_equations(
    checkpoint: Path, tmp_path: Path, arrays: Arrays, name: str
) -> None:
    build(checkpoint, tmp_path / "bundle", precision="exact")
    with Bundle.open(tmp_path / "bundle") as bundle:
        backend = open_backend(name, bundle)
        assert np.abs(backend.logits(TOKENS) - expected(arrays, TOKENS)).max() <= EXACT_LOGITS
        backend.close()


@pytest.mark.parametrize("preset", ["quality", "balanced", "speed"])
def test_presets_pack_the_family(checkpoint: Path, tmp_path: Path, preset: str) -> None:
    report = build(checkpoint, tmp_path / "bundle", precision=preset).to_json()
    assert [layer["layer"] for layer in report["verify"]["layers"]] == [0, 0, 1, 1, 2, 2]
    with Bundle.open(tmp_path / "bundle") as bundle:
        reference, backend = open_backend("reference", bundle), open_backend("cpu", bundle)
        reference.int8_activations = True  # type: ignore[attr-defined]
        found, wanted = backend.logits(TOKENS), reference.logits(TOKENS)
        assert median(found, wanted) <= PACKED_LOGITS
        assert relative(found, wanted) <= INT8_ACTIVATIONS
        backend.close()


def test_the_family_generates_is_inspected_and_traced(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "bundle", precision="speed")
    with LLM.load(tmp_path / "bundle") as llm:
        answer = llm.generate([1, 5, 9], max_tokens=7, temperature=0, ignore_eos=True)
        assert len(answer.token_ids) == 7
    with Bundle.open(tmp_path / "bundle") as bundle:
        described = describe(bundle)
        assert described["parameters"] == sum(
            np.prod(tensor.shape) for tensor in bundle.tensors.values()
        )
        assert described["state_bytes_per_session"] == 0
        assert len([n for n in trace_bundle(bundle).nodes if n.spec.type == "EcAttention"]) == 3
