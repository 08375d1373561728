# SPDX-License-Identifier: Apache-2.0
"""Plays TensorRT: builds an engine of our plugins from an ONNX graph and runs it, and looks at
everything that a plugin answers or does with TensorRT's contract in hand.

The classes and descriptions that the plugins meet are those of NVIDIA's bindings; the order of
calls is the one recorded from NVIDIA's builder. Only the symbolic sizes are ours, because the
bindings cannot make them outside of a network.

    play(trt)                     replaces Builder, OnnxParser, Runtime and the registry
    Builder, Network, ...         as much of TensorRT's interface as this project uses
"""

from __future__ import annotations

import ctypes
import math
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import onnx

GUARD = 256  # bytes before and behind every tensor between plugins
SPARE = 4096  # bytes looked at of what a profile's largest shapes would use
PATTERN = 0x5A

Dims = tuple[int, ...]


class ContractError(AssertionError):
    """A plugin broke a rule of TensorRT."""


def need(holds: Any, rule: str) -> None:
    if not holds:
        raise ContractError(rule)


class Size:
    """IDimensionExpr: a number, or None for one that only a step knows."""

    def __init__(self, value: int | None) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return self.value is not None

    def get_constant_value(self) -> int | None:
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class Sizes(list):  # type: ignore[type-arg]
    """DimsExprs."""


class ExprBuilder:
    """IExprBuilder, as far as plugins here need it."""

    def constant(self, value: int) -> Size:
        return Size(int(value))


@dataclass
class Tensor:
    """A tensor of a network; -1 in dims is a size that a profile bounds."""

    name: str
    dtype: Any
    dims: Dims


def _volume(dims: Sequence[int]) -> int:
    return math.prod(dims)


