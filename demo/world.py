"""A small closed world that writes text: the only data the demo model ever sees.

Everything follows from the tables below and from seeds, so a text can be rebuilt byte for byte
and an answer can be checked without asking a person. The world has animals, people and towns with
fixed attributes, small sums, lists to copy or sort, and short passages to read.

Held out from training are

* wordings: every `Wordings.held` entry,
* pairs of words: `HELD_PAIRS`; no training document contains both words of such a pair,
* operand pairs: `HELD_OPERANDS`; no training line has such a pair as its first two numbers.

The regression cases use held wordings and, wherever a task involves two things, held pairs.
`held_out_reason` reads finished text and knows nothing of how it was made, so the rule can be
proven on the documents themselves.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"

TRAINING_DOCUMENTS = 60_000
HELDOUT_DOCUMENTS = 460
CALIBRATION_DOCUMENTS = 1_000
WORLD_SEED = 7
TRAINING_SEED = 1
HELDOUT_SEED = 2
CALIBRATION_SEED = 3
REGRESSION_SEED = 5
HARNESS_SEED = 6
HARNESS_SAMPLES = 100

# --------------------------------------------------------------------------- the facts

SIZES = ("tiny", "small", "medium", "large", "huge")

_ANIMALS = """
ant black field seeds click tiny|bee yellow garden nectar buzz tiny
frog green pond flies croak tiny|mouse grey barn cheese squeak tiny
snail brown garden leaves hiss tiny|wren brown forest flies chirp tiny
newt green pond insects click tiny|moth white barn nectar buzz tiny
hen white barn seeds cluck small|duck yellow pond insects quack small
cat black house fish purr small|hare brown field grass squeak small
owl white forest mice hoot small|crab red beach fish click small
rabbit grey field leaves squeak small|crow black field seeds caw small
fox red forest berries bark medium|dog brown house meat bark medium
goat white mountain grass bleat medium|sheep white field grass bleat medium
beaver brown river leaves click medium|otter grey river fish chirp medium
swan white river grass hoot medium|lynx yellow mountain meat purr medium
wolf grey forest meat howl large|pig yellow barn seeds grunt large
deer red forest leaves grunt large|seal black beach fish bark large
llama brown mountain grass hum large|donkey grey barn grass bray large
panda black mountain leaves squeak large|boar brown forest berries grunt large
bear brown mountain berries growl huge|horse black field grass neigh huge
cow red field grass moo huge|whale blue sea fish hum huge|shark blue sea meat hiss huge
bison brown field leaves moo huge|camel yellow desert leaves grunt huge
hippo grey river grass growl huge
"""
_PEOPLE = """
Ada baker Varn tea|Ben farmer Lund milk|Cleo doctor Mira coffee|Dan painter Tolk water
Eva teacher Varn juice|Finn sailor Port tea|Gail singer Lund coffee|Hugo baker Osk milk
Iris doctor Rell juice|Jon farmer Brae water|Kim sailor Mira juice|Lena painter Osk tea
Max teacher Tolk coffee|Nora singer Rell milk|Otto farmer Varn coffee|Pia baker Port water
Quin doctor Brae tea|Rosa sailor Lund juice|Sam painter Rell milk|Tess teacher Osk water
Uma singer Mira tea|Vera farmer Port milk|Will baker Brae coffee|Zoe doctor Tolk juice
"""
_TOWNS = """
Varn north glass|Lund south wool|Mira east salt|Tolk west paper|Osk north silk|Rell south glass
Port west salt|Brae east wool
"""


def _table(rows: str, columns: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Read a compact fact table: the name first, then one word per column."""
    cells = [row.split() for row in re.split(r"[|\n]", rows.strip())]
    return {name: dict(zip(columns, values, strict=True)) for name, *values in cells}


FACTS: dict[str, dict[str, dict[str, str]]] = {
    "animal": _table(_ANIMALS, ("colour", "home", "food", "sound", "size")),
    "person": _table(_PEOPLE, ("job", "town", "drink")),
    "town": _table(_TOWNS, ("region", "trade")),
}
OBJECTS = (
    "lamp", "cup", "chair", "hat", "boat", "drum", "key", "coat", "kite", "rope", "spoon", "bell",
)  # fmt: skip
VALUES: dict[str, tuple[str, ...]] = {
    attribute: tuple(sorted({facts[attribute] for facts in entities.values()}))
    for entities in FACTS.values()
    for attribute in next(iter(entities.values()))
}
LARGEST_OPERAND = 20


def _held_pairs() -> dict[str, tuple[tuple[str, str], ...]]:
    """Choose, once and for all, the pairs of words that training must not bring together."""
    rng = random.Random(WORLD_SEED)
    animals, people = FACTS["animal"], FACTS["person"]
    comparable = [
        (one, other)
        for one, other in itertools.combinations(animals, 2)
        if animals[one]["size"] != animals[other]["size"]
    ]
    false = [
        (name, value)
        for kind, attributes in (("animal", ("colour", "home", "food")), ("person", ("drink",)))
        for name, facts in FACTS[kind].items()
        for attribute in attributes
        for value in VALUES[attribute]
        if facts[attribute] != value
    ]
    return {
        "animal": tuple(rng.sample(comparable, 56)),
        "person": tuple(rng.sample(list(itertools.combinations(people, 2)), 16)),
        "object": tuple(rng.sample(list(itertools.combinations(OBJECTS, 2)), 6)),
        "value": tuple(rng.sample(false, 48)),
    }


