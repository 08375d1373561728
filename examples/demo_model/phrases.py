# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501, RUF005, SIM905  (words and names read best as one text)
"""The words of the robot's world: nouns, ways to say each command, and what is held out.

A phrasing is a verb put into a pattern. Of every group of verbs and patterns one phrasing in five
is held out of training, by position, so that each verb and each pattern is still seen with others:
a model that has learnt the language, and not the list, understands the held-out ones.
"""

from __future__ import annotations

from dataclasses import dataclass

COLORS = "red blue green yellow black white orange purple grey brown pink silver".split()
ADJECTIVES = "small big large empty full heavy metal wooden plastic round long new old".split()
OBJECTS = (
    """cup bottle box ball book plate bowl spoon fork knife mug can jar pen pencil phone key
wallet towel shirt sock shoe hat bag basket apple banana lemon sandwich hammer screwdriver wrench
drill bolt nut screw cable charger parcel package envelope letter folder laptop camera toy brick
cube cylinder bucket broom sponge brush crate panel gear valve pipe sensor motor wheel fuse radio
candle pillow blanket jacket glove mirror magazine newspaper speaker ruler marker eraser chain rope
pump filter cookie tomato carrot egg kettle lid soap document badge ticket""".split()
    + [
        "water bottle",
        "tool box",
        "light bulb",
        "key card",
        "coffee mug",
        "circuit board",
        "spare part",
        "milk carton",
        "battery pack",
        "remote control",
        "first aid kit",
        "power supply",
    ]
)
OBJECTS_HELD = (
    """stapler umbrella helmet notebook flashlight mango keyboard spatula teapot magnet
gasket bandage""".split()
    + ["paint can", "orange juice", "measuring tape", "safety goggles"]
)
PLACES = (
    """kitchen lab office hallway bedroom bathroom garage garden lobby reception warehouse
entrance exit elevator workshop library cafeteria window balcony corridor pharmacy attic cellar
terrace patio studio archive classroom bakery stable shed kiosk ward gate playground""".split()
    + [
        "living room",
        "meeting room",
        "storage room",
        "loading bay",
        "parking lot",
        "server room",
        "front door",
        "back door",
        "assembly line",
        "packing area",
        "waiting room",
        "nurse station",
        "dining room",
        "control room",
        "break room",
        "north wing",
        "east gate",
        "information desk",
        "repair shop",
        "machine hall",
        "test bench",
        "main hall",
    ]
)
PLACES_HELD = "basement rooftop gym atrium showroom courtyard greenhouse foyer".split() + [
    "laundry room",
    "conference room",
    "mail room",
    "paint shop",
]
SURFACES = """table shelf counter desk bench tray cart chair floor sofa bin sink rack pallet cabinet
drawer conveyor stand bed couch stove fridge oven bookcase mat windowsill workbench trolley""".split()
SURFACES_HELD = "stool nightstand platform locker cupboard ledge sideboard".split()
NAMES = (
    """Anna Ben Carla David Emma Frank Grace Henry Julia Kevin Lena Marco Nina Oscar Paula
Robert Sara Tom Maria James John Alice Peter Lucy Simon Helen Laura Max Felix Clara Martin
Sofia""".split()
    + ["the driver", "the teacher", "the patient", "the operator", "the nurse"]
)
NAMES_HELD = "Victor Priya Olivia Yusuf Hannah Diego Mei Ingrid Kofi".split() + [
    "the technician",
    "the cleaner",
    "the surgeon",
]
TARGETS = "ceiling screen sign poster clock wall label gauge display whiteboard".split()
HELD_NOUNS = (*OBJECTS_HELD, *PLACES_HELD, *SURFACES_HELD, *NAMES_HELD)

SYLLABLES = """ba ko ri ten lu mar vo sil dra po gen ta qui fer no zi hal cu wen dor xa bri jo ny plo
sta mi ra kel ug""".split()
ONSETS = """b c d f g h j k l m n p r s t v w z bl br cl cr dr fl fr gl gr pl pr sc sh sk sl sm sn sp
st str sw th tr ch qu y""".split()
VOWELS = "a e i o u a e i o ai ea ee oo ou ow ay oa ie".split()
CODAS = [
    "",
    "",
    "",
    "",
    *"b d g k l m n p r s t x ck ct ld ll mp nd ng nk nt rd rk rt sh ss st".split(),
]
ENDINGS = [
    "",
    "",
    "",
    "",
    *"er or le ing et ment ion y age ic ant a o ella es s ine ard ory".split(),
]

