# SPDX-License-Identifier: Apache-2.0
"""Every op of a step alone, on the weights and shapes of a loaded CUDA backend.

The calls of one kind, an input projection of each layer say, are captured as one graph and
replayed: each replay goes through the weights of all layers, which is more than a GPU's L2 holds;
where it is not, the weights are copied until it is. Where an op is several launches, they are also
timed one by one, with the others taken out of the graph. Inputs are random rows that nothing
overwrites, so that the router chooses the same experts each time.
"""

from __future__ import annotations

import ctypes as c
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from edgecascade.backends import _cuda
from edgecascade.backends._lib import ARGS, OVERLAP, PREFETCH, Call, Step, Weight
from edgecascade.backends.cuda import CudaBackend
from edgecascade.errors import EdgeCascadeError
from edgecascade.ops import OPS, Kind
from edgecascade.tensors import Codec, matrix_bytes

NAMES = {code: op.name for op in OPS.values() for code in op.codes}
CODECS = {codec.ec_type: codec for codec in Codec}
L2_TIMES = 4  # what is replayed is at least so many times the L2
PARTS = {"moe": ("router, shared up", "experts up", "experts down, shared down")}


@dataclass(frozen=True)
class OpTime:
    """One kind of call, or one launch of it."""

    op: str
    batch: int
    calls: int  # in a decode step
    launches: int  # of a call
    us: float  # a call
    bytes: int  # of weights, state or keys and values that a call has to move
    ceiling: float | None  # bytes a second
    replayed_bytes: int

    @property
    def share(self) -> float | None:
        """Of the ceiling."""
        return self.bytes / self.us * 1e6 / self.ceiling if self.ceiling and self.bytes else None

    def row(self) -> dict[str, Any]:
        """For JSON."""
        rate = self.bytes / self.us / 1e3
        return asdict(self) | {"gb_per_s": rate, "share": self.share}


def seconds_of(work: Callable[[], None], wait: Callable[[], None], least_s: float) -> float:
    """Of one `work`, the median of five rounds that take at least so long."""
    work()
    wait()
    start = perf_counter()
    work()
    wait()
    count = max(1, int(least_s / max(perf_counter() - start, 1e-7)))
    rounds = []
    for _ in range(5 if least_s else 1):
        start = perf_counter()
        for _ in range(count):
            work()
        wait()
        rounds.append((perf_counter() - start) / count)
    return statistics.median(rounds)


class EdgeData(c.Structure):
    """CUgraphEdgeData."""

    _fields_ = [("from_port", c.c_uint8), ("to_port", c.c_uint8), ("type", c.c_uint8),
                ("reserved", c.c_uint8 * 5)]  # fmt: skip


PROGRAMMATIC = EdgeData(from_port=1, type=1)  # the later launch may begin early


class LaunchGraph:
    """A captured chain of launches, or some of them.

    Nodes that are not wanted are taken out, and their neighbours tied together as `early` says.

    Raises:
        EdgeCascadeError: when the driver does not list the nodes of a stream in their order.
    """

    def __init__(
        self,
        device: _cuda.Device,
        stream: int,
        work: Callable[[], None],
        wanted: Callable[[int], bool] | None = None,
        early: bool = False,
    ) -> None:
        with device._capturing(stream) as graph:
            work()
        self._graph, self._run, count = graph, c.c_void_p(), c.c_size_t()
        _cuda._call("cuGraphGetNodes", graph, None, c.byref(count))
        nodes = (c.c_void_p * count.value)()
        _cuda._call("cuGraphGetNodes", graph, nodes, c.byref(count))
        if wanted:
            _check_order(nodes)
        self._count, last = 0, None
        for i, node in enumerate(nodes):
            if wanted and not wanted(i):
                _cuda._call("cuGraphDestroyNode", c.c_void_p(node))
                continue
            self._count += 1
            if last is not None and last < i - 1:
                self._tie(nodes[last], node, early)
            last = i
        _cuda._call("cuGraphInstantiateWithFlags", c.byref(self._run), graph, 0)

    def _tie(self, before: int, after: int, early: bool) -> None:
        pair = (c.c_void_p * 1)(before), (c.c_void_p * 1)(after)
        if early:
            edge = c.byref(PROGRAMMATIC)
            _cuda._call("cuGraphAddDependencies_v2", self._graph, *pair, edge, c.c_size_t(1))
        else:
            _cuda._call("cuGraphAddDependencies_v2", self._graph, *pair, None, c.c_size_t(1))

    def __len__(self) -> int:
        return self._count

    def launch(self, stream: int) -> None:
        """Start the work."""
        _cuda._call("cuGraphLaunch", self._run, stream)

    def close(self) -> None:
        """Free it."""
        _cuda._call("cuGraphExecDestroy", self._run)
        _cuda._call("cuGraphDestroy", self._graph)