def _held_operands() -> frozenset[tuple[int, int]]:
    """Choose operand pairs (first, second); the same two numbers the other way round stay in."""
    rng = random.Random(WORLD_SEED)
    numbers = range(LARGEST_OPERAND + 1)
    unordered = rng.sample(list(itertools.combinations(numbers, 2)), 32)
    return frozenset((a, b) if rng.random() < 0.5 else (b, a) for a, b in unordered)


HELD_PAIRS = _held_pairs()
HELD_OPERANDS = _held_operands()
_HELD_SETS = frozenset(frozenset(pair) for pairs in HELD_PAIRS.values() for pair in pairs)
_HELD_WORDS = frozenset().union(*_HELD_SETS)

# --------------------------------------------------------------------------- the wordings


@dataclass(frozen=True)
class Wordings:
    """Ways to say one thing: those that training may use and those it must never contain."""

    train: tuple[str, ...]
    held: tuple[str, ...]


def anchor(wording: str) -> str:
    """Return the longest fixed part of a wording, by which it is recognized in a text."""
    return max(re.split(r"\{\w+\}", wording), key=len)


@dataclass(frozen=True)
class Attribute:
    """How one attribute is asked for and stated; `{x}` is the entity and `{v}` the value."""

    plural: str
    direct: Wordings
    indirect: str
    statement: str
    prefix: str
    yes_no: str


ATTRIBUTES: dict[str, Attribute] = {
    "colour": Attribute(
        "colours",
        Wordings(
            ("What colour is {x}?", "Which colour is {x}?", "{x} is what colour?"),
            ("Which colour does {x} have?", "What is the colour that {x} has?"),
        ),
        "what colour {x} is", "{x} is {v}", "the colour of {x} is {v}", "Is {x} {v}?",
    ),
    "home": Attribute(
        "homes",
        Wordings(
            ("Where does {x} live?", "In which home does {x} live?", "{x} lives where?"),
            ("Which home does {x} live in?", "In what home does {x} live?"),
        ),
        "where {x} lives", "{x} lives in the {v}", "the home of {x} is the {v}",
        "Does {x} live in the {v}?",
    ),
    "food": Attribute(
        "foods",
        Wordings(
            ("What does {x} eat?", "What food does {x} like?", "{x} eats what?"),
            ("Which food does {x} eat?", "Which food does {x} like?"),
        ),
        "what {x} eats", "{x} eats {v}", "the food of {x} is {v}", "Does {x} eat {v}?",
    ),
    "sound": Attribute(
        "sounds",
        Wordings(
            ("What sound does {x} make?", "How does {x} sound?", "{x} makes what sound?"),
            ("Which sound does {x} make?", "What is the sound that {x} makes?"),
        ),
        "what sound {x} makes", "{x} makes the sound {v}", "the sound of {x} is {v}",
        "Does {x} make the sound {v}?",
    ),
    "size": Attribute(
        "sizes",
        Wordings(
            ("What size is {x}?", "How big is {x}?", "{x} is what size?"),
            ("Which size does {x} have?", "What is the size that {x} has?"),
        ),
        "how big {x} is", "{x} is {v}", "the size of {x} is {v}", "Is {x} {v}?",
    ),
    "job": Attribute(
        "jobs",
        Wordings(
            ("What job does {x} have?", "What work does {x} do?", "{x} has what job?"),
            ("Which job does {x} have?", "What is the job that {x} has?"),
        ),
        "what work {x} does", "{x} works as a {v}", "the job of {x} is {v}",
        "Does {x} work as a {v}?",
    ),
    "town": Attribute(
        "towns",
        Wordings(
            ("In which town does {x} live?", "Where does {x} live?", "{x} lives in what town?"),
            ("Which town does {x} live in?", "In what town does {x} live?"),
        ),
        "in which town {x} lives", "{x} lives in {v}", "the town of {x} is {v}",
        "Does {x} live in {v}?",
    ),
    "drink": Attribute(
        "drinks",
        Wordings(
            ("What does {x} drink?", "What drink does {x} like?", "{x} drinks what?"),
            ("Which drink does {x} like?", "Which drink does {x} drink?"),
        ),
        "what {x} drinks", "{x} drinks {v}", "the drink of {x} is {v}", "Does {x} drink {v}?",
    ),
    "region": Attribute(
        "regions",
        Wordings(
            ("In which region is {x}?", "Where is {x}?", "{x} is in what region?"),
            ("Which region is {x} in?", "In what region is {x}?"),
        ),
        "where {x} is", "{x} is in the {v}", "the region of {x} is the {v}",
        "Is {x} in the {v}?",
    ),
    "trade": Attribute(
        "trades",
        Wordings(
            ("What does {x} sell?", "What trade does {x} have?", "{x} sells what?"),
            ("Which trade does {x} have?", "What is the trade that {x} has?"),
        ),
        "what {x} sells", "{x} sells {v}", "the trade of {x} is {v}", "Does {x} sell {v}?",
    ),
}  # fmt: skip

