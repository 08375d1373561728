# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905  (words and names read best as one text)
"""Commands: a sentence, and the one tool call that it means. Slots, numbers, names, and plans."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import phrases as say
import wider

ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
HALVES = (
    ("half a meter", 0.5),
    ("one and a half meters", 1.5),
    ("a meter and a half", 1.5),
    ("two and a half meters", 2.5),
    ("three and a half meters", 3.5),
    ("a quarter of a meter", 0.25),
    ("a meter", 1),
)
ROOMS = ("room {}", "station {}", "aisle {}", "bay {}", "gate {}", "floor {}", "zone {}")


@dataclass(frozen=True)
class Call:
    """A tool call and the line of thought that leads to it."""

    name: str
    arguments: dict[str, Any]
    thought: str


@dataclass(frozen=True)
class Clause:
    """A command in words, the calls it means, and the phrasing it was made from."""

    text: str
    calls: tuple[Call, ...]
    phrasing: say.Phrasing
    kind: str
    object: str = ""  # what "it" means in the next clause


@dataclass
class Grammar:
    """Draws words. `held_phrasings` and `held_nouns` draw from what training never sees."""

    rng: random.Random
    held_phrasings: bool = False
    held_nouns: bool = False
    typos: float = 0.0  # share of clauses with one misspelt word
    lower: bool = False  # as speech recognition writes
    wide: bool = False  # many more nouns, as in the second part of training
    compounds: bool = False  # words made of words, as in the third
    worldly: bool = False  # English that is no command, and misspelt numbers and directions
    drawn: list[Clause] = field(default_factory=list)

    def noun(
        self, seen: Sequence[str], more: Sequence[str], held: Sequence[str], invented: float
    ) -> str:
        rng = self.rng
        if self.held_nouns:
            return rng.choice(held)
        draw = rng.random()
        if self.wide and draw < 0.35:
            seen = more
        elif draw >= (0.8 if self.wide else invented):
            return rng.choice(seen)
        word = rng.choice(more) if seen is more else self.invented()
        if rng.random() < 0.7:
            return word
        if self.compounds and rng.random() < 0.5:
            seen = more
        known = rng.choice(seen).split()
        return f"{word} {known[-1]}" if rng.random() < 0.6 else f"{known[0]} {word}"

    def invented(self) -> str:
        """A word that does not exist: it can only be copied, never recalled."""
        while (word := self._invented()) in FORBIDDEN:
            pass
        return word

    def _invented(self) -> str:
        rng = self.rng
        if self.compounds and rng.random() < 0.45:
            return rng.choice(wider.PARTS) + rng.choice(wider.PARTS)
        if self.wide and rng.random() < 0.3:
            return self.letters()
        if rng.random() < 0.3:
            syllables = [rng.choice(say.SYLLABLES) for _ in range(rng.choice((2, 2, 3)))]
            return "".join(syllables) + rng.choice(("", "", "n", "r", "t", "x", "s"))
        word = "".join(
            rng.choice(say.ONSETS) + rng.choice(say.VOWELS) + rng.choice(say.CODAS)
            for _ in range(rng.choice((1, 1, 1, 2, 2)))
        )
        return word + rng.choice(say.ENDINGS)

    def letters(self) -> str:
        """Letters at random, with vowels often enough to be spoken."""
        rng, word = self.rng, ""
        for _ in range(rng.randint(3, 9)):
            after_consonant = word and word[-1] not in wider.VOWELS
            word += rng.choice(
                wider.VOWELS if after_consonant and rng.random() < 0.6 else wider.LETTERS
            )
        return word

    def object(self) -> str:
        rng = self.rng
        name = self.noun(say.OBJECTS, wider.OBJECTS, say.OBJECTS_HELD, 0.4)
        draw = rng.random()
        if draw < 0.3:
            return f"{rng.choice(say.COLORS)} {name}"
        if draw < 0.4:
            return f"{rng.choice(say.ADJECTIVES)} {name}"
        if draw < 0.45:
            return f"{rng.choice(say.ADJECTIVES)} {rng.choice(say.COLORS)} {name}"
        return name

    def place(self) -> str:
        rng = self.rng
        if rng.random() < 0.15 and not self.held_nouns:
            number = rng.choice((rng.randint(1, 9), rng.randint(10, 99), rng.randint(100, 499)))
            return rng.choice(ROOMS).format(rng.choice((number, number, rng.choice("abcdefgh"))))
        return self.noun(say.PLACES, wider.PLACES, say.PLACES_HELD, 0.4)

    def surface(self) -> str:
        rng = self.rng
        if rng.random() < 0.1 and not self.held_nouns:
            return f"{rng.choice(('shelf', 'table', 'rack', 'bin'))} {rng.randint(1, 30)}"
        return self.noun(say.SURFACES, wider.SURFACES, say.SURFACES_HELD, 0.25)

    def person(self) -> str:
        rng = self.rng
        if self.held_nouns:
            name = rng.choice(say.NAMES_HELD)
        else:
            known = wider.NAMES if rng.random() < 0.6 and self.wide else say.NAMES
            name = rng.choice(known)
            if rng.random() < 0.4:
                name = self.invented().capitalize()
        return name.lower() if self.lower else name

    def somebody(self) -> tuple[str, str]:
        """In words and as an argument."""
        if self.rng.random() < 0.4 and not self.held_nouns:
            return "me", "user"
        name = self.person()
        while self.held_nouns and name.startswith("the "):
            name = self.person()  # to the surgeon, to the atrium: an unknown word may be either
        return name, name

    def target(self) -> str:
        draw = self.rng.random()
        if draw < 0.3 and not self.held_nouns:
            return self.rng.choice(say.TARGETS)
        return self.object() if draw < 0.7 else self.place()

    def saying(self) -> str:
        rng = self.rng
        if rng.random() < 0.45:
            return rng.choice(say.SAYINGS)
        return " ".join(rng.choice(say.SAYING_WORDS) for _ in range(rng.randint(2, 6)))

    def with_article(self, noun: str) -> str:
        return f"{self.rng.choice(('the', 'the', 'the', 'that', 'my', 'this'))} {noun}"

    def distance(self) -> tuple[str, float, str]:
        """In words, in metres, and how one leads to the other where that takes a step."""
        rng, draw = self.rng, self.rng.random()
        metres = rng.choice(("m", "m", "meters", "metres"))
        if draw < 0.3:
            count = rng.randint(1, 20)
            if rng.random() < 0.5:
                return f"{in_words(count)} {'meter' if count == 1 else 'meters'}", count, ""
            return f"{count} {metres}", count, ""
        if draw < 0.6:
            value = rng.choice((rng.randint(1, 99) / 10, rng.randint(1, 399) / 100))
            return f"{number(value)} {metres}", value, ""
        if draw < 0.7:
            return (*rng.choice(HALVES), "")
        count = rng.choice((rng.randint(1, 19) * 5, rng.randint(1, 30) * 10, rng.randint(2, 99)))
        words = in_words(count) if rng.random() < 0.3 else str(count)
        unit = rng.choice(("cm", "cm", "centimeters", "centimetres"))
        return f"{words} {unit}", count / 100, f"{count} cm = {number(count / 100)} m"

    def angle(self) -> tuple[str, int]:
        rng = self.rng
        value = rng.choice(
            (rng.choice((30, 45, 60, 90, 180)), rng.randint(1, 36) * 5, rng.randint(5, 180))
        )
        if rng.random() < 0.3:
            return f"{in_words(value)} degrees", value
        return f"{value}{rng.choice((' degrees', ' degrees', ' deg', '°'))}", value

    def duration(self) -> tuple[str, int, str]:
        rng = self.rng
        minutes = rng.random() < 0.3
        count = (
            rng.randint(1, 15) if minutes else rng.choice((rng.randint(1, 60), rng.randint(1, 12)))
        )
        unit = "minute" if minutes else "second"
        if rng.random() < 0.35:
            words = f"{in_words(count)} {unit}{'' if count == 1 else 's'}"
        else:
            short = "min" if minutes else "s"
            words = f"{count} {rng.choice((unit + 's', unit + 's', short)) if count > 1 else unit}"
        if minutes:
            return words, count * 60, f"{count} min = {count * 60} s"
        return words, count, ""

    def speed(self) -> tuple[str, float]:
        rng = self.rng
        value = rng.choice((rng.randint(1, 20) / 10, rng.choice((0.25, 0.5, 0.75, 1, 1.5, 2))))
        return f"{number(value)} {rng.choice(('m/s', 'm/s', 'meters per second'))}", value

    def clause(self, kind: str) -> Clause:
        """One command of a kind; `drawn` keeps it, for the tests that look for leaks."""
        made = KINDS[kind](self)
        self.drawn.append(made)
        return made

    def phrase(self, choices: Sequence[say.Phrasing]) -> say.Phrasing:
        return self.rng.choice([each for each in choices if each.held == self.held_phrasings])

    def made(
        self, key: str, kind: str, calls: Sequence[Call], object: str = "", **slots: str
    ) -> Clause:
        phrasing = self.phrase(say.COMMANDS[key])
        return Clause(self.fill(phrasing, **slots), tuple(calls), phrasing, kind, object)

    def fill(self, phrasing: say.Phrasing, **slots: str) -> str:
        text = phrasing.text
        if self.typos and self.rng.random() < self.typos:
            text = misspelt(self.rng, text)
        for slot, value in slots.items():
            if self.worldly and slot in MISSPELT and self.rng.random() < 0.08:
                value = misspelt(self.rng, value)
            if slot == "p" and NUMBERED.search(value):
                text = text.replace("the {p}", value)
            if slot in ("s", "s2") and NUMBERED.search(value):
                text = text.replace(f"the {{{slot}}}", value)
            text = text.replace(f"{{{slot}}}", value)
        return text


MISSPELT = ("dir", "lr", "dist", "ang", "dur", "c", "sp")
NUMBERED = re.compile(r" (\d+|[a-h])$")
FORBIDDEN = {part.lower() for noun in say.HELD_NOUNS for part in noun.split()}


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def plain(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 2)


def in_words(count: int) -> str:
    if count < 20:
        return ONES[count]
    if count < 100:
        return TENS[count // 10] + (f" {ONES[count % 10]}" if count % 10 else "")
    rest = f" and {in_words(count % 100)}" if count % 100 else ""
    return f"{ONES[count // 100]} hundred{rest}"


def misspelt(rng: random.Random, text: str) -> str:
    """One letter of one longer word lost, doubled or swapped with the next."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if not places:
        return text
    at = rng.choice(places)
    word, i = words[at], rng.randrange(1, len(words[at]) - 1)
    words[at] = rng.choice(
        (
            word[:i] + word[i + 1 :],
            word[: i + 1] + word[i:],
            word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        )
    )
    return " ".join(words)


