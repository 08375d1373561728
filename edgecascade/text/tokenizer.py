# SPDX-License-Identifier: Apache-2.0
"""A bundle's tokenizer.json through Hugging Face's `tokenizers`; the bytes behind each token."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from edgecascade.errors import BundleError, InvalidRequest

T = TypeVar("T")

COPY = "copy tokenizer.json from the checkpoint and build again"

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a token of one byte, where the vocabulary falls back


class Tokenizer:
    """Text to token ids and back, as a tokenizer.json says: a file, or what is in it."""

    def __init__(self, source: Path | bytes) -> None:
        # Imported here: a bundle without a tokenizer, and `edgecascade --help`, do not need it.
        from tokenizers import Tokenizer as Fast

        name = str(source) if isinstance(source, Path) else "the bundle's tokenizer.json"
        try:
            data = source.read_bytes() if isinstance(source, Path) else source
            # from_file takes no odd file names
            self._fast = guarded(lambda: Fast.from_buffer(data))
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{name} is not a tokenizer that the tokenizers library reads ({error}); {COPY}"
            ) from error
        self._fast.no_truncation()
        self._fast.no_padding()
        added = self._fast.get_added_tokens_decoder()
        self.special = frozenset(token for token, info in added.items() if info.special)
        decoder = self._fast.decoder
        self._byte_level = _uses_byte_level(json.loads(decoder.__getstate__()) if decoder else None)
        self._bytes = lru_cache(maxsize=1 << 16)(self._token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; marks such as <|im_start|> in it become their special tokens."""
        try:
            made = guarded(lambda: self._fast.encode(text, add_special_tokens=add_special_tokens))
        except ValueError as error:
            raise InvalidRequest(f"the bundle's tokenizer fails on this text: {error}") from error
        ids: list[int] = made.ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(
            self.token_bytes(token, first=index == 0)
            for index, token in enumerate(tokens)
            if not (skip_special and token in self.special)
        ).decode("utf-8", "replace")

    def token_bytes(self, token: int, *, first: bool = False) -> bytes:
        """The bytes one token stands for; none for an id that the vocabulary does not hold."""
        return self._bytes(token, first)

    def token_id(self, text: str) -> int | None:
        """The id of a token by its exact text, None if there is none."""
        token: int | None = self._fast.token_to_id(text)
        return token

    def token_text(self, token: int | None) -> str | None:
        """The exact text of a token, None if there is none."""
        text: str | None = None if token is None else self._fast.id_to_token(token)
        return text

    @property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer knows."""
        size: int = self._fast.get_vocab_size(with_added_tokens=True)
        return size

    def _token_bytes(self, token: int, first: bool) -> bytes:
        text = self.token_text(token)
        if text is None:
            return b""
        if self._byte_level:
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in text)
            except KeyError:  # an added token, written in plain characters
                return text.encode()
        if byte := _BYTE.fullmatch(text):
            return bytes.fromhex(byte[1])
        # Decoders that mark word starts drop the first one's space; a neighbour keeps it.
        alone = self._decoded([token])
        if first:
            return alone.encode()
        return self._decoded([token, token]).removeprefix(alone).encode()

    def _decoded(self, tokens: list[int]) -> str:
        try:
            return str(guarded(lambda: self._fast.decode(tokens, skip_special_tokens=False)))
        except ValueError as error:
            raise BundleError(
                f"the bundle's tokenizer.json fails on token {tokens[0]}: {error}; {COPY}"
            ) from error


def guarded(call: Callable[[], T]) -> T:
    """What a call of the tokenizers library returns.

    Raises:
        ValueError: for whatever it raises: errors without a class, and panics, which are no
        Exception, on files that it has taken.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(str(error)) from error


def checked_text(text: str | bytes, what: str) -> str:
    """A text that has a UTF-8 form.

    Raises:
        InvalidRequest: naming the place that has none.
    """
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"{what} is not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start}; "
                "re-encode it as UTF-8"
            ) from error
    if not isinstance(text, str):
        raise InvalidRequest(f"{what} is {type(text).__name__}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{what} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at "
            f"character {error.start}; it came from bytes that are not UTF-8"
        ) from error
    return text


def _uses_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(
        _uses_byte_level(part) for part in decoder.get("decoders", ())
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: a printable Latin-1 byte is itself, the rest follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_CHAR = _byte_alphabet()
