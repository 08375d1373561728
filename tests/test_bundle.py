# SPDX-License-Identifier: Apache-2.0
"""Opening a bundle: what it hands out, what it remembers, and that weight files are safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest

from build_engine.pipeline import build as build_bundle
from edgecascade import bundle as module
from edgecascade import verified
from edgecascade.bundle import Bundle
from edgecascade.errors import BundleError, BundleMismatch
from edgecascade.files import canonical_json, sha256_files
from edgecascade.manifest import parse_manifest
from edgecascade.tensors import ALIGNMENT, Codec

Counted = list[Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every codec, which tests copy before they change it."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint = checkpoints.write(folder / "checkpoint", checkpoints.arrays("BF16"))
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}ü")
    build_bundle(checkpoint, folder / "bundle", precision="balanced", verify=False)
    return folder / "bundle"


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(made, tmp_path / "bundle")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The files that were hashed."""
    seen: Counted = []

    def count(paths: list[Path]) -> list[str]:
        seen.extend(paths)
        return sha256_files(paths)

    monkeypatch.setattr(module, "sha256_files", count)
    return seen


def test_bundle_hands_out_what_was_stored(made: Path) -> None:
    with Bundle.open(made) as bundle:
        assert bundle.path == made
        assert bundle.id == hashlib.sha256((made / "manifest.json").read_bytes()).hexdigest()
        assert (bundle.family, bundle.precision, bundle.kv_type) == (
            "nemotron_h",
            "balanced",
            "f16",
        )
        assert bundle.config["hidden_size"] == 72
        assert bundle.max_context == 512
        assert bundle.generation["eos_token_id"] == [2]
        assert bundle.report["precision"] == "balanced"
        assert bundle.chat_template == "{{ messages }}ü"
        assert bundle.tokenizer_json is None
        assert bundle.weight_bytes == sum(tensor.bytes for tensor in bundle.tensors.values())


def test_infinity_in_the_config_is_stored_as_json(made: Path) -> None:
    with Bundle.open(made) as bundle:
        assert bundle.config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


def test_map_starts_on_a_page_and_holds_the_padded_tensor(made: Path) -> None:
    with Bundle.open(made) as bundle:
        for name, tensor in bundle.tensors.items():
            view = bundle.map(name)
            assert view.ctypes.data % ALIGNMENT == 0
            assert view.nbytes == tensor.bytes == tensor.experts * tensor.stride
            assert not view.flags.writeable
            padding = view.reshape(tensor.experts, -1)[:, tensor.matrix_bytes :]
            assert not padding.any()


def test_matrix_has_the_logical_shape_and_is_read_only(made: Path) -> None:
    tensors = checkpoints.arrays("BF16")
    with Bundle.open(made) as bundle:
        router = bundle.matrix("layers.1.router")
        assert (router.shape, router.dtype) == ((4, 72), np.float32)
        source = tensors["layers.1.mixer.gate.weight"][1].astype(np.uint32) << 16
        np.testing.assert_array_equal(router, source.view(np.float32))
        assert bundle.matrix("embeddings").dtype == np.float16
        with pytest.raises(ValueError, match="read-only"):
            router[0, 0] = 1
        with pytest.raises(BundleError, match="'lm_head' is stored as i8_64 blocks"):
            bundle.matrix("lm_head")
        with pytest.raises(BundleError, match="has no tensor 'nothing'"):
            bundle.map("nothing")


def test_stacked_float_experts_skip_the_padding_between_them(tmp_path: Path) -> None:
    tensors = checkpoints.arrays()
    checkpoint = checkpoints.write(tmp_path / "checkpoint", tensors)
    build_bundle(checkpoint, tmp_path / "bundle", precision="exact", verify=False)
    with Bundle.open(tmp_path / "bundle") as bundle:
        up = bundle.matrix("layers.1.experts_up")
        for expert in range(4):
            source = tensors[f"layers.1.mixer.experts.{expert}.up_proj.weight"][1]
            np.testing.assert_array_equal(up[expert], source)