def move(g: Grammar) -> Clause:
    words, value, step = g.distance()
    direction = g.rng.choice(("forward", "forward", "backward", "left", "right"))
    key = "move"
    if direction in ("forward", "backward") and g.rng.random() < 0.25:
        key = f"move_{direction}"
    arguments = {"direction": direction, "distance": plain(value)}
    thought = f"{step}: " if step else ""
    call = Call("move", arguments, f"{thought}move {direction} {number(value)}")
    return g.made(key, "move", [call], dist=words, dir=g.rng.choice(say.DIRECTIONS[direction]))


def turn(g: Grammar) -> Clause:
    side, draw = g.rng.choice(("left", "right")), g.rng.random()
    if draw < 0.15:
        key, words, value = "turn_90", "", 90
    elif draw < 0.25:
        key, words, value, side = "turn_180", "", 180, "left"
    else:
        key, (words, value) = "turn", g.angle()
    call = Call("turn", {"direction": side, "angle": value}, f"turn {side} {value}")
    return g.made(key, "turn", [call], lr=side, ang=words)


def to_place(place: str) -> Call:
    return Call("go_to", {"place": place}, f"go_to {place}")


def pick_up(thing: str, place: str = "") -> Call:
    if place:
        return Call("pick", {"object": thing, "from": place}, f"pick {thing} from {place}")
    return Call("pick", {"object": thing}, f"pick {thing}")


