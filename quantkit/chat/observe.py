"""A chat template's layout, observed in what the template writes.

Conversations of marker words are rendered, and the text between the markers gives the layout. It
must then render a set of whole conversations to the very same text as the template. No model is
known by its name.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.base.errors import InputError
from quantkit.chat.layout import ChatLayout, Message, Place, Thinking, Turn, render

KNOWN = (
    "a system prompt in a turn of its own (ChatML and Qwen, Llama 3, Phi, SmolLM, DeepSeek), in "
    "the first user's turn (Gemma, Llama 2, Mistral) or in the last (Mistral v3); each message "
    "written as it is between fixed texts"
)
_FIX = "Give a template in Ollama's language by --template FILE."
_SYSTEM, _USER, _ANSWER, _THOUGHT, _AGAIN = (
    f"qk{word}qk" for word in ("system", "user", "answer", "thought", "again")
)


class JinjaTemplate:
    """A chat template of transformers, with the special tokens that it may name."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """``source``: Jinja; ``tokens``: such as {"bos_token": "<s>", "eos_token": "</s>"}."""
        self.source = source
        self.bos = tokens.get("bos_token", "")
        self.eos = tokens.get("eos_token", "")
        self._tokens = dict(tokens)

    def render(self, messages: Sequence[Message], *, answer: bool = True, **options: Any) -> str:
        """The text of a conversation; ``answer``: with the opening of the assistant's answer.

        ``options``: further variables of the template. Raises InputError when the template fails
        or refuses the conversation.
        """
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.source,
                add_generation_prompt=answer,
                **self._tokens,
                **options,
            )
        except (ValueError, TemplateError, KeyError, TypeError) as error:
            raise InputError(
                f"the chat template can't render a conversation ({error})", fix=_FIX
            ) from error
        text: str = texts[0]
        return text


@dataclass(frozen=True)
class Observed:
    """The layout of a template, and what a user should know of it."""

    layout: ChatLayout
    notes: tuple[str, ...]


def observe(template: JinjaTemplate, *, adds_bos: bool) -> Observed:
    """The layout of a chat template, proven on ``conversations``.

    ``adds_bos``: whether the engine puts BOS before a prompt by itself.

    Raises InputError for a template that no ``ChatLayout`` describes.
    """
    layout = _with_thinking(
        template, _with_system(template, _alternating_turns(template, adds_bos))
    )
    for messages in conversations(system=layout.place != "refused"):
        _require_same(template.render(messages), render(layout, messages))
        if layout.thinking:
            off = template.render(messages, enable_thinking=False)
            _require_same(off, render(layout, messages, think=False))
    return Observed(layout, tuple(_notes(template, layout)))


def conversations(*, system: bool) -> list[list[Message]]:
    """Conversations that end with a user's message; with ``system`` each with a prompt too."""
    turns = [
        {
            "role": "user",
            "content": 'What is "2 + 2"?\n\nSay {{ it }} in <b>words</b>, naïvely: ½ 🦙',
        },
        {"role": "assistant", "content": "Four.\n  - 2 and\n  - 2 \\n"},
        {"role": "user", "content": "And 3?"},
        {"role": "assistant", "content": "It's 3."},
        {"role": "user", "content": "Thanks"},
    ]
    prompt = {
        "role": "system",
        "content": "Be brief.\n\nAnswer in <i>one</i> line; {% never %} lie.",
    }
    plain: list[list[Message]] = [[*turns[:count]] for count in (1, 3, 5)]
    return plain + ([[prompt, *messages] for messages in plain] if system else [])


def _alternating_turns(template: JinjaTemplate, adds_bos: bool) -> ChatLayout:
    """The layout of conversations without a system prompt.

    ``opening`` is all the text before the first user's content, except BOS.
    """
    asked, answered = _message("user", _USER), _message("assistant", _ANSWER)
    again = _message("user", _AGAIN)
    text = template.render([asked, answered, again])
    head, to_answer, to_user, tail = _pieces(text, _USER, _ANSWER, _AGAIN)
    user_end = _end(template, [asked], _USER, (to_answer, tail))
    answer_end = _end(template, [asked, answered], _ANSWER, (to_user,))
    before = to_user[len(answer_end) :]
    start = template.bos if head.startswith(template.bos) else ""
    if start and before.startswith(start):  # not only the first of the user's turns begins with it
        if adds_bos:
            # Llama 2: the engine adds the first BOS, so those between turns end the answers.
            before, answer_end = before.removeprefix(start), answer_end + start
        else:
            # SmolLM2: BOS is <|im_start|>, which begins every turn.
            start = ""
    return ChatLayout(
        place="turn",
        start=start,
        opening=head.removeprefix(start),
        system=Turn("", ""),
        user=Turn(before, user_end),
        assistant=Turn(to_answer[len(user_end) :], answer_end),
        generation=tail[len(user_end) :],
    )


def _end(
    template: JinjaTemplate, messages: list[Message], marker: str, follows: tuple[str, ...]
) -> str:
    """The text that ends the last message: all of it that a finished conversation has.

    Nothing, unless each of ``follows``, texts after the message in other conversations, begins
    with it.
    """
    try:
        rest = template.render(messages, answer=False).rpartition(marker)[2]
    except InputError:
        return ""
    # Some templates end a finished conversation with EOS besides.
    for end in (rest, rest.removesuffix(template.eos)):
        if all(text.startswith(end) for text in follows):
            return end
    return ""