def _check_order(nodes: c.Array[c.c_void_p]) -> None:
    for i in range(1, len(nodes)):
        before, edge, count = (c.c_void_p * 1)(), EdgeData(), c.c_size_t(1)
        _cuda._call("cuGraphNodeGetDependencies_v2", c.c_void_p(nodes[i]), before, c.byref(edge),
                    c.byref(count))  # fmt: skip
        if count.value != 1 or before[0] != nodes[i - 1]:
            raise EdgeCascadeError(f"node {i} of the graph does not follow node {i - 1}")


class OpTimer:
    """Times the ops of a backend whose last step was a decode step of `batch` sequences, or, with
    `prompt`, the first `prompt` tokens of a sequence.
    """

    def __init__(
        self, backend: CudaBackend, ceiling: float | None, least_s: float, *, prompt: int = 0
    ) -> None:
        self._backend, self._ceiling, self._least_s = backend, ceiling, least_s
        self._prompt = prompt
        self._device, self._stream = backend._device, backend._stream
        names = {place: name for name, place in backend._weights.items()}
        self._kinds: dict[str, list[tuple[int, c.Structure]]] = {}
        for call in backend._prefill_calls if prompt else backend._decode_calls:
            name = NAMES[call.op]
            args = ARGS[name].from_address(call.args)
            label = name if name != "linear" else names[args.w.data].rpartition(".")[2]
            self._kinds.setdefault(label, []).append((call.op, args))
        widest = max(_widths(op, args) for calls in self._kinds.values() for op, args in calls)
        values = np.random.default_rng(3).standard_normal(
            (prompt or backend.slots, widest), np.float32
        )
        self._x = self._device.alloc(values.nbytes)
        self._y = self._device.alloc(values.nbytes)
        self._device.upload(self._x, values, self._stream)
        self._none = self._device.alloc(4)  # sequences that count
        self._device.zero(self._none, 4, self._stream)
        self._device.synchronize(self._stream)
        self._l2 = backend._library.query().l2_bytes
        self._copies: dict[tuple[int, int], int] = {}

    @property
    def labels(self) -> list[str]:
        """The kinds of the step's calls, in its order."""
        return list(self._kinds)

    def boundary_us(self, overlap: bool) -> float:
        """A launch in a graph that has nothing to do: a Mamba step of which no sequence counts."""
        code, args = self._kinds["mamba"][0]
        own = self._own(args)
        calls = (Call * 256)(*[Call(c.addressof(own), code, 0)] * 256)
        graph = self._graph(calls, 1, overlap, live=self._none)
        seconds = self._seconds(graph)
        graph.close()
        return seconds / len(calls) * 1e6

    def step_us(self, batch: int, *, overlap: bool, prefetch: bool) -> float:
        """The backend's decode step as a graph of its own."""
        graph = self._graph(self._backend._decode_calls, batch, overlap, prefetch=prefetch)
        seconds = self._seconds(graph)
        graph.close()
        return seconds * 1e6

    def time(self, label: str, batch: int) -> Iterator[OpTime]:
        """A kind of the step's calls, then each launch of one that has several; of a prompt,
        `batch` is its tokens.
        """
        calls = self._kinds[label]
        own = [(code, self._own(args)) for code, args in calls]
        own = self._past_l2(own)
        array = (Call * len(own))(*(Call(c.addressof(args), code, 0) for code, args in own))
        overlap = bool(self._backend._args_step.flags & OVERLAP)
        graph = self._graph(array, batch, overlap)
        launches, left = divmod(len(graph), len(own))
        assert left == 0, f"{label}: {len(graph)} launches of {len(own)} calls"
        calls_made = len(own)

        def made(name: str, parts: slice, launches: int, graph: LaunchGraph) -> OpTime:
            us = self._seconds(graph) / calls_made * 1e6
            graph.close()
            # After the run, which chose the experts.
            moved = sum(sum(self._bytes(code, args, batch)[parts]) for code, args in own)
            each = moved // calls_made
            return OpTime(name, batch, len(calls), launches, us, each, self._ceiling, moved)

        yield made(label, slice(None), launches, graph)
        names = tuple(f"launch {i + 1}" for i in range(launches))
        if not self._prompt:
            names = PARTS.get(label, names)
        for part in range(launches if launches > 1 else 0):
            some = self._graph(array, batch, overlap,
                               wanted=lambda i, part=part: i % launches == part)  # fmt: skip
            moves = slice(0, 0) if self._prompt else slice(part, part + 1)
            yield made(f"  {names[part]}", moves, 1, some)

    def _graph(
        self,
        calls: c.Array[Call],
        batch: int,
        overlap: bool,
        live: int | None = None,
        wanted: Callable[[int], bool] | None = None,
        prefetch: bool = False,  # which moves bytes of what is not timed
    ) -> LaunchGraph:
        early = overlap and not self._prompt and self._backend._library.query().sm >= 90
        step = Step.from_buffer_copy(self._backend._args_step)
        if self._prompt:
            step.n_tok, step.n_seq, step.n_out = self._prompt, 1, 1
            step.max_context = self._backend.max_context
        else:
            step.n_tok = step.n_seq = step.n_out = batch
            step.max_context = self._backend.context_bound(batch)
        step.flags = OVERLAP * overlap | PREFETCH * prefetch
        step.live = live or step.live
        library, queue = self._backend._library, self._backend._queue
        return LaunchGraph(
            self._device, self._stream, lambda: library.run(queue, step, calls), wanted, early
        )

    def _own(self, args: Any) -> Any:
        """The call with inputs and outputs of its own."""
        own = type(args).from_buffer_copy(args)
        op = next(op for op in OPS.values() if ARGS[op.name] is type(args))
        for field in op.fields:
            if field.kind is Kind.INPUT and getattr(own, field.name):
                setattr(own, field.name, self._x)
            if field.kind is Kind.OUTPUT and op.name != "head":
                setattr(own, field.name, self._y)
        return own

    def _past_l2(self, own: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """Calls of a matrix again, on copies of it, until they are more than the L2 holds."""
        if NAMES[own[0][0]] not in ("linear", "head"):
            return own
        size = sum(_stored(args.w) for _, args in own)
        made = list(own)
        for again in range(1, -(-L2_TIMES * self._l2 // size)):
            for code, args in own:
                copy = type(args).from_buffer_copy(args)
                copy.w.data = self._copy(args.w, again)
                made.append((code, copy))
        return made

    def _copy(self, weight: Weight, again: int) -> int:
        key = (weight.data, again)
        if key not in self._copies:
            size = _stored(weight)
            self._copies[key] = self._device.alloc(size)
            self._device.copy(self._copies[key], weight.data, size, self._stream)
        return self._copies[key]

    def _seconds(self, graph: LaunchGraph) -> float:
        return seconds_of(
            lambda: graph.launch(self._stream),
            lambda: self._device.synchronize(self._stream),
            self._least_s,
        )

    def _bytes(self, code: int, args: Any, batch: int) -> list[int]:
        """What each launch of a call has to move; only the first's where that is most of it. Of a
        prompt, the weights.
        """
        name = NAMES[code]
        if self._prompt and name in ("mamba", "attention"):
            return [0]
        if name in ("linear", "head"):
            return [_stored(args.w)]
        if name == "moe":
            taken = self._taken(args, batch)
            return [
                4 * args.up.experts * args.up.k + _stored(args.shared_up),
                taken * _stored(args.up),
                taken * _stored(args.down) + _stored(args.shared_down),
            ]
        if name == "mamba":
            return [8 * args.heads * args.head_dim * args.state * batch]
        if name == "attention":
            held = int(self._backend._step.arrays["past"][:batch].sum()) + batch
            row = self._backend.kv_type.row_bytes(args.head_dim)
            return [2 * args.kv_heads * row * held, 0]
        return [0]

    def _taken(self, args: Any, batch: int) -> int:
        """Different experts that the call took when it last ran."""
        ids = np.empty((batch, args.top_k), np.int32)
        self._device.download(ids, args.ids, self._stream)
        self._device.synchronize(self._stream)
        return len(np.unique(ids))


def _stored(weight: Weight) -> int:
    """Bytes of one matrix; 0 for none."""
    return matrix_bytes(CODECS[weight.type], weight.n, weight.k) if weight.data else 0


def _widths(code: int, args: Any) -> int:
    """Columns of the widest row that a call reads or writes, logits apart."""
    name = NAMES[code]
    if name == "mamba":
        inner = args.heads * args.head_dim
        return int(2 * inner + 2 * args.groups * args.state + args.heads)
    if name == "attention":
        return int((args.heads + 2 * args.kv_heads) * args.head_dim)
    if name == "moe":
        return int(args.up.k)
    weight = args.table if name == "embed" else args.w
    return int(weight.k if name in ("embed", "head") else max(weight.n, weight.k))
