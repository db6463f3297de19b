"""The forms that a record of text may have, and what each becomes: text, or chat messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.documents.content import MARK

Message = dict[str, Any]

_TEXTS = ("text", "content")
CHATS = ("messages", "conversations", "conversation")
_ASKED = ("instruction", "question", "query")
_ANSWERED = ("output", "answer", "response")
_PROMPT, _COMPLETION = "prompt", "completion"
# The keys, in small letters, that texts are read from.
KEYS = (*_TEXTS, *CHATS, *_ASKED, *_ANSWERED, _PROMPT, _COMPLETION)

# ShareGPT's names of those who speak.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response", "ipython"), "tool"),
    "function_call": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Form:
    """What a record holds. kind: its form, in words; content: text, or chat messages; plain: the
    text to take for messages where a model has no chat template, None where there is no such;
    tools: descriptions of the functions that may be called in the messages."""

    kind: str
    content: str | list[Message]
    plain: str | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing in it to read."""
        if isinstance(self.content, str):
            return not self.content.strip()
        return not any(_says(message) for message in self.content)


def _says(message: Message) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or any(
        value for key, value in message.items() if key not in ("role", "content", "name")
    )


def form_of(value: Any) -> Form:
    """What a record says. Raises ValueError with the reason where it is in no known form."""
    if isinstance(value, str):
        return Form("text", without_mark(value))
    if isinstance(value, list):
        return Form("messages", messages_of(value))
    if not isinstance(value, dict):
        raise ValueError(_unknown(value))
    record = {str(key).strip().lower(): item for key, item in value.items()}
    # pandas writes a missing text as NaN.
    record = {key: None if item != item else item for key, item in record.items()}
    forms = [form for read in (_text, _chat, _continued, _answered) if (form := read(record))]
    if not forms and any(key in record and record[key] is None for key in KEYS):
        return Form("text", "")
    if not forms:
        raise ValueError(_unknown(value))
    return next((form for form in forms if not form.is_blank), forms[0])


def is_blank(value: Any) -> bool:
    """Whether a record is in a known form and has nothing in it to read."""
    try:
        return form_of(value).is_blank
    except ValueError:
        return False


def asked_of(value: Any) -> Any:
    """What a record asks, without the answer that it may have: text, or the keys of a case.

    A record that is a case already, or in no known form, is returned as it is. Raises ValueError
    for a record that asks nothing.
    """
    if isinstance(value, dict) and ("check" in value or not _keys(value) & {*KEYS}):
        return value
    form = form_of(value)
    if form.kind == "text":
        return str(form.content).strip()
    if form.kind == "prompts":
        return value
    if isinstance(form.content, str):  # a prompt, and what continues it
        prompt = next(item for key, item in value.items() if key.strip().lower() == _PROMPT)
        return {_PROMPT: without_mark(prompt)}
    messages = form.content
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError("asks nothing: all that is said is an answer")
    if form.kind == "instructions":
        return messages[0]["content"]
    rest = value if form.kind == "messages" and isinstance(value, dict) else {}
    return {**rest, "messages": messages}


def _keys(value: dict[Any, Any]) -> set[str]:
    return {str(key).strip().lower() for key in value}


def _unknown(value: Any) -> str:
    """Why a record is in no known form."""
    wanted = '"text", "messages", "conversations", "instruction" or "prompt"'
    if not isinstance(value, dict):
        return f"isn't an object with {wanted}"
    if known := [key for key in value if str(key).strip().lower() in KEYS]:
        shown = json.dumps(value[known[0]], default=str)[:40]
        return f"has {known[0]}: {shown}, which is neither text nor a list of messages"
    return f"has none of the keys {wanted}, but {', '.join(map(str, value)) or 'none'}"


def without_mark(text: str) -> str:
    """A text without the byte order mark that it may begin with."""
    return text.lstrip(MARK)


def _text(record: Mapping[str, Any]) -> Form | None:
    for key in _TEXTS:
        # A message alone has content too, and is no document.
        if isinstance(record.get(key), str) and not (key == "content" and "role" in record):
            return Form("text", without_mark(record[key]))
    return None


def _chat(record: Mapping[str, Any]) -> Form | None:
    for key in CHATS:
        turns = record.get(key)
        if isinstance(turns, list):
            messages = messages_of(turns)
            system = record.get("system")
            if key != "messages" and isinstance(system, str) and system.strip():
                messages = [{"role": "system", "content": system}, *messages]
            kind = "messages" if key == "messages" else "conversations"
            return Form(kind, messages, tools=_tools(record.get("tools")))
        if isinstance(turns, str):
            raise ValueError(f"has {key} that are text, and no list of messages in JSON")
    return None


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools beside messages, which data sets also have as text in JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"has tools that are text, and no JSON ({error})") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("has tools that are no list of objects")
    return value


def _continued(record: Mapping[str, Any]) -> Form | None:
    """A prompt and what continues it: as one text, or as one chat."""
    prompt = record.get(_PROMPT)
    if isinstance(prompt, str):
        completion = record.get(_COMPLETION, record.get("response"))
        if completion is None:
            return Form("prompts", without_mark(prompt))
        if not isinstance(completion, str):
            raise ValueError("has a prompt that is text, and a completion that isn't")
        return Form("prompts and completions", without_mark(prompt) + completion)
    if isinstance(prompt, list):
        completion = record.get(_COMPLETION)
        both = [*prompt, *(completion if isinstance(completion, list) else [])]
        return Form("prompts and completions", messages_of(both))
    return None


def _answered(record: Mapping[str, Any]) -> Form | None:
    """A question or an instruction, perhaps with an input, and its answer."""
    asked = next((record[key] for key in _ASKED if isinstance(record.get(key), str)), None)
    if asked is None:
        return None
    answer = str(next((r for key in _ANSWERED if (r := record.get(key)) is not None), ""))
    given = record.get("input")
    question = "\n\n".join(
        part for part in (without_mark(asked), given) if isinstance(part, str) and part.strip()
    )
    messages = [{"role": "user", "content": question}] if question else []
    messages += [{"role": "assistant", "content": answer}] if answer.strip() else []
    return Form("instructions", messages, "\n\n".join(message["content"] for message in messages))


def messages_of(turns: list[Any]) -> list[Message]:
    """Chat messages as chat templates take them.

    ShareGPT's turns become messages, parts of text become one text, null contents empty ones, and
    arguments of tool calls objects; other keys that are null are left out.

    Raises ValueError for what is no message, has no role, or holds what isn't text.
    """
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"messages holds {json.dumps(turn)}, which is no object")
    return [_message(turn) for turn in turns]


def _message(turn: Message) -> Message:
    if "role" not in turn and "from" in turn:
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
            raise ValueError(
                f"messages holds a turn from {speaker!r}; known are {', '.join(_ROLES)}"
            )
        return {"role": _ROLES[speaker.lower()], "content": _content(turn.get("value"))}
    if not isinstance(turn.get("role"), str):
        raise ValueError("each of messages needs a role")
    message = {key: value for key, value in turn.items() if value is not None}
    message["content"] = _content(turn.get("content"))
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return without_mark(content)
    if isinstance(content, list):
        return "\n".join(map(_part, content))
    raise ValueError(f"messages holds the content {json.dumps(content)}, which is no text")


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, dict) else None
    raise ValueError(f"messages holds a part of the type {kind!r}, and only text can be read")


def _call(call: Any) -> Any:
    """A tool call whose arguments are an object, as templates write it; APIs hold them as text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    if not isinstance(arguments, dict):
        return call
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed
