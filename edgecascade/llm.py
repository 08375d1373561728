# SPDX-License-Identifier: Apache-2.0
"""A loaded bundle that generates.

    with LLM.load("bundle/") as llm:
        print(llm.generate("Plan a route to the charging dock.").text)
        for piece in llm.stream(messages=[...], temperature=0.6, max_tokens=200):
            print(piece.text, end="")

How a token is made: every request becomes a ticket. The engine (engine.py) gives it a slot, reads
its prompt, decodes all running requests together and samples; the ticket hands each token to its
sequence (sequence.py), which turns it into text until it has a reason to finish.
"""

from __future__ import annotations

import reprlib
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, overload

import numpy as np

from edgecascade.backends.base import (
    AUTO,
    Array,
    Backend,
    Snapshot,
    check_tokens,
    open_backend,
)
from edgecascade.bundle import Bundle
from edgecascade.completion import Completion, Event, Piece
from edgecascade.device.memory import memory_bytes
from edgecascade.engine import Engine, EngineStats
from edgecascade.errors import BundleError, ContextExceeded, InvalidRequest
from edgecascade.sampling import Sampling, SamplingParams
from edgecascade.scheduler import Limits
from edgecascade.sequence import Running
from edgecascade.session import Session
from edgecascade.snapshots import CutRule, PrefixCache
from edgecascade.text.budget import END, ThinkingBudget
from edgecascade.text.prompt import TURN_MARKS, Prompt, Prompter
from edgecascade.text.stream import TextStream
from edgecascade.text.tokenizer import checked_text
from edgecascade.ticket import Queueing, Ticket, apieces, pieces

SNAPSHOT_SHARE = 0.1  # of the memory that is available when the bundle is opened
MAX_SNAPSHOT_BYTES = 2 << 30

Text = str | bytes
Tokens = Sequence[int] | Array
Messages = Sequence[dict[str, Any]]


