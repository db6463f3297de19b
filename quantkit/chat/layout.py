"""What a chat template writes around messages, as data: rendered here, or as Ollama's template.

Ollama's templates are Go's ``text/template`` (https://pkg.go.dev/text/template), given
``.Messages`` (each with ``.Role``, ``.Content``, ``.Thinking``), ``.System`` (all system messages,
joined by an empty line), ``.Think`` and ``.IsThinkSet``
(https://github.com/ollama/ollama/blob/main/docs/template.mdx). ``render`` and ``go_template`` must
agree, so they are in one file, and the tests run both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Message = Mapping[str, str]

# Where a system prompt goes: into a turn of its own, the first or the last user's turn, or nowhere.
# Where the template refuses one, it is written into the first user's turn nevertheless.
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
    off: the text after ``generation`` where thinking is switched off.
    """

    turn: Turn
    off: str


@dataclass(frozen=True)
class ChatLayout:
    """What a chat template writes.

    start: a literal BOS token, or nothing.
    opening: the text in place of the system prompt, in a conversation without one.
    generation: the text that opens the answer, after a last message that isn't the assistant's.
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
    """The layout as a template for Ollama."""
    # All text is quoted inside actions, so that the white space between them, which makes the
    # template readable, can be trimmed. Only the text around the thoughts is bare: Ollama searches
    # the template for it, to tell thoughts from the answer.
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
    """An action that writes ``text``."""
    if not text:
        return ""
    # Go reads JSON's strings as its own, except pairs of surrogates; and Ollama drops characters
    # that aren't printable from a Modelfile.
    literal = json.dumps(text, ensure_ascii=False)
    escaped = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in literal)
    return f"{{{{- {escaped} }}}}"