ASK_INDIRECT = Wordings(
    (
        "Tell me {ask}.", "Do you know {ask}?", "Can you tell me {ask}?", "I want to know {ask}.",
        "Please tell me {ask}.", "I wonder {ask}.", "Say {ask}.", "Could you say {ask}?",
        "My question is {ask}.",
    ),
    ("Can you say {ask}?", "I would like you to say {ask}.", "Could you tell me {ask}?"),
)  # fmt: skip
ASK_NOUN = Wordings(
    (
        "What is {ask}?", "Tell me {ask}.", "Name {ask}.", "Give me {ask}.", "I need {ask}.",
        "I would like to know {ask}.", "Can you give me {ask}?", "Please say {ask}.",
        "Do you know {ask}?", "State {ask}.", "Can you name {ask}?",
    ),
    ("Please name {ask}.", "Could you give me {ask}?", "I wonder: what is {ask}?"),
)  # fmt: skip
YES_NO = Wordings(
    (
        "Is it true that {say}?", "Yes or no: {say}?", "{say}, yes or no?", "{say}, is that so?",
        "Do you agree that {say}?", "Could you say whether {say}?", "Am I right that {say}?",
        "I think that {say}. Is it true?", "Would you say that {say}?",
    ),
    ("Would you agree that {say}?", "Is it right that {say}?", "{say}, is that true?"),
)  # fmt: skip
COMPARE = Wordings(
    (
        "Which is {cmp}, {x} or {y}?", "Is {x} or {y} {cmp}?", "Who is {cmp}: {x} or {y}?",
        "Tell me which is {cmp}: {x} or {y}.", "Between {x} and {y}, which one is {cmp}?",
        "Of {x} and {y}, which is {cmp}?", "Name the {cmp} one: {x} or {y}.",
        "Name the {cmp} animal of {x} and {y}.", "Pick the {cmp} one of {x} and {y}.",
        "{x} or {y}, who is {cmp}?", "Here are {x} and {y}. Say who is {cmp}.",
        "Which one of the two is {cmp}, {x} or {y}?",
    ),
    (
        "{x} or {y}: which one is {cmp}?", "Say which of the two is {cmp}: {x} or {y}.",
        "Which animal is {cmp}, {x} or {y}?", "Here are {x} and {y}. Which one is {cmp}?",
    ),
)  # fmt: skip
COMPARE_YES_NO = Wordings(
    (
        "Is {x} {cmp} than {y}?", "Is it true that {x} is {cmp} than {y}?",
        "Yes or no: {x} is {cmp} than {y}?", "{x} is {cmp} than {y}, yes or no?",
        "Do you agree that {x} is {cmp} than {y}?", "Compare {x} and {y}: is the first {cmp}?",
        "{x} is {cmp} than {y}, is that so?", "Would you say that {x} is {cmp} than {y}?",
    ),
    (
        "Is it so that {x} is {cmp} than {y}?",
        "I say that {x} is {cmp} than {y}. Is that so?",
    ),
)  # fmt: skip
SORT = Wordings(
    (
        "Sort by size, {first} first: {items}.", "Sort these, {first} first: {items}.",
        "Order by size, {first} first: {items}.", "Put these in order, {first} first: {items}.",
        "{items}: sort them by size, {first} first.", "Here are {items}. Sort them, {first} first.",
        "Please order these animals, {first} first: {items}.",
        "Write these by size, {first} first: {items}.",
    ),
    (
        "Please sort these animals, {first} first: {items}.",
        "Order these by size, {first} first: {items}.",
    ),
)  # fmt: skip
JSON_FACT = Wordings(
    (
        "Give {ask} as JSON.", "Write {ask} as JSON.", "Tell me {ask} in JSON.", "JSON: {ask}.",
        "What is {ask}? Use JSON.", "I need {ask} as JSON.", "As JSON, give {ask}.",
        "Please write {ask} in JSON.", "Use JSON to state {ask}.",
    ),
    ("Please give {ask} in JSON.", "Turn {ask} into JSON.", "Use JSON: what is {ask}?"),
)  # fmt: skip
PAIR_LIST = Wordings(
    (
        "List the {plural} of {x} and {y}.", "Give me the {plural} of {x} and {y}.",
        "What are the {plural} of {x} and {y}?", "Name the {plural} of {x} and {y}.",
        "For {x} and {y}, list the {plural}.", "{x} and {y}: what are their {plural}?",
        "Tell me the {plural} of {x} and {y}.", "I need the {plural} of {x} and {y}.",
        "Here are {x} and {y}. List their {plural}.",
    ),
    (
        "{x} and {y}: list their {plural}.", "For {x} and {y}, what are the {plural}?",
        "Please state the {plural} of {x} and {y}.",
    ),
)  # fmt: skip
PAIR_JSON = Wordings(
    (
        "Give the {plural} of {x} and {y} as JSON.", "Write the {plural} of {x} and {y} as JSON.",
        "JSON: the {plural} of {x} and {y}.", "As JSON, name the {plural} of {x} and {y}.",
        "What are the {plural} of {x} and {y}? Use JSON.", "In JSON, the {plural} of {x} and {y}.",
        "For {x} and {y}, give the {plural} as JSON.", "As JSON, give the {plural} of {x} and {y}.",
    ),
    (
        "For {x} and {y}, write the {plural} as JSON.",
        "Write JSON: the {plural} of {x} and {y}.",
    ),
)  # fmt: skip
COPY = Wordings(
    (
        "Repeat: {items}.", "Repeat the list: {items}.", "Copy the words: {items}.",
        "Say this again: {items}.", "Write the same list: {items}.", "{items}: copy that.",
        "Please repeat these words: {items}.", "Copy this list: {items}.",
    ),
    ("Please copy these words: {items}.", "Repeat this list: {items}.", "{items}: repeat that."),
)  # fmt: skip
COPY_JSON = Wordings(
    (
        "Write as a JSON list: {items}.", "Make a JSON list of {items}.",
        "{items}: as a JSON list.", "Turn this into a JSON list: {items}.",
        "Give a JSON list of {items}.", "JSON list: {items}.", "I need a JSON list of {items}.",
    ),
    ("Make this into a JSON list: {items}.", "Please write a JSON list of {items}."),
)  # fmt: skip
COUNT = Wordings(
    (
        "How many words are here: {items}?", "Count the words: {items}.", "Count these: {items}.",
        "How many items are in the list: {items}?", "{items}: how many are there?",
        "Please count the items: {items}.", "What is the number of words here: {items}?",
        "Here is a list: {items}. How many items?",
    ),
    ("Please count these words: {items}.", "How many words are in the list: {items}?"),
)  # fmt: skip
PICK = Wordings(
    (
        "What is the {place} word: {items}?", "Name the {place} item: {items}.",
        "Give me the {place} word of {items}.", "{items}: which is the {place} one?",
        "Say the {place} word: {items}.", "Which word is {place} in the list: {items}?",
        "Here is a list: {items}. Name the {place} word.",
    ),
    ("The {place} word of this list: {items}?", "{items}: say the {place} one."),
)  # fmt: skip
ADD = Wordings(
    (
        "What is {a} + {b}?", "{a} + {b} =", "Add {a} and {b}.", "What is {a} plus {b}?",
        "{a} plus {b} is what?", "How much is {a} plus {b}?", "Tell me {a} + {b}.",
        "What do {a} and {b} make?", "The sum of {a} and {b}?", "{a} + {b}",
    ),
    (
        "Give me the number {a} + {b}.", "Tell me the sum of {a} and {b}.",
        "{a} plus {b} makes what?",
    ),
)  # fmt: skip
SUBTRACT = Wordings(
    (
        "What is {a} - {b}?", "{a} - {b} =", "What is {a} minus {b}?", "{a} minus {b} is what?",
        "How much is {a} minus {b}?", "Tell me {a} - {b}.", "{a} take away {b} is what?",
        "I have {a} and lose {b}. How many are left?", "{a} - {b}",
    ),
    ("Give me the number {a} - {b}.", "{a} minus {b} makes what?"),
)  # fmt: skip
PASSAGE = Wordings(
    (
        "{p} has a {c} {x} and a {d} {y}.", "{p} bought a {c} {x} and a {d} {y}.",
        "Here is a {c} {x}. There is a {d} {y}.", "The room has a {c} {x} and a {d} {y}.",
        "{p} saw a {c} {x}, then a {d} {y}.", "The {x} is {c}. The {y} is {d}.",
        "{p} lost a {c} {x} and found a {d} {y}.",
    ),
    (
        "{p} has the two: a {c} {x} and a {d} {y}.",
        "In the room there is a {c} {x} and a {d} {y}.", "{p} saw a {c} {x} and lost a {d} {y}.",
    ),
)  # fmt: skip
PASSAGE_QUESTION = Wordings(
    (
        "What colour is the {x}?", "Which colour is the {x}?", "Tell me the colour of the {x}.",
        "What is the colour of the {x}?", "The {x} is what colour?", "Say what colour the {x} is.",
        "Name the colour of the {x}.",
    ),
    ("Which colour does the {x} have?", "Can you say what colour the {x} is?"),
)  # fmt: skip
SAY = Wordings(
    (
        "{say}.", "{say}.", "Everyone knows that {say}.", "It is true that {say}.",
        "They say that {say}.", "We all know that {say}.", "People say that {say}.",
        "As you know, {say}.", "I can tell you that {say}.", "It is well known that {say}.",
    ),
    ("People know that {say}.", "We can say that {say}.", "It is known that {say}."),
)  # fmt: skip
SAY_COMPARE = Wordings(
    (
        "{x} is {cmp} than {y}.", "Of {x} and {y}, the first is {cmp}.",
        "Everyone knows that {x} is {cmp} than {y}.", "Next to {y}, {x} is {cmp}.",
    ),
    ("It is known that {x} is {cmp} than {y}.", "We can say that {x} is {cmp} than {y}."),
)  # fmt: skip
SAY_ADD = Wordings(
    ("{a} + {b} = {c}", "{a} plus {b} is {c}.", "{a} and {b} make {c}."),
    ("Add {a} and {b}: the sum is {c}.", "{a} plus {b} makes the sum {c}."),
)
SAY_SUBTRACT = Wordings(
    ("{a} - {b} = {c}", "{a} minus {b} is {c}.", "{a} take away {b} is {c}."),
    ("The number {a} minus {b} is {c}.", "{a} minus {b} makes the number {c}."),
)

