# SPDX-License-Identifier: Apache-2.0
"""The program that tries a bundle in a process of its own: `python -m edgecascade.fleet.trial`.

It reads one JSON object from stdin and writes one line of JSON after each step, so that whoever
started it knows where it hung or died:

    {"step": "loaded", "load_s": 1.5, "backend": "cpu"}
    {"step": "answer", "number": 0, "wrong": "", "tok_s": 21.0}
    {"step": "done"}

Without prompts it only says whether the bundle has the engine that this machine needs:

    {"step": "engine", "current": true}
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edgecascade.errors import EdgeCascadeError
from edgecascade.fleet import strict
from edgecascade.fleet.release import GoldenPrompt

if TYPE_CHECKING:
    from edgecascade.completion import Completion
    from edgecascade.llm import LLM

MAX_SHOWN = 200  # characters of an answer that is reported


def main() -> int:
    """Do what stdin asks for; 0 when it could be done, whatever the answers were."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    asked = json.load(sys.stdin)
    out = sys.stdout
    sys.stdout = sys.stderr  # nothing but steps may come out of it
    try:
        _run(asked, out)
    except EdgeCascadeError as error:
        _say(out, step="failed", code=error.code, message=str(error)[:1000])
    return 0


def _run(asked: dict[str, Any], out: IO[str]) -> None:
    from edgecascade.llm import LLM

    if "prompts" not in asked:
        _say(out, step="engine", current=LLM.has_engine(asked["folder"]))
        return
    prompts = [strict.read(GoldenPrompt, raw, "prompt") for raw in asked["prompts"]]
    begin = time.monotonic()
    with LLM.load(asked["folder"], slots=1, snapshot_bytes=0, **asked["options"]) as llm:
        _say(out, step="loaded", load_s=time.monotonic() - begin, backend=llm.backend)
        for number, prompt in enumerate(prompts):
            answer = _ask(llm, prompt)
            rate = answer.timings.decode_tokens_per_s if len(answer.token_ids) > 1 else None
            _say(out, step="answer", number=number, wrong=wrong(prompt, answer), tok_s=rate)
    _say(out, step="done")


def _ask(llm: LLM, golden: GoldenPrompt) -> Completion:
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": golden.max_tokens}
    if golden.messages:
        options["messages"] = list(golden.messages)
    elif golden.token_ids:
        options["prompt"] = np.array(golden.token_ids, np.int32)
    else:
        options |= {"prompt": golden.prompt, "raw": True}
    answer: Completion = llm.generate(**options)
    return answer


def wrong(golden: GoldenPrompt, answer: Completion) -> str:
    """What is wrong with an answer, or nothing."""
    wanted = list(golden.tokens)
    got = list(answer.token_ids[: len(wanted)])
    if got != wanted:
        at = next(
            (i for i, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]),
            min(len(got), len(wanted)),
        )
        return f"token {at} is {got[at : at + 1]}, expected {wanted[at : at + 1]}"
    text = answer.reasoning + answer.text
    missing = [part for part in golden.contains if part not in text]
    return f"{missing[0]!r:.100} is not in {text[:MAX_SHOWN]!r}" if missing else ""


def _say(out: IO[str], **step: Any) -> None:
    print(json.dumps(step), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main())