class LLM:
    """A bundle on a backend. All methods may be called from any thread."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        backend_reason: str,
        *,
        chunk_tokens: int | None = None,
        snapshot_bytes: int | None = None,
        max_queue: int = 256,
    ) -> None:
        chunk_tokens = backend.chunk_tokens if chunk_tokens is None else chunk_tokens
        self.bundle = bundle
        self.backend_reason = backend_reason
        self._backend = backend
        self.prompter = Prompter(bundle.tokenizer_json, bundle.chat_template, bundle.generation)
        self._recommended, self._eos = _recommended(bundle), _stop_ids(bundle)
        for name, value, least in (
            ("chunk_tokens", chunk_tokens, 1),
            ("snapshot_bytes", 0 if snapshot_bytes is None else snapshot_bytes, 0),
            ("max_queue", max_queue, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidRequest(f"{name} is {value!r}; it must be an integer from {least} on")
        self.rule = self._cut_rule(chunk_tokens)
        self._engine = Engine(
            backend,
            PrefixCache(_snapshot_bytes() if snapshot_bytes is None else snapshot_bytes, self.rule),
            Limits(
                backend.slots,
                backend.kv_tokens,
                backend.max_context,
                backend.page_tokens,
                max_queue=max_queue,
            ),
        )
        self._closed = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        *,
        slots: int = 8,
        max_context: int | None = None,
        threads: int | None = None,
        isa: str | None = None,
        kv: str | None = None,
        verify: bool | None = None,
        chunk_tokens: int | None = None,
        snapshot_bytes: int | None = None,
        max_queue: int = 256,
    ) -> LLM:
        """Open a bundle. Weights are mapped, not read; `slots` sequences run at the same time.

        Between two steps of the running answers `chunk_tokens` of a prompt are read at most; None:
        as many as the backend reads best.
        `snapshot_bytes` bounds the states kept for later prompts; None: a share of the memory.
        `kv` is how keys and values are kept, "f32", "f16" or "int8"; None: as the bundle says.

        Raises:
            BundleError: when the bundle is damaged.
            BackendUnavailable: when this machine lacks the backend.
        """
        bundle = Bundle.open(path, verify=verify)
        options = {
            "slots": slots,
            "max_context": max_context,
            "threads": threads,
            "isa": isa,
            "kv": kv,
        }
        opened = None
        try:
            opened = open_backend(backend, bundle, **options)
            auto = f"the first of {', '.join(AUTO)} that this machine has"
            return cls(
                bundle,
                opened,
                auto if backend == "auto" else "asked for",
                chunk_tokens=chunk_tokens,
                snapshot_bytes=snapshot_bytes,
                max_queue=max_queue,
            )
        except BaseException:
            if opened is not None:
                opened.close()
            bundle.close()
            raise

    @staticmethod
    def has_engine(path: str | Path) -> bool:
        """Whether a bundle has the TensorRT engine that this machine needs, or it needs none.

        Raises:
            BundleError: when the bundle is damaged.
        """
        from edgecascade.backends.tensorrt import engine_is_current

        with Bundle.open(path) as bundle:
            return engine_is_current(bundle)

    @overload
    def generate(self, prompt: Text | Tokens | None = None, **options: Any) -> Completion: ...

    @overload
    def generate(
        self, prompt: list[str] | list[bytes] | list[list[int]], **options: Any
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Any = None,
        *,
        messages: Messages | None = None,
        tools: Messages | None = None,
        params: SamplingParams | None = None,
        raw: bool = False,
        **options: Any,
    ) -> Completion | list[Completion]:
        """Answer a prompt, a conversation, or a list of prompts, which are decoded together.

        A text is a user's message where the bundle has a chat template; `raw` continues it as it
        is. Token ids are used as they are. `options` are SamplingParams and Queueing by name.

        Raises:
            InvalidRequest: for a prompt or parameter that cannot be; ContextExceeded if too long.
        """
        params, how = self._options(params, options)  # first: a deadline counts from here
        batch = prompt if messages is None and _is_batch(prompt) else [prompt]
        asked = [self._prompt(one, messages, tools, params, raw) for one in batch]
        tickets = [self.ticket(one, params) for one in asked]
        try:
            for ticket in tickets:
                ticket.submit(how, wait=True)
            answers = [ticket.result() for ticket in tickets]
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return answers if batch is prompt else answers[0]

    def stream(
        self,
        prompt: Text | Tokens | None = None,
        *,
        messages: Messages | None = None,
        tools: Messages | None = None,
        params: SamplingParams | None = None,
        raw: bool = False,
        **options: Any,
    ) -> Generator[Piece, None, None]:
        """As generate() for one prompt, token by token; close the iterator to stop early."""
        params, how = self._options(params, options)
        return self.pieces(self._prompt(prompt, messages, tools, params, raw), params, how)

    async def agenerate(
        self,
        prompt: Text | Tokens | None = None,
        *,
        messages: Messages | None = None,
        tools: Messages | None = None,
        params: SamplingParams | None = None,
        raw: bool = False,
        **options: Any,
    ) -> Completion:
        """As generate() for one prompt, without blocking the event loop."""
        answer = None
        pieces = self.astream(
            prompt, messages=messages, tools=tools, params=params, raw=raw, **options
        )
        async for piece in pieces:
            answer = piece.completion
        assert answer is not None
        return answer

    def astream(
        self,
        prompt: Text | Tokens | None = None,
        *,
        messages: Messages | None = None,
        tools: Messages | None = None,
        params: SamplingParams | None = None,
        raw: bool = False,
        **options: Any,
    ) -> AsyncGenerator[Piece, None]:
        """As stream(), for `async for`."""
        params, how = self._options(params, options)
        asked = self._prompt(prompt, messages, tools, params, raw)
        return apieces(lambda tell: self.ticket(asked, params, tell), how)

    def submit(
        self,
        prompt: Text | Tokens | None = None,
        *,
        on_event: Callable[[Event], None] | None = None,
        messages: Messages | None = None,
        tools: Messages | None = None,
        params: SamplingParams | None = None,
        raw: bool = False,
        **options: Any,
    ) -> Ticket:
        """Queue a request and return at once.

        `on_event` is told Accepted on this thread, then pieces and one Completion or Failure on
        the engine's: it must not block.

        Raises:
            Overloaded: when the queue is full; `retry_after_s` says when to come back.
        """
        params, how = self._options(params, options)
        asked = self._prompt(prompt, messages, tools, params, raw)
        return self.ticket(asked, params, on_event).submit(how, wait=False)

    def logits(self, token_ids: Tokens) -> Array:
        """float32 [T, vocab]: row t is what the model says after token t, all tokens given."""
        ids = self._ids(token_ids, "token_ids")
        self.check_fits(len(ids))
        rows: Array = self._engine.call(lambda backend: backend.logits(ids), tokens=len(ids))
        return rows

    def session(self, system: str | None = None, tools: Messages | None = None) -> Session:
        """A conversation that keeps its state between turns."""
        return Session(self, system, tools)

    def load_session(self, path: str | Path) -> Session:
        """Go on with a conversation that Session.save() wrote.

        Raises:
            SnapshotError: when the file is damaged.
            BundleMismatch: when another bundle wrote it.
        """
        return Session.load(self, path)

    def tokenize(self, text: Text, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        tokenizer = self.prompter.needed_tokenizer()
        return tokenizer.encode(checked_text(text, "text"), add_special_tokens=add_special_tokens)

    def detokenize(self, token_ids: Tokens, *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ids = self._ids(token_ids, "token_ids").tolist()
        return self.prompter.needed_tokenizer().decode(ids, skip_special=skip_special_tokens)

    @property
    def backend(self) -> str:
        """Name of the backend that runs it; `backend_reason` says why this one."""
        return self._backend.name

    @property
    def threads(self) -> int | None:
        """Threads that the backend computes with, None where it does not choose them."""
        threads: int | None = getattr(self._backend, "threads", None)
        return threads

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self._backend.vocab

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._backend.max_context

    @property
    def slots(self) -> int:
        """Requests that run at the same time."""
        return self._backend.slots

    def stats(self) -> EngineStats:
        """What is running and waiting, and what reuse was worth so far."""
        return self._engine.stats()

    def close(self) -> None:
        """Free the backend and the bundle; running generations end with an error."""
        self._engine.close()
        if not self._closed:
            self._closed = True
            self._backend.close()
            self.bundle.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):  # else loading failed
            self.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pieces(
        self, prompt: Prompt, params: SamplingParams, how: Queueing
    ) -> Generator[Piece, None, None]:
        """Generate, token by token. What cannot be is refused now, the rest starts when asked."""
        events: SimpleQueue[Event] = SimpleQueue()
        return pieces(self.ticket(prompt, params, events.put), how, events)

    def prepare(self, tokens: Tokens) -> None:
        """Read the beginning of later prompts, once nothing else is to be done.

        Raises:
            InvalidRequest: for ids that are none; ContextExceeded if there are too many.
        """
        ids = self._ids(tokens)
        self.check_fits(len(ids))
        self._engine.read_ahead(lambda: ids)

    def kept(self, tokens: Array) -> Snapshot | None:
        """The longest state along these tokens, computed now if need be."""
        if len(self.rule.cuts(tokens)) == 1 or len(tokens) > self.max_context:
            return None
        job = self._engine.prepare(tokens, priority=Queueing().priority)
        job.over.wait()
        if job.error is not None:
            raise job.error
        return self._engine.kept(tokens)

    def keep(self, tokens: Array, state: Snapshot) -> bool:
        """Keep a state that was saved; False when there is no room for it.

        Raises:
            SnapshotError: when it is none of this model's.
        """
        state.check_shapes(self.bundle.states)
        return self._engine.keep(check_tokens(tokens, self._backend.vocab), state)

    def _prompt(
        self, prompt: Any, messages: Any, tools: Any, params: SamplingParams, raw: bool
    ) -> Prompt:
        if (prompt is None) == (messages is None):
            raise InvalidRequest("give either a prompt or messages")
        if raw and messages is not None:
            raise InvalidRequest("raw continues a text; messages go through the chat template")
        if params.thinking is not None and (raw or not isinstance(prompt, str | bytes | None)):
            raise InvalidRequest(
                f"thinking is {params.thinking}, which the chat template is told; what goes to the "
                "model as it is begins its reasoning itself, or does not"
            )
        if isinstance(prompt, str | bytes):
            return self.prompter.from_text(prompt, tools, raw=raw, thinking=params.thinking)
        if messages is not None:
            return self.prompter.from_messages(messages, tools, thinking=params.thinking)
        return self.prompter.from_tokens(self._ids(prompt), tools)

    def ticket(
        self,
        prompt: Prompt,
        params: SamplingParams,
        on_event: Callable[[Event], None] | None = None,
    ) -> Ticket:
        """A request, checked and ready to be submitted."""
        goes_on = None
        if prompt.messages:
            goes_on = partial(_next_turn, self.prompter, prompt, params.thinking)
        running = self._running(prompt, params)
        return Ticket(self._engine, running, on_event, owner=self, goes_on=goes_on)

    def _running(self, prompt: Prompt, params: SamplingParams) -> Running:
        self.check_fits(len(prompt.tokens))
        vocab = self._backend.vocab
        check_tokens(prompt.tokens, vocab)
        for token in params.stop_ids:
            if token >= vocab:
                raise InvalidRequest(f"stop_token_ids holds {token}; the vocabulary has {vocab}")
        if params.stop and self.prompter.tokenizer is None:
            raise InvalidRequest("this bundle has no tokenizer.json; stop needs one")
        eos = frozenset[int]() if params.ignore_eos else self._eos
        room = self.max_context - len(prompt.tokens) + 1  # the last token is never read back
        return Running(
            prompt=prompt,
            params=params,
            sampling=params.sampling(self._recommended),
            room=min(params.max_tokens or room, room),
            stop_ids=frozenset(params.stop_ids) | eos,
            text=self._text_stream(prompt, params),
            budget=self._budget(prompt, params),
            bundle_id=self.bundle.id,
        )

    def _options(
        self, params: SamplingParams | None, options: Mapping[str, Any]
    ) -> tuple[SamplingParams, Queueing]:
        """Keywords, taken apart."""
        how = {name: value for name, value in options.items() if name in Queueing.names()}
        rest = {name: value for name, value in options.items() if name not in how}
        return self.merged(params, rest), Queueing(**how)

    @staticmethod
    def merged(params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
        """Parameters with some of them replaced by name."""
        unknown = sorted(overrides.keys() - set(SamplingParams.names()))
        if unknown:
            known = ", ".join(SamplingParams.names())
            raise InvalidRequest(f"unknown parameter {unknown[0]!r}; SamplingParams has {known}")
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params is {type(params).__name__}; it must be SamplingParams")
        return SamplingParams(**overrides) if params is None else replace(params, **overrides)

    def _text_stream(self, prompt: Prompt, params: SamplingParams) -> TextStream | None:
        tokenizer = self.prompter.tokenizer
        if tokenizer is None:
            return None
        return TextStream(
            tokenizer,
            opened=prompt.reasoning,
            chat=prompt.chat,
            stops=params.stops,
            tools=prompt.tools,
        )

    def _budget(self, prompt: Prompt, params: SamplingParams) -> ThinkingBudget | None:
        if params.thinking_budget is None or not prompt.reasoning:
            return None
        end = self.prompter.needed_tokenizer().encode(END)
        return ThinkingBudget(params.thinking_budget, end)

    def _cut_rule(self, chunk_tokens: int) -> CutRule:
        """Prompts part behind messages that are not the user's, and there states are kept."""
        tokenizer, (begin, end) = self.prompter.tokenizer, TURN_MARKS
        mark = None if tokenizer is None else tokenizer.token_id(end)
        if tokenizer is None or mark is None:
            return CutRule(chunk_tokens, self._eos)
        question = tuple(tokenizer.encode(f"{begin}user"))
        return CutRule(chunk_tokens, self._eos | {mark}, question)

    def _ids(self, tokens: Any, name: str = "prompt") -> Array:
        wanted = "a text or token ids" if name == "prompt" else "token ids"
        if isinstance(tokens, Mapping) or not isinstance(tokens, Iterable):
            raise InvalidRequest(f"{name} is {type(tokens).__name__}; give {wanted}")
        ids = tokens if isinstance(tokens, np.ndarray) else list(tokens)
        if (len(ids) if isinstance(ids, list) else ids.size) == 0:
            raise InvalidRequest(f"{name} is empty; give at least one token")
        if isinstance(ids, list) and isinstance(ids[0], str | bytes):
            raise InvalidRequest(f"{name} holds texts; give {wanted}, and many only to generate()")
        try:
            return check_tokens(ids, self._backend.vocab)
        except ValueError as error:  # NumPy's, for lists of unequal length
            raise InvalidRequest(f"{name} is no list of token ids: {error}") from error

    def check_fits(self, tokens: int, what: str = "the prompt") -> None:
        """Refuse more tokens than the context holds.

        Raises:
            ContextExceeded: with both numbers.
        """
        if tokens > self.max_context:
            most = self.bundle.max_context
            more = f", or load with a max_context of up to {most}"
            raise ContextExceeded(
                f"{what} has {tokens} tokens, the context holds {self.max_context}; "
                f"shorten it{more if self.max_context < most else ''}"
            )


