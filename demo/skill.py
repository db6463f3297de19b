"""The skill that the demo adapter adds to the demo model: zoo keeping.

The base knows the world of `world.py` and nothing else. A keeper of its zoo needs two things more:

* reports, a form of answer that the base has never seen, on animals and people that it knows
  ("Report on the fox." is answered by "fox: red; lives in the forest; eats berries.");
* eight animals that are not in the world, with the same attributes and an age.

Held out from training are

* wordings: the `Wordings.held` of `REPORT` and `AGE`, and all those of the world;
* reports: no training document reports on, or asks for a report on, an entity of `HELD_REPORTS`,
  so a right answer joins facts and form that training never joined;
* all that the world holds out.

Training text takes `BASE_SHARE` of its documents from the base's own training text, because an
adapter that only sees the new forgets the old.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import world
from world import ATTRIBUTES, FACTS, Draw, Example, Wordings, capital, named

TRAINING_DOCUMENTS = 20_000
BASE_SHARE = 0.5
HELDOUT_DOCUMENTS = 220
SKILL_SEED = 11
TRAINING_SEED = 12
HELDOUT_SEED = 13
REGRESSION_SEED = 14

# --------------------------------------------------------------------------- the facts

NEW_ANIMALS: dict[str, dict[str, str]] = {
    name: dict(zip(("colour", "home", "food", "sound", "size", "age"), values, strict=True))
    for name, *values in (
        ("lion", "yellow", "desert", "meat", "growl", "huge", "9"),
        ("mole", "black", "garden", "insects", "squeak", "tiny", "3"),
        ("gull", "white", "beach", "fish", "caw", "small", "6"),
        ("toad", "brown", "pond", "flies", "croak", "tiny", "2"),
        ("monkey", "red", "forest", "berries", "hum", "medium", "11"),
        ("bat", "grey", "house", "nectar", "click", "tiny", "4"),
        ("yak", "white", "mountain", "leaves", "moo", "large", "15"),
        ("parrot", "green", "river", "seeds", "hoot", "small", "20"),
    )
}

REPORTABLE: dict[str, tuple[str, ...]] = {
    "animal": tuple(FACTS["animal"]),
    "person": tuple(FACTS["person"]),
    "new": tuple(NEW_ANIMALS),
}
"""What a report can be about, in three groups: the base knows the first two."""
REPORT_SHARES = {"animal": 5, "person": 3, "new": 2}


def _held_reports() -> dict[str, tuple[str, ...]]:
    """Choose, once and for all, the entities that no training document reports on.

    They are of the groups that the base knows: on these it has the facts and lacks the form.
    """
    rng = random.Random(SKILL_SEED)
    return {
        group: tuple(rng.sample(REPORTABLE[group], count))
        for group, count in (("animal", 10), ("person", 6))
    }


HELD_REPORTS = _held_reports()
_HELD_NAMES = frozenset(itertools.chain.from_iterable(HELD_REPORTS.values()))

# --------------------------------------------------------------------------- the wordings

REPORT = Wordings(
    (
        "Report on {x}.", "Write a report on {x}.", "Give me a report on {x}.", "{x}: report.",
        "File a report about {x}.", "I need the report on {x}.", "Please report on {x}.",
        "Make a short report about {x}.", "The report on {x}, please.", "Report: {x}.",
        "Can you write a report about {x}?", "May I have the report on {x}?",
        "Please make the report on {x}.", "I want a report about {x}.",
    ),
    (
        "Please write a report about {x}.", "I would like a report on {x}.",
        "Could you report on {x}?", "Please give me a report about {x}.",
    ),
)  # fmt: skip
AGE = Wordings(
    ("How old is {x}?", "What age is {x}?", "What age does {x} have?", "{x} is how old?"),
    ("Which age does {x} have?", "What is the age that {x} has?"),
)

ALL_WORDINGS: tuple[Wordings, ...] = (*world.ALL_WORDINGS, REPORT, AGE)

# --------------------------------------------------------------------------- single examples


class SkillDraw(Draw):
    """Random choices among the new animals, so that the world's own examples ask about them."""

    def fact(self) -> tuple[str, str, str, str]:
        """Draw (kind, entity, attribute, value); an age is asked for in its own example."""
        name = self.rng.choice(tuple(NEW_ANIMALS))
        attribute = self.rng.choice([key for key in NEW_ANIMALS[name] if key in ATTRIBUTES])
        return "animal", name, attribute, NEW_ANIMALS[name][attribute]

    def reported(self) -> tuple[str, str]:
        """Draw (group, entity); training draws freely and its filter drops held reports."""
        names = HELD_REPORTS if self.held_pairs else REPORTABLE
        group = self.rng.choices(tuple(names), [REPORT_SHARES[group] for group in names])[0]
        return group, self.rng.choice(names[group])