def test_views_outlive_the_bundle(made: Path) -> None:
    bundle = Bundle.open(made)
    view = bundle.matrix("norm_f")
    before = view.copy()
    bundle.close()
    np.testing.assert_array_equal(view, before)


def test_weight_files_are_safetensors_files(made: Path) -> None:
    for path in made.glob("weights-*.safetensors"):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        assert (8 + size) % ALIGNMENT == 0
        header = json.loads(data[8 : 8 + size])
        end = 0
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["dtype"] == "U8"
                assert entry["data_offsets"] == [end, end + entry["shape"][0]]
                end = entry["data_offsets"][1]
        assert 8 + size + end == len(data)


def test_manifest_survives_its_own_writer(made: Path) -> None:
    data = (made / "manifest.json").read_bytes()
    manifest = parse_manifest(data, "manifest.json")
    assert manifest.to_json() == data
    assert canonical_json(json.loads(data)) == data


def test_fresh_bundle_is_not_hashed_again(made: Path, hashed: Counted) -> None:
    Bundle.open(made).close()
    assert hashed == []


def test_copied_bundle_is_hashed_once(own: Path, hashed: Counted) -> None:
    Bundle.open(own).close()
    assert {path.name for path in hashed} == {path.name for path in own.iterdir()} - {
        "manifest.json"
    }
    hashed.clear()
    Bundle.open(own).close()
    assert hashed == []


