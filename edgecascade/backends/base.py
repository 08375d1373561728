# SPDX-License-Identifier: Apache-2.0
"""The contract of a backend, and the choice of one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from numbers import Integral
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgecascade.bundle import Bundle
from edgecascade.errors import BackendError, BackendUnavailable, BundleError, InvalidRequest
from edgecascade.sampling import Logits, SampleRow
from edgecascade.state import check_parts, check_shapes
from edgecascade.tensors import KvType, State

Array = NDArray[Any]
log = logging.getLogger(__name__)

# Name -> (module, class). "auto" tries them in this order.
BACKENDS = {
    "tensorrt": ("edgecascade.backends.tensorrt", "TensorRTBackend"),
    "cuda": ("edgecascade.backends.cuda", "CudaBackend"),
    "cpu": ("edgecascade.backends.native", "NativeBackend"),
    "reference": ("edgecascade.backends.reference", "ReferenceBackend"),
}
GPU = ("tensorrt", "cuda")
AUTO = (*GPU, "cpu", "reference")
CPU_CHUNK_TOKENS = 256  # from here on a CPU computes as long as it reads weights


@dataclass(frozen=True)
class Snapshot:
    """A sequence's state at a token boundary, in a form that every backend reads.

    `parts` maps (layer, name) to arrays: "conv" [kernel - 1, channels], oldest first, and "ssm"
    [heads, head_dim, state] in float32; "kv" [2, tokens, kv_heads, row_items], rows of their KvType
    (edgecascade/blocks.py).
    """

    tokens: int
    parts: Mapping[tuple[int, str], Array]

    @property
    def nbytes(self) -> int:
        """Host memory it occupies."""
        return sum(part.nbytes for part in self.parts.values())

    def check(self, kv_type: KvType) -> None:
        """Refuse a state whose keys and values do not fit; see check_parts."""
        check_parts(self.parts, self.tokens, kv_type)

    def check_shapes(self, states: Sequence[State]) -> None:
        """Refuse a state that is not of a model with these; see state.py."""
        check_shapes(self.parts, self.tokens, states)


class Parked:
    """A sequence without a slot, at the backend that parked it."""


class Backend(Protocol):
    """Executes a bundle for up to `slots` sequences; one caller at a time."""

    name: str
    vocab: int
    slots: int
    max_context: int  # tokens that one slot can hold
    kv_tokens: int  # tokens that all slots can hold together, in pages of page_tokens
    page_tokens: int
    chunk_tokens: int  # of a prompt that it reads best at a time
    kv_type: KvType  # of keys and values, in snapshots too

    def prefill(self, slot: int, tokens: Array) -> Logits:
        """Append tokens to a slot; the logits [vocab] of the last one."""

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Logits:
        """Append one token to each of distinct slots; their logits [len(slots), vocab]."""

    def logits(self, tokens: Array) -> Array:
        """Teacher-forced logits of every position, float32 [T, vocab]; touches no slot."""

    def sample(self, logits: Logits, rows: Sequence[SampleRow]) -> list[tuple[int, float]]:
        """One token and its log probability for each row of logits, drawn where they lie."""

    def tokens(self, slot: int) -> int:
        """How many tokens a slot holds."""

    def reset(self, slot: int) -> None:
        """Empty a slot and give its pages back."""

    def save(self, slot: int) -> Snapshot:
        """Copy a slot's state to host memory."""

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Make a slot what it was when the snapshot was taken."""

    def park(self, slot: int, copy: Snapshot | None = None) -> Parked:
        """Empty a slot for somebody more urgent; what it held is for `resume` or `drop`.

        `copy` is its state where somebody has it already, so that nobody need copy it.
        """

    def resume(self, slot: int, parked: Parked) -> None:
        """Make a slot what the parked one was, once."""

    def drop(self, parked: Parked) -> None:
        """Forget a parked sequence; nothing happens if it was resumed."""

    def close(self) -> None:
        """Free everything; further calls are errors."""


@dataclass(frozen=True)
class Options:
    """What a caller may ask of a backend."""

    slots: int = 8
    max_context: int | None = None  # None: the model's, or what memory allows
    threads: int | None = None  # None: as many as the memory can feed
    isa: str | None = None  # None: the fastest this machine runs
    kv: str | None = None  # KvType of keys and values; None: the bundle's

    def __post_init__(self) -> None:
        if not _whole(self.slots, 1, 8):
            raise InvalidRequest(f"slots is {self.slots!r}; 1 to 8 are possible")
        if self.max_context is not None and not _whole(self.max_context, 1, 2**31 - 1):
            raise InvalidRequest(
                f"max_context is {self.max_context!r}; it must be an integer of at least 1"
            )
        if self.threads is not None and not _whole(self.threads, 1, 256):
            raise InvalidRequest(f"threads is {self.threads!r}; 1 to 256 are possible")
        if self.isa is not None and not isinstance(self.isa, str):
            raise InvalidRequest(f"isa is {self.isa!r}; it must be the name of an instruction set")
        kinds = [kind.value for kind in KvType]
        if self.kv is not None and self.kv not in kinds:
            raise InvalidRequest(f"kv is {self.kv!r}; choose one of {', '.join(kinds)}")


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def open_backend(name: str, bundle: Bundle, **options: Any) -> Backend:
    """Open a backend by name; "auto" takes the first that this machine has, and the CPU's where
    the GPU is full or has failed; the log says why.

    Raises:
        InvalidRequest: for an unknown name or option value.
        BackendUnavailable: when the machine lacks it; for "auto", when it lacks all.
    """
    chosen = Options(**options)
    if chosen.max_context is not None and chosen.max_context > bundle.max_context:
        raise InvalidRequest(
            f"max_context is {chosen.max_context}; the model holds at most {bundle.max_context} "
            "tokens: give less, or leave it out"
        )
    if name != "auto":
        return _open(name, bundle, chosen)
    reasons = []
    for candidate in AUTO:
        try:
            backend = _open(candidate, bundle, chosen)
        except (BackendError, BundleError) as error:  # an engine may be damaged, or of others
            # A GPU may be full, or lost. What a CPU lacks, the reference lacks even more.
            if candidate not in GPU and not isinstance(error, BackendUnavailable | BundleError):
                raise
            reasons.append(f"{candidate}: {error}")
            continue
        level = logging.WARNING if candidate == "reference" else logging.INFO  # it is that slow
        log.log(level, "backend %s%s", candidate, f" ({'; '.join(reasons)})" if reasons else "")
        return backend
    raise BackendUnavailable("no backend runs here: " + "; ".join(reasons))


def _open(name: str, bundle: Bundle, options: Options) -> Backend:
    if not isinstance(name, str) or name not in BACKENDS:
        raise InvalidRequest(f"backend is {name!r}; choose auto, {', '.join(BACKENDS)}")
    module, cls = BACKENDS[name]
    backend: Backend = getattr(import_module(module), cls)(bundle, options)
    return backend


def kv_type(bundle: Bundle, options: Options) -> KvType:
    """How keys and values are kept: as asked, else as the bundle says."""
    return KvType(options.kv or bundle.kv_type)


def check_tokens(tokens: Any, vocab: int) -> Array:
    """Token ids as int32 [T].

    Raises:
        InvalidRequest: when there are none, or one is not in [0, vocab).
    """
    ids = np.asarray(tokens)
    if ids.dtype == object and ids.ndim == 1 and all(isinstance(token, int) for token in ids):
        for position, token in enumerate(ids):
            if abs(token) >= 2**63:
                raise InvalidRequest(
                    f"a token beyond 64 bits at position {position} is outside the vocabulary of "
                    f"{vocab}"
                )
        ids = ids.astype(np.int64)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise InvalidRequest(
            f"tokens must be a non-empty list of ids, got shape {ids.shape} of {ids.dtype}"
        )
    bad = np.flatnonzero((ids < 0) | (ids >= vocab))
    if bad.size:
        raise InvalidRequest(
            f"token {ids[bad[0]]} at position {bad[0]} is outside the vocabulary of {vocab}"
        )
    return ids.astype(np.int32)
