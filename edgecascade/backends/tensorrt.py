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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgecascade.backends import _trt_plugins as plugins
from edgecascade.backends import _trt_versions as versions
from edgecascade.backends._cuda import Device, Graph, open_device
from edgecascade.backends._device_state import DeviceStates
from edgecascade.backends._lib import PAGE_TOKENS, cpu_library, cuda_library, cuda_library_path
from edgecascade.backends.base import Array, Options, Snapshot, check_tokens
from edgecascade.backends.sampler import Sampler
from edgecascade.bundle import Bundle
from edgecascade.device.facts import facts
from edgecascade.engines import EngineKey, engine_key, plugin_hash, read_engine
from edgecascade.errors import BackendError, ContextExceeded, InvalidRequest
from edgecascade.models import family
from edgecascade.nodes import state_name, state_output
from edgecascade.sampling import SampleRow
from edgecascade.state import PagePool, fit_pages
from edgecascade.trace import (
    LOGITS,
    OUT_ROWS,
    PREFILL_CHUNK,
    Tensor,
    dims,
    profiles,
    trace_bundle,
)

log = logging.getLogger(__name__)

DECODE, PREFILL = 0, 1  # profiles
ALIGNMENT = 256
UPLOAD_BYTES = 256 << 20  # of a weight file at a time


def key_here(bundle: Bundle, trt: Any, device: Device) -> EngineKey:
    """The key of the engine that this machine needs for a bundle."""
    return engine_key(
        bundle,
        builder="tensorrt",
        version=trt.__version__,
        sm=device.sm,
        l4t=facts().identity.l4t,
        plugins=plugin_hash([cuda_library_path()]),
    )