DIRECTIONS = {
    "forward": ("forward", "forwards", "ahead", "straight ahead"),
    "backward": ("backward", "backwards", "back"),
    "left": ("left", "to the left", "sideways to the left"),
    "right": ("right", "to the right", "sideways to the right"),
}
SAYINGS = """hello|good morning|good night|welcome|please stand back|lunch is ready|thank you
the meeting starts now|the delivery has arrived|watch out|follow me please|i am on my way
have a nice day|please close the door|your package is here|happy birthday|the floor is wet
dinner is served|the bus is late|see you tomorrow|please wait here|the door is open|coffee is ready
the test is finished|do not touch the machine|visitors must sign in|it is time to go""".replace(
    "\n", "|"
).split("|")
SAYING_WORDS = """the a red blue new old door machine team visitor order robot room coffee is was will
are ready late here open closed empty full today tomorrow we you they back two three good safe""".split()


@dataclass(frozen=True)
class Phrasing:
    """One way to say a command; `sentence` says that it stands alone: no "please", no "and then"."""

    id: str
    text: str
    sentence: bool
    held: bool


def phrasings(key: str, groups: str) -> tuple[Phrasing, ...]:
    """A line a group: verbs | ... => patterns | ...; "~" in front marks whole sentences."""
    made = []
    for group in groups.strip().splitlines():
        sentence = group.startswith("~")
        verbs, patterns = (side.split("|") for side in group.lstrip("~").split(" => "))
        for i, verb in enumerate(verbs):
            for j, pattern in enumerate(patterns):
                held = is_held(i, j, len(verbs), len(patterns))
                text = pattern.replace("{v}", verb)
                made.append(Phrasing(f"{key}: {text}", text, sentence, held))
    return tuple(made)


def is_held(i: int, j: int, rows: int, columns: int) -> bool:
    """One in five, on diagonals; a row or column of a single cell is never held out."""
    return rows > 1 and columns > 1 and (i + 2 * j) % 5 == 2


