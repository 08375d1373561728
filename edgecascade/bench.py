# SPDX-License-Identifier: Apache-2.0
"""How fast a bundle runs here, against what the memory of this machine allows."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import statistics
import subprocess
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edgecascade.backends._lib import cpu_library
from edgecascade.device.facts import facts
from edgecascade.doctor import processor_name
from edgecascade.errors import ContextExceeded
from edgecascade.inspect import describe
from edgecascade.llm import LLM
from edgecascade.version import package_version

START_TOKENS = 16  # of the prompt before decoding
SEED = 20
COLD: dict[str, Any] = {"ignore_eos": True, "reuse": False}


def bench(
    path: str | Path,
    *,
    prompt_tokens: int = 512,
    decode_tokens: int = 64,
    repeats: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """Measure a bundle; rates are medians of `repeats` runs on random tokens. `options` are those
    of LLM.load.

    Raises:
        ContextExceeded: when the bundle's context is too short for the tokens asked for.
    """
    start = perf_counter()
    with LLM.load(path, **options) as llm:
        load_s = perf_counter() - start
        needed = max(prompt_tokens + 1, START_TOKENS + decode_tokens)
        if needed > llm.max_context:
            raise ContextExceeded(
                f"the bench needs {needed} tokens, the context holds {llm.max_context}; "
                "lower --prompt-tokens or --decode-tokens"
            )
        first = llm.generate(_tokens(llm, START_TOKENS), max_tokens=1, **COLD)
        load_to_first_s = perf_counter() - start
        prefill = [_prefill_rate(llm, prompt_tokens) for _ in range(repeats)]
        decode = [_decode_rate(llm, decode_tokens) for _ in range(repeats)]
        content = describe(llm.bundle)
        content |= {"backend": llm.backend, "threads": llm.threads}
    token_bytes = content["read_bytes_per_token"] + 2 * content["state_bytes_per_session"]
    rate = statistics.median(decode)
    bandwidth = _read_bytes_per_s(content["backend"])
    return {
        "bundle_id": content["id"],
        "precision": content["precision"],
        "parameters": content["parameters"],
        "weight_bytes": content["weight_bytes"],
        "backend": content["backend"],
        "threads": content["threads"],
        "load_s": load_s,
        "first_token_s": first.timings.first_token_s,
        "load_to_first_token_s": load_to_first_s,
        "prompt_tokens": prompt_tokens,
        "prefill_tokens_per_s": statistics.median(prefill),
        "decode_tokens": decode_tokens,
        "decode_tokens_per_s": rate,
        "bytes_per_token": token_bytes,
        "read_bytes_per_s": bandwidth,
        "share_of_roofline": rate * token_bytes / bandwidth if bandwidth else None,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **circumstances(),
    }


def _prefill_rate(llm: LLM, tokens: int) -> float:
    answer = llm.generate(_tokens(llm, tokens), max_tokens=1, seed=SEED, **COLD)
    return tokens / answer.timings.prefill_s


def _decode_rate(llm: LLM, tokens: int) -> float:
    prompt = _tokens(llm, START_TOKENS)
    answer = llm.generate(prompt, max_tokens=tokens, seed=SEED, **COLD)
    return answer.timings.decode_tokens_per_s


def _tokens(llm: LLM, count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(SEED).integers(llm.vocab, size=count).tolist()
    return ids


def _read_bytes_per_s(backend: str) -> float:
    """What the processor reads from memory, 0 where the backend is not the CPU's kernels."""
    return 0.0 if backend != "cpu" else float(cpu_library().query().read_bytes_per_s)


def circumstances() -> dict[str, Any]:
    """Where and when something was measured."""
    device = facts()
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": f"{platform.system()} {platform.machine()}",
        "version": package_version(),
        "commit": _commit(),
        "device": {**device.description(), **device.telemetry()},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _commit() -> str | None:
    """The commit of a source checkout, None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