def test_verify_true_hashes_everything_and_false_nothing(made: Path, hashed: Counted) -> None:
    Bundle.open(made, verify=False).close()
    assert hashed == []
    Bundle.open(made, verify=True).close()
    assert len(hashed) == len(list(made.iterdir())) - 1  # the manifest


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_change_after_a_verified_open_is_found(own: Path) -> None:
    Bundle.open(own).close()
    weights = next(own.glob("weights-00002-*"))
    times = os.stat(weights)
    flip(weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # a copy with old times
    with pytest.raises(BundleError, match=rf"{weights.name} was changed: its SHA"):
        Bundle.open(own)


def test_change_right_after_the_build_is_found(tmp_path: Path) -> None:
    build_bundle(checkpoints.write(tmp_path / "checkpoint"), tmp_path / "bundle", verify=False)
    flip(tmp_path / "bundle" / "report.json", 5)
    with pytest.raises(BundleError, match=r"report\.json was changed"):
        Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize("cache", ["a file", "missing parent"])
def test_cache_folder_that_cannot_be_written_is_no_error(
    own: Path, hashed: Counted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: str
) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" if cache == "a file" else tmp_path / "file" / "below"
    monkeypatch.setenv("XDG_CACHE_HOME", str(target))
    for _ in range(2):
        hashed.clear()
        Bundle.open(own).close()
        assert len(hashed) == len(list(own.iterdir())) - 1  # the manifest


def test_damaged_stamp_costs_a_hash(own: Path, hashed: Counted) -> None:
    Bundle.open(own).close()
    for stamp in (Path(os.environ["XDG_CACHE_HOME"]) / "edgecascade" / "verified").iterdir():
        stamp.write_bytes(b"{")
    hashed.clear()
    Bundle.open(own).close()
    assert len(hashed) == len(list(own.iterdir())) - 1  # the manifest


def test_stamps_that_anybody_could_write_are_not_believed(
    own: Path, hashed: Counted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        Bundle.open(own).close()
    finally:
        os.umask(before)
    folder = tmp_path / "cache" / "edgecascade" / "verified"
    assert folder.stat().st_mode & 0o777 == 0o700
    hashed.clear()
    Bundle.open(own).close()
    assert hashed == []
    folder.chmod(0o777)
    Bundle.open(own).close()
    assert len(hashed) == len(list(own.iterdir())) - 1  # the manifest


def test_stamps_of_files_that_are_gone_do_not_pile_up(
    own: Path, hashed: Counted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "edgecascade" / "verified"
    folder.mkdir(parents=True)
    files = len(list(own.iterdir())) - 1
    monkeypatch.setattr(verified, "MAX_STAMPS", 4 * files)
    for number in range(4 * files):
        (folder / f"0-{number}.json").write_text("{}")
        os.utime(folder / f"0-{number}.json", (number, number))
    Bundle.open(own).close()
    assert len(list(folder.iterdir())) <= 4 * files
    hashed.clear()
    Bundle.open(own).close()
    assert hashed == []  # the newest stamps are those that stay


def test_engines_folder_is_not_the_manifests_business(own: Path) -> None:
    (own / "engines" / "sm87").mkdir(parents=True)
    (own / "engines" / "sm87" / "model.plan").write_bytes(b"plan")
    Bundle.open(own).close()


def test_wrong_folders_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="bundle is ''; give the path of its folder"):
        Bundle.open("")
    with pytest.raises(BundleError, match="does not exist; build one: edgecascade build"):
        Bundle.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "file")
    with pytest.raises(BundleError, match="so it is no bundle; a checkpoint becomes one"):
        Bundle.open(checkpoints.write(tmp_path / "checkpoint"))


def rewrite(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest and give it the digest that belongs to the change."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_bytes())
    change(raw)
    del raw["digest"]
    raw["digest"] = hashlib.sha256(canonical_json(raw)).hexdigest()
    path.write_bytes(canonical_json(raw))


def test_unknown_family_and_unknown_maths_are_mismatches(own: Path) -> None:
    rewrite(own, lambda raw: raw.update(family="llama"))
    with pytest.raises(BundleMismatch, match="'llama'; this version reads nemotron_h"):
        Bundle.open(own)
    rewrite(own, lambda raw: raw.update(family="nemotron_h"))
    rewrite(own, lambda raw: raw["config"].update(rotary=1))  # type: ignore[attr-defined]
    with pytest.raises(BundleMismatch, match="rotary = 1"):
        Bundle.open(own)


def test_config_that_asks_for_other_tensors_is_refused(own: Path) -> None:
    rewrite(own, lambda raw: raw["config"].update(vocab_size=98))  # type: ignore[attr-defined]
    with pytest.raises(BundleError, match=r"'embeddings' is embedding \[97, 72\], its config asks"):
        Bundle.open(own)


def test_codec_numbers_are_those_of_the_c_header() -> None:
    header = (Path(__file__).parent.parent / "plugins/include/edgecascade.h").read_text()
    for codec in Codec:
        assert f"EC_{codec.name} = {codec.ec_type}" in header


def test_an_open_bundle_keeps_its_weights_when_another_takes_its_name(
    made: Path, own: Path, tmp_path: Path
) -> None:
    other = checkpoints.write(tmp_path / "other", checkpoints.arrays("BF16", seed=4))
    (other / "chat_template.jinja").write_text("{{ other }}")
    with Bundle.open(made) as old, pytest.MonkeyPatch.context() as patch:

        def hash_and_replace(paths: list[Path]) -> list[str]:
            found = sha256_files(paths)
            patch.undo()
            build_bundle(other, own, precision="balanced", verify=False, overwrite=True)
            return found

        patch.setattr(module, "sha256_files", hash_and_replace)
        with Bundle.open(own, verify=True) as bundle:
            assert bundle.id == old.id
            assert bundle.chat_template == old.chat_template
            for name in bundle.tensors:
                assert np.array_equal(bundle.map(name), old.map(name)), name
        assert Bundle.open(own).id != old.id


def test_weights_that_are_gone_or_cut_off_are_the_bundles_error(own: Path) -> None:
    bundle = Bundle.open(own)
    bundle.close()
    with pytest.raises(BundleError, match="is closed"):
        bundle.map(next(iter(bundle.tensors)))
    weights = bundle.weight_files[0]
    promised = bundle.manifest.files[weights.name]
    os.truncate(weights, promised.bytes - ALIGNMENT)
    with pytest.raises(BundleError, match="is being replaced"):
        Bundle(own, bundle.manifest)