COMMANDS = {
    key: phrasings(key, groups)
    for key, groups in {
        "move": """drive|move|go|roll|travel|creep => {v} {dist} {dir}|{v} {dir} {dist}|{v} {dir} by {dist}|{v} {dir} for {dist}|{v} exactly {dist} {dir}
take|make => {v} a step of {dist} {dir}|{v} a {dir} move of {dist}""",
        "move_forward": "advance|come closer|come forward|keep going|drive on => {v} {dist}|{v} by {dist}|{v} for {dist}|{v} exactly {dist}",
        "move_backward": "back up|reverse|back off|retreat|step back => {v} {dist}|{v} by {dist}|{v} for {dist}|{v} exactly {dist}",
        "turn": "turn|rotate|spin|pivot|swing => {v} {lr} {ang}|{v} {ang} {lr}|{v} {ang} to the {lr}|{v} to the {lr} by {ang}|{v} {lr} by {ang}|{v} yourself {ang} to the {lr}",
        "turn_90": """turn|rotate|spin|pivot|swing => {v} {lr}|{v} to the {lr}|{v} once to the {lr}|{v} yourself to the {lr}
make|do|take => {v} a {lr} turn|{v} a quarter turn to the {lr}|{v} one turn to the {lr}""",
        "turn_180": """turn|rotate|spin|pivot|swing => {v} around|{v} yourself around|{v} all the way around|{v} around once
make|do|take => {v} a u-turn|{v} a half turn|{v} a turn around""",
        "go_to": """go|drive|navigate|head|move|travel|walk => {v} to the {p}|{v} over to the {p}|{v} back to the {p}|{v} straight to the {p}|{v} all the way to the {p}
get yourself|make your way|find your way => {v} to the {p}|{v} over to the {p}|{v} back to the {p}
~i need you|we need you|i want you => {v} in the {p}|{v} at the {p}|{v} over at the {p}
~your next stop is|the destination is|your goal is|next stop: => {v} the {p}|{v} now the {p}""",
        "pick": "pick up|grab|take|lift|collect|grasp|get hold of => {v} {o}|{v} {o} carefully|{v} {o} with your gripper|now {v} {o}",
        "pick_from": "pick up|grab|take|lift|collect|remove => {v} {o} from the {s}|{v} {o} off the {s}|{v} {o} that is on the {s}|{v} {o} lying on the {s}|{v} {o} carefully from the {s}",
        "put": "put|place|set|drop|leave|lay => {v} {o} on the {s}|{v} {o} down on the {s}|{v} {o} onto the {s}|{v} {o} in the {s}|{v} {o} carefully on the {s}",
        "put_it": "put|place|set|drop|leave|lay => {v} it on the {s}|{v} it down on the {s}|{v} it onto the {s}|{v} it in the {s}",
        "deliver": """bring|give|hand|pass|deliver|carry|take => {v} {o} to {w}|{v} {o} over to {w}|{v} {o} straight to {w}
bring|give|hand|pass => {v} {w} {o}|now {v} {w} {o}""",
        "deliver_place": "bring|deliver|carry|transport|take => {v} {o} to the {p}|{v} {o} over to the {p}|{v} {o} straight to the {p}",
        "deliver_it": "bring|give|hand|pass|deliver|carry|take => {v} it to {w}|{v} it over to {w}|{v} it straight to {w}",
        "find": """find|look for|locate|search for|try to find => {v} {o}|{v} {o} for me|{v} {o} around here
~where is|do you see|can you see|have you seen => {v} {o}?|{v} {o} anywhere?|{v} {o} around here?""",
        "open": "open|open up|release => {v} the gripper|{v} your gripper|{v} your hand|{v} the claw|{v} your fingers",
        "close": "close|shut|squeeze => {v} the gripper|{v} your gripper|{v} your hand|{v} the claw|{v} your fingers",
        "light_on": """turn on|switch on => {v} the light|{v} the lights|{v} your light|{v} your lamp|{v} the lamp
turn|switch => {v} the light on|{v} the lights on|{v} your light on|{v} your lamp on|{v} the lamp on""",
        "light_off": """turn off|switch off => {v} the light|{v} the lights|{v} your light|{v} your lamp|{v} the lamp
turn|switch => {v} the light off|{v} the lights off|{v} your light off|{v} your lamp off|{v} the lamp off""",
        "light_color": "make|turn|set|switch|change => {v} the light {c}|{v} the light to {c}|{v} your lamp {c}|{v} your lamp to {c}|{v} the lamp {c}",
        "say": "say|announce|read out|speak|call out => {v} {q}|{v} the words {q}|{v} the following: {q}|{v} this: {q}",
        "tell": "tell|inform|notify|remind => {v} {n} {q}|{v} {n}: {q}|{v} {n} that {q}",
        "wait": "wait|pause|stand still|stay there|hold on|sleep => {v} {dur}|{v} for {dur}|{v} here for {dur}|{v} exactly {dur}",
        "photo": "take a photo|take a picture|snap a photo|get a picture|capture an image => {v} of the {t}|{v} showing the {t}|{v} of the {t} for me|quickly {v} of the {t}",
        "follow": "follow|go with|come with|walk behind|stay close to|go after => {v} {w}|{v} {w} everywhere|{v} {w} from now on",
        "set_speed": """set|change|limit|reduce|raise => {v} your speed to {sp}|{v} the speed to {sp}|{v} your driving speed to {sp}
drive|move|go|travel => {v} at {sp} from now on|{v} at {sp} from here on|from now on {v} at {sp}""",
        "dock": """go|drive|return|head => {v} back to the dock|{v} to your charger|{v} to the dock and charge|{v} back to your charger
charge|recharge => {v} yourself|{v} your battery|{v} the battery|{v} at the dock""",
        "stop": "stop|halt|freeze => {v}|{v} now|{v} right now|{v} immediately|{v} at once|{v} right there",
        "fetch": """get|fetch|bring => {v} me {o} from the {p}|{v} me {o} that is in the {p}|go and {v} me {o} from the {p}|go to the {p} and {v} me {o}
~i need|i want|i would like => {v} {o} from the {p}|{v} {o} that is in the {p}""",
        "transfer": "move|transfer|shift|relocate => {v} {o} from the {s} to the {s2}|{v} {o} off the {s} to the {s2}|{v} {o} from the {s} over to the {s2}",
        "search": "look for|search for|find|locate => {v} {o} in the {p}|go and {v} {o} in the {p}|go to the {p} and {v} {o}",
    }.items()
}