class Play:
    """One TensorRT module whose missing library is played here."""

    def __init__(self, trt: ModuleType) -> None:
        self.trt = trt
        self.creators: dict[tuple[str, str, str], Any] = {}
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.checking = True  # of the memory around every plugin's work: slow
        self.enqueued = 0
        self.contexts = 0

    def dtype(self, name: str) -> Any:
        return self.trt.DataType.__members__[name]

    def description(self, tensor: Tensor, dims: Dims, layout: Any = None) -> Any:
        made = self.trt.PluginTensorDesc()
        made.dims, made.type = self.trt.Dims(list(dims)), tensor.dtype
        made.format = self.trt.TensorFormat.LINEAR if layout is None else layout
        made.scale = -1.0
        return made

    def dynamic(self, tensor: Tensor, bounds: Sequence[Dims], layout: Any = None) -> Any:
        made = self.trt.DynamicPluginTensorDesc()
        made.desc = self.description(tensor, tensor.dims, layout)
        made.min, made.opt, made.max = (self.trt.Dims(list(dims)) for dims in bounds)
        return made

    def output_shapes(self, plugin: Any, shapes: Sequence[Dims]) -> list[Dims]:
        """get_output_shapes() with these inputs; -1 stands for an unknown size."""
        symbols = [Sizes(Size(None if d < 0 else d) for d in dims) for dims in shapes]
        genuine, self.trt.DimsExprs = self.trt.DimsExprs, Sizes  # type: ignore[attr-defined]
        try:
            made = plugin.get_output_shapes(symbols, [], ExprBuilder())
        finally:
            self.trt.DimsExprs = genuine  # type: ignore[attr-defined]
        need(len(made) == plugin.num_outputs, "get_output_shapes: as many shapes as outputs")
        return [tuple(-1 if s.value is None else s.value for s in dims) for dims in made]

    def fields(self, values: dict[str, Any], known: Any = None) -> Any:
        """A collection of copies, as a parser or a plan makes it."""
        kinds = {np.dtype("int32"): "INT32", np.dtype("float32"): "FLOAT32"}
        names = {f.name for f in known} if known is not None else values.keys()
        return self.trt.PluginFieldCollection(
            [
                self.trt.PluginField(
                    name, value, getattr(self.trt.PluginFieldType, kinds[value.dtype])
                )
                for name, value in values.items()
                if name in names
            ]
        )

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Device memory can be looked at in here."""
        self.cuda.fakecuda_unlock()
        try:
            yield
        finally:
            self.cuda.fakecuda_lock()

    def alloc(self, size: int) -> int:
        address = ctypes.c_uint64()
        made = self.cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size))
        need(made == 0, "device memory")
        return address.value

    def counts(self) -> np.ndarray[Any, Any]:
        """allocations, waits, copies, calls, launches, bytes of fakecuda.c."""
        made = np.zeros(6, np.int64)
        self.cuda.fakecuda_counts(made.ctypes.data_as(ctypes.c_void_p))
        return made


class Layer:
    """One plugin of a network, asked what the builder asks, in the builder's order."""

    def __init__(
        self, play: Play, creator: Any, name: str, values: dict[str, Any], inputs: list[Tensor]
    ) -> None:
        self.play, self.creator, self.name, self.inputs = play, creator, name, inputs
        self.plugin = self._create(play.fields(values, creator.field_names), "BUILD")
        copy = self._clone(self.plugin)
        kinds = copy.get_output_data_types([t.dtype for t in inputs])
        need(len(kinds) == copy.num_outputs, "get_output_data_types: one type for each output")
        refused = {play.trt.bool, play.trt.uint8}
        need(not refused & set(kinds), "outputs of a plugin are neither BOOL nor UINT8")
        shapes = play.output_shapes(copy, [t.dims for t in inputs])
        self.outputs = [Tensor("", k, dims) for k, dims in zip(kinds, shapes, strict=True)]
        self.values: dict[str, Any] = {}
        self.workspace = 0

    def _create(self, fields: Any, phase: str) -> Any:
        made = self.creator.create_plugin(
            self.name, fields, getattr(self.play.trt.TensorRTPhase, phase)
        )
        need(made is not None, f"create_plugin({phase}) returns a plugin")
        # A local name, the argument and one that is never given back.
        need(sys.getrefcount(made) >= 3, "a plugin must never be garbage-collected (10.3)")
        for kind in self.play.trt.PluginCapabilityType.__members__.values():
            need(made.get_capability_interface(kind) is not None, f"a plugin has {kind}")
        for mine, its in (
            (made.plugin_name, self.creator.name),
            (made.plugin_version, self.creator.plugin_version),
            (made.plugin_namespace, self.creator.plugin_namespace),
        ):
            need(mine == its, f"a plugin is called as its creator: {mine!r}, {its!r}")
        return made

    def _clone(self, plugin: Any) -> Any:
        copy = plugin.clone()
        self._check_copy("clone()", plugin, copy)
        return copy

    def _check_copy(self, what: str, plugin: Any, copy: Any) -> None:
        need(copy is not None and copy is not plugin, f"{what} returns another object")
        for name in ("plugin_name", "plugin_version", "plugin_namespace", "num_outputs"):
            need(getattr(copy, name) == getattr(plugin, name), f"{what} keeps {name}")

    def configure(self, bounds: Callable[[Tensor], Sequence[Dims]]) -> None:
        """One profile."""
        play, trt = self.play, self.play.trt
        copy = self._clone(self.plugin)
        tensors = [*self.inputs, *self.outputs]
        io = [play.dynamic(t, bounds(t)) for t in tensors]
        unseen = play.dynamic(Tensor("", trt.int8, ()), [(), (), ()], trt.TensorFormat.CHW32)
        dtypes = (trt.float32, trt.float16, trt.bfloat16, trt.int8, trt.int32, trt.int64)
        for at, tensor in enumerate(tensors):
            rest = [unseen] * (len(io) - at - 1)

            def accepts(other: Any, at: int = at, rest: list[Any] = rest) -> bool:
                return bool(
                    copy.supports_format_combination(at, [*io[:at], other, *rest], len(self.inputs))
                )

            need(accepts(io[at]), f"position {at} of {self.name} takes what the network gives")
            for layout in (trt.TensorFormat.CHW32, trt.TensorFormat.HWC8):
                other = play.dynamic(tensor, bounds(tensor), layout)
                need(not accepts(other), f"position {at} of {self.name} refuses {layout}")
            for dtype in dtypes:
                other = play.dynamic(Tensor("", dtype, tensor.dims), bounds(tensor))
                if dtype != tensor.dtype:
                    need(not accepts(other), f"position {at} of {self.name} refuses {dtype}")
        count = len(self.inputs)
        in_context = copy.attach_to_context(None)
        self._check_copy("attach_to_context()", copy, in_context)
        for asked in (copy, in_context, in_context):  # TensorRT configures these, and repeats it
            asked.configure_plugin(io[:count], io[count:])
            sizes = asked.get_workspace_size(io[:count], io[count:])
            need(isinstance(sizes, int) and sizes >= 0, "get_workspace_size returns bytes")
            need(list(asked.get_valid_tactics()) == [], "no tactics: nothing is timed")
            asked.set_tactic(0)
            self.workspace = max(self.workspace, sizes)

    def serialize(self) -> None:
        """The fields that go into a plan, copied as TensorRT copies them."""
        copy = self._clone(self.plugin)
        first = copy.get_fields_to_serialize()
        need(sys.getrefcount(first) >= 3, "a plugin keeps the fields that it serializes (10.3)")
        self.values = {f.name: np.array(f.data) for f in first}
        del first
        again = {f.name: np.array(f.data) for f in copy.get_fields_to_serialize()}
        need(_same(self.values, again), "get_fields_to_serialize can be asked again")

    def restore(self) -> Any:
        """The plugin that a plan makes."""
        made = self._create(self.play.fields(self.values), "RUNTIME")
        again = {f.name: np.array(f.data) for f in made.get_fields_to_serialize()}
        need(_same(self.values, again), f"{self.name} comes back from a plan as it went")
        return made


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


