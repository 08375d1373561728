# SPDX-License-Identifier: Apache-2.0
"""Building: what the bundle and its report hold, what is refused, and that failures leave
nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest

from build_engine import bundle as writer_module
from build_engine import pack as pack_module
from build_engine import read as read_module
from build_engine import verify as verify_module
from build_engine.pipeline import build
from build_engine.synthetic import config, shapes, write_synthetic
from edgecascade.backends import open_backend
from edgecascade.bundle import Bundle
from edgecascade.errors import BackendUnavailable, BuildError, CheckpointError, InvalidRequest
from edgecascade.inspect import describe, tables
from edgecascade.tensors import Codec, Role


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "checkpoint")


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "checkpoint")


def weights(bundle: Bundle) -> dict[str, bytes]:
    return {name: bundle.map(name).tobytes() for name in bundle.tensors}


def test_report_measures_every_tensor_and_every_layer(checkpoint: Path, tmp_path: Path) -> None:
    report = build(checkpoint, tmp_path / "bundle", precision="quality")
    with Bundle.open(tmp_path / "bundle") as bundle:
        assert bundle.report == json.loads(json.dumps(report.to_json()))
        assert report.tensors.keys() == bundle.tensors.keys()
        for name, tensor in bundle.tensors.items():
            stored = report.tensors[name]
            assert (stored.codec, stored.bytes) == (tensor.codec.value, tensor.bytes)
            limit = {Codec.U4_64: 0.12, Codec.I8_64: 0.01, Codec.F16: 1e-3, Codec.F32: 0.0}
            assert stored.relative_error <= limit[tensor.codec]
            assert (stored.relative_error > 0) == (tensor.codec is not Codec.F32)
    assert report.verify is not None
    assert [layer.layer for layer in report.verify.layers] == [0, 1, 2, 3]
    assert 0 < report.verify.layers[0].relative <= report.verify.layers[0].worst_token < 1
    assert report.checkpoint == "checkpoint"


def test_exact_bundle_has_no_error_at_all(checkpoint: Path, tmp_path: Path) -> None:
    report = build(checkpoint, tmp_path / "bundle", precision="exact")
    assert {tensor.relative_error for tensor in report.tensors.values()} == {0.0}
    assert report.verify is not None
    assert {layer.relative for layer in report.verify.layers} == {0.0}
    assert report.verify.logits_relative == 0
    assert report.verify.kernels_relative is not None
    assert report.verify.kernels_relative < verify_module.FLOAT_LIMIT


def test_same_checkpoint_gives_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "one", verify=False)
    build(checkpoint, tmp_path / "two", verify=False)
    names = {path.name for path in (tmp_path / "one").glob("weights-*")}
    assert names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_small_pieces_give_the_same_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(checkpoint, tmp_path / "whole", precision="quality", verify=False)
    monkeypatch.setattr(read_module, "PIECE_BYTES", 1)
    build(checkpoint, tmp_path / "pieces", precision="quality", verify=False)
    with Bundle.open(tmp_path / "whole") as whole, Bundle.open(tmp_path / "pieces") as pieces:
        assert weights(whole) == weights(pieces)


def test_many_weight_files_hold_the_same_tensors(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(checkpoint, tmp_path / "one", verify=False)
    monkeypatch.setattr(writer_module, "SPLIT_BYTES", 20_000)
    build(checkpoint, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("weights-*"))) > 5
    with Bundle.open(tmp_path / "one") as one, Bundle.open(tmp_path / "many", verify=True) as many:
        assert weights(one) == weights(many)


def test_a_layer_that_did_not_change_is_the_same_file_again(tmp_path: Path) -> None:
    tensors = checkpoints.arrays("BF16")
    one = checkpoints.write(tmp_path / "one", tensors)
    trained = checkpoints.arrays("BF16", seed=4)
    changed = {n: trained[n] if "layers.1." in n else tensors[n] for n in tensors}
    other = checkpoints.write(tmp_path / "other", changed)
    for checkpoint in (one, other):
        build(checkpoint, checkpoint / "bundle", verify=False)
    files = [
        {name: (folder / "bundle" / name).read_bytes() for name in os.listdir(folder / "bundle")}
        for folder in (one, other)
    ]
    weights = [name for name in files[0] if name.startswith("weights-")]
    different = [name for name in weights if files[0][name] != files[1][name]]
    with Bundle.open(one / "bundle") as bundle:
        assert {t.file for n, t in bundle.tensors.items() if n.startswith("layers.1.")} == set(
            different
        )
    assert len(different) == 1
    assert len(weights) > 3


def test_build_without_the_library_packs_the_same_bytes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(checkpoint, tmp_path / "library", precision="quality", verify=False)

    def missing() -> None:
        raise BackendUnavailable("not built")

    monkeypatch.setattr(pack_module, "cpu_library", missing)
    build(checkpoint, tmp_path / "numpy", precision="quality", verify=False)
    with Bundle.open(tmp_path / "library") as library, Bundle.open(tmp_path / "numpy") as numpy:
        assert weights(library) == weights(numpy)


def test_progress_ends_at_the_bytes_of_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build(checkpoint, tmp_path / "b", verify=False, progress=lambda *step: seen.append(step))
    with Bundle.open(tmp_path / "b") as bundle:
        assert seen[-1] == (bundle.weight_bytes, bundle.weight_bytes)
    assert sorted(seen) == seen


BAD_VALUES = {
    "nan": (
        "layers.1.mixer.experts.2.up_proj.weight",
        (5, 7),
        np.nan,
        "speed",
        "[5, 7] is nan, which is no",
    ),
    "infinity": ("layers.0.mixer.D", (3,), -np.inf, "exact", "[3] is -inf, which is no number"),
    "exponent": ("layers.0.mixer.A_log", (2,), -np.inf, "exact", "[2] is -inf, which is no number"),
    "exponent too large": ("layers.0.mixer.A_log", (2,), 1e30, "speed", "[2] is -inf, which is no"),
    "router": ("layers.1.mixer.gate.weight", (1, 2), np.nan, "speed", "[1, 2] is nan"),
    "conv": ("layers.0.mixer.conv1d.weight", (9, 0, 2), np.nan, "speed", "[9, 0, 2] is nan"),
    "stacked": ("layers.2.mixer.v_proj.weight", (4, 70), np.inf, "quality", "[4, 70] is inf"),
    "embedding": (
        "embeddings.weight",
        (96, 71),
        7e4,
        "speed",
        "[96, 71] is 70000.0, which f16 cannot hold",
    ),
    "head": (
        "lm_head.weight",
        (90, 3),
        1e30,
        "speed",
        "[90, 3] is 1.0000000150474662e+30, which u4_64",
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_value_that_cannot_be_stored_is_named(tmp_path: Path, case: str) -> None:
    name, index, value, precision, message = BAD_VALUES[case]
    tensors = checkpoints.arrays()
    tensors[name][1][index] = value
    checkpoint = checkpoints.write(tmp_path / "checkpoint", tensors)
    with pytest.raises(CheckpointError) as caught:
        build(checkpoint, tmp_path / "bundle", precision=precision)
    assert f"{checkpoints.hub(name)}{message}" in str(caught.value)
    assert left_over(tmp_path) == []


def test_weights_that_overflow_in_the_forward_pass_are_refused(tmp_path: Path) -> None:
    tensors = checkpoints.arrays()
    for name in ("up_proj", "down_proj"):
        tensors[f"layers.3.mixer.{name}.weight"][1][:] = 5e5
    tensors["norm_f.weight"][1][:] = 3e38
    tensors["lm_head.weight"][1][:] = 5e5
    with pytest.raises(BuildError, match=r"weights are not finite|no numbers"):
        build(checkpoints.write(tmp_path / "checkpoint", tensors), tmp_path / "bundle")
    assert left_over(tmp_path) == []


def test_a_folder_in_the_place_of_the_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*chat_template.jinja"):
        build(checkpoint, tmp_path / "bundle", verify=False)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"],
)
def test_a_text_that_a_download_did_not_finish_is_refused(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    """A hub's cache is links; one that leads nowhere is a file that is missing, not one less."""
    (checkpoint / name).symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=rf"cannot read .*{name}: No such file.* again"):
        build(checkpoint, tmp_path / "bundle", verify=False)
    assert left_over(tmp_path) == []