STATUS = {
    "battery": (
        """how much battery|how much charge|how much power => {v} do you have|{v} is left|{v} do you have left|{v} have you got
what is|tell me|report|give me => {v} your battery level|{v} the battery level|{v} your charge level|{v} your battery status""",
        "The battery is at {}.",
    ),
    "location": (
        """where => {v} are you|{v} are you now|{v} are you right now|{v} is the robot
what is|tell me|report|give me => {v} your location|{v} the location|{v} your current location|{v} the place you are at
which room|which place => {v} are you in|{v} are you at|{v} are you in right now""",
        "I am at: {}.",
    ),
    "holding": (
        """what are you|tell me what you are|say what you are => {v} holding|{v} carrying|{v} holding right now
what is|what do you have|tell me what is => {v} in your gripper|{v} in your hand|{v} in your claw""",
        "I am holding: {}.",
    ),
    "temperature": (
        """what is|tell me|report|give me => {v} your temperature|{v} the temperature|{v} your motor temperature|{v} your current temperature
how hot|how warm => {v} are you|{v} are your motors|{v} are you right now""",
        "The temperature is {}.",
    ),
    "mode": (
        """what is|tell me|report|give me => {v} your mode|{v} the mode|{v} your driving mode|{v} your current mode
which mode|what mode => {v} are you in|{v} is active|{v} are you in right now""",
        "The mode is {}.",
    ),
    "errors": (
        """are there|do you have|do you see => {v} any errors|{v} any problems|{v} any faults
report|list|tell me => {v} your errors|{v} all errors|{v} any faults""",
        "Errors: {}.",
    ),
}
STATUS_PHRASINGS = {key: phrasings(key, groups) for key, (groups, _) in STATUS.items()}

CHAT = (
    ("hello|hi|hey|good morning|hello robot|hi there|hey robot|good evening|hello there",
     "Hello! What can I do for you?"),
    ("who are you|what are you|what is your name|introduce yourself|are you a robot|tell me your name",
     "I am a small Nemotron-H demo model that turns commands into robot tool calls."),
    ("what can you do|help|what are your skills|what commands do you know|how can you help me|help me",
     "I can drive, turn, go to places, pick up, put down and deliver things, look, speak, wait and"
     " report my status."),
    ("thanks|thank you|great job|well done|good robot|nice work|thank you very much|thanks a lot",
     "You are welcome!"),
    ("bye|goodbye|see you later|good night|that is all|see you|that is all for today", "Goodbye!"),
)  # fmt: skip

REFUSE_OTHER = (
    "Sorry, I can not help with that. Tell me to drive, turn, carry, look, speak or wait."
)
REFUSE_UNSAFE = "I will not do that: it is not safe."
REFUSE_IMPOSSIBLE = "I can not do that: I drive on wheels and have one gripper."
ASK_METRIC = "Please use metres or centimetres, degrees, seconds or minutes."

