# SPDX-License-Identifier: Apache-2.0
"""Runs a compile job with every call that NVIDIA's builder makes to our plugins written down.

    python tests/trt/record_rtx.py JOB.json CALLS.json FAULT

A program of its own, started like the product's child process: build_engine.compile.environment().
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from build_engine import compile_job
from edgecascade.backends import _trt_plugins as plugins

WATCHED = (
    "get_output_data_types",
    "get_output_shapes",
    "supports_format_combination",
    "configure_plugin",
    "get_workspace_size",
    "get_valid_tactics",
    "get_fields_to_serialize",
    "attach_to_context",
    "set_tactic",
    "on_shape_change",
    "enqueue",
    "clone",
)
calls: list[dict[str, Any]] = []


def describe(value: Any) -> Any:
    """A description, type or list of them as JSON."""
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if hasattr(value, "min"):  # DynamicPluginTensorDesc
        bounds = {name: list(getattr(value, name)) for name in ("min", "opt", "max")}
        return {**describe(value.desc), **bounds}
    if hasattr(value, "format"):  # PluginTensorDesc
        return {"type": value.type.name, "format": value.format.name, "dims": list(value.dims)}
    if hasattr(value, "name") and not hasattr(value, "spec"):  # an enum
        return value.name
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


def fields_of(collection: Any) -> dict[str, Any]:
    return {field.name: field.data.tolist() for field in collection}


def watch(method: str) -> None:
    original = getattr(plugins.Answers, method)

    @functools.wraps(original)
    def recorded(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        entry = {"node": self.node, "plugin": id(self), "call": method, "result": describe(result)}
        if method == "get_output_shapes":
            entry["arguments"] = [len(arguments[0])]
            entry["result"] = [len(shape) for shape in result]
        elif method == "get_fields_to_serialize":
            entry["result"] = fields_of(result)
        elif method == "supports_format_combination":
            pos, in_out, inputs = arguments
            entry["arguments"] = [pos, describe(in_out[pos].desc), inputs, len(in_out)]
        elif method in ("clone", "attach_to_context"):
            result.node = self.node
            entry["result"] = id(result)
        else:
            entry["arguments"] = describe(arguments)
        calls.append(entry)
        return result

    setattr(plugins.Answers, method, recorded)


def watch_creators() -> None:
    """Creators exist once they are registered; their class is one for all."""
    original_register = plugins.register

    def register(*arguments: Any) -> Any:
        kit = original_register(*arguments)
        creator = type(plugins._CREATORS[0])
        create = creator.create_plugin

        def recorded(self: Any, name: str, fields: Any, phase: Any) -> Any:
            plugin = create(self, name, fields, phase)
            plugin.node = name
            given = fields_of(fields)
            arguments = [self.name, phase.name, given]
            calls.append(
                {"node": name, "plugin": id(plugin), "call": "create", "arguments": arguments}
            )
            return plugin

        creator.create_plugin = recorded
        return kit

    plugins.register = register


def raises(self: Any, *_: Any) -> Any:
    raise RuntimeError("a fault on purpose")


FAULTS: dict[str, tuple[str, Any]] = {
    "wrong type": (
        "get_output_data_types",
        lambda self, types: [self.trt.int8] * self.num_outputs,
    ),
    "refuses all": ("supports_format_combination", lambda self, *_: False),
    "raises in shapes": ("get_output_shapes", raises),
    "one output": ("get_output_shapes", lambda self, inputs, *_: [inputs[0]]),
}


if __name__ == "__main__":
    plugins.Answers.node = ""
    if sys.argv[3]:
        setattr(plugins.Answers, *FAULTS[sys.argv[3]])
    for name in WATCHED:
        watch(name)
    watch_creators()
    status = compile_job.main(sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps(calls))
    sys.exit(status)
