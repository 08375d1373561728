# SPDX-License-Identifier: Apache-2.0
"""Every spelling of a sound checkpoint reads the same; every damaged one is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest

from build_engine import checkpoint
from build_engine.checkpoint import INDEX, read_header
from build_engine.pipeline import build
from build_engine.read import Model, read, widen
from edgecascade.errors import CheckpointError, EdgeCascadeError, UnsupportedModel
from edgecascade.tensors import Transform

SHARD = "model-00002-of-00003.safetensors"


def values(model: Model) -> dict[str, np.ndarray]:
    """All tensors in float32, put together from their pieces."""
    made = {}
    for tensor in model.tensors:
        pieces = [piece.widened() for piece in model.pieces(tensor)]
        made[tensor.name] = np.concatenate(pieces).reshape(tensor.shape)
    return made


def test_names_with_any_prefix_and_any_number_of_shards_read_the_same(tmp_path: Path) -> None:
    expected = values(read(checkpoints.write(tmp_path / "hub")))
    for name, options in {
        "model": {"rename": lambda name: name if name == "lm_head.weight" else f"model.{name}"},
        "bare": {"rename": lambda name: name},
        "shards": {"shards": 3},
    }.items():
        found = values(read(checkpoints.write(tmp_path / name, **options)))
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array, err_msg=f"{name}: {key}")


def test_fused_experts_read_as_single_ones(tmp_path: Path) -> None:
    single = values(read(checkpoints.write(tmp_path / "single")))
    fused_arrays = checkpoints.arrays(fused=True)
    for name in list(fused_arrays):  # the same values, stacked
        if name.endswith(("experts.up_proj", "experts.down_proj")):
            kind = name.rsplit(".", 1)[1].removesuffix("_proj")
            fused_arrays[name] = ("F32", single[f"layers.1.experts_{kind}"])
    fused = read(checkpoints.write(tmp_path / "fused", fused_arrays))
    for kind in ("up", "down"):
        name = f"layers.1.experts_{kind}"
        np.testing.assert_array_equal(values(fused)[name], single[name])
        tensor = next(t for t in fused.tensors if t.name == name)
        where = f"backbone.layers.1.mixer.experts.{kind}_proj[2, 5, 7]"
        assert fused.where(tensor, 2, 5, 7) == where


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_stored_types_widen_exactly(tmp_path: Path, dtype: str) -> None:
    tensors = checkpoints.arrays(dtype)
    found = values(read(checkpoints.write(tmp_path / "c", tensors)))
    for name, source in {
        "embeddings": "embeddings.weight",
        "layers.3.up": "layers.3.mixer.up_proj.weight",
    }.items():
        stored, array = tensors[source]
        np.testing.assert_array_equal(found[name], widen(array, stored.lower()))


def test_query_key_and_value_rows_are_stacked_in_that_order(tmp_path: Path) -> None:
    tensors = checkpoints.arrays()
    model = read(checkpoints.write(tmp_path / "c", tensors))
    parts = [tensors[f"layers.2.mixer.{name}_proj.weight"][1] for name in "qkv"]
    stacked = np.concatenate(parts)
    np.testing.assert_array_equal(values(model)["layers.2.qkv"], stacked)
    tensor = next(t for t in model.tensors if t.name == "layers.2.qkv")
    # 60 query rows, 20 key rows: a cut inside the keys.
    np.testing.assert_array_equal(model.rows(tensor, 0, 32, 64).values, stacked[32:64])
    assert model.where(tensor, 0, 61, 3) == "backbone.layers.2.mixer.k_proj.weight[1, 3]"


def test_sources_of_different_types_are_widened_before_they_are_stacked(tmp_path: Path) -> None:
    tensors = checkpoints.arrays()
    tensors["layers.2.mixer.k_proj.weight"] = checkpoints.encode(
        tensors["layers.2.mixer.k_proj.weight"][1], "BF16"
    )
    found = values(read(checkpoints.write(tmp_path / "c", tensors)))["layers.2.qkv"]
    np.testing.assert_array_equal(found[:60], tensors["layers.2.mixer.q_proj.weight"][1])
    keys = widen(tensors["layers.2.mixer.k_proj.weight"][1], "bf16")
    np.testing.assert_array_equal(found[60:80], keys)


def test_convolution_is_transposed_and_a_is_minus_exp(tmp_path: Path) -> None:
    tensors = checkpoints.arrays()
    found = values(read(checkpoints.write(tmp_path / "c", tensors)))
    conv = tensors["layers.0.mixer.conv1d.weight"][1]
    np.testing.assert_array_equal(found["layers.0.conv_weight"], conv[:, 0, :].T)
    a_log = tensors["layers.0.mixer.A_log"][1].astype(np.float64)
    np.testing.assert_array_equal(found["layers.0.a"], (-np.exp(a_log)).astype(np.float32))


def test_draft_head_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = checkpoints.arrays()
    tensors["mtp.layers.0.enorm.weight"] = ("F32", np.ones(72, np.float32))
    with caplog.at_level("INFO"):
        model = read(checkpoints.write(tmp_path / "c", tensors))
    assert not any("mtp" in tensor.name for tensor in model.tensors)
    assert "left out 1 tensors: the draft head" in caplog.text


def test_head_that_is_stored_counts_even_when_the_config_ties_it(tmp_path: Path) -> None:
    """transformers ties nothing in this family, so it answers with the head that is there."""
    tensors = checkpoints.arrays()
    both = values(read(checkpoints.write(tmp_path / "both", tensors, tie_word_embeddings=True)))
    untied = values(read(checkpoints.write(tmp_path / "untied", tensors)))
    np.testing.assert_array_equal(both["lm_head"], untied["lm_head"])
    assert not np.array_equal(both["lm_head"], both["embeddings"])


def test_embeddings_take_the_place_of_a_tied_head_that_is_not_stored(tmp_path: Path) -> None:
    tensors = checkpoints.arrays()
    del tensors["lm_head.weight"]
    found = values(read(checkpoints.write(tmp_path / "c", tensors, tie_word_embeddings=True)))
    np.testing.assert_array_equal(found["lm_head"], found["embeddings"])


Damage = Callable[[Path], object]


def edit_index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def edit_header(change: Callable[[dict[str, dict[str, list[int]]]], object]) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        (folder / SHARD).write_bytes(checkpoints.with_header(header, data[8 + size :]))

    return damage


def overwrite(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def in_place_of(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def cut(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def grow(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes() + b"x")


def huge_header(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes((1 << 60).to_bytes(8, "little") + data[8:])


def overlap(header: dict[str, dict[str, list[int]]]) -> None:
    first, second = list(header.values())[:2]
    second["data_offsets"] = [v - first["data_offsets"][1] for v in second["data_offsets"]]


def move_tensor(weight_map: dict[str, str]) -> None:
    name = next(name for name, shard in weight_map.items() if shard == SHARD)
    weight_map[name] = "model-00001-of-00003.safetensors"


DAMAGE: dict[str, tuple[Damage, type[EdgeCascadeError], str]] = {
    "truncated shard": (
        cut,
        CheckpointError,
        f"{SHARD} is truncated: it has .* bytes, its header promises",
    ),
    "shard with a tail": (grow, CheckpointError, f"{SHARD} is too long"),
    "missing shard": (
        lambda f: (f / SHARD).unlink(),
        CheckpointError,
        f"shards that are not there: {SHARD}",
    ),
    "empty shard": (
        overwrite(SHARD, b""),
        CheckpointError,
        "header length 0 is impossible in a file of 0",
    ),
    "impossible header length": (huge_header, CheckpointError, "header length 1152921504606846976"),
    "header no JSON": (
        overwrite(SHARD, b"\x05\0\0\0\0\0\0\0{bad}"),
        CheckpointError,
        "header is not valid JSON",
    ),
    "header a list": (
        overwrite(SHARD, b"\x02\0\0\0\0\0\0\0[]"),
        CheckpointError,
        "header is no JSON object",
    ),
    "repeated name": (
        overwrite(SHARD, b"\x0e\0\0\0\0\0\0\0" + b'{"a":1,"a":2}\n'),
        CheckpointError,
        "key 'a' is given twice",
    ),
    "overlapping tensors": (edit_header(overlap), CheckpointError, "overlaps the one before"),
    "offset beyond the file": (
        edit_header(lambda h: list(h.values())[-1].update(data_offsets=[10**12, 10**12 + 4])),
        CheckpointError,
        "bytes, but has 4",
    ),
    "negative size": (
        edit_header(lambda h: next(iter(h.values())).update(shape=[-1, 4])),
        CheckpointError,
        "entry of 'backbone",
    ),
    "dtype no text": (
        edit_header(lambda h: next(iter(h.values())).update(dtype=["F32"])),
        CheckpointError,
        "entry of 'backbone",
    ),
    "header in UTF-16": (
        overwrite(SHARD, b"\x06\0\0\0\0\0\0\0" + "{}".encode("utf-16")),
        CheckpointError,
        "header is not valid JSON",
    ),
    "index no JSON": (
        overwrite("model.safetensors.index.json", b"{"),
        CheckpointError,
        "index.json is not valid JSON",
    ),
    "index without map": (
        overwrite("model.safetensors.index.json", b"{}"),
        CheckpointError,
        "has no weight_map",
    ),
    "index names another shard": (
        edit_index(lambda m: m.update({next(iter(m)): "model-9.safetensors"})),
        CheckpointError,
        "not there: model-9.safetensors",
    ),
    "index names a shard that no folder holds": (
        edit_index(lambda m: m.update({next(iter(m)): "x" * 300 + ".safetensors"})),
        CheckpointError,
        "not there: xxx",
    ),
    "tensor in the wrong shard": (
        edit_index(move_tensor),
        CheckpointError,
        "disagree: not where the index says",
    ),
    "index lacks a tensor": (
        edit_index(lambda m: m.pop(next(iter(m)))),
        CheckpointError,
        "not in the index",
    ),
    "path out of the folder": (
        edit_index(lambda m: m.update({next(iter(m)): "../x.safetensors"})),
        CheckpointError,
        "'../x.safetensors', which is no safetensors file beside it",
    ),
    "absolute path": (
        edit_index(lambda m: m.update({next(iter(m)): "/etc/x.safetensors"})),
        CheckpointError,
        "which is no safetensors file beside it",
    ),
    "shard no text": (
        edit_index(lambda m: m.update({next(iter(m)): 3})),
        CheckpointError,
        "into 3, which",
    ),
    "config missing": (
        lambda f: (f / "config.json").unlink(),
        CheckpointError,
        "cannot read .*config.json",
    ),
    "config no JSON": (
        overwrite("config.json", b"\xff"),
        CheckpointError,
        "config.json is not valid JSON",
    ),
    "config a list": (
        overwrite("config.json", b"[]"),
        CheckpointError,
        "holds list; expected a JSON object",
    ),
    "config with NaN": (overwrite("config.json", b'{"x": NaN}'), CheckpointError, "holds NaN"),
    "config a pipe": (
        in_place_of("config.json", os.mkfifo),
        CheckpointError,
        r"cannot read .*config.json: no such regular file",
    ),
    "config a device without an end": (
        in_place_of("config.json", lambda path: path.symlink_to("/dev/zero")),
        CheckpointError,
        r"cannot read .*config.json: no such regular file",
    ),
    "index a link to nowhere": (
        in_place_of(INDEX, lambda path: path.symlink_to("../blobs/gone")),
        CheckpointError,
        "cannot read .*index.json: No such file",
    ),
    "config deep": (
        overwrite("config.json", b'{"id2label": ' + b"[" * 400 + b"]" * 400 + b"}"),
        CheckpointError,
        "config.json is not valid JSON: it is nested more than 100 deep",
    ),
    "config too deep": (
        overwrite("config.json", b"[" * 10**5),
        CheckpointError,
        "config.json is not valid JSON",
    ),
    "another family": (
        overwrite("config.json", b'{"model_type": "llama"}'),
        UnsupportedModel,
        "model_type is 'llama'",
    ),
    "quantized": (
        overwrite("config.json", b'{"quantization_config": {"quant_method": "gptq"}}'),
        UnsupportedModel,
        r"already quantized \(gptq\); start from the BF16 checkpoint",
    ),
    "quantized by modelopt": (
        overwrite("hf_quant_config.json", b"{}"),
        UnsupportedModel,
        r"already quantized \(modelopt\)",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoint_is_refused_by_name(tmp_path: Path, case: str) -> None:
    damage, error, message = DAMAGE[case]
    folder = checkpoints.write(tmp_path / "c", shards=3)
    damage(folder)
    with pytest.raises(error, match=message):
        read(folder)


def test_a_pipe_in_the_place_of_the_weights_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c")
    in_place_of("model.safetensors", os.mkfifo)(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such regular file"):
        read(folder)


def test_a_file_that_may_not_be_read_is_not_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, **_: bool) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    folder = checkpoints.write(tmp_path / "c")
    monkeypatch.setattr(checkpoint, "open_regular", refused)
    with pytest.raises(CheckpointError, match=r"json: Permission denied; let this user read it$"):
        read(folder)


def test_links_into_a_hubs_cache_are_followed(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c")
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(f"../blobs/{path.name}")
    alone = values(read(checkpoints.write(tmp_path / "alone")))
    assert values(read(folder)).keys() == alone.keys()


def test_a_manifest_beside_a_config_makes_no_bundle(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c")
    (folder / "manifest.json").write_text("{}")  # some mirrors and download tools write one
    assert read(folder).tensors


def test_missing_folder_and_folder_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        read(tmp_path / "nowhere")
    build(checkpoints.write(tmp_path / "source"), tmp_path / "bundle", verify=False)
    with pytest.raises(CheckpointError, match="is a bundle; give the checkpoint that it is of"):
        read(tmp_path / "bundle")
    (checkpoints.write(tmp_path / "c") / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        read(tmp_path / "c")


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c", shards=2)
    shutil.copy(checkpoints.write(tmp_path / "single") / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match=r"has model\.safetensors, and .*two sets of weights"):
        read(folder)


def test_an_index_may_name_the_one_file_there_is(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c")
    names = {tensor.name for tensor in read_header(folder / "model.safetensors")}
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    alone = read(checkpoints.write(tmp_path / "alone"))
    assert values(read(folder)).keys() == values(alone).keys()


def test_a_header_of_many_repeated_names_is_refused_at_once(tmp_path: Path) -> None:
    names = "".join(f'"{i}":0,' for i in range(50_000))
    header = f'{{{names}"49999":0}}'.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="key '49999' is given twice"):
        read_header(path)


def test_all_wrong_tensors_are_named_up_to_ten(tmp_path: Path) -> None:
    tensors = checkpoints.arrays()
    del tensors["norm_f.weight"]
    tensors["layers.0.norm.weight"] = ("F32", np.ones(71, np.float32))
    tensors["layers.1.norm.weight"] = ("I64", np.ones(72, np.int64))
    tensors["layers.9.what"] = ("F32", np.ones(1, np.float32))
    with pytest.raises(CheckpointError) as caught:
        read(checkpoints.write(tmp_path / "few", tensors))
    for part in (
        "norm_f.weight is missing",
        "backbone.layers.0.norm.weight has shape [71], the config asks for [72]",
        "backbone.layers.1.norm.weight is I64; BF16, F16 and F32 are read",
        "backbone.layers.9.what is unknown",
    ):
        assert part in str(caught.value)
    for i in range(20):
        tensors[f"layers.9.what{i}"] = ("F32", np.ones(1, np.float32))
    with pytest.raises(CheckpointError, match="and 14 more"):
        read(checkpoints.write(tmp_path / "many", tensors))


def test_same_tensor_under_two_prefixes_is_refused(tmp_path: Path) -> None:
    tensors = {checkpoints.hub(name): entry for name, entry in checkpoints.arrays().items()}
    tensors["model.norm_f.weight"] = tensors["backbone.norm_f.weight"]
    with pytest.raises(CheckpointError, match="are the same tensor"):
        read(checkpoints.write(tmp_path / "c", tensors, rename=lambda name: name))


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "qweight"])
def test_packed_tensors_are_refused(tmp_path: Path, suffix: str) -> None:
    tensors = checkpoints.arrays()
    tensors[f"layers.0.mixer.in_proj.{suffix}"] = ("I32", np.ones((4, 4), np.int32))
    with pytest.raises(UnsupportedModel, match="start from the BF16 checkpoint"):
        read(checkpoints.write(tmp_path / "c", tensors))


def test_shard_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c")
    model = read(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"model.safetensors ends at \d+, inside"):
        list(model.pieces(model.tensors[-1]))


def test_transforms_of_the_family_are_all_read(tmp_path: Path) -> None:
    model = read(checkpoints.write(tmp_path / "c"))
    assert {tensor.transform for tensor in model.tensors} == set(Transform)
