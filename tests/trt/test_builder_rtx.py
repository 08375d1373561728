# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's own parser and builder take our graphs and plugins: TensorRT-RTX, without a GPU.

RTX is not the TensorRT of a Jetson. What holds here: the parser creates our plugins from our nodes,
the builder asks them what the contract says in an order that it allows, and makes a plan.
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from golden import Golden
from models import graph_of_shapes, write_bundle

from build_engine.compile import (
    WORKSPACE_BYTES,
    build_engine,
    compile_graph,
    compile_onnx,
    environment,
)
from build_engine.compile_job import ONNX, Job, profile_of
from build_engine.decompose import with_functions
from build_engine.graph import to_onnx
from build_engine.rtx import libraries
from edgecascade.bundle import Bundle
from edgecascade.cli import main
from edgecascade.engines import EngineKey, read_engine
from edgecascade.errors import BackendUnavailable, BuildError, InvalidRequest
from edgecascade.nodes import NODES
from edgecascade.trace import Graph, Node, dims, profiles, trace_bundle

RECORDER = Path(__file__).with_name("record_rtx.py")
TYPES = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32"}
Calls = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def rtx() -> None:
    """TensorRT-RTX has wheels for x86-64 only; where they could be, CI must have them."""
    try:
        libraries()
    except BackendUnavailable as error:
        if "CI" in os.environ:
            pytest.fail(str(error))
        pytest.skip(str(error))


@dataclass(frozen=True)
class Recorded:
    """A build, and every call that it made to the plugins."""

    graph: Graph
    context: int
    calls: Calls
    facts: dict[str, Any]


