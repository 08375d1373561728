# SPDX-License-Identifier: Apache-2.0
"""A damaged bundle never opens, whatever was damaged and however; a killed build leaves none."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from build_engine.pipeline import build
from edgecascade.bundle import Bundle
from edgecascade.errors import BundleError, BundleMismatch
from edgecascade.files import canonical_json

FILES = [
    "manifest.json",
    *(f"weights-{i:05}-of-00006.safetensors" for i in range(1, 7)),
    "tokenizer.json",
    "chat_template.jinja",
    "generation.json",
    "report.json",
]
WEIGHTS = "weights-00002-of-00006.safetensors"  # layer 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sound bundles of different weights and texts."""
    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("one", "two")):
        tensors = checkpoints.arrays("BF16", seed=seed)
        checkpoint = checkpoints.write(folder / f"checkpoint-{name}", tensors)
        tokens = checkpoints.tokenizer(**{"<|im_end|>": 11 + seed})
        (checkpoint / "tokenizer.json").write_text(json.dumps(tokens))
        (checkpoint / "chat_template.jinja").write_text("{{ messages }}" + name)
        build(checkpoint, folder / name, verify=False)
    return folder / "one", folder / "two"


@pytest.fixture
def own(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage, which has been opened before."""
    copy = shutil.copytree(pair[0], tmp_path / "bundle")
    Bundle.open(copy).close()
    return copy


def refused(folder: Path, *parts: str) -> str:
    """The message with which the bundle is refused; it names every part."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    message = str(caught.value)
    for part in parts:
        assert part in message
    return message


def test_these_are_all_the_files(own: Path) -> None:
    assert sorted(path.name for path in own.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_file_is_refused(own: Path, name: str, keep: float) -> None:
    size = (own / name).stat().st_size
    os.truncate(own / name, min(int(size * keep), size - 1))
    refused(own, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("tail", [b"\0", b"\n", b"x" * 5000])
def test_extended_file_is_refused(own: Path, name: str, tail: bytes) -> None:
    with open(own / name, "ab") as file:
        file.write(tail)
    refused(own, name)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_refused(own: Path, name: str) -> None:
    data = (own / name).read_bytes()
    bits = random.Random(name)
    places = {0, len(data) * 8 - 1, *(bits.randrange(len(data) * 8) for _ in range(40))}
    for bit in places:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (own / name).write_bytes(changed)
        refused(own, name)
    (own / name).write_bytes(data)
    Bundle.open(own).close()


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused(own: Path, name: str) -> None:
    (own / name).unlink()
    refused(own, name)


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_bundle_is_refused(own: Path, pair: tuple[Path, Path], name: str) -> None:
    shutil.copy(pair[1] / name, own / name)
    # Reports hold times, so that their sizes differ now and then; a manifest fits no other bundle.
    refused(own, {"manifest.json": "", "report.json": "report.json"}.get(name, "SHA-256"))


@pytest.mark.parametrize("name", FILES)
def test_link_in_the_place_of_a_file_is_refused(
    own: Path, pair: tuple[Path, Path], name: str
) -> None:
    (own / name).unlink()
    (own / name).symlink_to(pair[0] / name)
    refused(own, name, "is a link or no regular file")


@pytest.mark.parametrize("name", FILES)
def test_folder_in_the_place_of_a_file_is_refused(own: Path, name: str) -> None:
    (own / name).unlink()
    (own / name).mkdir()
    refused(own, name)


@pytest.mark.parametrize("extra", ["notes.txt", "weights-00002-of-00002.safetensors", ".hidden"])
def test_file_that_nobody_lists_is_refused(own: Path, extra: str) -> None:
    (own / extra).write_text("")
    refused(own, extra, "does not list", "remove them")


Change = Callable[[dict[str, Any]], object]


def first(raw: dict[str, Any]) -> dict[str, Any]:
    """The entry of a block tensor."""
    entry: dict[str, Any] = raw["tensors"]["lm_head"]
    return entry


def rename_file(raw: dict[str, Any], name: str) -> None:
    raw["files"][name] = raw["files"].pop(WEIGHTS)
    for entry in raw["tensors"].values():
        if entry["file"] == WEIGHTS:
            entry["file"] = name


def shift(raw: dict[str, Any], by: int) -> None:
    first(raw)["offset"] += by


def exchange(raw: dict[str, Any]) -> None:
    one, other = raw["tensors"]["layers.0.d"], raw["tensors"]["layers.0.a"]
    one["offset"], other["offset"] = other["offset"], one["offset"]


EDITS: dict[str, tuple[Change, str]] = {
    "schema of the future": (lambda raw: raw.update(schema=2), "schema is 2, this version reads 1"),
    "no schema": (lambda raw: raw.pop("schema"), "schema is None"),
    "unknown key": (lambda raw: raw.update(color="red"), "unknown keys ['color']"),
    "missing key": (lambda raw: raw.pop("limits"), "missing keys ['limits']"),
    "unknown file": (
        lambda raw: raw["files"].update({"run.sh": {"bytes": 1, "sha256": "0" * 64}}),
        "'run.sh', which is no file of a bundle",
    ),
    "path upwards": (lambda raw: rename_file(raw, f"../{WEIGHTS}"), f"'../{WEIGHTS}', which is no"),
    "absolute path": (lambda raw: rename_file(raw, f"/tmp/{WEIGHTS}"), f"'/tmp/{WEIGHTS}', which"),
    "size too small": (lambda raw: raw["files"]["report.json"].update(bytes=1), "promises 1"),
    "weights shorter": (
        lambda raw: raw["files"][WEIGHTS].update(bytes=4096),
        f"but {WEIGHTS} has 4096 bytes",
    ),
    "negative size": (lambda raw: raw["files"]["report.json"].update(bytes=-1), "bytes is -1"),
    "size a text": (lambda raw: raw["files"]["report.json"].update(bytes="9"), "bytes is '9'"),
    "size true": (lambda raw: raw["files"]["report.json"].update(bytes=True), "bytes is True"),
    "wrong hash": (
        lambda raw: raw["files"]["report.json"].update(sha256="0" * 64),
        "promises 0000",
    ),
    "hash no hex": (lambda raw: raw["files"]["report.json"].update(sha256="x"), "sha256 is 'x'"),
    "file left out": (lambda raw: raw["files"].pop("report.json"), "files lacks report.json"),
    "optional file left out": (
        lambda raw: raw["files"].pop("tokenizer.json"),
        "does not list: tokenizer.json",
    ),
    "tensor left out": (lambda raw: raw["tensors"].pop("layers.0.d"), f"in {WEIGHTS}"),
    "last tensor left out": (lambda raw: raw["tensors"].pop("lm_head"), "tensors of weights-00006"),
    "tensor in no file": (lambda raw: first(raw).update(file="report.json"), "is no weight file"),
    "tensor outside": (lambda raw: first(raw).update(offset=1 << 40), "ends at 109951"),
    "tensor unaligned": (lambda raw: shift(raw, -64), "is not a multiple of 4096"),
    "tensors overlap": (lambda raw: shift(raw, -4096), "starts at"),
    "tensors exchanged": (exchange, "header and manifest differ about layers.0.a, layers.0.d"),
    "shape too large": (lambda raw: first(raw).update(shape=[10**6, 72]), "takes"),
    "shape zero": (lambda raw: first(raw).update(shape=[0, 72]), "shape is [0, 72]"),
    "shape of floats": (lambda raw: first(raw).update(shape=[97.0, 72]), "shape is [97.0, 72]"),
    "shape too deep": (lambda raw: first(raw).update(shape=[1, 1, 97, 72]), "one to three sizes"),
    "codec unknown": (lambda raw: first(raw).update(codec="u3"), "'u3' is not a valid Codec"),
    "codec of other size": (lambda raw: first(raw).update(codec="i8_64"), "in i8_64 takes"),
    "role unknown": (lambda raw: first(raw).update(role="magic"), "'magic' is not a valid Role"),
    "role of another tensor": (lambda raw: first(raw).update(role="mlp"), "'lm_head' is mlp"),
    "vector in blocks": (
        lambda raw: raw["tensors"]["layers.0.d"].update(codec="u4_64"),
        "role vector is always f32, found u4_64",
    ),
    "tensor renamed": (
        lambda raw: raw["tensors"].update(head=raw["tensors"].pop("lm_head")),
        "header and manifest differ about head, lm_head",
    ),
    "tensor name with a path": (
        lambda raw: raw["tensors"].update({"../x": raw["tensors"].pop("lm_head")}),
        "'../x' is no tensor name",
    ),
    "limit zero": (lambda raw: raw["limits"].update(max_context=0), "max_context is 0"),
    "limit unknown": (lambda raw: raw["limits"].update(kv_type="f64"), "kv_type is 'f64'"),
    "files a list": (lambda raw: raw.update(files=[]), "files is list; expected a JSON object"),
    "config a text": (lambda raw: raw.update(config="x"), "config is str; expected a JSON object"),
    "config without a key": (lambda raw: raw["config"].pop("vocab_size"), "lacks vocab_size"),
}


@pytest.mark.parametrize("signed", [True, False], ids=["digest fits", "digest left"])
@pytest.mark.parametrize("case", EDITS)
def test_edited_manifest_is_refused(own: Path, case: str, signed: bool) -> None:
    change, message = EDITS[case]
    path = own / "manifest.json"
    raw = json.loads(path.read_bytes())
    change(raw)
    if signed:
        del raw["digest"]
        raw["digest"] = hashlib.sha256(canonical_json(raw)).hexdigest()
    path.write_bytes(canonical_json(raw))
    if signed:
        refused(own, message)
    else:
        refused(own, "manifest.json")


def test_future_schema_is_a_mismatch(own: Path) -> None:
    path = own / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"schema": 1', b'"schema": 7'))
    with pytest.raises(BundleMismatch, match="install the version that wrote the bundle"):
        Bundle.open(own)


SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "other white space": lambda data: data.replace(b"\n ", b"\n  ", 1),
    "repeated key": lambda data: data.replace(b'"family":', b'"family": "x",\n "family":', 1),
    "other number": lambda data: data.replace(b'"schema": 1', b'"schema": 1.0', 1),
    "no newline": lambda data: data[:-1],
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "infinite number": lambda data: data.replace(b'"schema": 1', b'"schema": 1,\n "x": 1e999', 1),
    "not a number": lambda data: data.replace(b'"schema": 1', b'"schema": NaN', 1),
    "no json": lambda data: b"\xff\xfe",
    "empty": lambda data: b"",
    "a list": lambda data: b"[]\n",
    "too deep": lambda data: b"[" * 100_000,
    "deep but parseable": lambda data: b'{"schema": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    "huge number": lambda data: data.replace(b'"schema": 1', b'"schema": ' + b"1" * 5000, 1),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_manifest_spelled_another_way_is_refused(own: Path, case: str) -> None:
    path = own / "manifest.json"
    path.write_bytes(SPELLINGS[case](path.read_bytes()))
    refused(own, "manifest.json")


@pytest.mark.parametrize("path", ["a\0b", "a\ud800", "x" * 5000])
def test_path_that_cannot_be_is_refused(path: str) -> None:
    with pytest.raises(BundleError, match="cannot read bundle"):
        Bundle.open(path)


def test_sizes_are_checked_even_without_hashing(own: Path) -> None:
    os.truncate(own / WEIGHTS, 4096)
    with pytest.raises(BundleError, match="has 4096 bytes, the manifest promises"):
        Bundle.open(own, verify=False)


BUILD = """
import sys
from build_engine.pipeline import build
print("started", flush=True)
build(sys.argv[1], sys.argv[2], precision="quality", overwrite=sys.argv[3] == "overwrite")
"""


def killed_after(delay_s: float, checkpoint: Path, out: Path, how: str) -> bool:
    """Whether SIGKILL came before the build ended."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", BUILD, checkpoint, out, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()  # imports are behind
        time.sleep(delay_s)
        child.kill()
        return child.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A checkpoint and how long its build takes."""
    folder = tmp_path_factory.mktemp("slow")
    checkpoint = checkpoints.write(folder / "checkpoint")
    started = time.monotonic()
    build(checkpoint, folder / "bundle", precision="quality")
    return checkpoint, time.monotonic() - started


def test_killed_build_leaves_nothing_that_opens(
    slow_checkpoint: tuple[Path, float], tmp_path: Path
) -> None:
    checkpoint, whole_s = slow_checkpoint
    moments = random.Random(5)
    early = 0
    for i in range(8):
        out = tmp_path / f"bundle-{i}"
        early += killed_after(moments.random() * whole_s, checkpoint, out, "new")
        for folder in tmp_path.glob(f".bundle-{i}.part-*"):
            with pytest.raises(BundleError):
                Bundle.open(folder, verify=False)
        if out.exists():  # it had its name already, so it is whole
            Bundle.open(out, verify=True).close()
        build(checkpoint, out, precision="quality", verify=False, overwrite=True)
        assert not list(tmp_path.glob(f".bundle-{i}.part-*"))
    assert early  # else nothing was tested


def test_killed_overwrite_leaves_the_old_or_the_new_bundle(
    slow_checkpoint: tuple[Path, float], tmp_path: Path
) -> None:
    checkpoint, whole_s = slow_checkpoint
    moments = random.Random(6)
    out = tmp_path / "bundle"
    build(checkpoint, out, precision="speed", verify=False)
    for _ in range(6):
        killed_after(moments.random() * whole_s, checkpoint, out, "overwrite")
        with Bundle.open(out, verify=True) as bundle:
            assert bundle.precision in ("speed", "quality")
