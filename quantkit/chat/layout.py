"""What a chat template writes around messages, as data; rendered here, or in Ollama.

Ollama's templates are Go's ``text/template`` (https://pkg.go.dev/text/template), given
``.Messages`` (each with ``.Role``, ``.Content``, ``.Thinking``), ``.System`` (all system messages,
joined by an empty line), ``.Think`` and ``.IsThinkSet``
(https://github.com/ollama/ollama/blob/main/docs/template.mdx). ``render`` and ``go_template`` say
the same thing twice, so they stand side by side, and the tests run both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Message = Mapping[str, str]

# Where a system prompt goes: a turn of its own, into the first or the last user's turn, nowhere;
# "refused" by the template, and then written into the first user's turn all the same.
Place = Literal["turn", "first", "last", "ignored", "refused"]
_INSIDE_FIRST = ("first", "refused")


@dataclass(frozen=True)
class Turn:
    """The text before and after the content of a message."""

    before: str
    after: str


@dataclass(frozen=True)
class Thinking:
    """How a model thinks before it answers.

    turn: around the thoughts, before the content of an answer that is to be continued.
    off: what follows ``generation`` where thinking is switched off.
    """

    turn: Turn
    off: str


@dataclass(frozen=True)
class ChatLayout:
    """What a chat template writes.

    start: a literal BOS token, or nothing.
    opening: stands where a system prompt would, in a conversation without one.
    generation: opens the answer, after a last message that isn't the assistant's.
    An assistant's message that comes last is left open, to be continued.
    """

    place: Place
    start: str
    opening: str
    system: Turn
    user: Turn
    assistant: Turn
    generation: str
    thinking: Thinking | None = None


def render(layout: ChatLayout, messages: Sequence[Message], *, think: bool | None = None) -> str:
    """The text that Ollama makes of ``messages`` by ``go_template(layout)``.

    ``think``: as a request may set it; None leaves it unset. Roles other than system, user and
    assistant are passed over.
    """
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    prompt = layout.system.before + system + layout.system.after if system else ""
    text = layout.start
    first = True
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        last = index == len(messages) - 1
        if layout.place not in _INSIDE_FIRST and index == 0 and role != "system":
            text += layout.opening
        if role == "system" and layout.place == "turn":
            text += layout.system.before + content + layout.system.after
        elif role == "user":
            text += layout.user.before
            if layout.place in _INSIDE_FIRST and first:
                text += prompt or layout.opening
            if layout.place == "last" and last:
                text += prompt
            text += content + layout.user.after
            first = False
        elif role == "assistant":
            text += layout.assistant.before
            if layout.thinking and last:
                turn = layout.thinking.turn
                text += turn.before + message.get("reasoning_content", "") + turn.after
            text += content + ("" if last else layout.assistant.after)
        if last and role != "assistant":
            text += layout.generation
            if layout.thinking and think is False:
                text += layout.thinking.off
    return text


def go_template(layout: ChatLayout) -> str:
    """The layout as a template for Ollama.

    All text stands in quotes inside actions, so that the white space between them, which makes
    the template readable, can be trimmed. Only the thoughts' surroundings are bare: Ollama finds
    out by them how to tell thoughts from the answer.
    """
    lines = [_quoted(layout.start)] if layout.start else []
    if layout.place in _INSIDE_FIRST:
        lines.append("{{- $first := true }}")
    lines += [
        "{{- range $i, $_ := .Messages }}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
    ]
    if layout.opening and layout.place not in _INSIDE_FIRST:
        lines += ['{{- if and (eq $i 0) (ne .Role "system") }}', _quoted(layout.opening), _END]
    lines += ['{{- if eq .Role "user" }}', *_user(layout)]
    lines += ['{{- else if eq .Role "assistant" }}', *_assistant(layout)]
    if layout.place == "turn":
        lines += ['{{- else if eq .Role "system" }}', _around(layout.system, "{{- .Content }}")]
    lines.append(_END)
    if layout.generation or layout.thinking:
        lines += ['{{- if and $last (ne .Role "assistant") }}', _quoted(layout.generation)]
        if layout.thinking:
            lines += ["{{- if and $.IsThinkSet (not $.Think) }}", _quoted(layout.thinking.off)]
            lines.append(_END)
        lines.append(_END)
    return "\n".join([*lines, _END])


_END = "{{- end }}"


def _user(layout: ChatLayout) -> list[str]:
    prompt = _around(layout.system, "{{- $.System }}")
    lines = [_quoted(layout.user.before)]
    if layout.place in _INSIDE_FIRST:
        lines += ["{{- if $first }}{{ $first = false }}", "{{- if $.System }}", prompt]
        lines += ["{{- else }}", _quoted(layout.opening)] if layout.opening else []
        lines += [_END, _END]
    if layout.place == "last":
        lines += ["{{- if and $last $.System }}", prompt, _END]
    return [*lines, "{{- .Content }}", _quoted(layout.user.after)]


def _assistant(layout: ChatLayout) -> list[str]:
    lines = [_quoted(layout.assistant.before)]
    if layout.thinking:
        turn = layout.thinking.turn
        lines.append(
            f"{{{{- if $last }}}}{turn.before}{{{{ .Thinking }}}}{turn.after}{{{{ end }}}}"
        )
    lines.append("{{- .Content }}")
    if layout.assistant.after:
        lines += ["{{- if not $last }}", _quoted(layout.assistant.after), _END]
    return lines


def _around(turn: Turn, content: str) -> str:
    return _quoted(turn.before) + content + _quoted(turn.after)


def _quoted(text: str) -> str:
    """An action that writes ``text``. Go reads JSON's strings as its own, but not its pairs of
    surrogates; and a Modelfile loses what isn't printable."""
    if not text:
        return ""
    literal = json.dumps(text, ensure_ascii=False)
    escaped = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in literal)
    return f"{{{{- {escaped} }}}}"