def test_a_template_without_an_end_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with open(checkpoint / "chat_template.jinja", "wb") as template:
        template.truncate(20 << 30)
    with pytest.raises(
        CheckpointError, match=r"chat_template.jinja has 21474836480 bytes; at most"
    ):
        build(checkpoint, tmp_path / "bundle", verify=False)


def test_existing_target_is_kept_unless_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    build(checkpoint, out, precision="speed", verify=False)
    with pytest.raises(BuildError, match="bundle exists; choose another folder, or replace it"):
        build(checkpoint, out, precision="exact", verify=False)
    assert Bundle.open(out).precision == "speed"
    old = Bundle.open(out)
    kept = old.matrix("norm_f")
    build(checkpoint, out, precision="exact", verify=False, overwrite=True)
    assert Bundle.open(out).precision == "exact"
    assert kept.sum() == Bundle.open(out).matrix("norm_f").sum()  # the old mapping lives on
    assert left_over(tmp_path) == ["bundle"]


def test_failed_build_leaves_no_parent_folders(tmp_path: Path) -> None:
    tensors = checkpoints.arrays()
    tensors["lm_head.weight"][1][5, 5] = np.nan
    checkpoint = checkpoints.write(tmp_path / "checkpoint", tensors)
    with pytest.raises(CheckpointError):
        build(checkpoint, tmp_path / "new" / "deep" / "bundle")
    assert left_over(tmp_path) == []