Profile = dict[str, tuple[Dims, Dims, Dims]]


@dataclass
class Network:
    """INetworkDefinition, filled by the parser."""

    play: Play
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    def parse(self, model: onnx.ModelProto) -> None:
        tensors: dict[str, Tensor] = {}
        for value in model.graph.input:
            tensors[value.name] = self.inputs[value.name] = self._tensor(value)
        for node in model.graph.node:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            where = (values.pop("plugin_version", b"1"), values.pop("plugin_namespace", b""))
            creator = self.play.creators.get((node.op_type, *(w.decode() for w in where)))
            need(creator is not None, f"no creator for {node.op_type} {where}")
            arrays = {
                name: np.array([value], np.float32 if isinstance(value, float) else np.int32)
                for name, value in values.items()
            }
            layer = Layer(self.play, creator, node.name, arrays, [tensors[i] for i in node.input])
            need(len(node.output) == len(layer.outputs), f"{node.name} has its outputs")
            for name, tensor in zip(node.output, layer.outputs, strict=True):
                tensor.name = name
                tensors[name] = tensor
            self.layers.append(layer)
        for value in (*model.graph.output, *model.graph.value_info):
            promised, made = self._tensor(value), tensors[value.name]
            need(
                promised.dtype == made.dtype and promised.dims == made.dims,
                f"{value.name} is what the graph promises: {promised}, {made}",
            )
        self.outputs = {value.name: tensors[value.name] for value in model.graph.output}

    def _tensor(self, value: onnx.ValueInfoProto) -> Tensor:
        kinds = {
            onnx.TensorProto.INT32: self.play.trt.int32,
            onnx.TensorProto.FLOAT: self.play.trt.float32,
            onnx.TensorProto.FLOAT16: self.play.trt.float16,
        }
        kind = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        return Tensor(value.name, kinds[kind.elem_type], dims)


def build(network: Network, profiles: list[Profile]) -> bytes:
    """What build_serialized_network() does with our network: a plan."""
    for profile in profiles:
        shapes = [_all_shapes(network, profile, which) for which in range(3)]
        for layer in network.layers:
            layer.configure(lambda t, shapes=shapes: [s[t.name] for s in shapes])
    for layer in network.layers:
        layer.serialize()
    return pickle.dumps(
        {
            "profiles": profiles,
            "inputs": [(t.name, t.dtype.name, t.dims) for t in network.inputs.values()],
            "outputs": [t.name for t in network.outputs.values()],
            "layers": [
                {
                    "name": layer.name,
                    "creator": (
                        layer.creator.name,
                        layer.creator.plugin_version,
                        layer.creator.plugin_namespace,
                    ),
                    "values": layer.values,
                    "workspace": layer.workspace,
                    "inputs": [t.name for t in layer.inputs],
                    "outputs": [(t.name, t.dtype.name, t.dims) for t in layer.outputs],
                }
                for layer in network.layers
            ],
        }
    )


