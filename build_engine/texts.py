# SPDX-License-Identifier: Apache-2.0
"""The small files of a bundle: tokenizer, chat template, and what ends and shapes a generation."""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from build_engine.checkpoint import DOWNLOAD_AGAIN, Checkpoint, parse_json, read_small
from edgecascade import manifest as layout
from edgecascade.errors import CheckpointError, InvalidRequest
from edgecascade.sampling import SamplingParams
from edgecascade.text.sandbox import compiled
from edgecascade.text.tokenizer import guarded

log = logging.getLogger(__name__)

# Turn ends that config.json of this family leaves out although a chat stops there.
TURN_ENDS = ("<|im_end|>",)
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TOKEN_KEYS = ("bos_token_id", "pad_token_id")
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def texts(checkpoint: Checkpoint, vocab: int) -> dict[str, bytes]:
    """tokenizer.json and the chat template, as far as the checkpoint has them; `vocab` is the
    model's.
    """
    made: dict[str, bytes] = {}
    tokenizer = checkpoint.folder / "tokenizer.json"
    if os.path.lexists(tokenizer):
        made[layout.TOKENIZER] = read_small(tokenizer)
        _check_tokenizer(tokenizer, made[layout.TOKENIZER], vocab)
    else:
        log.warning(
            "%s has no tokenizer.json: the bundle will take and give token ids only",
            checkpoint.folder,
        )
    template = _chat_template(checkpoint)
    if template is not None:
        try:
            compiled(template, f"the chat template of {checkpoint.folder}")
            made[layout.CHAT_TEMPLATE] = template.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"chat_template in {checkpoint.folder / TOKENIZER_CONFIG} is not Unicode: {error}"
            ) from error
        except ValueError as error:
            raise CheckpointError(
                f"{error}; correct it, or remove it: the family's own format takes its place"
            ) from error
    return made


def generation(checkpoint: Checkpoint, vocab: int) -> dict[str, Any]:
    """generation.json: every token id that ends an answer, and the sampling that the authors
    recommend.
    """
    config = checkpoint.config
    recommended = checkpoint.optional_json(GENERATION_CONFIG)
    ends = {
        *_ids("eos_token_id", config.get("eos_token_id")),
        *_ids("eos_token_id", recommended.get("eos_token_id")),
        *_turn_ends(checkpoint),
    }
    if ends and max(ends) >= vocab:
        raise CheckpointError(
            f"eos_token_id holds {max(ends)}, which would end no answer: config.json vocab_size is "
            f"{vocab}"
        )
    made: dict[str, Any] = {"eos_token_id": sorted(ends)}
    for key in TOKEN_KEYS:
        if key in recommended or key in config:
            made[key] = recommended.get(key, config.get(key))
            _ids(key, made[key])
    sampling = {key: recommended[key] for key in SAMPLING_KEYS if recommended.get(key) is not None}
    try:
        SamplingParams(**sampling)
    except InvalidRequest as error:
        raise CheckpointError(f"{checkpoint.folder / GENERATION_CONFIG}: {error}") from error
    made.update(sampling)
    drawn = recommended.get("do_sample")
    if not isinstance(drawn, bool | None):
        raise CheckpointError(
            f"{checkpoint.folder / GENERATION_CONFIG}: do_sample is {drawn!r}; expected true or "
            "false"
        )
    if drawn is False:
        made["temperature"] = 0.0
    return made


def _check_tokenizer(path: Path, data: bytes, vocab: int) -> None:
    """The library that will read it gives the ids that it was made with, and the model has them."""
    from tokenizers import Tokenizer

    added = parse_json(data, path).get("added_tokens", [])
    try:
        tokenizer = guarded(lambda: Tokenizer.from_buffer(data))
        guarded(lambda: tokenizer.encode("Go to 1."))  # reads what was only taken
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a tokenizer that the tokenizers library reads ({error}); "
            f"{DOWNLOAD_AGAIN}"
        ) from error
    ids = tokenizer.get_vocab(with_added_tokens=True)
    for token in added:  # the library numbers them anew where the vocabulary has lost a word
        if ids.get(token["content"]) != token["id"]:
            raise CheckpointError(
                f"{path} has {token['content']!r} as token {token['id']}, its vocabulary makes it "
                f"{ids.get(token['content'])}; {DOWNLOAD_AGAIN}"
            )
    last = max(ids, key=ids.__getitem__, default="")
    if ids.get(last, 0) >= vocab:
        raise CheckpointError(
            f"{path} has {last!r} as token {ids[last]}, but config.json vocab_size is {vocab}: "
            f"they are of different checkpoints; {DOWNLOAD_AGAIN}"
        )


def _chat_template(checkpoint: Checkpoint) -> str | None:
    path = checkpoint.folder / layout.CHAT_TEMPLATE
    if os.path.lexists(path):
        try:
            return read_small(path).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8: {error}") from error
    template = checkpoint.optional_json(TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):
        named = (entry for entry in template if isinstance(entry, dict))
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"chat_template in {checkpoint.folder / TOKENIZER_CONFIG} is "
            f"{type(template).__name__}; expected a text"
        )
    return template


def _turn_ends(checkpoint: Checkpoint) -> Iterable[int]:
    added = checkpoint.optional_json(layout.TOKENIZER).get("added_tokens", [])
    if not isinstance(added, list):
        raise CheckpointError(
            f"added_tokens in {checkpoint.folder / layout.TOKENIZER} is {type(added).__name__}; "
            "expected a list"
        )
    for token in added:
        if isinstance(token, dict) and token.get("content") in TURN_ENDS:
            yield from _ids("the id of a turn's end", token.get("id"))


def _ids(name: str, value: Any) -> list[int]:
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int and 0 <= item < 2**31 for item in ids):
        raise CheckpointError(f"{name} is {reprlib.repr(value)}; expected token ids")
    return ids
