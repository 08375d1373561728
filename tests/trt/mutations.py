# SPDX-License-Identifier: Apache-2.0
"""Breaks the plugins in every way that TensorRT's contract forbids, and sees whether it is noticed.

    python tests/trt/mutations.py RELEASE FOLDER BUNDLE     a line of JSON for each: [name, how]

An untouched run comes first; it must pass, with the logits of the CPU backend.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import standin

RELEASE, FOLDER, BUNDLE = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
TOUCHED = 97  # exit status of fakecuda.c when the host touches device memory

trt: ModuleType = standin.load(RELEASE, FOLDER)

import driver  # noqa: E402
import play  # noqa: E402

from edgecascade.backends import _trt_plugins as plugins  # noqa: E402
from edgecascade.backends._cuda import open_device  # noqa: E402
from edgecascade.backends._trt_plugins import Answers, NodeCall  # noqa: E402
from edgecascade.errors import EdgeCascadeError  # noqa: E402

PLAYER = driver.play(trt)
PRIVATE: list[int] = []  # device memory that no plugin has business with
PROMPT = np.arange(5, 42, dtype=np.int32)


def answers(backend: Any) -> list[Any]:
    """What the run below computes: two prompts, then decode alone, captured, and together."""
    made = [backend.prefill(0, PROMPT), backend.prefill(1, PROMPT[:3])]
    made += [backend.decode([0], [7]), backend.decode([0], [8]), backend.decode([0], [9])]
    made += [backend.decode([1, 0], [7, 5]), backend.decode([0, 1], [9, 4])]
    return [*made, backend.prefill(1, PROMPT[4:7])]  # the shapes of the last prefill: none is set


def run() -> None:
    """Build and run with fresh plugins; raises when something is wrong."""
    plugins._REGISTERED.clear()
    PRIVATE.append(open_device().alloc(1 << 22))
    PLAYER.creators.clear()
    with play.Bundle.open(BUNDLE, verify=False) as bundle:
        play.build_engine(bundle)
    with play.opened(BUNDLE, "tensorrt", threads=1) as backend:
        PLAYER.cuda.fakecuda_strict(1)
        try:
            for made, expected in zip(answers(backend), EXPECTED, strict=True):
                driver.need(np.array_equal(made, expected), "logits are the CPU backend's")
            driver.need(len(backend._captured) == 2, "decode is captured")
        finally:
            PLAYER.cuda.fakecuda_strict(0)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def fail(*_: Any) -> Any:
    raise RuntimeError("broken on purpose")


# What the mutations replace.
ORIGINAL = {n: getattr(Answers, n) for n in dir(Answers) if callable(getattr(Answers, n))}
CALL, RESHAPE, BIND = NodeCall.__call__, NodeCall.reshape, NodeCall._bind
CUDA, LINEAR = PLAYER.cuda, trt.TensorFormat.LINEAR


def same_output(self: Any, ins: Any, outs: Any, ws: int, stream: int) -> None:
    activations = [i for i, p in enumerate(self._spec.present(self._attributes)) if p.name == "x"]
    CALL(self, ins, [ins[activations[0]], *outs[1:]] if activations else outs, ws, stream)


def longer(self: Any, shapes: Any) -> None:
    RESHAPE(self, shapes)
    if self._spec.op.name == "linear":
        self._step.n_tok += 1


def private_state(self: Any, ins: Any, outs: Any, ws: int, stream: int) -> None:
    places = {place for _, place, _ in self._copies}
    moved = [PRIVATE[-1] if i in places else a for i, a in enumerate(outs)]
    CALL(self, ins, moved, ws, stream)


def no_copy(self: Any, shapes: Any) -> None:
    RESHAPE(self, shapes)
    self._copies = []


def allocate(self: Any, *arguments: Any) -> None:
    address = ctypes.c_uint64()
    CUDA.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(64))
    CALL(self, *arguments)


def wait(self: Any, ins: Any, outs: Any, ws: int, stream: int) -> None:
    CALL(self, ins, outs, ws, stream)
    CUDA.cuStreamSynchronize(ctypes.c_void_p(stream))


def other_stream(self: Any, ins: Any, outs: Any, ws: int, stream: int) -> None:
    if not hasattr(self, "_other"):
        self._other = open_device().stream()
    CALL(self, ins, outs, ws, self._other)


def read_back(self: Any, ins: Any, outs: Any, ws: int, stream: int) -> None:
    ctypes.string_at(ins[0], 4)
    CALL(self, ins, outs, ws, stream)


def shared(self: Any) -> Any:
    copy = ORIGINAL["clone"](self)
    copy.call = self.call
    return copy


def renamed(self: Any) -> Any:
    copy = ORIGINAL["clone"](self)
    copy.plugin_name = "EcOther"
    return copy


def forgets(self: Any) -> Any:
    fields = list(ORIGINAL["get_fields_to_serialize"](self))
    self.kept = (trt.PluginFieldCollection(fields[:-1]), fields)
    return self.kept[0]


def misremembers(self: Any) -> Any:
    other = {k: type(v)(v + 1) for k, v in self.attributes.items()}
    self.kept = plugins.make_fields(trt, self.spec, other)
    return self.kept[0]


def no_states(self: Any, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
    return ORIGINAL["get_output_shapes"](self, inputs, shape_inputs, builder)[:1]


def transposed(self: Any, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
    first, *rest = ORIGINAL["get_output_shapes"](self, inputs, shape_inputs, builder)
    return [driver.Sizes(reversed(first)), *rest]


def types(self: Any, inputs: Any) -> Any:
    return [trt.float32] * self.num_outputs


# What is broken -> class, attribute, and what takes its place.
MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "accepts any format": (Answers, "supports_format_combination",
        lambda s, pos, io, n: io[pos].desc.type == s.dtypes[pos]),
    "accepts any dtype": (Answers, "supports_format_combination",
        lambda s, pos, io, n: io[pos].desc.format == LINEAR),
    "accepts nothing": (Answers, "supports_format_combination", lambda s, pos, io, n: False),
    "looks at positions that are not decided": (Answers, "supports_format_combination",
        lambda s, pos, io, n: ORIGINAL["supports_format_combination"](s, pos, io, n)
        and io[-1].desc.format == LINEAR),
    "clone returns itself": (Answers, "clone", lambda s: s),
    "clone returns nothing": (Answers, "clone", lambda s: None),
    "clone shares its memory": (Answers, "clone", shared),
    "clone loses its name": (Answers, "clone", renamed),
    "attach_to_context returns itself": (Answers, "attach_to_context", lambda s, c: s),
    "attach_to_context returns nothing": (Answers, "attach_to_context", lambda s, c: None),
    "a field is not serialized": (Answers, "get_fields_to_serialize", forgets),
    "a field is serialized wrongly": (Answers, "get_fields_to_serialize", misremembers),
    "fields are not kept (10.3)": (Answers, "get_fields_to_serialize",
        lambda s: plugins.make_fields(trt, s.spec, s.attributes)[0]),
    "a plugin can be collected (10.3)": (plugins, "keep_alive", lambda plugin: None),
    "no capability": (Answers, "get_capability_interface", lambda s, kind: None),
    "too few output types": (Answers, "get_output_data_types", lambda s, t: []),
    "an output of BOOL": (Answers, "get_output_data_types",
        lambda s, t: [trt.bool] * s.num_outputs),
    "half outputs promised as float": (Answers, "get_output_data_types", types),
    "states are not outputs": (Answers, "get_output_shapes", no_states),
    "an output is transposed": (Answers, "get_output_shapes", transposed),
    "exception in configure_plugin": (Answers, "configure_plugin", fail),
    "exception in get_workspace_size": (Answers, "get_workspace_size", fail),
    "exception in on_shape_change": (Answers, "on_shape_change", fail),
    "exception in enqueue": (Answers, "enqueue", fail),
    "no workspace": (Answers, "get_workspace_size", lambda s, i, o: 0),
    "workspace for the smallest shapes": (Answers, "get_workspace_size",
        lambda s, i, o: s.call.workspace_bytes([tuple(d.min) for d in i])),
    "ignores a change of shapes": (Answers, "on_shape_change",
        lambda s, i, out: s.call._run or ORIGINAL["on_shape_change"](s, i, out)),
    "an output one row too long": (NodeCall, "reshape", longer),
    "writes its input": (NodeCall, "__call__", same_output),
    "a state is kept elsewhere": (NodeCall, "__call__", private_state),
    "a state is not copied for a timing run": (NodeCall, "reshape", no_copy),
    "allocates in enqueue": (NodeCall, "__call__", allocate),
    "waits in enqueue": (NodeCall, "__call__", wait),
    "works on another stream": (NodeCall, "__call__", other_stream),
    "reads device memory on the host": (NodeCall, "__call__", read_back),
    "does nothing": (NodeCall, "__call__", lambda s, *arguments: None),
    "forgets an address": (NodeCall, "_bind",
        lambda s, ins, outs, ws: BIND(s, [*ins[:-1], ins[0]], outs, ws)),
}  # fmt: skip


def _refusals() -> dict[str, Callable[[], Any]]:
    """What the untouched plugins and backend must say no to."""
    creator = plugins.make_creators(trt, plugins.Kit(play.cuda_library(), lambda *copy: None))
    linear, kinds = creator["EcLinear"], trt.PluginFieldType

    kept: list[Any] = []  # fields point into arrays

    def create(*fields: tuple[str, Any, Any]) -> Any:
        made = {f.name: (f.name, np.array(f.data), f.type) for f in linear.field_names}
        made |= {f[0]: f for f in fields}
        kept.append([f for f in made.values() if f[2] is not None])
        collection = trt.PluginFieldCollection([trt.PluginField(*f) for f in kept[-1]])
        return linear.create_plugin("x", collection, trt.TensorRTPhase.RUNTIME)

    def reshape(*shapes: tuple[int, ...]) -> None:
        numbers = {"w_type": 0, "w_n": 8, "w_k": 4, "w_experts": 1, "w_stride": 16}
        create(
            *((n, np.array([v], np.int32), kinds.INT32) for n, v in numbers.items())
        ).call.reshape(shapes)

    def too_long() -> None:
        with play.opened(BUNDLE, "tensorrt", threads=1) as backend:
            backend._prefill.shape(n_tok=513)

    def truncated() -> None:
        with play.opened(BUNDLE, "tensorrt", threads=1) as backend:
            play.versions.deserialize(trt, backend._logger, b"nothing")

    return {
        "an attribute that is missing": lambda: create(("w_n", None, None)),
        "an attribute that is text": lambda: create(
            ("w_n", np.frombuffer(b"64\0", np.int8), kinds.CHAR)
        ),
        "an attribute that is two numbers": lambda: create(
            ("w_n", np.array([1, 2], np.int32), kinds.INT32)
        ),
        "an attribute of another type": lambda: create(
            ("w_n", np.array([64], np.float32), kinds.FLOAT32)
        ),
        "an input of another width": lambda: reshape((3, 5), (1, 1024)),
        "an input of another rank": lambda: reshape((3, 4, 1), (1, 1024)),
        "an input that is missing": lambda: reshape((3, 4)),
        "a weight of another size": lambda: reshape((3, 4), (1, 1023)),
        "a shape outside the profile": too_long,
        "a plan that is none": truncated,
    }


def in_child(work: Callable[[], None]) -> str:
    """How a run ended, in a process of its own: some mutations end the process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            work()
            how = "passed"
        except driver.ContractError as error:
            how = f"contract: {error}"
        except (EdgeCascadeError, RuntimeError, TypeError, ValueError) as error:
            how = f"{type(error).__name__}: {error}"
        os.write(write, how.encode()[:400])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        how = answer.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return how or ("touched device memory" if code == TOUCHED else f"died with {code}")


def say(name: str, work: Callable[[], Any]) -> None:
    sys.stdout.write(json.dumps([name, in_child(work)]) + "\n")
    sys.stdout.flush()


def main() -> None:
    global EXPECTED
    with play.opened(BUNDLE, "cpu", threads=1) as cpu:
        EXPECTED = answers(cpu)
    say("nothing is broken", run)
    for name, (owner, attribute, value) in MUTATIONS.items():

        def work(owner: Any = owner, attribute: str = attribute, value: Any = value) -> None:
            with replaced(owner, attribute, value):
                run()

        say(name, work)
    for name, ask in _refusals().items():
        say(name, ask)


if __name__ == "__main__":
    main()