def _all_shapes(network: Network, profile: Profile, which: int) -> dict[str, Dims]:
    shapes = {
        name: profile[name][which] if name in profile else tensor.dims
        for name, tensor in network.inputs.items()
    }
    for name, dims in shapes.items():
        need(min(dims, default=0) >= 0, f"the profile says the size of {name}: {dims}")
    for layer in network.layers:
        made = network.play.output_shapes(layer.plugin, [shapes[t.name] for t in layer.inputs])
        shapes |= {t.name: dims for t, dims in zip(layer.outputs, made, strict=True)}
    return shapes


class PlanLayer:
    """A layer of a plan: knows its plugin, and makes one for each context."""

    def __init__(self, engine: Engine, stored: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        play = engine.play
        self.name, self.workspace = stored["name"], stored["workspace"]
        self.inputs = [tensors[name] for name in stored["inputs"]]
        self.outputs = [
            Tensor(name, play.dtype(kind), dims) for name, kind, dims in stored["outputs"]
        ]
        tensors |= {t.name: t for t in self.outputs}
        creator = play.creators.get(stored["creator"])
        need(creator is not None, f"no creator for {stored['creator']}")
        layer = Layer.__new__(Layer)
        layer.play, layer.creator, layer.name = play, creator, self.name
        layer.values = stored["values"]
        self.plugin = layer.restore()
        self.states = {}  # input -> output that must be at its address
        for at, tensor in enumerate(self.inputs):
            for place, out in enumerate(self.outputs):
                if out.name == tensor.name + ".out":
                    self.states[at] = place


class Engine:
    """ICudaEngine."""

    def __init__(self, play: Play, plan: bytes) -> None:
        self.play = play
        stored = pickle.loads(plan)
        self.profiles: list[Profile] = stored["profiles"]
        tensors = {n: Tensor(n, play.dtype(k), dims) for n, k, dims in stored["inputs"]}
        self.inputs = dict(tensors)
        self.layers = [PlanLayer(self, layer, tensors) for layer in stored["layers"]]
        self.tensors = tensors
        self.outputs = {name: tensors[name] for name in stored["outputs"]}
        self.num_optimization_profiles = len(self.profiles)
        self.device_memory_size_v2 = max(
            Memory(self, self.shapes(profile, 2)).size for profile in self.profiles
        )
        io = [*self.inputs, *self.outputs]
        self.num_io_tensors, self._io = len(io), io

    def shapes(self, profile: Profile, which: int) -> dict[str, Dims]:
        return self.infer(
            {n: profile[n][which] if n in profile else t.dims for n, t in self.inputs.items()}
        )

    def infer(self, shapes: dict[str, Dims]) -> dict[str, Dims]:
        """Shapes of all tensors, from those of the inputs."""
        for layer in self.layers:
            made = self.play.output_shapes(layer.plugin, [shapes[t.name] for t in layer.inputs])
            shapes |= {t.name: dims for t, dims in zip(layer.outputs, made, strict=True)}
        return shapes

    def get_tensor_name(self, index: int) -> str:
        return self._io[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self.play.trt.TensorIOMode
        return (
            mode.INPUT
            if name in self.inputs
            else mode.OUTPUT
            if name in self.outputs
            else mode.NONE
        )

    def get_tensor_shape(self, name: str) -> Any:
        return self.play.trt.Dims(list(self.tensors[name].dims))

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        bounds = self.profiles[profile].get(name, [self.tensors[name].dims] * 3)
        return [self.play.trt.Dims(list(dims)) for dims in bounds]

    def create_execution_context(self, strategy: Any) -> Context:
        need(
            strategy == self.play.trt.ExecutionContextAllocationStrategy.USER_MANAGED,
            "the caller owns the activation memory",
        )
        return Context(self)


class Memory:
    """Where the tensors between plugins lie in the activation memory, with guards around each."""

    def __init__(self, engine: Engine, shapes: dict[str, Dims]) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        at = GUARD
        for layer in engine.layers:
            for tensor in layer.outputs:
                if tensor.name not in engine.outputs:
                    size = _volume(shapes[tensor.name]) * tensor.dtype.itemsize
                    self.places[tensor.name] = (at, size)
                    at += -(-size // 256) * 256 + GUARD
        self.workspace = (at, max((layer.workspace for layer in engine.layers), default=0))
        self.size = at + -(-self.workspace[1] // 256) * 256 + GUARD


class Context:
    """IExecutionContext."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.play = engine, engine.play
        self.plugins = []
        for layer in engine.layers:
            plugin = layer.plugin.attach_to_context(None)
            need(plugin is not None and plugin is not layer.plugin, "each context has its plugin")
            plugin.set_tactic(0)
            self.plugins.append(plugin)
        self.profile = engine.profiles[0]
        self._set: dict[str, Dims] = {}
        self.addresses: dict[str, int] = {}
        self._memory, self._memory_size = 0, 0
        self._prepared: dict[str, Dims] = {}
        self._timed: list[Any] = []
        self.play.contexts += 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = self.engine.profiles[index]
        self._set.clear()
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self.profile.get(name, [self.engine.inputs[name].dims] * 3)
        dims = tuple(shape)
        if len(dims) != len(low) or not all(
            a <= d <= b for a, d, b in zip(low, dims, high, strict=True)
        ):
            return False
        self._set[name] = dims
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.inputs or name in self.engine.outputs

    def set_device_memory(self, memory: int, size: int) -> None:
        need(memory % 256 == 0, "activation memory is aligned to 256 bytes")
        need(size >= self.engine.device_memory_size_v2, "activation memory is large enough")
        self._memory, self._memory_size = memory, size

    def execute_async_v3(self, stream: int) -> bool:
        """Run every plugin in order; False when one of them raised."""
        try:
            self._execute(stream)
        except ContractError:
            raise
        except Exception:  # noqa: BLE001  whatever a plugin raises, the bindings print and go on
            traceback.print_exc()
            return False
        return True

    def _execute(self, stream: int) -> None:
        shapes = self._prepared
        if not shapes or any(shapes[name] != dims for name, dims in self._set.items()):
            shapes = self._prepare()
        capturing = ctypes.c_int()
        self.play.cuda.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(capturing))
        checking = self.play.checking and not capturing.value
        for layer, plugin, call in zip(self.engine.layers, self.plugins, self._calls, strict=True):
            ins, outs, in_desc, out_desc = call
            if checking and layer.states and plugin not in self._timed:
                self._timed.append(plugin)
                self._time(layer, plugin, call, shapes, stream)
            with self._watched(layer, shapes, ins, outs) if checking else _unwatched():
                plugin.enqueue(in_desc, out_desc, list(ins), list(outs), self._workspace, stream)
            self.play.enqueued += 1

    def _time(
        self, layer: PlanLayer, plugin: Any, call: Any, shapes: dict[str, Dims], stream: int
    ) -> None:
        """What a builder does to time a plugin: run it with outputs of its own. The states that
        go in must stay as they are, and those that come out be what the real step makes of them.
        """
        play = self.play
        ins, outs, in_desc, out_desc = call
        sizes = [_volume(shapes[t.name]) * t.dtype.itemsize for t in layer.outputs]
        elsewhere = [play.alloc(size) for size in sizes]
        with play.memory():
            before = {at: ctypes.string_at(ins[at], sizes[o]) for at, o in layer.states.items()}
        plugin.enqueue(in_desc, out_desc, list(ins), elsewhere, self._workspace, stream)
        with play.memory():
            for at, place in layer.states.items():
                same = ctypes.string_at(ins[at], sizes[place]) == before[at]
                need(same, f"timing leaves {layer.inputs[at].name} alone")
        plugin.enqueue(in_desc, out_desc, list(ins), list(outs), self._workspace, stream)
        with play.memory():
            for at, place in layer.states.items():
                made = ctypes.string_at(outs[place], sizes[place])
                same = made == ctypes.string_at(elsewhere[place], sizes[place])
                need(same, f"{layer.inputs[at].name} becomes the same wherever it lies")
                ctypes.memmove(ins[at], before[at], sizes[place])
        for address in elsewhere:
            play.cuda.cuMemFree_v2(ctypes.c_uint64(address))

    def _prepare(self) -> dict[str, Dims]:
        engine, play = self.engine, self.play
        given = {n: self._set.get(n, t.dims) for n, t in engine.inputs.items()}
        for name, dims in given.items():
            need(min(dims, default=0) >= 0, f"{name} has a shape")
        shapes = engine.infer(dict(given))
        need(self._memory, "a context has activation memory")
        self._map = memory = Memory(engine, engine.shapes(self.profile, 2))
        self._workspace = self._memory + memory.workspace[0]
        where = {n: self._memory + at for n, (at, _) in memory.places.items()} | self.addresses
        missing = [n for n in (*engine.inputs, *engine.outputs) if not where.get(n)]
        need(not missing, f"tensors without an address: {missing}")
        self._calls = []
        for layer, plugin in zip(engine.layers, self.plugins, strict=True):
            for at, place in layer.states.items():
                need(
                    where[layer.inputs[at].name] == where[layer.outputs[place].name],
                    f"{layer.inputs[at].name} is updated in place",
                )
            ins = [play.description(t, shapes[t.name]) for t in layer.inputs]
            outs = [play.description(t, shapes[t.name]) for t in layer.outputs]
            plugin.on_shape_change(ins, outs)
            addresses = (
                [where[t.name] for t in layer.inputs],
                [where[t.name] for t in layer.outputs],
            )
            self._calls.append((*addresses, ins, outs))
        self._prepared = shapes
        return shapes

    @contextmanager
    def _watched(
        self, layer: PlanLayer, shapes: dict[str, Dims], ins: list[int], outs: list[int]
    ) -> Iterator[None]:
        """A plugin's work may change its outputs and its workspace, and nothing else."""
        play = self.play
        outside = self._outside(layer, shapes)
        inputs = [
            (tensor.name, address, _volume(shapes[tensor.name]) * tensor.dtype.itemsize)
            for at, (tensor, address) in enumerate(zip(layer.inputs, ins, strict=True))
            if at not in layer.states
        ]
        with play.memory():
            for address, size in outside:
                ctypes.memset(address, PATTERN, size)
            before = [ctypes.string_at(address, size) for _, address, size in inputs]
        counts = play.counts()
        yield
        made = play.counts() - counts
        need(not made[0], f"{layer.name} allocates in enqueue")
        need(not made[1], f"{layer.name} waits in enqueue")
        need(not made[2], f"{layer.name} copies a state that is updated in place")
        need(made[3] == 1, f"{layer.name} starts one kernel on the stream, not {made[3]}")
        with play.memory():
            for address, size in outside:
                intact = ctypes.string_at(address, size) == bytes([PATTERN]) * size
                need(intact, f"{layer.name} wrote outside of its outputs and workspace")
            for (name, address, size), was in zip(inputs, before, strict=True):
                same = ctypes.string_at(address, size) == was
                need(same, f"{layer.name} changed its input {name}")

    def _outside(self, layer: PlanLayer, shapes: dict[str, Dims]) -> list[tuple[int, int]]:
        """Memory that a layer has no business with: behind and before its outputs, and behind its
        own workspace.
        """
        memory, found = self._map, []
        for tensor in layer.outputs:
            if tensor.name in memory.places:
                at, most = memory.places[tensor.name]
                size = _volume(shapes[tensor.name]) * tensor.dtype.itemsize
                found += [(at - GUARD, GUARD), (at + size, min(most - size, SPARE) + GUARD)]
        at, most = memory.workspace
        found.append((at + layer.workspace, min(most - layer.workspace, SPARE) + GUARD))
        return [(self._memory + start, size) for start, size in found]


@contextmanager
def _unwatched() -> Iterator[None]:
    yield


class Registry:
    """IPluginRegistry."""

    def __init__(self, play: Play) -> None:
        self._play = play

    def register_creator(self, creator: Any, namespace: str) -> bool:
        need(creator.plugin_namespace == namespace, "a creator is registered under its namespace")
        key = (creator.name, creator.plugin_version, namespace)
        known = key in self._play.creators
        self._play.creators.setdefault(key, creator)
        return not known


class Runtime:
    """trt.Runtime."""

    play: Play

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        try:
            return Engine(self.play, plan)
        except pickle.UnpicklingError as error:
            self._logger.log(self.play.trt.ILogger.Severity.ERROR, f"a bad plan: {error}")
            return None


def play(trt: ModuleType) -> Play:
    """Put the driver in TensorRT's place."""
    made = Play(trt)
    registry = Registry(made)
    trt.get_plugin_registry = lambda: registry  # type: ignore[attr-defined]
    trt.Runtime = type("Runtime", (Runtime,), {"play": made})  # type: ignore[attr-defined]
    return made
