# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905  (words and names read best as one text)
"""Scenes: each draws a conversation with the robot and the one right answer. Skills are the rows of
the evaluation's table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import phrases as say
from conversation import (
    Answer,
    Message,
    act,
    called,
    command_text,
    framed,
    result,
    some_state,
    state,
    surface,
    system,
    user,
    written,
)
from grammar import Call, Clause, Grammar, speak, tell, with_it
from prose import order, prose

SKILLS = {
    "motion": ("move", "turn", "set_speed", "dock", "stop"),
    "go_to": ("go_to",),
    "handling": ("pick", "pick_from", "put", "gripper"),
    "deliver": ("deliver", "deliver_place"),
    "camera": ("find", "photo"),
    "people": ("follow", "speak", "tell"),
    "other": ("light", "wait"),
}
SKILL_OF = {kind: skill for skill, kinds in SKILLS.items() for kind in kinds}
WITH_NOUNS = """go_to pick pick_from put deliver deliver_place find photo follow tell fetch transfer
search""".split()
WEIGHTS = {
    "move": 12,
    "turn": 9,
    "go_to": 10,
    "pick": 7,
    "pick_from": 5,
    "put": 7,
    "deliver": 8,
    "deliver_place": 3,
    "find": 5,
    "gripper": 3,
    "light": 5,
    "speak": 4,
    "tell": 4,
    "wait": 6,
    "photo": 5,
    "follow": 4,
    "set_speed": 4,
    "dock": 2,
    "stop": 2,
}
Scene = tuple[str, list[Message], Answer]


def kind_of(g: Grammar) -> str:
    kinds = [k for k in WEIGHTS if not g.held_nouns or k in WITH_NOUNS]
    return g.rng.choices(kinds, [WEIGHTS[k] for k in kinds])[0]


def single(g: Grammar) -> Scene:
    kind = kind_of(g)
    if kind in ("speak", "tell") and g.rng.random() < 0.4:
        return unquoted(g, kind)
    clause = g.clause(kind)
    messages = [*some_state(g), user(surface(g, command_text(g, clause)))]
    return SKILL_OF[kind], messages, act([clause])


def unquoted(g: Grammar, kind: str) -> Scene:
    """Words to be said run to the end: nothing may follow them."""
    clause = (speak if kind == "speak" else tell)(g, quoted=False)
    g.drawn.append(clause)
    before = g.rng.choice(("", "", "please ", "robot, ", "now ", "hey robot, "))
    text = before + clause.text
    text = re.sub(r"[,:](?=\s)", "", text).lower() if g.lower else text[0].upper() + text[1:]
    return "people", [*some_state(g), user(text)], act([clause])


def plan(g: Grammar) -> Scene:
    """Two to four steps in a row; "it" is the thing of the step before."""
    if g.rng.random() < 0.25:
        clause = g.clause(g.rng.choice(("fetch", "fetch", "transfer", "search")))
        return "plan", [*some_state(g), user(surface(g, command_text(g, clause)))], act([clause])
    count = g.rng.choices((2, 3, 4), (5, 3, 2))[0]
    clauses: list[Clause] = []
    while len(clauses) < count:
        clause = g.clause(kind_of(g))
        if clause.phrasing.sentence:
            continue
        clauses.append(clause)
        if clause.kind in ("pick", "find") and len(clauses) < count and g.rng.random() < 0.6:
            clauses.append(with_it(g, clause.object))
    text = joined(g, clauses)
    return "plan", [*some_state(g), user(surface(g, framed(g, text)))], act(clauses)


def joined(g: Grammar, clauses: Sequence[Clause]) -> str:
    rng = g.rng
    texts = [clause.text for clause in clauses]
    pronoun = any(clause.phrasing.id.startswith(("put_it", "deliver_it")) for clause in clauses)
    if len(texts) == 2 and not pronoun and rng.random() < 0.25:
        form = g.phrase(say.REVERSED)
        return form.text.replace("{a}", texts[0]).replace("{b}", texts[1])
    while True:
        lead, last = rng.randrange(len(say.LEADS)), rng.randrange(len(say.LASTS))
        middles = [rng.randrange(len(say.MIDDLES)) for _ in texts[2:]]
        # Ways to join are held out as phrasings are.
        held = (lead + 2 * last + (middles[0] if middles else 0)) % 5 == 2
        if held == g.held_phrasings:
            break
    text = say.LEADS[lead] + texts[0]
    for middle, step in zip(middles, texts[1:-1], strict=True):
        text += say.MIDDLES[middle] + step
    return text + say.LASTS[last] + texts[-1]


def status(g: Grammar) -> Scene:
    """A question about the state: answered from the system message, or asked of the robot."""
    key = g.rng.choice(list(say.STATUS))
    form = say.STATUS[key][1]
    question = g.phrase(say.STATUS_PHRASINGS[key])
    asked = g.fill(question) + (
        "?" if question.text.startswith(("what", "where", "how", "which", "are", "do")) else ""
    )
    asked = g.rng.choice(("", "", "", "robot, ", "hey, ", "please tell me, ")) + asked
    text = surface(g, asked)
    if g.rng.random() < 0.65:
        values = state(g, must=(key,))
        answer = Answer(f"{key}: {values[key]}", form.format(values[key]))
        return "status", [*system(g, values), user(text)], answer
    values = state(g, never=(key,)) if g.rng.random() < 0.6 else {}
    call = Call("get_state", {"item": key}, f"{key} is not known: get_state {key}")
    messages = [*system(g, values), user(text)]
    if g.rng.random() < 0.5:
        return "status", messages, Answer(call.thought, calls=(call,))
    value = state(g, must=(key,))[key]
    messages += [called(call.thought, [call]), result({key: value})]
    return "status", messages, Answer(f"{key}: {value}", form.format(value))


def outcome(g: Grammar) -> Scene:
    """The tools have answered: report success, the failure, or what was found."""
    rng = g.rng
    if rng.random() < 0.3:
        clause = g.clause("find")
        found = g.surface() if rng.random() < 0.5 else g.place()
        results, answer = (
            [{"found": False}],
            Answer("not found", f"I could not find the {clause.object}."),
        )
        if rng.random() < 0.75:
            results = [{"found": True, "place": found}]
            answer = Answer(f"found: {found}", f"I found the {clause.object} here: {found}.")
        clauses = [clause]
    else:
        clauses = [g.clause(kind_of(g)) for _ in range(rng.choice((1, 1, 2)))]
        while any(c.phrasing.sentence for c in clauses):
            clauses = [g.clause(kind_of(g)) for _ in clauses]
        results, answer = [{"status": "ok"} for _ in clauses], Answer("all done", "Done.")
        if rng.random() < 0.4:
            reason, step = rng.choice(say.ERRORS), rng.randrange(len(clauses))
            results[step] = {"status": "error", "reason": reason}
            answer = Answer(f"step {step + 1}: {reason}", f"I could not finish: {reason}.")
    text = command_text(g, clauses[0]) if len(clauses) == 1 else framed(g, joined(g, clauses))
    done = act(clauses)
    messages = [*some_state(g), user(surface(g, text)), called(done.thought, done.calls)]
    return "result", [*messages, *map(result, results)], answer


def follow_up(g: Grammar) -> Scene:
    """ "Now put it on the shelf", said after the thing was picked up."""
    first = g.clause(g.rng.choice(("pick", "pick_from")))
    second = with_it(g, first.object)
    done = act([first])
    messages = [
        *some_state(g),
        user(surface(g, framed(g, first.text))),
        called(done.thought, done.calls),
        result({"status": "ok"}),
        {"role": "assistant", "content": "Done."},
        user(surface(g, framed(g, second.text))),
    ]
    return "plan", messages, act([second])


def chat(g: Grammar) -> Scene:
    texts, answer = g.rng.choice(say.CHAT)
    text = written(g, g.rng.choice(texts.split("|")))
    return "chat", [*some_state(g), user(text)], Answer("small talk", answer)


def question(g: Grammar) -> Scene:
    """What is missing is asked for, and so are metric units."""
    rng = g.rng
    if rng.random() < 0.3:
        slots = {
            "k": str(rng.randint(2, 99)),
            "lr": rng.choice(("left", "right")),
            "dir": rng.choice(say.DIRECTIONS[rng.choice(list(say.DIRECTIONS))]),
        }
        text = g.fill(g.phrase(say.OTHER_UNITS), **slots)
        answer = Answer("other units", say.ASK_METRIC)
    else:
        choices, ask, what = rng.choice(say.MISSING_PHRASINGS)
        text, answer = g.fill(g.phrase(choices)), Answer(f"missing: {what}", ask)
    return "question", [*some_state(g), user(surface(g, framed(g, text)))], answer


def refusal(g: Grammar) -> Scene:
    choices, answer = g.rng.choice(
        (
            (say.UNSAFE, Answer("not safe", say.REFUSE_UNSAFE)),
            (say.UNSAFE, Answer("not safe", say.REFUSE_UNSAFE)),
            (say.IMPOSSIBLE, Answer("not possible", say.REFUSE_IMPOSSIBLE)),
        )
    )
    name = g.person()
    slots = {
        "w": g.rng.choice((name, name, "me", "the people", "the dog", "somebody")),
        "n": name,
        "o": g.with_article(g.object()),
        "p": g.place(),
        "t": g.rng.choice(say.TARGETS),
    }
    text = g.fill(g.phrase(choices), **slots)
    return "refusal", [*some_state(g), user(surface(g, framed(g, text)))], answer


UNKNOWN = Answer("not a robot task", say.REFUSE_OTHER)


def off_topic(g: Grammar) -> Scene:
    slots = {
        "x": g.rng.choice(say.TOPICS),
        "k": str(g.rng.randint(2, 99)),
        "k2": str(g.rng.randint(2, 99)),
    }
    text = g.fill(g.phrase(say.OFF_TOPIC), **slots)
    return "unknown", [*some_state(g), user(surface(g, text))], UNKNOWN


def nonsense(g: Grammar) -> Scene:
    return "unknown", [*some_state(g), user(nonsense_text(g) or "?")], UNKNOWN


def nonsense_text(g: Grammar) -> str:
    rng, draw = g.rng, g.rng.random()
    count = rng.choice((1, 2, 3, 4, 6, 10, 20))
    if g.worldly and rng.random() < 0.6:
        return written(g, order(rng) if draw < 0.4 else prose(rng, rng.randint(3, 60)))
    if draw < 0.35:
        words = rng.choice(say.FOREIGN).split(" ")
        if rng.random() < 0.4:
            words += rng.choice(say.FOREIGN).split(" ")
            rng.shuffle(words)
        return written(g, " ".join(words))
    if draw < 0.5:
        letters = "abcdefghijklmnopqrstuvwxyz" if rng.random() < 0.6 else "asdfghjkl;qwertzuiop 123"
        return " ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(count))
    if draw < 0.62:
        return written(g, " ".join(g.invented() for _ in range(count)))
    if draw < 0.72:
        return "".join(rng.choices("0123456789.,;:-+*/()[]{}<>=!?#%&$@\"'_|~ \n", k=4 * count))
    if draw < 0.78:
        return "".join(
            chr(
                rng.choice(
                    (
                        rng.randint(0xA1, 0x17F),
                        rng.randint(0x370, 0x5FF),
                        rng.randint(0x3040, 0x9FFF),
                        rng.randint(0x1F300, 0x1F64F),
                    )
                )
            )
            for _ in range(count)
        )
    if draw < 0.9:
        pool = (say.OBJECTS, say.PLACES, say.ADJECTIVES, say.SAYING_WORDS, say.COLORS)
        return written(g, " ".join(rng.choice(rng.choice(pool)) for _ in range(count)))
    return written(g, rng.choice((*say.DISTRACTIONS, *say.SAYINGS)))


def long_text(g: Grammar, words: int) -> str:
    """Much talk and no command."""
    if g.worldly and g.rng.random() < 0.7:
        return prose(g.rng, words)
    parts: list[str] = []
    while sum(part.count(" ") + 1 for part in parts) < words:
        draw = g.rng.random()
        if draw < 0.4:
            parts.append(g.rng.choice(say.DISTRACTIONS) + ".")
        elif draw < 0.7:
            parts.append(nonsense_text(g))
        else:
            parts.append(" ".join(g.rng.choice(say.SAYING_WORDS) for _ in range(12)) + ".")
    return " ".join(" ".join(parts).split(" ")[:words])


def rambling(g: Grammar) -> Scene:
    return "unknown", [*some_state(g), user(long_text(g, g.rng.randint(30, 90)))], UNKNOWN


CALLS_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "arguments": {"type": "object"}},
    },
}
STATE_TYPES = {"battery": "number", "temperature": "number"}


def asks_json(schema: dict[str, Any]) -> str:
    return f"Answer in JSON: {json.dumps(schema)}"


def as_json(g: Grammar) -> tuple[str, list[Message], Answer, dict[str, Any]]:
    rng = g.rng
    if rng.random() < 0.5:
        clauses = [g.clause(kind_of(g)) for _ in range(rng.choice((1, 1, 2)))]
        while any(c.phrasing.sentence for c in clauses):
            clauses = [g.clause(kind_of(g)) for _ in clauses]
        text = clauses[0].text if len(clauses) == 1 else joined(g, clauses)
        done = act(clauses)
        content = json.dumps(
            [{"name": c.name, "arguments": c.arguments} for c in done.calls], ensure_ascii=False
        )
        values = state(g) if rng.random() < 0.3 else {}
        messages = [*system(g, values, asks_json(CALLS_SCHEMA)), user(surface(g, framed(g, text)))]
        return "json", messages, Answer(done.thought, content), CALLS_SCHEMA
    keys = rng.sample(list(say.STATUS), rng.choice((1, 2, 2, 3)))
    values = state(g, must=keys)
    properties = {key: {"type": STATE_TYPES.get(key, "string")} for key in keys}
    schema = {"type": "object", "properties": properties, "required": keys}
    found = {k: number_or_text(values[k]) if k in STATE_TYPES else values[k] for k in keys}
    text = surface(
        g,
        rng.choice(
            ("report your state", "give me your state", "what is your state?", "status report")
        ),
    )
    thought = "\n".join(f"{key}: {values[key]}" for key in keys)
    answer = Answer(thought, json.dumps(found, ensure_ascii=False))
    return "json", [*system(g, values, asks_json(schema)), user(text)], answer, schema


def number_or_text(text: str) -> int:
    return int(re.match(r"\d+", text).group())  # type: ignore[union-attr]


SCENES: dict[str, Callable[[Grammar], Any]] = {
    each.__name__: each
    for each in (
        single,
        plan,
        status,
        outcome,
        follow_up,
        chat,
        question,
        refusal,
        off_topic,
        nonsense,
        rambling,
        as_json,
    )
}
