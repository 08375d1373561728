# SPDX-License-Identifier: Apache-2.0
"""A TensorRT engine as a backend: weights and states bound once, decode replayed as a CUDA graph.

The engine holds no weights. They lie in device memory beside the states, and every execution
context is bound to their addresses when it is made. Prefill has one context, whose shapes follow
the chunks. Decode has one for each number of sequences: its first step runs as TensorRT runs it,
is then captured, and every later one is a single launch without Python in it. Padding fewer
captures with idle sequences would make mixture-of-experts layers read experts for nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from edgecascade.backends import _trt_plugins as plugins
from edgecascade.backends import _trt_versions as versions
from edgecascade.backends._cuda import Device, open_device
from edgecascade.backends._device_backend import DeviceBackend
from edgecascade.backends._lib import cuda_library, cuda_library_path
from edgecascade.backends.base import Options, kv_type
from edgecascade.bundle import Bundle
from edgecascade.device.identity import read_identity
from edgecascade.engines import EngineKey, engine_key, plugin_hash, read_engine
from edgecascade.errors import BackendError, BackendUnavailable, BundleError
from edgecascade.nodes import state_name, state_output
from edgecascade.tensors import PAGE_TOKENS
from edgecascade.trace import LOGITS, Tensor, dims, profiles, trace_bundle

log = logging.getLogger(__name__)

DECODE, PREFILL = 0, 1  # profiles


def key_here(bundle: Bundle, trt: Any, device: Device) -> EngineKey:
    """The key of the engine that this machine needs for a bundle."""
    return engine_key(
        bundle,
        builder="tensorrt",
        version=trt.__version__,
        sm=device.sm,
        l4t=read_identity().l4t,
        plugins=plugin_hash([cuda_library_path()]),
    )


def engine_is_current(bundle: Bundle) -> bool:
    """Whether the bundle has the engine that this machine needs; also where it can use none."""
    if not cuda_library_path().exists():
        return True
    try:
        trt, device = versions.import_tensorrt(), open_device()
    except BackendUnavailable:
        return True
    try:
        read_engine(bundle, key_here(bundle, trt, device))
    except BundleError as error:
        log.info("the engine has to be built: %s", error)
        return False
    finally:
        device.close()
    return True


class Steps:
    """An execution context, bound to everything it reads and writes."""

    def __init__(
        self,
        context: Any,
        inputs: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        addresses: Mapping[str, int],
        stream: int,
    ) -> None:
        self._context, self._stream = context, stream
        self._inputs = [tensor for tensor in inputs.values() if not _is_static(tensor)]
        self._sizes, self._shapes = dict(sizes), dict[str, tuple[int, ...]]()
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(f"the engine has no tensor {name!r}; build it again")

    def shape(self, **counts: int) -> None:
        """Set the counts of the next steps. A shape that stays costs nothing."""
        self._sizes |= counts
        named = {name: (size, size, size) for name, size in self._sizes.items()}
        for tensor in self._inputs:
            shape = dims(tensor, named)[0]
            if self._shapes.get(tensor.name) != shape:
                if not self._context.set_input_shape(tensor.name, shape):
                    raise BackendError(
                        f"the engine takes no {tensor.name} of shape {list(shape)}; its profiles "
                        "end below, so build it again"
                    )
                self._shapes[tensor.name] = shape

    def enqueue(self) -> bool:
        """Start a step; False when TensorRT or a plugin refused."""
        return bool(self._context.execute_async_v3(self._stream))


def _is_static(tensor: Tensor) -> bool:
    return all(isinstance(dim, int) for dim in tensor.shape)


class TensorRTBackend(DeviceBackend):
    """Runs a bundle's TensorRT engine on an NVIDIA GPU."""

    name = "tensorrt"
    least_out = 1  # no tensor of the engine is empty

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._trt = versions.import_tensorrt()
        if kv_type(bundle, options).value != bundle.kv_type:
            raise BackendUnavailable(
                f"an engine keeps keys and values as its bundle does, {bundle.kv_type}; load "
                f"without kv={options.kv!r}, or with another backend"
            )
        super().__init__(bundle, options)

    def _prepare(self, bundle: Bundle) -> None:
        trt, device = self._trt, self._device
        self._kit = plugins.register(trt, cuda_library(), device.copy)
        stored = read_engine(bundle, key_here(bundle, trt, device))
        self._logger = versions.make_logger(trt, log)
        self._engine = versions.deserialize(trt, self._logger, stored.plan)
        self._graph = trace_bundle(bundle)

    def _most_pages(self, bundle: Bundle) -> int:
        most: int = profiles(self._graph, bundle.max_context)[PREFILL]["pages"][-1]
        return most

    def _open_pass(self, bundle: Bundle, options: Options) -> None:
        table = self._pages.table
        self._sizes = {
            "slots": self.slots + 1,
            "pages": self.kv_tokens // PAGE_TOKENS,
            "max_pages": table.shape[1],
        }
        self._addresses = {**self._weights, **self._step.addresses, LOGITS: self._logits_address}
        for state in self._state_parts:
            name = getattr(state, "name", "kv")
            address = self._states.address(state.layer, name)
            self._addresses[state_name(state.layer, name)] = address
            self._addresses[state_output(state.layer, name)] = address
        # What no layer of this model reads is no tensor of its engine.
        asked = self._graph.inputs.keys() | self._graph.outputs.keys()
        self._addresses = {name: self._addresses[name] for name in sorted(asked)}
        self._memory_bytes = int(self._engine.device_memory_size_v2)
        self._memory = self._device.alloc(self._memory_bytes)
        self._prefill = self._steps(PREFILL)
        self._decode: dict[int, Steps] = {}

    def _steps(self, profile: int) -> Steps:
        """A context of a profile. All share one activation memory: one step runs at a time."""
        context = versions.create_context(self._trt, self._engine)
        if context is None or not context.set_optimization_profile_async(profile, self._stream):
            raise BackendError(f"TensorRT makes no execution context: {self._logger.last}")
        context.set_device_memory(self._memory, self._memory_bytes)
        return Steps(context, self._graph.inputs, self._sizes, self._addresses, self._stream)

    def _start_prefill(self, count: int, n_out: int) -> None:
        self._prefill.shape(n_tok=count, n_seq=1, n_out=n_out)
        self._enqueue(self._prefill)

    def _start_decode(self, count: int) -> None:
        """One step of `count` sequences, by replay once that is captured."""
        if self._replay(count):
            return
        steps = self._decode.get(count)
        if steps is None:
            steps = self._decode[count] = self._steps(DECODE)
            steps.shape(n_tok=count, n_seq=count, n_out=count)
        self._enqueue(steps)  # TensorRT asks for one run before a capture
        self._try_capture(count, lambda: self._enqueue(steps))

    def _enqueue(self, steps: Steps) -> None:
        self._kit.failure = None
        if not steps.enqueue():
            reason = self._kit.failure or self._logger.last
            raise BackendError(f"TensorRT did not run the step: {reason}")

    def _close_pass(self) -> None:
        self._decode = {}
        del self._prefill, self._engine