def _next_turn(
    prompter: Prompter, prompt: Prompt, thinking: bool | None, answer: Completion
) -> Array:
    """What the prompt after an answer begins with."""
    return prompter.history([*prompt.messages, answer.message], prompt.tools, thinking=thinking)


def _snapshot_bytes() -> int:
    available = memory_bytes()
    return min(int((available or 0) * SNAPSHOT_SHARE), MAX_SNAPSHOT_BYTES)


def _is_batch(prompt: Any) -> bool:
    kinds = (str, bytes, list, tuple, np.ndarray)
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], kinds)


def _recommended(bundle: Bundle) -> dict[str, Any]:
    """What generation.json says about sampling."""
    names = {field.name for field in fields(Sampling)}
    values = {name: value for name, value in bundle.generation.items() if name in names}
    try:
        SamplingParams(**values)
    except InvalidRequest as error:
        raise BundleError(f"{bundle.path}: generation.json: {error}; build again") from error
    return values


def _stop_ids(bundle: Bundle) -> frozenset[int]:
    """Tokens that end an answer; the other token ids of generation.json are checked with them."""
    for name in ("bos_token_id", "pad_token_id", "unk_token_id", "eos_token_id"):
        value = bundle.generation.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            shown = reprlib.repr(value)
            raise BundleError(f"{bundle.path}: generation.json: {name} is {shown}; build again")
    return frozenset(ids)