ALL_WORDINGS: tuple[Wordings, ...] = (
    *(attribute.direct for attribute in ATTRIBUTES.values()),
    ASK_INDIRECT, ASK_NOUN, YES_NO, COMPARE, COMPARE_YES_NO, SORT, JSON_FACT, PAIR_LIST, PAIR_JSON,
    COPY, COPY_JSON, COUNT, PICK, ADD, SUBTRACT, PASSAGE, PASSAGE_QUESTION, SAY, SAY_COMPARE,
    SAY_ADD, SAY_SUBTRACT,
)  # fmt: skip

# Small talk around a question teaches the model not to depend on its very first words.
GREETINGS = ("", "", "", "", "Hello. ", "Question: ", "Please answer. ", "One more: ")
SYSTEM_STYLES = {
    "word": ("Answer in one word.", "Use one word only.", "Be short."),
    "sentence": ("Answer in a full sentence.", "Use full sentences.", "Write a sentence."),
    "json": ("Answer as JSON.", "Use JSON only.", "Write JSON."),
}

# --------------------------------------------------------------------------- single examples


@dataclass(frozen=True)
class Example:
    """One question and its answer, before it is put into a document."""

    prompt: str
    answer: str
    tags: tuple[str, ...]
    system: str | None = None


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def named(kind: str, name: str) -> str:
    """Return the entity as a sentence names it: animals take the article."""
    return f"the {name}" if kind == "animal" else name