def test_target_that_appears_during_the_build_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def appear(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")

    for overwrite in (False, True):
        with pytest.raises(BuildError, match="exists"):
            build(checkpoint, out, verify=False, overwrite=overwrite, progress=appear)
        assert [path.name for path in out.iterdir()] == ["mine.txt"]
        shutil.rmtree(out)


def test_failed_overwrite_keeps_the_old_bundle(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    build(checkpoint, out, verify=False)
    before = (out / "manifest.json").read_bytes()
    tensors = checkpoints.arrays()
    tensors["lm_head.weight"][1][5, 5] = np.nan
    bad = checkpoints.write(tmp_path / "bad", tensors)
    with pytest.raises(CheckpointError):
        build(bad, out, overwrite=True)
    assert (out / "manifest.json").read_bytes() == before
    shutil.rmtree(bad)
    assert left_over(tmp_path) == ["bundle"]


@pytest.mark.parametrize("kind", ["file", "folder", "checkpoint", "link"])
def test_overwrite_never_removes_what_is_no_bundle(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    elif kind == "link":
        target.symlink_to(checkpoint)
    else:
        target = checkpoint
    with pytest.raises(BuildError, match="is no bundle; remove it yourself"):
        build(checkpoint, target, overwrite=True)
    assert target.exists()


def test_full_disk_is_noticed_before_the_build(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5, 5))
    with pytest.raises(BuildError, match=r"has 0\.00 GB free, the bundle needs 0\.07 GB"):
        build(checkpoint, tmp_path / "bundle")
    assert left_over(tmp_path) == []


def test_disk_that_fills_up_during_the_build_leaves_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    limit = 40_000  # bytes of a file, as a full disk: the write comes back short, then fails
    script = "import sys; from build_engine.pipeline import build; build(sys.argv[1], sys.argv[2])"
    child = subprocess.run(
        [sys.executable, "-c", script, checkpoint, tmp_path / "bundle"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "BuildError: cannot write" in child.stderr
    assert "free space there, or choose another folder" in child.stderr
    assert left_over(tmp_path) == []


def test_leftovers_of_dead_builds_are_removed_and_living_ones_kept(
    checkpoint: Path, tmp_path: Path
) -> None:
    dead, alive = tmp_path / ".bundle.part-7-00aa", tmp_path / ".bundle.part-7-00bb"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "weights").write_text("half")
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    build(checkpoint, tmp_path / "bundle", verify=False)
    os.close(lock)
    assert left_over(tmp_path) == [alive.name, "bundle"]


def test_two_step_rename_swaps_too(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(source: Path, target: Path, flags: int) -> None:
        writer_module._rename_in_two_steps(source, target, swap=flags == 2)

    monkeypatch.setattr(writer_module, "_rename", rename)
    build(checkpoint, tmp_path / "bundle", precision="exact", verify=False)
    build(checkpoint, tmp_path / "bundle", precision="speed", verify=False, overwrite=True)
    assert Bundle.open(tmp_path / "bundle").precision == "speed"
    assert left_over(tmp_path) == ["bundle"]


KILLED_BETWEEN = """
import os, sys
from build_engine import bundle, pipeline

checkpoint, target = sys.argv[1:]
bundle._rename = lambda a, b, flags: bundle._rename_in_two_steps(a, b, swap=flags == 2)
rename, done = os.rename, []

def killed(source, target):
    if done:
        os.kill(os.getpid(), 9)
    done.append(rename(source, target))

os.rename = killed
pipeline.build(checkpoint, target, precision="speed", verify=False, overwrite=True)
"""


def test_a_bundle_whose_name_a_killed_build_had_taken_gets_it_back(
    checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    build(checkpoint, target, precision="exact", verify=False)
    child = subprocess.run(
        [sys.executable, "-c", KILLED_BETWEEN, str(checkpoint), str(target)],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.returncode == -9
    assert not target.exists()
    with pytest.raises(BuildError, match="exists"):
        build(checkpoint, target, precision="speed", verify=False)
    assert Bundle.open(target).precision == "exact"
    assert left_over(tmp_path) == ["bundle"]


def test_unknown_preset_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="precision is 'int2'"):
        build(checkpoint, tmp_path / "bundle", precision="int2")
    assert left_over(tmp_path) == []


def put_texts(checkpoint: Path, **texts: Any) -> None:
    for name, value in texts.items():
        (checkpoint / f"{name}.json").write_text(json.dumps(value))


def test_generation_gathers_every_token_that_ends_an_answer(
    checkpoint: Path, tmp_path: Path
) -> None:
    put_texts(
        checkpoint,
        generation_config={
            "eos_token_id": [2, 5],
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": None,
        },
        tokenizer=checkpoints.tokenizer(**{"<|im_end|>": 11, "x": 1}),
    )
    build(checkpoint, tmp_path / "bundle", verify=False)
    with Bundle.open(tmp_path / "bundle") as bundle:
        assert bundle.generation["eos_token_id"] == [2, 5, 11]
        assert bundle.generation["temperature"] == 0.6
        assert bundle.generation["top_p"] == 0.95
        assert "top_k" not in bundle.generation
        assert bundle.tokenizer_json == (checkpoint / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ a }}", "{{ a }}"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([5, {"name": ["default"], "template": "t"}], None),
        (None, None),
    ],
)
def test_chat_template_of_the_tokenizer_config(
    checkpoint: Path, tmp_path: Path, template: Any, expected: str | None
) -> None:
    put_texts(checkpoint, tokenizer_config={"chat_template": template})
    build(checkpoint, tmp_path / "bundle", verify=False)
    assert Bundle.open(tmp_path / "bundle").chat_template == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"tokenizer_config": {"chat_template": 3}}, "is int; expected a text"),
        ({"generation_config": {"eos_token_id": "two"}}, "eos_token_id is 'two'"),
        ({"generation_config": {"eos_token_id": [2, 97]}}, "holds 97, which would end no answer"),
        (
            {"tokenizer": checkpoints.tokenizer(near=96, far=97)},
            r"tokenizer\.json has 'far' as token 97, but config.json vocab_size is 97: they are of",
        ),
        (
            {
                "tokenizer": {
                    **checkpoints.tokenizer(mark=5),
                    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
                }
            },
            r"tokenizer\.json has 'mark' as token 5, its vocabulary makes it 2; download",
        ),
        ({"tokenizer": []}, r"tokenizer\.json holds list"),
        ({"tokenizer": {"added_tokens": None}}, "is not a tokenizer that the tokenizers library"),
        ({"tokenizer_config": {"chat_template": "\ud800"}}, "is not Unicode"),
        *(
            (
                {"tokenizer": {**checkpoints.tokenizer(a=5), **part}},
                "is not a tokenizer that the tokenizers library reads",
            )
            for part in (checkpoints.PANIC_READING, checkpoints.PANIC_ENCODING)
        ),
        (
            {"tokenizer_config": {"chat_template": "a\n{% endfor %}"}},
            r"the chat template of .*checkpoint, line 2: .*endfor.* correct it, or remove it",
        ),
        ({"tokenizer_config": {"chat_template": "{{ 2 ** 100000 }}"}}, "cannot be compiled"),
        ({"tokenizer_config": {"chat_template": "{% break %}"}}, "compiled: 'break' outside loop"),
        ({"generation_config": {"bos_token_id": 2**31}}, "bos_token_id is 2147483648"),
        ({"generation_config": {"do_sample": 0}}, "do_sample is 0; expected true or false"),
        ({"generation_config": {"temperature": "hot"}}, "generation_config.json: temperature is"),
        ({"generation_config": {"top_p": float("inf")}}, "generation_config.json: top_p is"),
    ],
)
def test_wrong_texts_are_refused(
    checkpoint: Path, tmp_path: Path, texts: dict[str, Any], message: str
) -> None:
    put_texts(checkpoint, **texts)
    with pytest.raises(CheckpointError, match=message):
        build(checkpoint, tmp_path / "bundle", verify=False)
    assert left_over(tmp_path) == []