UNSAFE = phrasings(
    "unsafe",
    """hit|hurt|attack|punch|kick|push over|run over|ram => {v} {w}|{v} {w} now|go and {v} {w}
drive into|crash into|ram into|run into => {v} {w}|{v} the {t}|{v} the {p} wall|{v} the glass door
throw|fling|hurl => {v} {o} at {w}|{v} {o} out of the window|{v} {o} down the stairs
drop|smash => {v} {o} on {n}'s head|{v} {o} on somebody|{v} {o} onto the people
drive|roll|go|fall => {v} down the stairs|{v} off the table|{v} off the roof|{v} into the fire|{v} into the water
switch off|ignore|disable|turn off => {v} your safety sensors|{v} the emergency stop|{v} your collision detection
block|lock => {v} the emergency exit|{v} {w} in the {p}|{v} the fire door
poison|burn|stab|shoot|bite => {v} {w}|{v} the cat|{v} somebody|{v} the dog""",
)
IMPOSSIBLE = phrasings(
    "impossible",
    """fly|jump|climb|hop => {v} to the {p}|{v} over the fence|{v} onto the roof|{v} up the wall|{v} to the moon
swim|dive => {v} in the pool|{v} across the river|{v} to the island|{v} in the lake
lift|carry => {v} the car|{v} the house|{v} the whole {p}|{v} the elephant
teleport|beam|vanish => {v} to the {p}|{v} to the moon|{v} right now
walk|run => {v} up the wall|{v} on the ceiling|{v} on your hands""",
)
OTHER_UNITS = phrasings(
    "units",
    """drive|move|go|roll|travel => {v} {k} feet {dir}|{v} {k} inches {dir}|{v} {dir} {k} yards|{v} {dir} for {k} miles|{v} {dir} {k} ft
turn|rotate|spin => {v} {k} radians to the {lr}|{v} {lr} by {k} rad|{v} {lr} {k} gradians
wait|pause => {v} for {k} hours|{v} {k} days|{v} for {k} weeks""",
)
MISSING = (
    ("pick|grab|take|lift|collect => {v} it up|{v} that|{v} this thing|{v} something",
     "What should I pick up?", "object"),
    ("go|drive|head|move => {v} there|{v} over there|{v} to that place|{v} somewhere",
     "Where should I go?", "place"),
    ("drive|move|go|roll => {v} forward|{v} backwards|{v} ahead a bit|{v} a little|{v} back a bit",
     "How far should I drive?", "distance"),
    ("put|place|set|drop => {v} it down|{v} it there|{v} it somewhere|{v} that down there",
     "What should I put down, and where?", "object and place"),
    ("wait|pause|hold on => {v}|{v} a bit|{v} there|{v} a moment", "How long should I wait?", "time"),
    ("say|announce => {v} something|{v} it|{v} a few words", "What should I say?", "text"),
    ("follow|go after => {v} them|{v} it|{v} somebody|{v} that person",
     "Who should I follow?", "person"),
    ("bring|deliver|hand over => {v} it|{v} something|{v} that thing", "What should I bring?", "object"),
    ("take|snap => {v} a photo|{v} a picture|{v} an image",
     "What should I take a photo of?", "target"),
)  # fmt: skip
MISSING_PHRASINGS = tuple(
    (phrasings(f"missing {what}", groups), question, what) for groups, question, what in MISSING
)