def put_down(thing: str, place: str) -> Call:
    return Call("put", {"object": thing, "on": place}, f"put {thing} on {place}")


def hand_over(thing: str, whom: str) -> Call:
    return Call("deliver", {"object": thing, "to": whom}, f"deliver {thing} to {whom}")


def look_for(thing: str) -> Call:
    return Call("find", {"object": thing}, f"find {thing}")


def go_to(g: Grammar) -> Clause:
    place = g.place()
    return g.made("go_to", "go_to", [to_place(place)], p=place)


def pick(g: Grammar) -> Clause:
    thing = g.object()
    return g.made("pick", "pick", [pick_up(thing)], thing, o=g.with_article(thing))


def pick_from(g: Grammar) -> Clause:
    thing, place = g.object(), g.surface()
    slots = {"o": g.with_article(thing), "s": place}
    return g.made("pick_from", "pick", [pick_up(thing, place)], thing, **slots)


def put(g: Grammar) -> Clause:
    thing, place = g.object(), g.surface()
    slots = {"o": g.with_article(thing), "s": place}
    return g.made("put", "put", [put_down(thing, place)], thing, **slots)


def deliver(g: Grammar) -> Clause:
    thing, (words, whom) = g.object(), g.somebody()
    slots = {"o": g.with_article(thing), "w": words}
    return g.made("deliver", "deliver", [hand_over(thing, whom)], thing, **slots)


