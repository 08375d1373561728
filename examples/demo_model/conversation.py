# SPDX-License-Identifier: Apache-2.0
"""A conversation and its answer as text; the ways people write, and the state a robot reports."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import phrases as say
from grammar import Call, Clause, Grammar

TEMPLATE = Path(__file__).parent / "chat_template.jinja"
Message = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the assistant should think, say and do."""

    thought: str
    content: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A conversation that ends where the assistant is to answer, and the answer."""

    skill: str
    messages: tuple[Message, ...]
    thinking: bool
    answer: Answer
    schema: dict[str, Any] | None = None
    clauses: tuple[Clause, ...] = field(default=(), repr=False)

    def prompt(self) -> str:
        return template().render(
            messages=self.messages, add_generation_prompt=True, enable_thinking=self.thinking
        )

    def target(self) -> str:
        """The text after the prompt, up to the token that ends the turn."""
        thought = f"{self.answer.thought}\n</think>\n" if self.thinking else ""
        return thought + self.answer.content + in_xml(self.answer.calls) + "<|im_end|>"


@cache
def template() -> Any:
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE.read_text())


def in_xml(calls: Sequence[Call]) -> str:
    def value(x: Any) -> str:
        return x if isinstance(x, str) else json.dumps(x)

    return "".join(
        f"<tool_call>\n<function={call.name}>\n"
        + "".join(f"<parameter={k}>\n{value(v)}\n</parameter>\n" for k, v in call.arguments.items())
        + "</function>\n</tool_call>\n"
        for call in calls
    )


def in_openai(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def called(thought: str, calls: Sequence[Call]) -> Message:
    return {
        "role": "assistant",
        "content": "",
        "reasoning_content": thought,
        "tool_calls": in_openai(calls),
    }


def surface(g: Grammar, text: str) -> str:
    """Distraction, filler words, and the two ways of writing: speech-to-text or a sentence."""
    rng = g.rng
    if rng.random() < 0.12:
        aside = rng.choice(say.DISTRACTIONS)
        text = f"{aside}. {text}" if rng.random() < 0.6 else f"{text.rstrip('.?')}. {aside}"
    if rng.random() < 0.06:
        words = text.split(" ")
        words.insert(rng.randint(0, 1), rng.choice(say.FILLERS))
        text = " ".join(words)
    return written(g, text)


def written(g: Grammar, text: str) -> str:
    rng = g.rng
    if g.lower:
        return re.sub(r"[,.?!:](?=\s|$)", "", text).lower()
    if rng.random() < 0.75:
        text = text[0].upper() + text[1:]
        text += "" if text[-1] in '.?!"' else rng.choice((".", ".", "", "!"))
    return text


def framed(g: Grammar, text: str) -> str:
    """Politeness around a command; a text of several sentences takes it in front."""
    frame = g.rng.choice(say.FRAMES)
    if ". " in text or text.startswith(("before", "right before", "first", "to begin")):
        frame = g.rng.choice(("{c}", "{c}", "robot, {c}", "please {c}", "hey robot, {c}"))
    return frame.replace("{c}", text)


def command_text(g: Grammar, clause: Clause) -> str:
    return clause.text if clause.phrasing.sentence else framed(g, clause.text)


def state(g: Grammar, must: Sequence[str] = (), never: Sequence[str] = ()) -> dict[str, str]:
    rng = g.rng
    values = {
        "battery": f"{rng.randint(3, 100)}%",
        "location": g.place(),
        "holding": rng.choice(("nothing", g.object(), g.object())),
        "temperature": f"{rng.randint(18, 79)} C",
        "mode": rng.choice(("manual", "auto", "idle", "charging", "remote", "service")),
        "errors": rng.choice(("none", *say.ERRORS)),
    }
    keys = [k for k in values if k not in never and (k in must or rng.random() < 0.4)]
    rng.shuffle(keys)
    return {key: values[key] for key in keys}


def system(g: Grammar, values: dict[str, str], more: str = "") -> list[Message]:
    lines = [f"{key}: {value}" for key, value in values.items()]
    intro = g.rng.choice(say.INTROS)
    text = "\n".join([*([intro] if intro else []), *lines, *([more] if more else [])])
    return [{"role": "system", "content": text}] if text else []


def some_state(g: Grammar) -> list[Message]:
    return system(g, state(g) if g.rng.random() < 0.5 else {})


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def result(value: dict[str, Any]) -> Message:
    return {"role": "tool", "content": json.dumps(value)}


def act(clauses: Sequence[Clause]) -> Answer:
    calls = tuple(call for clause in clauses for call in clause.calls)
    thought = "\n".join(f"{i}. {call.thought}" for i, call in enumerate(calls, 1))
    return Answer(thought, calls=calls)