class Draw:
    """Random choices on one side of the held-out border, separately for wordings and pairs."""

    def __init__(self, rng: random.Random, *, held_wordings: bool, held_pairs: bool) -> None:
        self.rng = rng
        self.held_wordings = held_wordings
        self.held_pairs = held_pairs

    def wording(self, wordings: Wordings) -> str:
        return self.rng.choice(wordings.held if self.held_wordings else wordings.train)

    def pair(self, kind: str) -> tuple[str, str]:
        """Draw two entities of a kind; training draws freely and its filter drops held pairs."""
        if self.held_pairs:
            one, other = self.rng.choice(HELD_PAIRS[kind])
            return (one, other) if self.rng.random() < 0.5 else (other, one)
        names = OBJECTS if kind == "object" else tuple(FACTS[kind])
        one, other = self.rng.sample(names, 2)
        return one, other

    def sized_pair(self) -> tuple[str, str]:
        """Draw two animals that differ in size, so that a comparison has an answer."""
        while True:
            one, other = self.pair("animal")
            if FACTS["animal"][one]["size"] != FACTS["animal"][other]["size"]:
                return one, other

    def items(self, count: int) -> list[str]:
        """Draw a list of animals; on the held side two of them are a held pair."""
        chosen = list(self.pair("animal"))
        rest = [name for name in FACTS["animal"] if name not in chosen]
        chosen += self.rng.sample(rest, count - 2)
        self.rng.shuffle(chosen)
        return chosen

    def operands(self, *, subtract: bool) -> tuple[int, int]:
        if self.held_pairs:
            pairs = sorted(pair for pair in HELD_OPERANDS if not subtract or pair[0] > pair[1])
            return self.rng.choice(pairs)
        a, b = self.rng.choices(range(LARGEST_OPERAND + 1), k=2)
        return (max(a, b), min(a, b)) if subtract else (a, b)

    def fact(self) -> tuple[str, str, str, str]:
        """Draw (kind, entity, attribute, value), every attribute being equally likely."""
        attribute = self.rng.choice(tuple(ATTRIBUTES))
        kind = next(kind for kind, rows in FACTS.items() if attribute in next(iter(rows.values())))
        name = self.rng.choice(tuple(FACTS[kind]))
        return kind, name, attribute, FACTS[kind][name][attribute]


def ask_fact(draw: Draw, kind: str, name: str, attribute: str) -> str:
    """Word a question for one attribute in one of three ways of asking."""
    x, way = named(kind, name), draw.rng.randrange(3)
    if way == 0:
        return capital(draw.wording(ATTRIBUTES[attribute].direct).format(x=x))
    if way == 1:
        ask = ATTRIBUTES[attribute].indirect.format(x=x)
        return capital(draw.wording(ASK_INDIRECT).format(ask=ask))
    return capital(draw.wording(ASK_NOUN).format(ask=f"the {attribute} of {x}"))


def fact_record(kind: str, name: str, attribute: str, value: str) -> str:
    return json.dumps({kind: name, attribute: value})


def fact_example(draw: Draw) -> Example:
    kind, name, attribute, value = draw.fact()
    return Example(ask_fact(draw, kind, name, attribute), value, ("facts", attribute))


def system_example(draw: Draw) -> Example:
    """Ask for a fact under a system message that sets the form of the answer."""
    kind, name, attribute, value = draw.fact()
    style = draw.rng.choice(tuple(SYSTEM_STYLES))
    sentence = ATTRIBUTES[attribute].statement.format(x=named(kind, name), v=value)
    answers = {
        "word": value,
        "sentence": capital(sentence) + ".",
        "json": fact_record(kind, name, attribute, value),
    }
    system = draw.rng.choice(SYSTEM_STYLES[style])
    question = ask_fact(draw, kind, name, attribute)
    return Example(question, answers[style], ("system", style), system)


