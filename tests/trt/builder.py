# SPDX-License-Identifier: Apache-2.0
"""TensorRT's builder and ONNX parser, played: from a graph to a plan for tests/trt/runtime.py."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from contract import ContractError, Dims, Layer, Play, Tensor, need

Profile = dict[str, tuple[Dims, Dims, Dims]]


@dataclass
class Network:
    """INetworkDefinition, filled by the parser."""

    play: Play
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

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


class Parser:
    """OnnxParser."""

    def __init__(self, network: Network, logger: Any) -> None:
        self._network = network
        self._errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        said = self._errors[index]
        return type("Error", (), {"node": lambda self: 0, "desc": lambda self: said})()

    def parse(self, model: bytes) -> bool:
        try:
            self._network.parse(onnx.load_from_string(model))
        except ContractError:
            raise
        except Exception as error:  # noqa: BLE001  as the bindings do with what a plugin raises
            self._errors.append(f"{type(error).__name__}: {error}")
            return False
        return True


class Ranges:
    """IOptimizationProfile."""

    def __init__(self) -> None:
        self.shapes: Profile = {}

    def set_shape(self, name: str, low: Dims, likely: Dims, high: Dims) -> None:
        need(len(low) == len(likely) == len(high), f"{name} has one rank")
        self.shapes[name] = (low, likely, high)


class TimingCache:
    """ITimingCache: nothing is timed."""

    def __init__(self, data: bytes = b"nothing was timed") -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data


class Config:
    """IBuilderConfig, as far as this project sets it."""

    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.max_aux_streams = -1
        self.profile_stream = 0
        self.progress_monitor: Any = None
        self._cache = TimingCache()

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.workspace_bytes = size

    def add_optimization_profile(self, ranges: Ranges) -> int:
        self.profiles.append(ranges.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(data or b"nothing was timed")

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        return self._cache


class Builder:
    """trt.Builder."""

    play: Play

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> Network:
        typed = self.play.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        need(flags == 1 << int(typed), "networks are strongly typed, and 11 knows no other flag")
        return Network(self.play)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Ranges:
        return Ranges()

    def build_serialized_network(self, network: Network, config: Config) -> memoryview | None:
        need(config.max_aux_streams == 0, "plugins work on one stream, or none can be captured")
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("Building", None, len(network.layers))
        plan = build(network, config.profiles)
        largest = max((layer.workspace for layer in network.layers), default=0)
        if monitor is not None:
            monitor.step_complete("Building", 0)
            monitor.phase_finish("Building")
        if largest > config.workspace_bytes:
            self._logger.log(
                self.play.trt.ILogger.Severity.ERROR, f"a plugin needs {largest} bytes to work in"
            )
            return None
        return memoryview(plan)
