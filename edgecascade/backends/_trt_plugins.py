# SPDX-License-Identifier: Apache-2.0
"""The plugins of a TensorRT engine: one class for every op, made from its node.

`NodeCall` knows one node of a graph and calls the kernel library for it; it knows nothing of
TensorRT. The plugin around it answers TensorRT's questions from the same node. enqueue() allocates
nothing and waits for nothing, so that TensorRT's execution can be captured in a CUDA graph; all
that depends on shapes is done in on_shape_change().
"""

from __future__ import annotations

import ctypes as c
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from edgecascade.backends._lib import ARGS, Call, Library, Step
from edgecascade.backends._trt_versions import keep_alive
from edgecascade.errors import BackendError, InvalidRequest
from edgecascade.nodes import (
    BY_TYPE,
    DOMAIN,
    STRIDE_UNIT,
    VERSION,
    Attributes,
    NodeSpec,
    Port,
)
from edgecascade.ops import Kind
from edgecascade.tensors import PAGE_TOKENS

Copy = Callable[[int, int, int, int], None]  # to, from, bytes, stream
Shapes = Sequence[Sequence[int]]
ITEM_BYTES = {"int32": 4, "float32": 4, "float16": 2}
ALIGNMENT = 256
TILE = 64  # rows
PRESENT = ALIGNMENT  # stands for an address that is not known yet: NULL would mean absent


@dataclass
class Kit:
    """What the plugins of a process share. `failure` is what the last failed enqueue said: of an
    exception in a plugin, TensorRT only passes on that there was one.
    """

    library: Library
    copy: Copy
    failure: Exception | None = None


