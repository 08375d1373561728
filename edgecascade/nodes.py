# SPDX-License-Identifier: Apache-2.0
"""The ONNX node, and with it the TensorRT plugin, of every op: derived from the op table.

The exporter, the plugins, the decompositions and docs/tensorrt.md read the same `NodeSpec`. A node
`Ec<Name>` of domain "edgecascade" has

inputs      what it reads of the step, then the op's arrays in struct order. Packed weights are
            INT32 words. An absent optional array is left out; the attribute has_<name> says so.
outputs     the op's output, then one for each state, at run time at the address of its input.
attributes  integers and floats only: those of each norm and weight, then the op's own.

A decode step and a prefill step are the same node: n_tok == n_seq makes it a decode.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

from edgecascade.errors import InvalidRequest
from edgecascade.ops import OPS, Field, Kind, Op
from edgecascade.tensors import PAGE_TOKENS, Codec

DOMAIN = "edgecascade"  # of the nodes, and the namespace of the plugins
VERSION = "1"
STRIDE_UNIT = 256  # bytes; attributes are int32, and an embedding table may be larger

Dim = int | str  # a string is a size that each step, or each device, chooses
Attributes = Mapping[str, Any]

# Fields of ec_step that ops read, with their shapes; n_tok, n_seq and n_out are the step's counts.
STEP_PORTS: dict[str, tuple[Dim, ...]] = {
    "start": ("n_seq + 1",),
    "slot": ("n_seq",),
    "past": ("n_seq",),
    "page_table": ("slots", "max_pages"),
    "out_row": ("n_out",),
}
STEP_OF = {
    "mamba": ("start", "slot", "past"),
    "attention": ("start", "slot", "past", "page_table"),
    "head": ("out_row",),
}
PAGED = {"kv"}  # states that lie in pages; the others have one part per slot

# The letters of an op's shapes (edgecascade/ops.py) as sums and products of attributes.
LETTERS: dict[str, dict[str, str]] = {
    "embed": {"V": "table_n", "D": "table_k"},
    "linear": {"N": "w_n", "K": "w_k"},
    "mamba": {
        "H": "heads",
        "P": "head_dim",
        "G": "groups",
        "N": "state",
        "K": "kernel",
        "C": "heads * head_dim + 2 * groups * state",
    },
    "attention": {"H": "heads", "G": "kv_heads", "P": "head_dim"},
    "moe": {"E": "up_experts", "F": "up_n", "D": "up_k"},
    "head": {"V": "w_n", "D": "w_k"},
}
COUNTS = {"T": "n_tok", "O": "n_out"}


class Attribute(NamedTuple):
    """A number that a node carries and a plugin serializes."""

    name: str
    is_float: bool = False


class Port(NamedTuple):
    """An input or output; `kind` is None for what comes from the step."""

    name: str
    kind: Kind | None
    shape: str = ""  # in the letters of edgecascade/ops.py
    optional: bool = False


PORT_KINDS = (Kind.INPUT, Kind.TOKENS, Kind.WEIGHT, Kind.VECTOR, Kind.NORM, Kind.STATE)
WEIGHT_ATTRIBUTES = ("type", "n", "k", "experts", "stride")  # stride in units of STRIDE_UNIT


@dataclass(frozen=True)
class NodeSpec:
    """The node of one op."""

    op: Op

    @property
    def type(self) -> str:
        """The node's op_type, and the plugin's name. No built-in importer starts with Ec."""
        return "Ec" + self.op.name.capitalize()

    @cached_property
    def inputs(self) -> tuple[Port, ...]:
        """All inputs in order, optional ones too."""
        step = [Port(name, None) for name in STEP_OF.get(self.op.name, ())]
        return (*step, *(_port(field) for field in self.op.fields_of(*PORT_KINDS)))

    @cached_property
    def outputs(self) -> tuple[Port, ...]:
        """The output, then the states."""
        return tuple(_port(f) for f in (self.op.output, *self.op.fields_of(Kind.STATE)))

    @cached_property
    def attributes(self) -> tuple[Attribute, ...]:
        """Every attribute; all of them are always written."""
        made: list[Attribute] = []
        for field in self.op.fields:
            name = field.name
            if field.optional and field.kind in PORT_KINDS:
                made.append(Attribute(f"has_{name}"))
            if field.kind is Kind.NORM:
                made += [Attribute(f"{name}_eps", is_float=True), Attribute(f"{name}_groups")]
            elif field.kind is Kind.WEIGHT:
                made += [Attribute(f"{name}_{part}") for part in WEIGHT_ATTRIBUTES]
            elif field.kind in (Kind.INT, Kind.FLOAT):
                made.append(Attribute(name, is_float=field.kind is Kind.FLOAT))
        return tuple(made)

    def present(self, attributes: Attributes) -> tuple[Port, ...]:
        """The inputs that a node with these attributes has."""
        return tuple(p for p in self.inputs if not p.optional or attributes[f"has_{p.name}"])

    def dtype(self, port: Port, attributes: Attributes) -> str:
        """ "int32", "float32" or "float16"."""
        if port.kind is Kind.STATE and port.name in PAGED:
            return weight_dtype(attributes["kv_type"])
        if port.kind is Kind.WEIGHT:
            return weight_dtype(attributes[f"{port.name}_type"])
        return "int32" if port.kind in (None, Kind.TOKENS) else "float32"

    def shape(self, port: Port, attributes: Attributes) -> tuple[Dim, ...]:
        """Sizes known when the engine is built, and names for the others."""
        if port.kind is None:
            return STEP_PORTS[port.name]
        if port.kind is Kind.WEIGHT:
            stride = attributes[f"{port.name}_stride"] * STRIDE_UNIT
            itemsize = 2 if self.dtype(port, attributes) == "float16" else 4
            return attributes[f"{port.name}_experts"], stride // itemsize
        dims = tuple(self._size(word, attributes) for word in port.shape.split())
        if port.kind is not Kind.STATE:
            return dims
        if port.name in PAGED:
            return ("pages", *dims[:-1], PAGE_TOKENS, dims[-1])
        return ("slots", *dims)

    def sizes(self, attributes: Attributes, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """The named sizes that actual input shapes stand for.

        Raises:
            InvalidRequest: for a shape that the node's attributes do not allow, or for two that
            contradict each other.
        """
        ports = self.present(attributes)
        if len(shapes) != len(ports):
            raise InvalidRequest(f"{self.type} has {len(shapes)} inputs, expected {len(ports)}")
        sizes: dict[str, int] = {}
        for port, shape in zip(ports, shapes, strict=True):
            expected = self.shape(port, attributes)
            if not _bind(expected, shape, sizes):
                raise InvalidRequest(
                    f"{self.type}: input {port.name} has shape {list(shape)}, expected "
                    f"{list(expected)}" + (f" with {sizes}" if sizes else "")
                )
        return sizes

    def code(self, n_tok: int, n_seq: int) -> int:
        """The ec_op of a step."""
        return self.op.codes[0 if n_tok == n_seq else 1]

    def _size(self, word: str, attributes: Attributes) -> Dim:
        if word in COUNTS:
            return COUNTS[word]
        letters = LETTERS[self.op.name]
        return evaluate(word, {x: evaluate(letters[x], attributes) for x in letters})


def state_name(layer: int, name: str) -> str:
    """The graph input that is a layer's state; every other input is named as in the step or as the
    bundle's tensor.
    """
    return f"layers.{layer}.state.{name}"


def state_output(layer: int, name: str) -> str:
    """The graph output that shares its address."""
    return state_name(layer, name) + ".out"


def _port(field: Field) -> Port:
    return Port(field.name, field.kind, field.shape, field.optional)


def weight_dtype(ec_type: int) -> str:
    """How values of an ec_type travel: blocks as words of 32 bits."""
    return {Codec.F32.ec_type: "float32", Codec.F16.ec_type: "float16"}.get(ec_type, "int32")


def evaluate(text: str, names: Attributes) -> int:
    """The value of a sum of products such as "2HP+2GN+H" or "heads * head_dim"."""
    return _value(_parse(text), names)


@cache
def _parse(text: str) -> ast.expr:
    explicit = re.sub(r"(?<=[\dA-Z)])(?=[A-Z(])", "*", text)
    return ast.parse(explicit, mode="eval").body


def _value(node: ast.expr, names: Attributes) -> int:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _value(node.left, names), _value(node.right, names)
        return left + right if isinstance(node.op, ast.Add) else left * right
    if isinstance(node, ast.Name):
        return int(names[node.id])
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    raise ValueError(f"a shape is a sum of products, not {ast.unparse(node)!r}")


def _bind(expected: Sequence[Dim], shape: Sequence[int], sizes: dict[str, int]) -> bool:
    """Whether a shape is the expected one; learns the named sizes."""
    if len(expected) != len(shape):
        return False
    for want, found in zip(expected, shape, strict=True):
        if isinstance(want, int):
            if found != want:
                return False
            continue
        name, _, more = want.partition(" + ")
        value = found - int(more or 0)
        if value < 0 or sizes.setdefault(name, value) != value:
            return False
    return True


# sample runs outside the engine: its parameters are host structs that point to each other.
NODES: dict[str, NodeSpec] = {
    name: NodeSpec(op)
    for name, op in OPS.items()
    if not any(f.kind is Kind.TABLE and not f.optional for f in op.fields)
}
BY_TYPE: dict[str, NodeSpec] = {spec.type: spec for spec in NODES.values()}
