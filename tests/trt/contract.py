# SPDX-License-Identifier: Apache-2.0
"""TensorRT's rules for a plugin that is being built, checked one by one.

Classes and descriptions are those of NVIDIA's bindings. Only the symbolic sizes are ours, because
the bindings cannot make them outside of a network.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

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


def volume(dims: Sequence[int]) -> int:
    return math.prod(dims)


class Play:
    """One TensorRT module whose missing library is played here."""

    def __init__(self, trt: ModuleType) -> None:
        self.trt = trt
        self.creators: dict[tuple[str, str, str], Any] = {}
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.checking = True  # of the memory around every plugin's work: slow
        self.one_launch_each = True  # False: ops of the real kernels are several
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
        """Of fakecuda.c: allocations, waits, copies, calls, launches, and bytes held, up, down."""
        made = np.zeros(8, np.int64)
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