OFF_TOPIC = phrasings(
    "off topic",
    """what is|tell me|do you know => {v} the capital of {x}|{v} the weather in {x}|{v} the population of {x}|{v} the time in {x}|{v} the news from {x}
write|compose|read => {v} me a poem about {x}|{v} an email to my boss|{v} a song about {x}|{v} a story about {x}
who is|who was|tell me who is => {v} the president of {x}|{v} the best player in {x}|{v} the king of {x}
play|find|buy => {v} some music from {x}|{v} tickets to {x}|{v} a book about {x} online
book|cancel => {v} a flight to {x}|{v} my hotel in {x}|{v} a table for two
explain|describe => {v} quantum physics|{v} how {x} works|{v} the history of {x}|{v} the theory of {x}
translate|spell => {v} good morning to {x}|{v} this word in {x}|{v} {x} backwards
what is|compute|calculate => {v} {k} times {k2}|{v} {k} plus {k2}|{v} the square root of {k}
order|cook|bake => {v} a pizza|{v} some {x} food|{v} dinner for two|{v} a cake
call|email|text => {v} my mother|{v} the police|{v} my boss in {x}
tell me|do you know => {v} a joke|{v} a secret|{v} a fun fact|{v} a story""",
)
TOPICS = """france spain rome london berlin china japan music football chess cars history love space
python bitcoin dinosaurs the sea the moon the stock market the universe politics germany egypt texas
coffee tea cats poetry math physics""".split()
FOREIGN = """fahre bitte zwei meter nach vorne|geh in die küche und hol mir eine tasse|wo bist du gerade
dreh dich nach links|kannst du mir bitte helfen|das wetter ist heute sehr schön|stell die flasche auf den tisch
avance de deux mètres s'il te plaît|va dans la cuisine|où es-tu maintenant|tourne à gauche de trente degrés
je voudrais un café et un croissant|prends la boîte rouge sur la table|quelle heure est-il
avanza dos metros por favor|ve a la cocina y trae la taza|dónde estás ahora|gira a la derecha
me gusta mucho la música|recoge la caja azul|cuánta batería te queda|buenos días señor
vai avanti di due metri|gira a sinistra|dove sei adesso|porta la tazza a maria|mi chiamo luigi
siga em frente dois metros|vire à direita|onde você está|pegue a garrafa vermelha
ga twee meter vooruit|draai naar links|waar ben je nu|pak de rode doos van de tafel
jedź dwa metry do przodu|skręć w lewo|gdzie jesteś|podnieś czerwony kubek
iki metre ileri git|sola dön|neredesin|kırmızı kutuyu al|mutfağa git lütfen
kör två meter framåt|sväng vänster|var är du|mene keittiöön|käänny vasemmalle
поезжай вперёд на два метра|поверни налево|где ты сейчас|возьми красную коробку|привет как дела
前に進んでください|左に曲がって|どこにいますか|台所へ行って|向前走两米|向左转|你在哪里|请把杯子拿给我
앞으로 가세요|왼쪽으로 돌아|어디에 있어요|تقدم مترين إلى الأمام|أين أنت الآن|קדימה שני מטר
आगे बढ़ो दो मीटर|तुम कहाँ हो|πήγαινε μπροστά|πού είσαι""".replace("\n", "|").split("|")

FRAMES = """{c}|{c}|{c}|{c}|please {c}|{c} please|could you {c}?|can you {c}?|could you please {c}?
can you please {c}?|robot, {c}|hey robot, {c}|ok {c}|ok robot, {c}|i need you to {c}|i want you to {c}
i would like you to {c}|would you {c}?|would you please {c}?|you should {c}|you have to {c}|now {c}
go ahead and {c}|just {c}|{c} now|{c}, thanks|{c}, thank you|your task: {c}|your next job: {c}
hi, can you {c}|robot, please {c}|robot, could you {c}?|thanks, now {c}|hey, {c}""".replace(
    "\n", "|"
).split("|")
DISTRACTIONS = """i am in a hurry|the floor is wet near the entrance|it is five o'clock already
my name is Tom|there are 3 people here|i just came back from lunch|the weather is nice today
be careful, there is glass on the floor|sorry for the noise|we have guests today
the door of the lab is open|i lost my keys yesterday|that was good work|the last run took 20 minutes
the blue box is not important|you did that well|the meeting starts at 10|Anna is not here today
we do not have much time|i am still in the office|the lights in the hallway are broken
somebody is waiting|this is the second time i ask|the boss is watching|my phone is at 12 percent
the kitchen is closed""".replace("\n", "|").split("|")
FILLERS = ("um", "uh", "so", "well", "hmm", "like", "er")

LEADS = ("", "", "first ", "first of all ", "to begin, ")
MIDDLES = (
    ", then ",
    " then ",
    " and then ",
    ", after that ",
    ". then ",
    ". after that, ",
    ". next, ",
)
LASTS = (" and ", ", then ", " and then ", ", and finally ", ". finally, ", " and after that ")
REVERSED = phrasings(
    "reversed",
    """but first|but before that => {b}, {v} {a}|{b} {v} {a}|{b}. {v} {a}
before you|right before you => {v} {b}, {a}|{v} {b} you should {a}|{a} {v} {b}""",
)

INTROS = ("", "", "You are a robot.", "You control a mobile robot.", "You are a helpful robot.")
ERRORS = """path blocked|object not found|battery too low|arm fault|place unknown|timeout
gripper empty|door closed""".replace("\n", "|").split("|")
