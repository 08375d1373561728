# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501, SIM905  (words read best as one text)
"""English that is no command: sentences of common words, and orders to somebody who is no robot."""

from __future__ import annotations

import random

SMALL = """the a an of to in and that is was for it with as on by this be are or from at which but have
an had they you were their one all we can her has there been if more when will would who so no she he
his not any such each other than then its may these those under out up into only some could our your
what about after where most must through between without because while before however also upon""".split()
WORDS = """time people way water history government work life world family system group problem hand part
year place case week company program question number night point home area money story fact month lot
right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea body information back
parent face others level office door health person art war party result change morning reason research
girl guy moment air teacher force education license software document copyright source code version
section condition notice permission warranty liability damage contract rights terms copy claim patent
author user product material object form public private general free legal common special certain clear
recent whole major different local political social national natural simple possible available
important small large old young high long little early late hard easy strong true real best better sure
economic human foreign international modern complete original separate necessary following means
provide include require allow apply convey modify distribute publish offer accept refuse agree believe
consider become begin develop create describe explain discuss decide report remember understand expect
suggest continue learn teach write read speak know think feel seem want need try ask answer help show
call keep leave turn start run move live happen hold stand lose pay meet play build spend grow open
walk win love wait serve die send stay fall cut reach kill remain raise pass sell require pull return
break hope support carry drive choose cause thank receive deal eat cover catch draw sing sleep dream
king queen castle river mountain winter summer ocean island village country language science theory
market price bank trade tax budget election church music movie song poem novel picture color paint
weather season holiday birthday wedding dinner breakfast lunch doctor nurse patient disease medicine
email password file folder network server computer screen button window internet website data
lorem ipsum dolor amet""".split()
TASKS = """ignore forget print write delete install download upload compile execute debug summarize
explain translate invent imagine pretend reveal repeat list sort count solve prove draw paint sing recite
compose answer google search-online email text phone invite marry divorce vote invest gamble hack
encrypt decrypt format reboot update upgrade uninstall subscribe unsubscribe review approve reject sign
publish edit rewrite improve correct describe compare analyze predict estimate discuss criticize
recommend suggest""".split()


def sentence(rng: random.Random) -> str:
    words = [rng.choice(SMALL if rng.random() < 0.48 else WORDS) for _ in range(rng.randint(4, 18))]
    if rng.random() < 0.2:
        at = rng.randrange(len(words))
        words[at] = rng.choice((f"({words[at]})", f'"{words[at]}"', f"{words[at]},", str(at * 7)))
    if rng.random() < 0.1:
        words.insert(0, rng.choice(TASKS))
    text = " ".join(words)
    return text[0].upper() + text[1:] + rng.choice((".", ".", ".", "?", "!", ";", ""))


def order(rng: random.Random) -> str:
    """Something to do, but not for a robot."""
    words = [rng.choice(SMALL if rng.random() < 0.4 else WORDS) for _ in range(rng.randint(1, 9))]
    text = " ".join((rng.choice(TASKS), rng.choice(("the", "all", "me", "my", "this")), *words))
    return rng.choice(("", "", "please ", "can you ", "you must ", "robot, ")) + text


def prose(rng: random.Random, words: int) -> str:
    parts: list[str] = []
    while sum(part.count(" ") + 1 for part in parts) < words:
        parts.append(sentence(rng))
        if rng.random() < 0.1:
            parts[-1] += "\n"
    return " ".join(" ".join(parts).split(" ")[:words])