class StepArrays:
    """What changes from step to step, in page-locked host memory with a copy on the device."""

    def __init__(self, device: Device, stream: int, slots: int, table: Array) -> None:
        sizes = {
            "tokens": PREFILL_CHUNK,
            "start": slots + 1,
            "slot": slots,
            "past": slots,
            "out_row": OUT_ROWS,
        }
        self._device, self._stream, self._table = device, stream, table
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += -(-4 * size // ALIGNMENT) * ALIGNMENT
        self._host = device.host((at // 4,), np.int32)
        self._host_table = device.host(table.shape, np.int32)
        self._host_table[...] = table
        base, table_address = device.alloc(at), device.alloc(table.nbytes)
        self._base, self._table_address = base, table_address
        self.addresses = {name: base + offset for name, offset in offsets.items()}
        self.addresses["page_table"] = table_address
        self.arrays = {n: self._host[o // 4 :][: sizes[n]] for n, o in offsets.items()}
        self._device.upload(table_address, self._host_table, stream)

    def upload(self) -> None:
        """Start the copies; the stream must be through before the next step is written."""
        self._device.upload(self._base, self._host, self._stream)
        if not np.array_equal(self._host_table, self._table):
            self._host_table[...] = self._table
            self._device.upload(self._table_address, self._host_table, self._stream)


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


class TensorRTBackend:
    """Runs a bundle's TensorRT engine on an NVIDIA GPU."""

    name = "tensorrt"
    page_tokens = PAGE_TOKENS

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._trt = versions.import_tensorrt()
        self._device = open_device()
        try:
            self._open(bundle, options)
        except BaseException:
            self._device.close()
            raise

    def _open(self, bundle: Bundle, options: Options) -> None:
        trt, device = self._trt, self._device
        self._kit = plugins.register(trt, cuda_library(), device.copy)
        stored = read_engine(bundle, key_here(bundle, trt, device))
        self._logger = versions.make_logger(trt, log)
        self._engine = versions.deserialize(trt, self._logger, stored.plan)
        self._stream = device.stream()
        self._graph = trace_bundle(bundle)
        self._addresses = self._upload(bundle)
        self._open_state(bundle, options)
        self._step = StepArrays(device, self._stream, self.slots, self._pages.table)
        self._addresses |= self._step.addresses
        rows = max(self.slots, OUT_ROWS)
        self._logits = device.host((rows, self.vocab), np.float32)
        self._addresses[LOGITS] = device.alloc(self._logits.nbytes)
        self._memory_bytes = int(self._engine.device_memory_size_v2)
        self._memory = device.alloc(self._memory_bytes)
        self._prefill = self._steps(PREFILL)
        self._decode: dict[int, Steps] = {}
        self._captured: dict[int, Graph] = {}
        self._capture = True
        cpu = cpu_library()
        self._host_stream = cpu.stream(options.threads)
        self._sampler = Sampler(cpu, self._host_stream, self.vocab, self.slots)
        self._open_now = True

    def _open_state(self, bundle: Bundle, options: Options) -> None:
        model = family(bundle.family)
        config = model.read_config(bundle.config)
        states = model.states(config)
        self.vocab: int = config.vocab
        self.slots = options.slots
        self._scratch_slot = options.slots  # for logits(), which belongs to no sequence
        self._held = [0] * (self.slots + 1)
        kv_dtype = np.dtype("float32" if bundle.kv_type == "f32" else "float16")
        limits = profiles(self._graph, bundle.max_context)[PREFILL]
        self.max_context, num_pages = fit_pages(
            states,
            slots=self.slots + 1,
            context=min(options.max_context or bundle.max_context, bundle.max_context),
            asked=options.max_context is not None,
            page_tokens=PAGE_TOKENS,
            itemsize=kv_dtype.itemsize,
            available=self._device.available_bytes,
        )
        num_pages = min(num_pages, limits["pages"][-1])
        self.max_context = min(self.max_context, num_pages * PAGE_TOKENS)
        self.kv_tokens = num_pages * PAGE_TOKENS
        max_pages = -(-self.max_context // PAGE_TOKENS)
        self._pages = PagePool(num_pages, self.slots + 1, max_pages, PAGE_TOKENS)
        self._sizes = {"slots": self.slots + 1, "pages": num_pages, "max_pages": max_pages}
        self._states = DeviceStates(
            self._device,
            self._stream,
            states,
            self._pages,
            slots=self.slots + 1,
            num_pages=num_pages,
            kv_dtype=kv_dtype,
        )
        for state in states:
            name = getattr(state, "name", "kv")
            address = self._states.address(state.layer, name)
            self._addresses[state_name(state.layer, name)] = address
            self._addresses[state_output(state.layer, name)] = address

    def _upload(self, bundle: Bundle) -> dict[str, int]:
        """All weights in one piece of device memory, each at the alignment of the kernels."""
        offsets, size = {}, 0
        for name, stored in bundle.tensors.items():
            offsets[name] = size
            size += -(-stored.bytes // ALIGNMENT) * ALIGNMENT
        base = self._device.alloc(size)
        for name, offset in offsets.items():
            data = bundle.map(name)
            for at in range(0, len(data), UPLOAD_BYTES):
                part = data[at : at + UPLOAD_BYTES]
                self._device.upload(base + offset + at, part, self._stream)
        self._device.synchronize(self._stream)
        return {name: base + offset for name, offset in offsets.items()}

    def _steps(self, profile: int) -> Steps:
        """A context of a profile. All share one activation memory: one step runs at a time."""
        context = versions.create_context(self._trt, self._engine)
        if context is None or not context.set_optimization_profile_async(profile, self._stream):
            raise BackendError(f"TensorRT makes no execution context: {self._logger.last}")
        context.set_device_memory(self._memory, self._memory_bytes)
        return Steps(context, self._graph.inputs, self._sizes, self._addresses, self._stream)

    @property
    def captured(self) -> list[int]:
        """For how many sequences a decode step is a single launch by now."""
        return sorted(self._captured)

    def prefill(self, slot: int, tokens: Array) -> Array:
        """See Backend."""
        self._check_slot(slot)
        ids = check_tokens(tokens, self.vocab)
        self._admit(slot, len(ids))
        last: Array = self._append(slot, ids, chunk=PREFILL_CHUNK, all_rows=False)[-1][0]
        return last

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Array:
        """See Backend."""
        count = len(slots)
        if not 0 < count <= self.slots or len(set(slots)) != count or len(tokens) != count:
            raise InvalidRequest(
                f"decode needs 1 to {self.slots} distinct slots and a token for each, "
                f"got slots {list(slots)} and {len(tokens)} tokens"
            )
        ids = check_tokens(tokens, self.vocab)
        for slot in slots:
            self._check_slot(slot)
        for slot in slots:
            self._admit(slot, 1)
        arrays = self._step.arrays
        arrays["tokens"][:count] = ids
        arrays["start"][: count + 1] = np.arange(count + 1)
        arrays["slot"][:count] = slots
        arrays["past"][:count] = [self._held[slot] for slot in slots]
        arrays["out_row"][:count] = np.arange(count)
        self._step.upload()
        self._run_decode(count)
        logits = self._read_logits(count)
        for slot in slots:
            self._held[slot] += 1
        return logits

    def logits(self, tokens: Array) -> Array:
        """See Backend."""
        self._check_open()
        ids = check_tokens(tokens, self.vocab)
        slot = self._scratch_slot
        try:
            self._admit(slot, len(ids))
            return np.concatenate(self._append(slot, ids, chunk=OUT_ROWS, all_rows=True))
        finally:
            self._clear(slot)

    def sample(self, logits: Array, rows: Sequence[SampleRow]) -> list[tuple[int, float]]:
        """See Backend."""
        self._check_open()
        return self._sampler(logits, rows)

    def _append(self, slot: int, ids: Array, *, chunk: int, all_rows: bool) -> list[Array]:
        """Run tokens through a slot in chunks; logits of all rows, or of each chunk's last."""
        made = []
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            count = len(part)
            n_out = count if all_rows else 1
            arrays = self._step.arrays
            arrays["tokens"][:count] = part
            arrays["start"][:2] = 0, count
            arrays["slot"][0], arrays["past"][0] = slot, self._held[slot]
            arrays["out_row"][:n_out] = np.arange(count - n_out, count)
            self._step.upload()
            self._prefill.shape(n_tok=count, n_seq=1, n_out=n_out)
            self._enqueue(self._prefill)
            made.append(self._read_logits(n_out))
            self._held[slot] += count
        return made

    def _run_decode(self, count: int) -> None:
        """One step of `count` sequences, by replay once that is captured."""
        graph = self._captured.get(count)
        if graph is not None:
            graph.launch(self._stream)
            return
        steps = self._decode.get(count)
        if steps is None:
            steps = self._decode[count] = self._steps(DECODE)
            steps.shape(n_tok=count, n_seq=count, n_out=count)
        self._enqueue(steps)  # TensorRT asks for one run before a capture
        if self._capture:
            self._try_capture(count, steps)

    def _try_capture(self, count: int, steps: Steps) -> None:
        try:
            self._captured[count] = self._device.capture(self._stream, lambda: self._enqueue(steps))
        except BackendError as error:
            self._capture = False
            log.warning(
                "decode is not captured as a CUDA graph, so every token costs Python's time: %s",
                error,
            )

    def _enqueue(self, steps: Steps) -> None:
        self._kit.failure = None
        if not steps.enqueue():
            reason = self._kit.failure or self._logger.last
            raise BackendError(f"TensorRT did not run the step: {reason}")

    def _read_logits(self, rows: int) -> Array:
        target = self._logits[:rows]
        self._device.download(target, self._addresses[LOGITS], self._stream)
        self._device.synchronize(self._stream)
        return np.array(target)

    def tokens(self, slot: int) -> int:
        """See Backend."""
        self._check_slot(slot)
        return self._held[slot]

    def reset(self, slot: int) -> None:
        """See Backend."""
        self._check_slot(slot)
        self._clear(slot)

    def save(self, slot: int) -> Snapshot:
        """See Backend."""
        self._check_slot(slot)
        return Snapshot(self._held[slot], self._states.export(slot, self._held[slot]))

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """See Backend."""
        self._check_slot(slot)
        self._clear(slot)
        self._admit(slot, snapshot.tokens)
        self._states.load(slot, snapshot.tokens, snapshot.parts)
        self._held[slot] = snapshot.tokens

    def close(self) -> None:
        """See Backend."""
        if not self._open_now:
            return
        self._open_now = False
        self._device.use()
        self._device.synchronize(self._stream)
        for graph in self._captured.values():
            graph.close()
        self._captured, self._decode = {}, {}
        del self._prefill, self._engine
        self._device.close()
        self._host_stream.close()

    def _clear(self, slot: int) -> None:
        self._states.clear(slot)
        self._held[slot] = 0

    def _admit(self, slot: int, count: int) -> None:
        """Room for `count` more tokens in a slot, or an error that changes nothing."""
        held = self._held[slot]
        if held + count > self.max_context:
            raise ContextExceeded(
                f"{held} tokens held and {count} more exceed the context of {self.max_context}"
            )
        self._pages.grow(slot, held + count)

    def _check_slot(self, slot: int) -> None:
        self._check_open()
        if not 0 <= slot < self.slots:
            raise InvalidRequest(f"slot is {slot}; this backend has {self.slots}")

    def _check_open(self) -> None:
        if not self._open_now:
            raise BackendError("the backend is closed; load the bundle again")
        self._device.use()  # whichever thread this is
