# SPDX-License-Identifier: Apache-2.0
"""Writes ONNX expressions as Python: `body.mul(x, 2.0)` adds a node and returns its output's name.

Constants become Constant nodes, because a model-local function has no initializers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

Operand = Any  # the name of a value, or a constant: a number, a list of integers, an array


class Body:
    """The nodes of one function or subgraph. Any operator is a method: `body.ReduceSum(x, [0])`."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix
        self._constants: dict[tuple[Any, ...], str] = {}
        self._count = 0

    def __getattr__(self, op_type: str) -> Callable[..., str]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return lambda *operands, **attributes: self.node(op_type, operands, 1, attributes)[0]

    def node(
        self,
        op_type: str,
        operands: Sequence[Operand],
        outputs: int,
        attributes: dict[str, Any],
        names: Sequence[str] = (),
    ) -> list[str]:
        """Add a node; the names of its outputs."""
        from onnx import helper

        made = list(names) or [self._fresh() for _ in range(outputs)]
        inputs = [self._name(operand) for operand in operands]
        self.nodes.append(helper.make_node(op_type, inputs, made, **attributes))
        return made

    def give(self, value: str, name: str) -> None:
        """Make a value an output under its name."""
        self.node("Identity", [value], 1, {}, [name])

    def dim(self, value: str, axis: int) -> str:
        """One size of a value, int64 [1]."""
        return self.Shape(value, start=axis, end=axis + 1)

    def cast(self, value: Operand, dtype: str) -> str:
        """A value as "float32", "float16", "int32", "int64" or "bool"."""
        from onnx import helper

        return self.Cast(value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def _name(self, operand: Operand) -> str:
        if isinstance(operand, str):
            return operand
        array = np.asarray(operand)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._constant(array)
        return self._constants[key]

    def _constant(self, array: Any) -> str:
        from onnx import numpy_helper

        return self.node("Constant", [], 1, {"value": numpy_helper.from_array(array)})[0]

    def _fresh(self) -> str:
        self._count += 1
        return f"{self._prefix}t{self._count}"
