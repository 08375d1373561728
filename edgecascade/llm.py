# SPDX-License-Identifier: Apache-2.0
"""A loaded bundle that generates.

    with LLM.load("bundle/") as llm:
        print(llm.generate("Plan a route to the charging dock.").text)
        for piece in llm.stream(messages=[...], temperature=0.6, max_tokens=200):
            print(piece.text, end="")

How a token is made: `run` gives each sequence a slot and reads its prompt, then decodes all
running sequences together; `_deliver` samples and hands each token to its sequence, which turns it
into text (sequence.py) until it has a reason to finish.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from edgecascade.backends.base import AUTO, Array, Backend, check_tokens, open_backend
from edgecascade.bundle import Bundle
from edgecascade.completion import Completion, Piece
from edgecascade.errors import BackendError, BundleError, ContextExceeded, InvalidRequest
from edgecascade.sampling import Sampling, SamplingParams
from edgecascade.sequence import Running, Saved
from edgecascade.session import Session
from edgecascade.slots import SlotPool
from edgecascade.text.budget import END, ThinkingBudget
from edgecascade.text.prompt import Prompt, Prompter
from edgecascade.text.stream import TextStream
from edgecascade.text.tokenizer import checked_text

Text = str | bytes
Tokens = Sequence[int] | Array
Messages = Sequence[dict[str, Any]]


class LLM:
    """A bundle on a backend. All methods may be called from any thread."""

    def __init__(self, bundle: Bundle, backend: Backend, backend_reason: str) -> None:
        self.bundle = bundle
        self.backend_reason = backend_reason
        self._backend = backend
        self.prompter = Prompter(bundle.tokenizer_file, bundle.chat_template, bundle.generation)
        self._recommended, self._eos = _recommended(bundle), _stop_ids(bundle)
        self._slots = SlotPool(backend.slots)
        # Backends serve one caller at a time. Reentrant: the collector may close a forgotten stream
        # while this very thread is inside a call.
        self._lock = threading.RLock()
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
        verify: bool | None = None,
    ) -> LLM:
        """Open a bundle. Weights are mapped, not read; `slots` sequences run at the same time.

        Raises:
            BundleError: when the bundle is damaged.
            BackendUnavailable: when this machine lacks the backend.
        """
        bundle = Bundle.open(path, verify=verify)
        options = {"slots": slots, "max_context": max_context, "threads": threads, "isa": isa}
        try:
            opened = open_backend(backend, bundle, **options)
            auto = f"the first of {', '.join(AUTO)} that this machine has"
            return cls(bundle, opened, auto if backend == "auto" else "asked for")
        except BaseException:
            bundle.close()
            raise

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
        **overrides: Any,
    ) -> Completion | list[Completion]:
        """Answer a prompt, a conversation, or a list of prompts, which are decoded together.

        A text is a user's message where the bundle has a chat template; `raw` continues it as it
        is. Token ids are used as they are. `overrides` are SamplingParams by name.

        Raises:
            InvalidRequest: for a prompt or parameter that cannot be; ContextExceeded if too long.
        """
        params = self.merged(params, overrides)
        batch = prompt if messages is None and _is_batch(prompt) else [prompt]
        asked = [self._prompt(one, messages, tools, params, raw) for one in batch]
        sequences = [self.sequence(one, params) for one in asked]
        done = {id(sequence): piece.completion for sequence, piece in self.run(sequences)}
        answers = [answer for s in sequences if (answer := done[id(s)]) is not None]
        return answers if batch is prompt else answers[0]

    def stream(
        self,
        prompt: Text | Tokens | None = None,
        *,
        messages: Messages | None = None,
        tools: Messages | None = None,
        params: SamplingParams | None = None,
        raw: bool = False,
        **overrides: Any,
    ) -> Generator[Piece, None, None]:
        """As generate() for one prompt, token by token; close the iterator to stop early."""
        params = self.merged(params, overrides)
        sequence = self.sequence(self._prompt(prompt, messages, tools, params, raw), params)
        return (piece for _, piece in self.run([sequence]))

    def logits(self, token_ids: Tokens) -> Array:
        """float32 [T, vocab]: row t is what the model says after token t, all tokens given."""
        ids = self._ids(token_ids)
        with self._using() as backend:
            self._check_fits(len(ids))
            return backend.logits(ids)

    def session(self, system: str | None = None, tools: Messages | None = None) -> Session:
        """A conversation that keeps its state between turns."""
        return Session(self, system, tools)

    def tokenize(self, text: Text, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        tokenizer = self.prompter.needed_tokenizer()
        return tokenizer.encode(checked_text(text, "text"), add_special_tokens=add_special_tokens)

    def detokenize(self, token_ids: Tokens, *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ids = self._ids(token_ids).tolist()
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

    def close(self) -> None:
        """Free the backend and the bundle; running generations end with an error."""
        self._slots.close()
        with self._lock:
            if not self._closed:
                self._closed = True
                self._backend.close()
                self.bundle.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, sequences: Iterable[Running]) -> Iterator[tuple[Running, Piece]]:
        """Generate: every token of every sequence as it is made."""
        waiting, running = deque(sequences), list[Running]()
        try:
            while waiting or running:
                while waiting and (slot := self._slots.take(wait=not running)) is not None:
                    sequence = waiting.popleft()
                    sequence.admit(slot)
                    running.append(sequence)
                    yield from self._deliver([sequence], self._prefill(sequence))
                running = [sequence for sequence in running if sequence.holds_slot]
                if running:
                    yield from self._deliver(running, self._decode(running))
        finally:
            for sequence in running:
                self._release(sequence)

    def _prefill(self, sequence: Running) -> Array:
        """Read the prompt, from where a snapshot ends; logits [1, vocab]."""
        tokens = np.array(sequence.prompt.tokens, np.int32)
        slot, done, history = sequence.slot, 0, sequence.prompt.history
        with self._using() as backend:
            if sequence.resume:
                backend.restore(slot, sequence.resume.state)
                done = len(sequence.resume.tokens)
            if sequence.saves and done < history < len(tokens):
                backend.prefill(slot, tokens[done:history])
                sequence.saved.append(Saved(sequence.prompt.tokens[:history], backend.save(slot)))
                done = history
            logits = backend.prefill(slot, tokens[done:])
        sequence.prefilled()
        return logits[None]

    def _decode(self, running: list[Running]) -> Array:
        """Append each sequence's last token to its slot; logits [len(running), vocab]."""
        with self._using() as backend:
            return backend.decode([s.slot for s in running], [s.tokens[-1] for s in running])

    def _deliver(self, running: list[Running], logits: Array) -> Iterator[tuple[Running, Piece]]:
        """Sample a token from each row and hand it to its sequence."""
        with self._using() as backend:
            sampled = backend.sample(logits, [sequence.row() for sequence in running])
        for sequence, row, (token, logprob) in zip(running, logits, sampled, strict=True):
            piece = sequence.accept(token, logprob, row)
            if piece.finish_reason:
                self._release(sequence)
            yield sequence, piece

    def _release(self, sequence: Running) -> None:
        """Give a slot back, its state kept if a session wants it."""
        if not sequence.holds_slot or self._closed:
            return
        slot, sequence.holds_slot = sequence.slot, False
        with self._using() as backend:
            try:
                if sequence.saves and sequence.finish_reason:
                    held = (*sequence.prompt.tokens, *sequence.tokens)[: backend.tokens(slot)]
                    sequence.saved.append(Saved(held, backend.save(slot)))
            finally:
                backend.reset(slot)
                self._slots.give(slot)

    @contextmanager
    def _using(self) -> Iterator[Backend]:
        with self._lock:
            if self._closed:
                raise BackendError("the LLM is closed; load the bundle again")
            yield self._backend

    def _prompt(
        self, prompt: Any, messages: Any, tools: Any, params: SamplingParams, raw: bool
    ) -> Prompt:
        if (prompt is None) == (messages is None):
            raise InvalidRequest("give either a prompt or messages")
        if isinstance(prompt, str | bytes):
            return self.prompter.from_text(prompt, tools, raw=raw, thinking=params.thinking)
        if messages is not None:
            return self.prompter.from_messages(messages, tools, thinking=params.thinking)
        return self.prompter.from_tokens(self._ids(prompt).tolist(), tools)

    def sequence(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        resume: Saved | None = None,
        saves: bool = False,
    ) -> Running:
        """A request, checked and ready to run."""
        self._check_fits(len(prompt.tokens))
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
            resume=resume,
            saves=saves,
        )

    @staticmethod
    def merged(params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
        """Parameters with some of them replaced by name."""
        unknown = sorted(overrides.keys() - set(SamplingParams.names()))
        if unknown:
            known = ", ".join(SamplingParams.names())
            raise InvalidRequest(f"unknown parameter {unknown[0]!r}; SamplingParams has {known}")
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params is {type(params).__name__}; it must be SamplingParams")
        return replace(params or SamplingParams(), **overrides)

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

    def _ids(self, tokens: Any) -> Array:
        if isinstance(tokens, Mapping) or not isinstance(tokens, Iterable):
            raise InvalidRequest(f"prompt is {type(tokens).__name__}; give a text or token ids")
        ids = tokens if isinstance(tokens, np.ndarray) else list(tokens)
        if len(ids) == 0:
            raise InvalidRequest("prompt is empty; give at least one token")
        try:
            return check_tokens(ids, self._backend.vocab)
        except ValueError as error:  # NumPy's, for lists of unequal length
            raise InvalidRequest(f"prompt is no list of token ids: {error}") from error

    def _check_fits(self, tokens: int) -> None:
        if tokens > self.max_context:
            raise ContextExceeded(
                f"the prompt has {tokens} tokens, the context holds {self.max_context}; "
                "shorten it, or load with a larger max_context if the model allows"
            )


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
    """Tokens that end an answer."""
    value = bundle.generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BundleError(f"{bundle.path}: generation.json: eos_token_id is {value!r}; build again")
    return frozenset(ids)