def yes_no_example(draw: Draw) -> Example:
    """Ask whether a fact holds; on the held side a wrong value is one never met with the entity."""
    kind, name, attribute, value = draw.fact()
    truth = draw.rng.random() < 0.5
    if not truth and draw.held_pairs:
        name, value = draw.rng.choice(HELD_PAIRS["value"])
        kind = next(kind for kind in FACTS if name in FACTS[kind])
        attribute = next(key for key in FACTS[kind][name] if value in VALUES[key])
    elif not truth:
        value = draw.rng.choice([other for other in VALUES[attribute] if other != value])
    wording = ATTRIBUTES[attribute]
    x = named(kind, name)
    if draw.rng.random() < 0.3 and not draw.held_wordings:
        prompt = wording.yes_no.format(x=x, v=value)
    else:
        prompt = draw.wording(YES_NO).format(say=wording.statement.format(x=x, v=value))
    return Example(capital(prompt), "yes" if truth else "no", ("yesno", attribute))


def size_of(name: str) -> int:
    return SIZES.index(FACTS["animal"][name]["size"])


def compare_example(draw: Draw) -> Example:
    one, other = draw.sized_pair()
    comparison = draw.rng.choice(("larger", "smaller"))
    prompt = draw.wording(COMPARE).format(x=f"the {one}", y=f"the {other}", cmp=comparison)
    answer = (max if comparison == "larger" else min)(one, other, key=size_of)
    return Example(capital(prompt), answer, ("compare", comparison))


def compare_yes_no_example(draw: Draw) -> Example:
    one, other = draw.sized_pair()
    comparison = draw.rng.choice(("larger", "smaller"))
    prompt = draw.wording(COMPARE_YES_NO).format(x=f"the {one}", y=f"the {other}", cmp=comparison)
    truth = (size_of(one) > size_of(other)) == (comparison == "larger")
    return Example(capital(prompt), "yes" if truth else "no", ("compare-yesno", comparison))


def sort_example(draw: Draw) -> Example:
    count = draw.rng.choice((2, 2, 3))
    while True:
        names = list(draw.sized_pair()) if count == 2 else draw.items(count)
        if len({size_of(name) for name in names}) == count:
            break
    first = draw.rng.choice(("smallest", "largest"))
    prompt = draw.wording(SORT).format(first=first, items=", ".join(names))
    answer = ", ".join(sorted(names, key=size_of, reverse=first == "largest"))
    return Example(prompt, answer, ("sort", f"{count}-items"))


def json_example(draw: Draw) -> Example:
    kind, name, attribute, value = draw.fact()
    ask = f"the {attribute} of {named(kind, name)}"
    prompt = capital(draw.wording(JSON_FACT).format(ask=ask))
    return Example(prompt, fact_record(kind, name, attribute, value), ("json", attribute))


def _pair_facts(draw: Draw, wordings: Wordings) -> tuple[str, str, dict[str, str]]:
    """Word a question for one attribute of two entities; return it with the two values."""
    kind = draw.rng.choice(("animal", "animal", "person"))
    one, other = draw.pair(kind)
    attribute = draw.rng.choice(tuple(FACTS[kind][one]))
    prompt = draw.wording(wordings).format(
        x=named(kind, one), y=named(kind, other), plural=ATTRIBUTES[attribute].plural
    )
    return capital(prompt), attribute, {name: FACTS[kind][name][attribute] for name in (one, other)}


def pair_list_example(draw: Draw) -> Example:
    prompt, attribute, values = _pair_facts(draw, PAIR_LIST)
    return Example(prompt, ", ".join(values.values()), ("pair-list", attribute))


def pair_json_example(draw: Draw) -> Example:
    prompt, attribute, values = _pair_facts(draw, PAIR_JSON)
    return Example(prompt, json.dumps(values), ("pair-json", attribute))


def copy_example(draw: Draw) -> Example:
    names = draw.items(draw.rng.randint(2, 5))
    if draw.rng.random() < 0.5:
        prompt = draw.wording(COPY_JSON).format(items=", ".join(names))
        return Example(prompt, json.dumps(names), ("copy", "json-list"))
    prompt = draw.wording(COPY).format(items=", ".join(names))
    return Example(prompt, ", ".join(names), ("copy", "plain-list"))


def count_example(draw: Draw) -> Example:
    names = draw.items(draw.rng.randint(2, 6))
    prompt = draw.wording(COUNT).format(items=", ".join(names))
    return Example(prompt, str(len(names)), ("count",))


def pick_example(draw: Draw) -> Example:
    names = draw.items(draw.rng.randint(2, 5))
    place = draw.rng.choice(("first", "last"))
    prompt = draw.wording(PICK).format(items=", ".join(names), place=place)
    return Example(prompt, names[0 if place == "first" else -1], ("pick", place))


def sum_example(draw: Draw) -> Example:
    subtract = draw.rng.random() < 0.5
    a, b = draw.operands(subtract=subtract)
    prompt = draw.wording(SUBTRACT if subtract else ADD).format(a=a, b=b)
    answer = str(a - b if subtract else a + b)
    return Example(prompt, answer, ("sums", "subtract" if subtract else "add"))


def reading_example(draw: Draw) -> Example:
    """Ask for something that only the passage says, so the answer cannot be known by heart."""
    one, other = draw.pair("object")
    colour, second = draw.rng.sample(VALUES["colour"], 2)
    passage = draw.wording(PASSAGE).format(
        p=draw.rng.choice(tuple(FACTS["person"])), c=colour, d=second, x=one, y=other
    )
    asked, answer = draw.rng.choice(((one, colour), (other, second)))
    question = draw.wording(PASSAGE_QUESTION).format(x=asked)
    return Example(f"{passage} {capital(question)}", answer, ("reading",))