class NodeCall:
    """One node as a call of the kernel library, prepared once and bound to addresses later."""

    def __init__(self, spec: NodeSpec, attributes: Attributes, kit: Kit) -> None:
        self._spec, self._attributes, self._kit = spec, attributes, kit
        self._step = Step()
        self._args = self._constants()
        self._step_reference, self._args_address = c.byref(self._step), c.addressof(self._args)
        self._ports = ports = spec.present(attributes)
        self._targets = [self._target(port) for port in ports]
        for target, name in self._targets:
            setattr(target, name, PRESENT)
        self._states = [
            (ports.index(port), place, port)
            for place, port in enumerate(spec.outputs)
            if port.kind is Kind.STATE
        ]
        self._copies: list[tuple[int, int, int]] = []  # input, output, bytes of each state
        self._record_bytes = 0  # of each record, at the start of the workspace
        self._bound: tuple[Any, ...] = ()
        self._run: Callable[[int, Any, int], int] | None = None

    def _constants(self) -> c.Structure:
        """The op's struct with everything that the attributes say."""
        args, attributes = ARGS[self._spec.op.name](), self._attributes
        for field in self._spec.op.fields:
            name = field.name
            if field.kind in (Kind.INT, Kind.FLOAT):
                setattr(args, name, attributes[name])
            elif field.kind is Kind.NORM:
                norm = getattr(args, name)
                norm.eps, norm.groups = attributes[f"{name}_eps"], attributes[f"{name}_groups"]
            elif field.kind is Kind.WEIGHT and attributes.get(f"has_{name}", 1):
                weight = getattr(args, name)
                for part in ("type", "n", "k", "experts"):
                    setattr(weight, part, attributes[f"{name}_{part}"])
                weight.expert_stride = attributes[f"{name}_stride"] * STRIDE_UNIT
        return args

    def _target(self, port: Port) -> tuple[Any, str]:
        """The struct and field that an input's address goes to."""
        if port.kind is None:
            return self._step, port.name
        if port.kind is Kind.WEIGHT:
            return getattr(self._args, port.name), "data"
        if port.kind is Kind.NORM:
            return getattr(self._args, port.name), "gamma"
        return self._args, port.name

    def workspace_bytes(self, shapes: Shapes) -> int:
        """Scratch memory that suffices for inputs of these shapes and of all smaller ones.

        Kernels change their method with the number of rows, and a method for few rows may need
        more than one for many.
        """
        largest = self._sizes(shapes)
        counted = "n_out" if "out_row" in (port.name for port in self._ports) else "n_tok"
        needed = 0
        for rows in _row_counts(largest[counted]):
            sizes = {**largest, counted: rows}
            n_tok, together = sizes["n_tok"], min(sizes["n_tok"], sizes["n_seq"])
            needed = max(
                needed,
                self._scratch(sizes, n_tok, sizes["n_seq"]),
                self._scratch(sizes, together, together),  # a decode step
            )
        records = len(self._spec.op.fields_of(Kind.RECORD)) * self._record(largest["n_tok"])
        return records + needed

    def reshape(self, shapes: Shapes) -> None:
        """Prepare for inputs of these shapes."""
        spec, sizes = self._spec, self._sizes(shapes)
        n_tok, n_seq = sizes["n_tok"], sizes["n_seq"]
        self._step.workspace_bytes = self._scratch(sizes, n_tok, n_seq)
        self._set_counts(self._step, sizes, n_tok, n_seq)
        self._record_bytes = self._record(n_tok)
        self._copies = [
            (i, o, math.prod(shapes[i]) * ITEM_BYTES[spec.dtype(port, self._attributes)])
            for i, o, port in self._states
        ]
        self._run = self._kit.library.op(spec.code(n_tok, n_seq))
        self._bound = ()

    def __call__(
        self, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Start the op on a stream. Addresses that are those of the last call cost nothing."""
        if self._run is None:
            raise BackendError(f"{self._spec.type} was started before it learned its shapes")
        if (inputs, outputs, workspace) != self._bound:
            self._bind(inputs, outputs, workspace)
        for i, o, size in self._copies:
            if inputs[i] != outputs[o]:  # when TensorRT times the plugin, with memory of its own
                self._kit.copy(outputs[o], inputs[i], size, stream)
        status = self._run(stream, self._step_reference, self._args_address)
        if status:
            self._kit.library.check(status, self._spec.type)

    def _bind(self, inputs: Sequence[int], outputs: Sequence[int], workspace: int) -> None:
        for (target, name), address in zip(self._targets, inputs, strict=True):
            setattr(target, name, address)
        for port, address in zip(self._spec.outputs, outputs, strict=True):
            setattr(self._args, port.name, address)
        free = workspace
        for field in self._spec.op.fields_of(Kind.RECORD):
            setattr(self._args, field.name, free)
            free += self._record_bytes
        self._step.workspace = free
        self._bound = (list(inputs), list(outputs), workspace)

    def _sizes(self, shapes: Shapes) -> dict[str, int]:
        sizes = self._spec.sizes(self._attributes, shapes)
        # An op that reads nothing of the step does not care which rows belong together.
        return {"n_seq": sizes["n_tok"], "n_out": 0, "max_pages": 0, **sizes}

    def _scratch(self, sizes: dict[str, int], n_tok: int, n_seq: int) -> int:
        step = Step()
        self._set_counts(step, sizes, n_tok, n_seq)
        call = Call(self._args_address, self._spec.code(n_tok, n_seq), 0)
        return self._kit.library.workspace_size(step, (Call * 1)(call))

    @staticmethod
    def _set_counts(step: Step, sizes: dict[str, int], n_tok: int, n_seq: int) -> None:
        step.n_tok, step.n_seq, step.n_out = n_tok, n_seq, sizes["n_out"]
        step.max_pages = sizes["max_pages"]
        step.max_context = sizes["max_pages"] * PAGE_TOKENS  # a captured graph serves any length

    def _record(self, n_tok: int) -> int:
        """Bytes of [n_tok, top_k]: what the op writes for tools goes to its workspace."""
        size = n_tok * int(self._attributes.get("top_k", 0)) * 4
        return -(-size // ALIGNMENT) * ALIGNMENT


def _row_counts(most: int) -> list[int]:
    """Numbers of rows that stand for all up to the largest: kernels take at most 64 at a time."""
    return [*range(1, min(most, TILE) + 1), *range(2 * TILE, most, TILE), most]


def read_fields(spec: NodeSpec, fields: Any) -> dict[str, Any]:
    """A node's attributes from the fields that TensorRT hands over.

    Raises:
        InvalidRequest: when one is missing, or is not the single number that it must be.
    """
    given = {field.name: np.asarray(field.data) for field in fields}
    missing = [a.name for a in spec.attributes if a.name not in given]
    if missing:
        raise InvalidRequest(f"{spec.type} lacks the attributes {missing}; export the graph again")
    attributes: dict[str, Any] = {}
    for attribute in spec.attributes:
        value = given[attribute.name]
        kind = "float32" if attribute.is_float else "int32"
        if value.dtype != kind or value.size != 1:
            raise InvalidRequest(
                f"{spec.type}: attribute {attribute.name} is {value.dtype} {value.tolist()}, "
                f"expected one {kind}"
            )
        attributes[attribute.name] = value.reshape(-1)[0].item()
    return attributes


class Answers:
    """What a plugin answers TensorRT. `plugin_class` joins it with TensorRT's own classes.

    A copy shares nothing with its original, because each execution context has one of its own.
    """

    trt: ModuleType
    bases: tuple[Any, ...]
    plugin_name: str
    plugin_version: str
    plugin_namespace: str
    num_outputs: int

    def __init__(self, spec: NodeSpec, attributes: Attributes, kit: Kit) -> None:
        for base in self.bases:
            base.__init__(self)
        self.plugin_name, self.plugin_version = spec.type, VERSION
        self.plugin_namespace, self.num_outputs = DOMAIN, len(spec.outputs)
        self.spec, self.attributes, self.kit = spec, attributes, kit
        self.inputs = spec.present(attributes)
        self.call = NodeCall(spec, attributes, kit)
        ports = (*self.inputs, *spec.outputs)
        self.dtypes = [getattr(self.trt, spec.dtype(port, attributes)) for port in ports]
        keep_alive(self)

    def get_capability_interface(self, kind: Any) -> Any:
        """Core, build and run time: one object."""
        return self

    def clone(self) -> Any:
        """Another plugin of the same node."""
        return type(self)(self.spec, self.attributes, self.kit)

    def get_output_data_types(self, input_types: Any) -> list[Any]:
        """The node says them."""
        return self.dtypes[-self.num_outputs :]

    def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
        """Named sizes are those of the inputs, the others are known."""
        known: dict[str, Any] = {}
        for port, dims in zip(self.inputs, inputs, strict=True):
            for at, dim in enumerate(self.spec.shape(port, self.attributes)):
                if isinstance(dim, str):
                    known.setdefault(dim, dims[at])
        return [
            self.trt.DimsExprs(
                [
                    known[dim] if isinstance(dim, str) else builder.constant(dim)
                    for dim in self.spec.shape(port, self.attributes)
                ]
            )
            for port in self.spec.outputs
        ]

    def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
        """Plain row-major arrays of the node's dtypes, and nothing else."""
        found = in_out[pos].desc
        linear = self.trt.TensorFormat.LINEAR
        return bool(found.format == linear and found.type == self.dtypes[pos])

    def configure_plugin(self, inputs: Any, outputs: Any) -> None:
        """Refuse a profile whose shapes the node cannot have."""
        self._guard(self.spec.sizes, self.attributes, [tuple(d.max) for d in inputs])

    def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
        """For the largest shapes of the profile."""
        return int(self._guard(self.call.workspace_bytes, [tuple(d.max) for d in inputs]))

    def get_valid_tactics(self) -> list[int]:
        """None to choose from: with one format too, TensorRT need not time the plugin."""
        return []

    def get_fields_to_serialize(self) -> Any:
        """All attributes. TensorRT 10.3 reads them after Python would have freed them."""
        self.kept = make_fields(self.trt, self.spec, self.attributes)
        return self.kept[0]

    def attach_to_context(self, context: Any) -> Any:
        """The plugin of a context, which TensorRT may go on to configure."""
        return self.clone()

    def set_tactic(self, tactic: int) -> None:
        """There is one."""

    def on_shape_change(self, inputs: Any, outputs: Any) -> None:
        """Everything that depends on shapes."""
        self._guard(self.call.reshape, [tuple(d.dims) for d in inputs])

    def enqueue(
        self,
        input_desc: Any,
        output_desc: Any,
        inputs: list[int],
        outputs: list[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Start the op; nothing is allocated, waited for or read back."""
        self._guard(self.call, inputs, outputs, workspace, stream)

    def _guard(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            self.kit.failure = error
            raise


def plugin_class(trt: ModuleType) -> Any:
    """The plugin, of the classes of one TensorRT module."""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    made: Any = type(trt.IPluginV3)("Plugin", (Answers, *bases), {"trt": trt, "bases": bases})
    return made


def make_fields(trt: ModuleType, spec: NodeSpec, attributes: Attributes) -> tuple[Any, list[Any]]:
    """The attributes as TensorRT's fields, and the arrays that they point into."""
    arrays, fields = [], []
    for name, is_float in spec.attributes:
        array = np.array([attributes[name]], np.float32 if is_float else np.int32)
        kind = trt.PluginFieldType.FLOAT32 if is_float else trt.PluginFieldType.INT32
        arrays.append(array)
        fields.append(trt.PluginField(name, array, kind))
    return trt.PluginFieldCollection(fields), arrays


def make_creators(trt: ModuleType, kit: Kit) -> dict[str, Any]:
    """A creator for each node type."""
    plugin = plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined, misc]
        """Makes the plugins of one op, from an ONNX node or from a plan."""

        def __init__(self, spec: NodeSpec) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = spec.type, VERSION, DOMAIN
            self.spec = spec
            nothing = {attribute.name: 0 for attribute in spec.attributes}
            self.field_names, self._arrays = make_fields(trt, spec, nothing)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            try:
                return plugin(self.spec, read_fields(self.spec, fields), kit)
            except Exception as error:
                kit.failure = error
                raise

    return {node_type: Creator(spec) for node_type, spec in BY_TYPE.items()}


_REGISTERED: dict[int, Kit] = {}  # by the module's id; creators stay registered for ever
_CREATORS: list[Any] = []  # TensorRT keeps no reference


def register(trt: ModuleType, library: Library, copy: Copy) -> Kit:
    """Register the creators once a process; from then on plans with our plugins load."""
    kit = _REGISTERED.get(id(trt))
    if kit is not None:
        kit.library, kit.copy = library, copy
        return kit
    kit = _REGISTERED[id(trt)] = Kit(library, copy)
    registry = trt.get_plugin_registry()
    for creator in make_creators(trt, kit).values():
        _CREATORS.append(creator)
        if not registry.register_creator(creator, DOMAIN):
            raise BackendError(f"TensorRT does not take the plugin {creator.name}")
    return kit
