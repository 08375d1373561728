# SPDX-License-Identifier: Apache-2.0
"""A stored engine is loaded only where it belongs, and says why not elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import Build

from build_engine import compile as compile_module
from build_engine.accept import PROMPTS, STEPS, compare
from edgecascade.backends import open_backend
from edgecascade.bundle import Bundle
from edgecascade.engines import (
    INDEX,
    PLAN,
    TIMING_CACHE,
    EngineKey,
    engine_key,
    plugin_hash,
    read_engine,
    read_timing_cache,
    remove_engine,
    write_engine,
)
from edgecascade.errors import BuildError, BundleError, BundleMismatch, OutOfMemory
from edgecascade.files import canonical_json

PLAN_BYTES = bytes(range(256)) * 40
ORIN = {"builder": "tensorrt", "version": "10.3.0", "sm": 87, "l4t": "36.4.3"}


@pytest.fixture
def bundle(build: Build, tmp_path: Path) -> Bundle:
    """A bundle of our own: engines are written into it."""
    copy = tmp_path / "bundle"
    shutil.copytree(build("tiny", "speed"), copy)
    return Bundle.open(copy)


@pytest.fixture
def key(bundle: Bundle) -> EngineKey:
    return engine_key(bundle, **ORIN, plugins=plugin_hash())


@pytest.fixture
def stored(bundle: Bundle, key: EngineKey) -> Path:
    return write_engine(bundle, key, PLAN_BYTES, {"build_s": 1.5}, b"timings")


def test_an_engine_comes_back_as_it_was_stored(
    bundle: Bundle, key: EngineKey, stored: Path
) -> None:
    engine = read_engine(bundle, key)
    assert (engine.plan, engine.facts, engine.key) == (PLAN_BYTES, {"build_s": 1.5}, key)
    assert read_timing_cache(bundle, key) == b"timings"
    assert stored.name.startswith("sm87-tensorrt10.3.0-")
    Bundle.open(bundle.path, verify=True)  # a bundle with an engine is a bundle


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("version", "10.13.3.9", ("TensorRT 10.3.0", "TensorRT 10.13.3.9")),
        ("sm", 110, ("SM 87", "SM 110")),
        ("l4t", "38.2.0", ("L4T 36.4.3", "L4T 38.2.0")),
        ("builder", "rtx", ("builder tensorrt", "builder rtx")),
        ("plugins", "f" * 64, ("plugins ", "plugins ffffffffffff")),
        ("graph", "e" * 64, ("graph ", "graph eeeeeeeeeeee")),
        ("bundle", "d" * 64, ("bundle ", "bundle dddddddddddd")),
    ],
)
def test_a_plan_for_something_else_is_refused_with_both_sides(
    bundle: Bundle, key: EngineKey, stored: Path, field: str, value: Any, words: tuple[str, str]
) -> None:
    with pytest.raises(BundleMismatch) as refused:
        read_engine(bundle, replace(key, **{field: value}))
    built, needed = str(refused.value).split("; needed here: ")
    assert words[0] in built
    assert words[1] in needed
    assert f"edgecascade engine {bundle.path}" in needed
    assert str(stored) in built


def test_every_part_of_the_key_was_tried(key: EngineKey) -> None:
    (mark,) = (
        m
        for m in test_a_plan_for_something_else_is_refused_with_both_sides.pytestmark
        if m.name == "parametrize"
    )
    assert {case[0] for case in mark.args[1]} == {f.name for f in fields(EngineKey)}


def test_the_engine_of_another_bundle_is_refused(
    bundle: Bundle, key: EngineKey, stored: Path, build: Build, tmp_path: Path
) -> None:
    """Copied over with all its files, under the very name that is looked for."""
    shutil.copytree(build("tiny", "quality"), tmp_path / "other")
    other = Bundle.open(tmp_path / "other")
    wanted = engine_key(other, **ORIN, plugins=plugin_hash())
    shutil.copytree(stored, other.path / "engines" / wanted.folder)
    with pytest.raises(BundleMismatch, match=f"bundle {key.bundle[:12]}.*bundle {other.id[:12]}"):
        read_engine(other, wanted)


def test_no_engine_at_all(bundle: Bundle, key: EngineKey) -> None:
    with pytest.raises(BundleMismatch, match=r"no engine for this machine.*edgecascade engine"):
        read_engine(bundle, key)
    assert read_timing_cache(bundle, key) is None


def test_the_engine_that_differs_least_is_named(
    bundle: Bundle, key: EngineKey, stored: Path
) -> None:
    thor = replace(key, version="10.13.3.9", sm=110, l4t="38.2.0")
    write_engine(bundle, thor, PLAN_BYTES, {})
    with pytest.raises(BundleMismatch) as refused:
        read_engine(bundle, replace(thor, version="10.16.1"))
    assert "TensorRT 10.13.3.9; needed here: TensorRT 10.16.1;" in str(refused.value)


Damage = Callable[[Path], object]


def edit(**changes: Any) -> Damage:
    def damage(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        (path / INDEX).write_bytes(canonical_json({**index, **changes}))

    return damage


def link(path: Path) -> None:
    (path / PLAN).rename(path / "elsewhere")
    (path / PLAN).symlink_to(path / "elsewhere")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated plan": (lambda p: os.truncate(p / PLAN, 100), "has 100 bytes.*promises 10240"),
    "empty plan": (lambda p: os.truncate(p / PLAN, 0), "has 0 bytes.*promises 10240"),
    "longer plan": (lambda p: os.truncate(p / PLAN, 10241), "has 10241 bytes"),
    "flipped bit": (
        lambda p: (p / PLAN).write_bytes(b"\x01" + PLAN_BYTES[1:]),
        "was changed: its SHA-256",
    ),
    "no plan": (lambda p: (p / PLAN).unlink(), "is missing"),
    "plan is a link": (link, "no regular file"),
    "no index": (lambda p: (p / INDEX).unlink(), "no readable engine.json"),
    "index cut": (lambda p: os.truncate(p / INDEX, 50), "not valid JSON"),
    "index of a list": (lambda p: (p / INDEX).write_text("[]\n"), "was changed"),
    "another spelling": (
        lambda p: (p / INDEX).write_text(" " + (p / INDEX).read_text()),
        "was changed",
    ),
    "a later schema": (edit(schema=2), "schema 2, this version reads 1"),
    "an unknown key": (edit(more=1), "was changed"),
    "key is a word": (edit(key="orin"), "has the key"),
    "key lacks a part": (edit(key={"sm": 87}), "has the key"),
    "true is no SM": (
        edit(key=dict.fromkeys([f.name for f in fields(EngineKey)], "") | {"sm": True}),
        "has the key",
    ),
    "no file named": (edit(files={}), "which plan"),
    "a file elsewhere": (edit(files={PLAN: {}, "../../manifest.json": {}}), "which plan"),
    "a promise of nothing": (edit(files={PLAN: None}), "promises None"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_engine_is_refused(
    bundle: Bundle, key: EngineKey, stored: Path, name: str
) -> None:
    damage, message = DAMAGES[name]
    damage(stored)
    with pytest.raises(BundleError, match=message) as refused:
        read_engine(bundle, key)
    assert "edgecascade engine" in str(refused.value) or "not valid JSON" in str(refused.value)


def test_a_damaged_timing_cache_is_worth_nothing_and_harms_nothing(
    bundle: Bundle, key: EngineKey, stored: Path
) -> None:
    (stored / TIMING_CACHE).write_bytes(b"timingz")
    assert read_timing_cache(bundle, key) is None
    assert read_engine(bundle, key).plan == PLAN_BYTES


def test_building_again_replaces(bundle: Bundle, key: EngineKey, stored: Path) -> None:
    half_built = stored.with_name(f".{key.folder}.part-1-dead")  # what a killed build left
    half_built.mkdir()
    assert write_engine(bundle, key, b"other", {}) == stored
    assert read_engine(bundle, key).plan == b"other"
    assert {p.name for p in stored.parent.iterdir()} == {stored.name, ".lock"}


def test_an_engine_that_proved_wrong_goes(bundle: Bundle, key: EngineKey, stored: Path) -> None:
    remove_engine(bundle, key)
    assert not stored.exists()


@pytest.mark.parametrize("before", [True, False])
def test_an_engine_that_could_not_be_proven_leaves_what_was_there(
    bundle: Bundle, key: EngineKey, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    if before:
        write_engine(bundle, key, PLAN_BYTES, {"build_s": 1.5}, b"timings")

    def busy(opened: Bundle) -> None:
        assert read_engine(opened, key).plan == b"new"
        raise OutOfMemory("the service holds the GPU's memory")

    monkeypatch.setattr(compile_module, "accept", busy)
    made = compile_module.Compiled(b"new", b"", key, {})
    monkeypatch.setattr(compile_module, "compile_graph", lambda *args, **options: made)
    with pytest.raises(OutOfMemory):
        compile_module.build_engine(bundle)
    if not before:
        with pytest.raises(BundleMismatch):
            read_engine(bundle, key)
        return
    engine = read_engine(bundle, key)
    assert (engine.plan, engine.facts) == (PLAN_BYTES, {"build_s": 1.5})
    assert read_timing_cache(bundle, key) == b"timings"


@pytest.mark.parametrize("line", [b"3", b"null", b'"error"', b"[1]", b"{}", b'{"step": 1}', b"x{"])
def test_what_a_library_prints_in_a_build_is_no_message(line: bytes) -> None:
    assert compile_module._heard(line + b"\n", None) is None


def test_the_plugin_hash_is_of_sources_and_kernels(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    library.write_bytes(b"one")
    first = plugin_hash([library])
    assert first == plugin_hash([library]) != plugin_hash()
    library.write_bytes(b"two")
    assert plugin_hash([library]) != first


def test_an_engine_is_accepted_by_its_tokens(build: Build) -> None:
    with Bundle.open(build("tiny", "speed")) as bundle:
        pair = [open_backend("cpu", bundle, slots=1, max_context=128) for _ in range(2)]
        accepted = compare(*pair)
    assert accepted.steps == accepted.same == len(PROMPTS) * STEPS
    assert accepted.against == "cpu"


def test_an_engine_with_other_tokens_is_not(build: Build) -> None:
    """A plan that loads, runs and answers nonsense."""
    with Bundle.open(build("tiny", "speed")) as bundle:
        truth = open_backend("cpu", bundle, slots=1, max_context=128)
        wrong = open_backend("cpu", bundle, slots=1, max_context=128)
        wrong.prefill = lambda slot, tokens: -truth.prefill(slot, tokens)
        with pytest.raises(BuildError, match=r"prefers token \d+, the cpu backend \d+"):
            compare(wrong, truth)


def test_logits_that_are_no_numbers_are_no_tokens(build: Build) -> None:
    with Bundle.open(build("tiny", "speed")) as bundle:
        truth, broken = (open_backend("cpu", bundle, slots=1, max_context=128) for _ in range(2))
        truth.prefill = lambda slot, tokens: -np.arange(truth.vocab, dtype=np.float32)
        broken.prefill = lambda slot, tokens: np.full(truth.vocab, np.nan, np.float32)
        assert truth.prefill(0, []).argmax() == broken.prefill(0, []).argmax()
        with pytest.raises(BuildError, match="no numbers"):
            compare(broken, truth)