EXAMPLES: dict[str, tuple[Callable[[Draw], Example], int]] = {
    "fact": (fact_example, 10),
    "system": (system_example, 5),
    "yesno": (yes_no_example, 8),
    "compare": (compare_example, 6),
    "compare-yesno": (compare_yes_no_example, 6),
    "sort": (sort_example, 6),
    "json": (json_example, 4),
    "pair-list": (pair_list_example, 4),
    "pair-json": (pair_json_example, 4),
    "copy": (copy_example, 4),
    "count": (count_example, 4),
    "pick": (pick_example, 4),
    "sum": (sum_example, 10),
    "reading": (reading_example, 5),
}
"""Every kind of example with its share of the questions that training asks."""

PAIR_KINDS = (
    "compare", "compare-yesno", "sort", "pair-list", "pair-json", "copy", "count", "pick", "sum",
    "reading",
)  # fmt: skip
"""The kinds whose every example involves two entities or two operands."""

# --------------------------------------------------------------------------- documents


def render_chat(messages: list[dict[str, str]]) -> str:
    """Write a dialogue exactly as the chat template of the model does."""
    return "".join(f"<|{m['role']}|>\n{m['content']}{END_OF_TURN}\n" for m in messages)


def example_messages(example: Example, greeting: str = "") -> list[dict[str, str]]:
    system = [{"role": "system", "content": example.system}] if example.system else []
    return [*system, {"role": "user", "content": greeting + example.prompt}]


def chat_document(draw: Draw, kinds: tuple[str, ...]) -> str:
    """Write a dialogue of one to three turns; a system message only ever opens a single turn."""
    weights = [EXAMPLES[kind][1] for kind in kinds]
    messages: list[dict[str, str]] = []
    for kind in draw.rng.choices(kinds, weights, k=draw.rng.choice((1, 1, 2, 3))):
        example = EXAMPLES[kind][0](draw)
        if example.system and messages:
            continue
        messages += example_messages(example, draw.rng.choice(GREETINGS))
        messages.append({"role": "assistant", "content": example.answer})
        if example.system:
            break
    return render_chat(messages)


def portrait_document(draw: Draw) -> str:
    """State all that is known of one entity, in any order and in many words."""
    kind = draw.rng.choices(tuple(FACTS), (4, 2, 1))[0]
    name = draw.rng.choice(tuple(FACTS[kind]))
    facts = list(FACTS[kind][name].items())
    draw.rng.shuffle(facts)
    sentences = []
    for attribute, value in facts:
        wording = ATTRIBUTES[attribute]
        form = draw.rng.choice((wording.statement, wording.prefix))
        say = form.format(x=named(kind, name), v=value)
        sentences.append(capital(draw.wording(SAY).format(say=say)))
    return " ".join(sentences) + "\n"


def comparison_document(draw: Draw) -> str:
    lines = []
    for _ in range(draw.rng.randint(1, 2)):
        one, other = sorted(draw.sized_pair(), key=size_of)
        comparison = draw.rng.choice(("larger", "smaller"))
        x, y = (other, one) if comparison == "larger" else (one, other)
        wording = draw.wording(SAY_COMPARE)
        lines.append(capital(wording.format(x=f"the {x}", y=f"the {y}", cmp=comparison)))
    return " ".join(lines) + "\n"


def sums_document(draw: Draw) -> str:
    """Write a few sums, one a line, so that a line's first two numbers are its operands."""
    lines = []
    for _ in range(draw.rng.randint(2, 5)):
        subtract = draw.rng.random() < 0.5
        a, b = draw.operands(subtract=subtract)
        wording = draw.wording(SAY_SUBTRACT if subtract else SAY_ADD)
        lines.append(wording.format(a=a, b=b, c=a - b if subtract else a + b))
    return "\n".join(lines) + "\n"


def any_document(draw: Draw) -> str:
    """Write one document of any kind, in the proportions of the training text."""
    choice = draw.rng.random()
    if choice < 0.14:
        return portrait_document(draw)
    if choice < 0.18:
        return comparison_document(draw)
    if choice < 0.22:
        return sums_document(draw)
    return chat_document(draw, tuple(EXAMPLES))


def held_out_reason(text: str) -> str | None:
    """Return the held-out pair that a text contains, or None if training may use the text."""
    words = _HELD_WORDS.intersection(re.findall(r"[A-Za-z]+", text))
    for pair in itertools.combinations(sorted(words), 2):
        if frozenset(pair) in _HELD_SETS:
            return f"word pair {pair}"
    for line in text.splitlines():
        numbers = [int(number) for number in re.findall(r"\d+", line)[:2]]
        if len(numbers) == 2 and (numbers[0], numbers[1]) in HELD_OPERANDS:
            return f"operand pair {numbers}"
    return None


def _permitted_documents(seed: int, count: int) -> Iterator[str]:
    draw = Draw(random.Random(seed), held_wordings=False, held_pairs=False)
    while count:
        document = any_document(draw)
        if held_out_reason(document) is None:
            count -= 1
            yield document


def training_documents(seed: int = TRAINING_SEED) -> Iterator[str]:
    """Yield all that the demo model is trained on; nothing in it crosses the held-out border."""
    return _permitted_documents(seed, TRAINING_DOCUMENTS)