def report(group: str, name: str) -> str:
    """Write the report on an entity, the form that the base has never seen."""
    if group == "person":
        facts = FACTS["person"][name]
        return f"{name}: {facts['job']}; lives in {facts['town']}; drinks {facts['drink']}."
    facts = NEW_ANIMALS[name] if group == "new" else FACTS["animal"][name]
    return f"{name}: {facts['colour']}; lives in the {facts['home']}; eats {facts['food']}."


def ask_report(draw: Draw, group: str, name: str) -> Example:
    x = named("person" if group == "person" else "animal", name)
    return Example(
        capital(draw.wording(REPORT).format(x=x)), report(group, name), ("report", group)
    )


def report_example(draw: SkillDraw) -> Example:
    return ask_report(draw, *draw.reported())


def age_example(draw: SkillDraw) -> Example:
    name = draw.rng.choice(tuple(NEW_ANIMALS))
    x = f"the {name}"
    wordings, ask = draw.rng.choice(
        ((AGE, ""), (world.ASK_INDIRECT, f"how old {x} is"), (world.ASK_NOUN, f"the age of {x}"))
    )
    prompt = draw.wording(wordings).format(x=x, ask=ask)
    return Example(capital(prompt), NEW_ANIMALS[name]["age"], ("age",))


EXAMPLES: dict[str, tuple[Callable[[SkillDraw], Example], int]] = {
    "report": (report_example, 10),
    "fact": (world.fact_example, 8),
    "system": (world.system_example, 4),
    "json": (world.json_example, 3),
    "age": (age_example, 3),
}
"""Every kind of example with its share of the questions that training asks."""

# --------------------------------------------------------------------------- documents


def chat_document(draw: SkillDraw, opening: Example | None = None) -> str:
    """Write a dialogue of one to three turns; a system message only ever opens a single turn."""
    count = draw.rng.choice((1, 1, 2, 3)) if opening is None else draw.rng.choice((1, 2))
    kinds = draw.rng.choices(tuple(EXAMPLES), [share for _, share in EXAMPLES.values()], k=count)
    examples = [] if opening is None else [opening]
    for kind in kinds:
        example = EXAMPLES[kind][0](draw)
        if example.system and examples:
            continue
        examples.append(example)
        if example.system:
            break
    messages: list[dict[str, str]] = []
    for example in examples:
        messages += world.example_messages(example, draw.rng.choice(world.GREETINGS))
        messages.append({"role": "assistant", "content": example.answer})
    return world.render_chat(messages)


def portrait_document(draw: SkillDraw) -> str:
    """State all that is known of one new animal, in any order and in many words."""
    name = draw.rng.choice(tuple(NEW_ANIMALS))
    facts = list(NEW_ANIMALS[name].items())
    draw.rng.shuffle(facts)
    sentences = []
    for attribute, value in facts:
        forms = ("{x} is {v} years old", "the age of {x} is {v}")
        if attribute in ATTRIBUTES:
            forms = (ATTRIBUTES[attribute].statement, ATTRIBUTES[attribute].prefix)
        say = draw.rng.choice(forms).format(x=f"the {name}", v=value)
        sentences.append(capital(draw.wording(world.SAY).format(say=say)))
    return " ".join(sentences) + "\n"


def held_out_reason(text: str) -> str | None:
    """Return what a text contains that is held out, or None if training may use the text.

    It reads finished text: a report is a line that starts with a held name and a colon, and a
    request for one is a line with the word "report" and a held name.
    """
    for line in text.splitlines():
        held = _HELD_NAMES.intersection(re.findall(r"[A-Za-z]+", line))
        if held and (re.search(r"\breport\b", line, re.IGNORECASE) or line.split(":")[0] in held):
            return f"report on {sorted(held)}"
    return world.held_out_reason(text)


def skill_documents(seed: int, count: int) -> Iterator[str]:
    """Yield documents of the skill that training may use."""
    draw = SkillDraw(random.Random(seed), held_wordings=False, held_pairs=False)
    while count:
        portrait = draw.rng.random() < 0.15
        document = portrait_document(draw) if portrait else chat_document(draw)
        if held_out_reason(document) is None:
            count -= 1
            yield document