def record(graph: Graph, context: int, folder: Path, fault: str = "") -> Recorded:
    """Build under the recorder; AssertionError with the builder's words when it refuses."""
    ranges = [
        profile_of({t.name: dims(t, p) for t in graph.inputs.values()})
        for p in profiles(graph, context)
    ]
    job = Job(str(folder), "rtx", ranges, WORKSPACE_BYTES)
    (folder / ONNX).write_bytes(to_onnx(graph).SerializeToString())
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    log = folder / "calls.json"
    with environment("rtx") as variables:
        done = subprocess.run(
            [sys.executable, str(RECORDER), str(folder / "job.json"), str(log), fault],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
    told = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, f"{told} {done.stderr[-1000:]}"
    return Recorded(graph, context, json.loads(log.read_text()), told["result"]["facts"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A model of all kinds of layers, and with blocks of both codecs."""
    folder = tmp_path_factory.mktemp("small")
    with Bundle.open(write_bundle(folder, "odd", "quality")) as bundle:
        return record(trace_bundle(bundle), bundle.max_context, folder)


def check(recorded: Recorded) -> None:
    """Every call is one that the contract allows, in an order that it allows."""
    graph = recorded.graph
    bounds = profiles(graph, recorded.context)
    nodes = {node.name: node for node in graph.nodes}
    by_node: dict[str, Calls] = {name: [] for name in nodes}
    for call in recorded.calls:
        by_node[call["node"]].append(call)
    for name, calls in by_node.items():
        node = nodes[name]
        check_creation(node, calls)
        check_formats(node, calls, bounds)
        check_profiles(node, calls, bounds)
        check_order(calls)


def check_creation(node: Node, calls: Calls) -> None:
    """Created once, with each attribute as the graph has it; serialized with the same."""
    wanted = {
        name: [float(np.float32(value)) if isinstance(value, float) else value]
        for name, value in node.attributes.items()
    }
    (created,) = (c for c in calls if c["call"] == "create")
    assert created == calls[0]
    assert created["arguments"] == [node.spec.type, "BUILD", wanted]
    serialized = [c["result"] for c in calls if c["call"] == "get_fields_to_serialize"]
    assert serialized
    assert all(fields == wanted for fields in serialized)


def check_formats(node: Node, calls: Calls, bounds: tuple[Any, Any]) -> None:
    """Asked about every input and output; yes to plain arrays of the node's types and no other."""
    tensors = (*node.inputs, *node.outputs)
    asked: dict[int, list[int]] = {}
    for call in calls:
        if call["call"] != "supports_format_combination":
            continue
        at, found, inputs, total = call["arguments"]
        assert (inputs, total) == (len(node.inputs), len(tensors))
        right = (found["type"], found["format"]) == (TYPES[tensors[at].dtype], "LINEAR")
        assert call["result"] is right, (node.name, at, found)
        # A size that a profile fixes is known, the others are open.
        fixed = [dims(tensors[at], profile) for profile in bounds]
        shapes = [[a if a == c else -1 for a, _, c in zip(*f, strict=True)] for f in fixed]
        assert found["dims"] in shapes, (node.name, tensors[at], found)
        if right:
            asked.setdefault(call["plugin"], []).append(at)
    assert asked
    for positions in asked.values():
        assert sorted(set(positions)) == list(range(len(tensors)))


def check_profiles(node: Node, calls: Calls, bounds: tuple[Any, Any]) -> None:
    """Configured for a decode and for a prefill step, each with a workspace of its own."""
    ranges = {
        json.dumps([[list(shape) for shape in dims(t, profile)] for t in node.inputs])
        for profile in bounds
    }
    seen = set()
    for call in calls:
        if call["call"] in ("configure_plugin", "get_workspace_size"):
            inputs, outputs = call["arguments"]
            seen.add(json.dumps([[d["min"], d["opt"], d["max"]] for d in inputs]))
            assert [d["type"] for d in inputs] == [TYPES[t.dtype] for t in node.inputs]
            assert [d["type"] for d in outputs] == [TYPES[t.dtype] for t in node.outputs]
            for state, given in zip(node.outputs[1:], outputs[1:], strict=True):
                place = [t.name + ".out" for t in node.inputs].index(state.name)
                assert given["max"] == inputs[place]["max"]
        if call["call"] == "get_workspace_size":
            assert 0 <= call["result"] <= WORKSPACE_BYTES
    assert seen == ranges
    types = [c for c in calls if c["call"] == "get_output_data_types"]
    assert types
    for call in types:
        assert call["arguments"] == [[TYPES[t.dtype] for t in node.inputs]]
        assert call["result"] == [TYPES[t.dtype] for t in node.outputs]
    for call in calls:
        if call["call"] == "get_output_shapes":
            assert call["arguments"] == [len(node.inputs)]
            assert call["result"] == [len(t.shape) for t in node.outputs]


def check_order(calls: Calls) -> None:
    """Formats, configuration, workspace, fields: on a copy each; nothing of run time."""
    order = (
        "supports_format_combination",
        "configure_plugin",
        "get_workspace_size",
        "get_fields_to_serialize",
    )
    original = calls[0]["plugin"]
    known = {original}
    first: dict[int, dict[str, int]] = {}
    for at, call in enumerate(calls):
        assert call["plugin"] in known, "a plugin that nobody made"
        assert call["call"] not in ("enqueue", "on_shape_change"), "nothing runs in a build"
        if call["call"] in ("clone", "attach_to_context"):
            assert call["result"] not in known, "a copy is an object of its own"
            known.add(call["result"])
        first.setdefault(call["plugin"], {}).setdefault(call["call"], at)
    assert not set(order) & first[original].keys(), "the network's own plugin stays as it is"
    built = [calls_of for calls_of in first.values() if "get_fields_to_serialize" in calls_of]
    assert len(built) >= 2, "one for each profile"
    for calls_of in built:
        assert calls_of.keys() >= set(order)
        assert [calls_of[name] for name in order] == sorted(calls_of[name] for name in order)


def test_the_builder_asks_what_the_contract_says(small: Recorded) -> None:
    check(small)
    assert {node.spec.op.name for node in small.graph.nodes} == NODES.keys()


def drop(call: str) -> Callable[[Calls], Calls]:
    return lambda calls: [c for c in calls if c["call"] != call]


def change(call: str, how: Callable[[dict[str, Any]], None]) -> Callable[[Calls], Calls]:
    def changed(calls: Calls) -> Calls:
        made = copy.deepcopy(calls)
        how(next(c for c in made if c["call"] == call))
        return made

    return changed


LIES = {
    "no fields": drop("get_fields_to_serialize"),
    "a field left out": change("get_fields_to_serialize", lambda c: c["result"].popitem()),
    "a field changed": change("get_fields_to_serialize", lambda c: c["result"].update(w_n=[1])),
    "a wrong format accepted": change(
        "supports_format_combination", lambda c: c["arguments"][1].update(format="CHW4")
    ),
    "a wrong type accepted": change(
        "supports_format_combination", lambda c: c["arguments"][1].update(type="INT8")
    ),
    "the right format refused": change(
        "supports_format_combination", lambda c: c.update(result=False)
    ),
    "clone returns itself": change("clone", lambda c: c.update(result=c["plugin"])),
    "never configured": drop("configure_plugin"),
    "a workspace beyond the limit": change(
        "get_workspace_size", lambda c: c.update(result=WORKSPACE_BYTES + 1)
    ),
    "another output type": change("get_output_data_types", lambda c: c.update(result=["HALF"])),
    "a rank too many": change("get_output_shapes", lambda c: c["result"].__setitem__(0, 3)),
    "run in a build": change("get_valid_tactics", lambda c: c.update(call="enqueue")),
    "created twice": lambda calls: [calls[0], *calls],
}


@pytest.mark.parametrize("name", LIES)
def test_the_check_sees_each_breach(small: Recorded, name: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(replace(small, calls=LIES[name](small.calls)))


@pytest.mark.parametrize("fault", ["wrong type", "refuses all", "raises in shapes", "one output"])
def test_nvidias_builder_refuses_a_broken_plugin(
    small: Recorded, tmp_path: Path, fault: str
) -> None:
    with pytest.raises(AssertionError, match="BuildError"):
        record(small.graph, small.context, tmp_path, fault)


def compile_changed(small: Recorded, edit: Callable[[onnx.NodeProto], None]) -> None:
    model = to_onnx(small.graph)
    edit(next(node for node in model.graph.node if node.op_type == "EcLinear"))
    ranges = [
        profile_of({t.name: dims(t, p) for t in small.graph.inputs.values()})
        for p in profiles(small.graph, small.context)
    ]
    compile_onnx(model.SerializeToString(), Job("", "rtx", ranges, WORKSPACE_BYTES))


def without_attribute(node: onnx.NodeProto) -> None:
    node.attribute.remove(next(a for a in node.attribute if a.name == "w_n"))


def with_wrong_width(node: onnx.NodeProto) -> None:
    next(a for a in node.attribute if a.name == "w_k").i += 64


def with_unknown_type(node: onnx.NodeProto) -> None:
    node.op_type = "EcUnknown"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_attribute, r"EcLinear lacks the attributes \['w_n'\]"),
        (with_wrong_width, "EcLinear: input x has shape"),
        (with_unknown_type, "node 1: .*Plugin not found"),
    ],
)
def test_a_graph_that_does_not_fit_its_plugins_is_refused(
    small: Recorded, edit: Callable[[onnx.NodeProto], None], message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        compile_changed(small, edit)


def test_the_builder_takes_the_decomposition_too(tmp_path: Path) -> None:
    """The same graph with its functions: types, shapes and operators as NVIDIA reads ONNX."""
    with Bundle.open(write_bundle(tmp_path, "expert-groups", "exact")) as bundle:
        graph, context = trace_bundle(bundle), bundle.max_context
    ranges = [
        profile_of({t.name: dims(t, p) for t in graph.inputs.values()})
        for p in profiles(graph, context)[:1]
    ]
    model = with_functions(to_onnx(graph)).SerializeToString()
    made = compile_onnx(model, Job("", "rtx", ranges, WORKSPACE_BYTES))
    assert made.facts["layers"] > 10 * len(graph.nodes)


def test_the_30b_graph_builds_in_a_gigabyte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """52 layers, 17.3 GB of weights outside of the plan; every call to a plugin is looked at."""
    graph, context = graph_of_shapes("nemotron-3-nano-30b")
    kinds = Counter(node.spec.op.name for node in graph.nodes)
    assert (kinds["mamba"], kinds["moe"], kinds["attention"]) == (23, 23, 6)
    assert sum(_bytes(t) for t in graph.inputs.values() if _is_static(t.shape)) > 17e9
    recorded = record(graph, context, tmp_path)
    check(recorded)
    facts = recorded.facts
    with capsys.disabled():
        sys.stdout.write(
            f"\n30B-shaped graph in TensorRT-RTX {facts['version']}: parsed in "
            f"{facts['parse_s']:.1f} s, built in {facts['build_s']:.1f} s, peak RSS "
            f"{facts['peak_rss_bytes'] / 1e6:.0f} MB, plan {facts['plan_bytes'] / 1e6:.1f} MB, "
            f"{len(recorded.calls)} calls to plugins\n"
        )
    assert facts["layers"] == len(graph.nodes)
    assert facts["peak_rss_bytes"] <= 1 << 30
    assert facts["plan_bytes"] <= 40e6


def children() -> list[int]:
    """Processes that this one started and has not waited for."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_builder_that_is_killed_leaves_an_error_and_no_engine(
    own_bundle: Callable[[str, str], Path], signal_number: int
) -> None:
    def kill(*_: Any) -> None:
        for pid in children():
            os.kill(pid, signal_number)

    with (
        Bundle.open(own_bundle("tiny", "speed")) as bundle,
        pytest.raises(BuildError, match=f"ended by signal {int(signal_number)}; 9 means"),
    ):
        build_engine(bundle, builder="rtx", progress=kill)
    assert not (bundle.path / "engines").exists()


def test_an_interrupted_build_takes_its_child_along(
    own_bundle: Callable[[str, str], Path],
) -> None:
    def interrupt(*_: Any) -> None:
        assert children()
        raise KeyboardInterrupt

    with Bundle.open(own_bundle("tiny", "speed")) as bundle, pytest.raises(KeyboardInterrupt):
        build_engine(bundle, builder="rtx", progress=interrupt)
    assert not children()
    assert not (bundle.path / "engines").exists()


def test_an_engine_that_cannot_be_stored(own_bundle: Callable[[str, str], Path]) -> None:
    with Bundle.open(own_bundle("tiny", "speed")) as bundle:
        (bundle.path / "engines").write_text("in the way")
        with pytest.raises(BuildError, match="cannot write the engine into"):
            build_engine(bundle, builder="rtx")


def test_build_with_engine_is_one_command(
    tiny: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    arguments = ["build", str(tiny.checkpoint), "--out", str(out), "--no-verify"]
    assert main([*arguments, "--engine", "--builder", "rtx"]) == 0
    assert "sm0-rtx" in capsys.readouterr().out
    assert any((out / "engines").glob("sm0-rtx*/model.plan"))


def test_progress_is_told_phase_by_phase(small: Recorded) -> None:
    heard: list[tuple[str, int, int]] = []
    compile_graph(
        small.graph, small.context, builder="rtx", progress=lambda *step: heard.append(step)
    )
    assert any(phase == "Building engine" for phase, _, _ in heard)
    assert heard[-1][1] == heard[-1][2] > 0
    assert all(0 <= step <= steps for _, step, steps in heard)


def test_unknown_builder(small: Recorded) -> None:
    with pytest.raises(InvalidRequest, match="choose one of tensorrt, rtx"):
        compile_graph(small.graph, small.context, builder="trt")


def _is_static(shape: tuple[Any, ...]) -> bool:
    return all(isinstance(dim, int) for dim in shape)


def _bytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * (2 if tensor.dtype == "float16" else 4)


def test_the_command_stores_an_engine_that_no_jetson_would_take(
    own_bundle: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_bundle("tiny", "speed")
    assert main(["engine", str(path), "--builder", "rtx"]) == 0
    printed = capsys.readouterr().out
    (folder,) = (p for p in (path / "engines").iterdir() if p.is_dir())
    assert folder.name.startswith("sm0-rtx")
    assert str(folder) in printed
    assert "no Jetson runs it" in printed
    with Bundle.open(path) as bundle:
        key = EngineKey(**json.loads((folder / "engine.json").read_text())["key"])
        assert len(read_engine(bundle, key).plan) > 1000
    assert main(["engine", str(path), "--builder", "rtx"]) == 0
    assert "with a timing cache" in capsys.readouterr().out