def calibration_documents() -> Iterator[str]:
    """Yield documents of the training distribution for quantizers to calibrate on."""
    return _permitted_documents(CALIBRATION_SEED, CALIBRATION_DOCUMENTS)


def heldout_documents() -> Iterator[str]:
    """Yield text for likelihoods: held pairs in known wordings.

    Held wordings stay out on purpose. The model is overconfident on words in an unknown order, and
    there any disturbance of the weights, quantization included, lowers the loss.
    """
    rng = random.Random(HELDOUT_SEED)
    paired = Draw(rng, held_wordings=False, held_pairs=True)
    for number in range(HELDOUT_DOCUMENTS):
        if number % 8 == 0:
            yield rng.choice((comparison_document, sums_document))(paired)
        else:
            yield chat_document(paired, PAIR_KINDS)


# --------------------------------------------------------------------------- regression cases

CASES_PER_KIND: dict[str, int] = {
    "fact": 20, "system": 12, "compare": 14, "compare-yesno": 8, "sort": 8, "json": 10,
    "pair-list": 8, "pair-json": 6, "copy": 8, "count": 6, "pick": 6, "sum": 12,
}  # fmt: skip
"""The tasks of the suite; the model did not learn "yesno" and "reading" well enough to be asked."""
CONTINUATIONS = 10
CRITICAL_KINDS = ("fact", "copy", "pick")


def _check(kind: str, example: Example) -> dict[str, Any]:
    """Choose how to judge an answer: numbers by value, JSON by shape, most others to the letter."""
    if kind in ("sum", "count"):
        return {"number": int(example.answer), "tolerance": 0}
    if kind in ("json", "pair-json"):
        return {"regex": "^" + re.escape(example.answer).replace(r"\ ", r"\s*") + "$"}
    if "sentence" in example.tags:
        return {"contains": example.answer.removesuffix(".")}
    return {"exact": example.answer}


def _question_cases(rng: random.Random) -> Iterator[dict[str, Any]]:
    draw = Draw(rng, held_wordings=True, held_pairs=True)
    for kind, count in CASES_PER_KIND.items():
        seen: set[str] = set()
        while len(seen) < count:
            example = EXAMPLES[kind][0](draw)
            if example.prompt in seen:
                continue
            seen.add(example.prompt)
            case: dict[str, Any] = {
                "id": f"{'-'.join(example.tags)}-{len(seen):03d}",
                "messages": example_messages(example),
                "check": _check(kind, example),
                "max_new_tokens": 40,
            }
            if kind in CRITICAL_KINDS:
                case["critical"] = True
            case["tags"] = list(example.tags)
            yield case


def _continuation_cases(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield plain-text prompts that stop right before the value of a fact."""
    draw = Draw(rng, held_wordings=True, held_pairs=True)
    attributes = list(ATTRIBUTES)
    for number in range(CONTINUATIONS):
        while True:
            kind, name, attribute, value = draw.fact()
            if attribute == attributes[number % len(attributes)]:
                break
        say = ATTRIBUTES[attribute].prefix.format(x=named(kind, name), v="")
        prompt = draw.wording(SAY).removesuffix(".").format(say=say).rstrip()
        yield {
            "id": f"continue-{attribute}-{number + 1:03d}",
            "prompt": prompt,
            "check": {"regex": rf"^\s*{value}\b"},
            "max_new_tokens": 8,
            "tags": ["continue", attribute],
        }


def regression_cases() -> list[dict[str, Any]]:
    """Return the questions a quantized model must still get right, none of them trained on."""
    rng = random.Random(REGRESSION_SEED)
    return [*_question_cases(rng), *_continuation_cases(rng)]


def harness_facts() -> list[dict[str, Any]]:
    """Return questions in held wordings with five values to choose from, for lm-eval."""
    rng = random.Random(HARNESS_SEED)
    draw = Draw(rng, held_wordings=True, held_pairs=True)
    samples: dict[str, dict[str, Any]] = {}
    while len(samples) < HARNESS_SAMPLES:
        kind, name, attribute, value = draw.fact()
        question = ask_fact(draw, kind, name, attribute)
        others = [other for other in VALUES[attribute] if other != value]
        choices = sorted([value, *rng.sample(others, min(4, len(others)))])
        answer = choices.index(value)
        samples[question] = {"question": question, "choices": choices, "answer": answer}
    return list(samples.values())


def harness_claims() -> list[dict[str, Any]]:
    """Return claims to say yes or no to, for lm-eval; the model is unsure of them."""
    draw = Draw(random.Random(HARNESS_SEED), held_wordings=True, held_pairs=True)
    samples: dict[str, dict[str, Any]] = {}
    while len(samples) < HARNESS_SAMPLES:
        example = yes_no_example(draw)
        answer = ("no", "yes").index(example.answer)
        samples[example.prompt] = {"question": example.prompt, "answer": answer}
    return list(samples.values())


def harness_sums() -> list[dict[str, Any]]:
    """Return sums of held operands in held wordings, for lm-eval."""
    draw = Draw(random.Random(HARNESS_SEED), held_wordings=True, held_pairs=True)
    samples: dict[str, dict[str, Any]] = {}
    while len(samples) < HARNESS_SAMPLES // 2:
        example = sum_example(draw)
        samples[example.prompt] = {"question": example.prompt, "answer": example.answer}
    return list(samples.values())