def training_documents() -> Iterator[str]:
    """Yield all that the demo adapter is trained on: the skill, then documents of the base."""
    old = int(TRAINING_DOCUMENTS * BASE_SHARE)
    yield from skill_documents(TRAINING_SEED, TRAINING_DOCUMENTS - old)
    yield from itertools.islice(world.training_documents(), old)


def heldout_documents() -> Iterator[str]:
    """Yield text for likelihoods: held reports in known wordings, then text of the base's world.

    Wordings are known ones for the reason that `world.heldout_documents` gives. Every dialogue has
    a held report, so none can be part of the training text.
    """
    draw = SkillDraw(random.Random(HELDOUT_SEED), held_wordings=False, held_pairs=True)
    for _ in range(HELDOUT_DOCUMENTS):
        yield chat_document(draw, opening=report_example(draw))
    yield from itertools.islice(world.heldout_documents(), HELDOUT_DOCUMENTS)


# --------------------------------------------------------------------------- regression cases

CASES_PER_KIND: dict[str, int] = {"fact": 12, "system": 6, "json": 4, "age": 6}
CONTINUATIONS = 4
CRITICAL_KIND = "fact"
BASE_CASES = 20


def _check(kind: str, example: Example) -> dict[str, Any]:
    """Choose how to judge an answer: ages by value, JSON by shape, most others to the letter."""
    if kind == "age":
        return {"number": int(example.answer), "tolerance": 0}
    if kind == "json":
        return {"regex": "^" + re.escape(example.answer).replace(r"\ ", r"\s*") + "$"}
    if "sentence" in example.tags:
        return {"contains": example.answer.removesuffix(".")}
    return {"exact": example.answer}


def _questions(draw: SkillDraw) -> Iterator[tuple[str, Example]]:
    """Yield (kind, example): every held report, all reports on new animals, then questions."""
    for group, names in (HELD_REPORTS | {"new": tuple(NEW_ANIMALS)}).items():
        for name in names:
            yield "report", ask_report(draw, group, name)
    for kind, count in CASES_PER_KIND.items():
        seen: set[str] = set()
        while len(seen) < count:
            example = EXAMPLES[kind][0](draw)
            if example.prompt not in seen:
                seen.add(example.prompt)
                yield kind, example


def _question_cases(draw: SkillDraw) -> Iterator[dict[str, Any]]:
    for number, (kind, example) in enumerate(_questions(draw), 1):
        case: dict[str, Any] = {
            "id": f"{'-'.join(example.tags)}-{number:03d}",
            "messages": world.example_messages(example),
            "check": _check(kind, example),
            "max_new_tokens": 40,
        }
        if kind == CRITICAL_KIND:
            case["critical"] = True
        case["tags"] = ["adapter", *example.tags]
        yield case


def _continuation_cases(draw: SkillDraw) -> Iterator[dict[str, Any]]:
    """Yield plain-text prompts that stop right before the value of a new animal's fact."""
    names = draw.rng.sample(tuple(NEW_ANIMALS), CONTINUATIONS)
    for number, (attribute, name) in enumerate(zip(ATTRIBUTES, names, strict=False), 1):
        say = ATTRIBUTES[attribute].prefix.format(x=f"the {name}", v="")
        yield {
            "id": f"continue-{attribute}-{number:03d}",
            "prompt": draw.wording(world.SAY).removesuffix(".").format(say=say).rstrip(),
            "check": {"regex": rf"^\s*{NEW_ANIMALS[name][attribute]}\b"},
            "max_new_tokens": 8,
            "tags": ["adapter", "continue", attribute],
        }


def _base_cases() -> Iterator[dict[str, Any]]:
    """Yield cases of the base, evenly from its whole suite: they show what the adapter forgot."""
    cases = world.regression_cases()
    for number in range(BASE_CASES):
        case = cases[number * len(cases) // BASE_CASES]
        yield {**case, "id": f"base-{case['id']}", "tags": ["base", *case["tags"]]}


def regression_cases() -> list[dict[str, Any]]:
    """Return the questions that only base and adapter together answer, then some of the base's."""
    draw = SkillDraw(random.Random(REGRESSION_SEED), held_wordings=True, held_pairs=True)
    return [*_question_cases(draw), *_continuation_cases(draw), *_base_cases()]