def last_token_gone(logits: Any) -> Any:
    return np.where(np.arange(len(logits))[:, None] < len(logits) - 1, logits, np.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits[:, ::-1], "the kernel library and the reference disagree"),
        (last_token_gone, "logits of the kernel library .* are not finite"),
    ],
)
def test_verify_finds_kernels_that_compute_something_else(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], Any],
    message: str,
) -> None:
    def wrong(name: str, bundle: Bundle, **options: Any) -> Any:
        backend = open_backend("reference", bundle, **options)
        right = backend.logits
        monkeypatch.setattr(backend, "logits", lambda tokens: change(right(tokens)))
        return backend

    monkeypatch.setattr(verify_module, "open_backend", wrong)
    with pytest.raises(BuildError, match=message):
        build(checkpoint, tmp_path / "bundle")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("name", shapes())
def test_synthetic_shapes_are_those_of_the_models(name: str) -> None:
    from edgecascade.models import nemotron_h

    parameters = {  # counted on transformers' own modules, plus the router's bias buffers
        "nemotron-3-nano-30b": 31_577_937_344 + 2_944,
        "nemotron-nano-9b-v2": 8_888_227_328,
        "nemotron-3-nano-4b": 3_973_556_832,
    }
    tensors = nemotron_h.tensors(nemotron_h.read_config(config(name)))
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors) == parameters[name]


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A synthetic model of the tests' size."""
    small = {**checkpoints.CONFIG, "time_step_limit": None}
    monkeypatch.setattr("build_engine.synthetic.config", lambda name, layers: small)