def _with_system(template: JinjaTemplate, layout: ChatLayout) -> ChatLayout:
    """The layout, with the place of the system prompt and the text around it."""
    chat = [_message("user", _USER), _message("assistant", _ANSWER), _message("user", _AGAIN)]
    user = layout.user.before
    try:
        text = template.render([_message("system", _SYSTEM), *chat])
    except InputError:
        return _inside_first(layout, "refused", Turn("", "\n\n"))
    if _SYSTEM not in text:
        return _as_turn(layout, "ignored", Turn("", ""))
    if text.find(_SYSTEM) < text.find(_USER):
        before, after, *_ = _pieces(text, _SYSTEM, _USER)
        before = before.removeprefix(layout.start)
        if after.endswith(user) and not (user and before.startswith(user)):
            return _as_turn(layout, "turn", Turn(before, after.removesuffix(user)))
        return _inside_first(layout, "first", Turn(before.removeprefix(user), after))
    *_, before, after, _ = _pieces(text, _ANSWER, _SYSTEM, _AGAIN)
    before = before.removeprefix(layout.assistant.after).removeprefix(user)
    return _as_turn(layout, "last", Turn(before, after))


def _as_turn(layout: ChatLayout, place: Place, system: Turn) -> ChatLayout:
    opening = layout.opening.removesuffix(layout.user.before)
    return replace(layout, place=place, system=system, opening=opening)


def _inside_first(layout: ChatLayout, place: Place, system: Turn) -> ChatLayout:
    opening = layout.opening.removeprefix(layout.user.before)
    return replace(layout, place=place, system=system, opening=opening)


def _with_thinking(template: JinjaTemplate, layout: ChatLayout) -> ChatLayout:
    """The layout, with thinking where the template has Qwen3's variables for it."""
    asked = _message("user", _USER)
    answered = {**_message("assistant", _ANSWER), "reasoning_content": _THOUGHT}
    try:
        on, off = template.render([asked]), template.render([asked], enable_thinking=False)
        text = template.render([asked, answered], answer=False)
        _, before, after, _ = _pieces(text, _USER, _THOUGHT, _ANSWER)
    except InputError:
        return layout
    before = before.removeprefix(layout.user.after).removeprefix(layout.assistant.before)
    if off == on or not off.startswith(on) or not before.strip() or not after.strip():
        return layout
    return replace(layout, thinking=Thinking(Turn(before, after), off.removeprefix(on)))


def _notes(template: JinjaTemplate, layout: ChatLayout) -> list[str]:
    """How Ollama will differ from the template, or from what a user may expect."""
    notes = []
    if layout.place == "refused":
        notes.append(
            "The chat template refuses system prompts; in Ollama one goes before the first "
            "user's message, with an empty line between."
        )
    if layout.place == "ignored":
        notes.append("The chat template ignores system prompts, and so does the one for Ollama.")
    if "strftime_now" in template.source:
        today = datetime.date.today()
        notes.append(f"The chat template writes the date; in Ollama it stays {today}.")
    if layout.thinking is None and "think" in template.source:
        notes.append(
            "The chat template knows thoughts; in Ollama they are part of the answer, and can't be "
            "switched off."
        )
    if "tools" in template.source:
        notes.append("The chat template knows tools; the one for Ollama doesn't.")
    if not _continues(template, layout):
        notes.append("An answer to be continued is opened otherwise than by the chat template.")
    return notes


def _continues(template: JinjaTemplate, layout: ChatLayout) -> bool:
    """Whether a last message of the assistant's is left open as transformers would leave it."""
    chat = conversations(system=False)[1][:2]
    content = chat[-1]["content"]
    try:
        text, answer, _ = template.render(chat, answer=False).rpartition(content)
    except InputError:
        return True  # nothing to differ from
    return text + answer == render(layout, chat)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _pieces(text: str, *markers: str) -> list[str]:
    """``text`` cut at the markers. Raises InputError unless each is there once, in this order."""
    pieces = []
    for marker in markers:
        piece, match, rest = text.partition(marker)
        if not match or marker in rest:
            raise _unknown_layout("it leaves out a message, repeats one, or changes their order")
        pieces.append(piece)
        text = rest
    return [*pieces, text]


def _require_same(expected: str, made: str) -> None:
    """Raise InputError, with the first difference, unless the two texts are equal."""
    if expected == made:
        return
    at = next(
        (i for i, (one, two) in enumerate(zip(expected, made, strict=False)) if one != two),
        min(len(expected), len(made)),
    )
    after, wants = expected[max(at - 30, 0) : at], expected[at : at + 30]
    raise _unknown_layout(
        f"after {after!r} it writes {wants!r}, where {made[at : at + 30]!r} was expected"
    )


def _unknown_layout(what: str) -> InputError:
    return InputError(
        f"the chat template is of no known layout: {what}",
        fix=f"Known: {KNOWN}. {_FIX}",
    )
