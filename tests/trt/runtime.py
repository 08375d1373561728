# SPDX-License-Identifier: Apache-2.0
"""TensorRT's runtime, played: engines and contexts, and a close look at every enqueue."""

from __future__ import annotations

import ctypes
import pickle
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from builder import Profile
from contract import ContractError, Dims, Layer, Play, Tensor, need, volume

GUARD = 256  # bytes before and behind every tensor between plugins
SPARE = 4096  # bytes looked at of what a profile's largest shapes would use
PATTERN = 0x5A


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
                    size = volume(shapes[tensor.name]) * tensor.dtype.itemsize
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
        sizes = [volume(shapes[t.name]) * t.dtype.itemsize for t in layer.outputs]
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
            (tensor.name, address, volume(shapes[tensor.name]) * tensor.dtype.itemsize)
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
        right = made[3] == 1 if play.one_launch_each else made[3] >= 1
        need(right, f"{layer.name} starts its kernels on the stream, not {made[3]}")
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
                size = volume(shapes[tensor.name]) * tensor.dtype.itemsize
                found += [(at - GUARD, GUARD), (at + size, min(most - size, SPARE) + GUARD)]
        at, most = memory.workspace
        found.append((at + layer.workspace, min(most - layer.workspace, SPARE) + GUARD))
        return [(self._memory + start, size) for start, size in found]


@contextmanager
def _unwatched() -> Iterator[None]:
    yield


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