@pytest.mark.usefixtures("small_shapes")
@pytest.mark.parametrize("precision", ["speed", "quality", "exact"])
def test_synthetic_bundle_opens_and_gives_sane_logits(tmp_path: Path, precision: str) -> None:
    write_synthetic(tmp_path / "bundle", precision=precision)
    with Bundle.open(tmp_path / "bundle", verify=True) as bundle:
        logits = open_backend("reference", bundle).logits(np.arange(20))
        assert 0.1 < logits.std() < 10
        up = bundle.map("layers.1.experts_up").reshape(4, -1)
        assert len({row.tobytes() for row in up}) == 4  # experts differ


@pytest.mark.usefixtures("small_shapes")
def test_synthetic_bundle_is_the_same_every_time(tmp_path: Path) -> None:
    ids = [Bundle.open(write_synthetic(tmp_path / name)).id for name in ("one", "two")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(("name", "layers"), [("gpt-2", None), ("nemotron-3-nano-30b", 0)])
def test_unknown_synthetic_model_is_refused(tmp_path: Path, name: str, layers: int | None) -> None:
    with pytest.raises(InvalidRequest, match=r"unknown; choose one of|layers is 0"):
        write_synthetic(tmp_path / "bundle", name, layers)
    assert left_over(tmp_path) == []


def test_inspect_counts_what_one_token_reads_and_holds(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "bundle", precision="exact", verify=False)
    with Bundle.open(tmp_path / "bundle") as bundle:
        found = describe(bundle)
        experts = [t for t in bundle.tensors.values() if t.role is Role.EXPERT]
        dense = [t for t in bundle.tensors.values() if t.role not in (Role.EXPERT, Role.EMBEDDING)]
        # Two of four experts, one row of the embedding, everything else whole.
        read = sum(2 * t.matrix_bytes for t in experts) + sum(t.matrix_bytes for t in dense)
        assert found["read_bytes_per_token"] == read + 72 * 4
        assert found["weight_bytes"] == bundle.weight_bytes
        channels = 4 * 12 + 2 * 2 * 8
        assert found["state_bytes_per_session"] == 4 * (4 * channels + 4 * 12 * 8)
        assert found["state_bytes_per_token"] == 2 * 1 * 20 * 4
        assert json.loads(json.dumps(found))["id"] == bundle.id
        counts = found["modules"][0]["sessions"]
        assert counts == {2048: None, 8192: None, 32768: None}  # the context is 512 tokens
        assert len(tables(found)) == 2


def test_inspect_says_which_modules_are_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoints.write(tmp_path / "checkpoint", max_position_embeddings=32_768)
    build(checkpoint, tmp_path / "bundle", verify=False)
    monkeypatch.setattr(Bundle, "weight_bytes", property(lambda self: 17_300_000_000))
    with Bundle.open(tmp_path / "bundle") as bundle:
        fits = {fit["module"]: fit for fit in describe(bundle)["modules"]}
    assert not fits["Orin NX 16GB"]["fits"]
    assert fits["Orin NX 16GB"]["sessions"] == {2048: 0, 8192: 0, 32768: 0}
    assert fits["AGX Orin 64GB"]["fits"]
    assert fits["AGX Orin 64GB"]["sessions"][2048] > fits["AGX Orin 64GB"]["sessions"][32768] > 0