def deliver_place(g: Grammar) -> Clause:
    thing, place = g.object(), g.place()
    slots = {"o": g.with_article(thing), "p": place}
    return g.made("deliver_place", "deliver", [hand_over(thing, place)], thing, **slots)


def find(g: Grammar) -> Clause:
    thing = g.object()
    return g.made("find", "find", [look_for(thing)], thing, o=g.with_article(thing))


def gripper(g: Grammar) -> Clause:
    action = g.rng.choice(("open", "close"))
    return g.made(action, "gripper", [Call("gripper", {"action": action}, f"gripper {action}")])


def light(g: Grammar) -> Clause:
    if g.rng.random() < 0.35:
        color = g.rng.choice(say.COLORS)
        call = Call("light", {"state": "on", "color": color}, f"light on {color}")
        return g.made("light_color", "light", [call], c=color)
    state = g.rng.choice(("on", "off"))
    return g.made(f"light_{state}", "light", [Call("light", {"state": state}, f"light {state}")])


def speak(g: Grammar, quoted: bool = True) -> Clause:
    text = g.saying()
    call = Call("say", {"text": text}, f"say {text}")
    return g.made("say", "say", [call], q=f'"{text}"' if quoted else text)


def tell(g: Grammar, quoted: bool = True) -> Clause:
    text, name = g.saying(), g.person()
    call = Call("say", {"text": text, "to": name}, f"say {text} to {name}")
    return g.made("tell", "say", [call], q=f'"{text}"' if quoted else text, n=name)


def wait(g: Grammar) -> Clause:
    words, value, step = g.duration()
    thought = f"{step}: " if step else ""
    call = Call("wait", {"seconds": value}, f"{thought}wait {value}")
    return g.made("wait", "wait", [call], dur=words)


def photo(g: Grammar) -> Clause:
    target = g.target()
    return g.made(
        "photo", "photo", [Call("photo", {"target": target}, f"photo {target}")], t=target
    )


def follow(g: Grammar) -> Clause:
    words, whom = g.somebody()
    return g.made("follow", "follow", [Call("follow", {"target": whom}, f"follow {whom}")], w=words)


def set_speed(g: Grammar) -> Clause:
    words, value = g.speed()
    call = Call("set_speed", {"speed": plain(value)}, f"set_speed {number(value)}")
    return g.made("set_speed", "set_speed", [call], sp=words)


def dock(g: Grammar) -> Clause:
    return g.made("dock", "dock", [Call("dock", {}, "dock")])


def stop(g: Grammar) -> Clause:
    return g.made("stop", "stop", [Call("stop", {}, "stop")])


def fetch(g: Grammar) -> Clause:
    thing, place = g.object(), g.place()
    calls = [to_place(place), pick_up(thing), hand_over(thing, "user")]
    return g.made("fetch", "plan", calls, thing, o=g.with_article(thing), p=place)


def transfer(g: Grammar) -> Clause:
    thing, source, goal = g.object(), g.surface(), g.surface()
    calls = [pick_up(thing, source), put_down(thing, goal)]
    slots = {"o": g.with_article(thing), "s2": goal, "s": source}
    return g.made("transfer", "plan", calls, thing, **slots)


def search(g: Grammar) -> Clause:
    thing, place = g.object(), g.place()
    calls = [to_place(place), look_for(thing)]
    return g.made("search", "plan", calls, thing, o=g.with_article(thing), p=place)


def with_it(g: Grammar, thing: str) -> Clause:
    """What happens to the thing of the clause before."""
    if g.rng.random() < 0.5:
        place = g.surface()
        made = g.made("put_it", "put", [put_down(thing, place)], thing, s=place)
    else:
        words, whom = g.somebody()
        made = g.made("deliver_it", "deliver", [hand_over(thing, whom)], thing, w=words)
    g.drawn.append(made)
    return made


KINDS: dict[str, Callable[[Grammar], Clause]] = {
    each.__name__: each
    for each in (
        move,
        turn,
        go_to,
        pick,
        pick_from,
        put,
        deliver,
        deliver_place,
        find,
        gripper,
        light,
        speak,
        tell,
        wait,
        photo,
        follow,
        set_speed,
        dock,
        stop,
        fetch,
        transfer,
        search,
    )
}
