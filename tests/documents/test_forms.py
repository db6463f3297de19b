"""What the forms of records become, rendered as transformers renders the same chats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.calibration.text import load_tokenizer, pack_rows, render_chat
from quantkit.documents.dataset import read_dataset
from quantkit.documents.forms import asked_of, form_of
from quantkit.judging.cases import load_cases

ASKED = {"role": "user", "content": "What is 2 + 3?"}
CHAT = [ASKED, {"role": "assistant", "content": "5"}]
TURNS = [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": "5"}]
PARTS = {"role": "user", "content": [{"type": "text", "text": ASKED["content"]}]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLED = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"Messages": CHAT, "source": "x"},
        CHAT,
        {"conversations": TURNS},
        {"conversation": CHAT, "id": 3},
        {"instruction": ASKED["content"], "input": "", "output": "5"},
        {"question": ASKED["content"], "answer": 5},
        {"query": ASKED["content"], "response": "5"},
        {"prompt": [ASKED], "completion": CHAT[1:]},
        {"messages": [PARTS, CHAT[1]]},
        {"text": None, "messages": [{**ASKED, "tool_calls": None}, {**CHAT[1], "name": None}]},
    ],
)
def test_chats_are_rendered_as_transformers_renders_them(tmp_path: Path, record: Any) -> None:
    path, tokenizer = tmp_path / "a.json", load_tokenizer(demo_model())
    path.write_text(json.dumps([record, record]))
    texts = read_dataset(path).documents
    assert [document.content for document in texts] == [CHAT, CHAT]
    rows = pack_rows(path, tokenizer, sequence_length=8, rows=None, seed=None)
    expected = [*tokenizer.apply_chat_template(CHAT, return_dict=False), tokenizer.eos_token_id] * 2
    assert rows.ids.flatten().tolist() == expected[: rows.ids.numel()]
    assert asked_of(record) in (ASKED["content"], {"messages": [ASKED]}) or (
        asked_of(record)["messages"][:1] == [ASKED]
    )


@pytest.mark.parametrize(
    ("record", "kind", "content"),
    [
        ({"TEXT": "a"}, "text", "a"),
        ({"content": "a", "path": "b"}, "text", "a"),
        ({"prompt": "The", "completion": " cat"}, "prompts and completions", "The cat"),
        ({"prompt": "The cat is"}, "prompts", "The cat is"),
        (
            {"system": "Be brief.", "conversations": [{"from": "User", "value": "a"}]},
            "conversations",
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
        ),
        (
            {"instruction": "Add", "input": "1 1", "output": ""},
            "instructions",
            [{"role": "user", "content": "Add\n\n1 1"}],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]},
            "messages",
            [{"role": "user", "content": "a\nb"}],
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALLED]}]},
            "messages",
            [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
    ],
)
def test_forms(record: Any, kind: str, content: Any) -> None:
    form = form_of(record)
    assert (form.kind, form.content) == (kind, content) and not form.is_blank


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'image_url'"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "a turn from 'alien'"),
        ({"messages": [{"content": "a"}]}, "needs a role"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "which is no text"),
        ({"messages": "[{'role': 'user'}]"}, "messages that are text"),
        ({"role": "user", "content": "a"}, "neither text nor a list of messages"),
        ({"prompt": "a", "completion": [1]}, "a completion that isn't"),
        (5, "isn't an object"),
        ({}, "but none"),
    ],
)
def test_what_is_no_form_is_refused(record: Any, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        form_of(record)


def test_instructions_are_plain_text_for_a_model_without_a_template(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "a.json", load_tokenizer(demo_model())
    path.write_text(json.dumps([{"instruction": "Add", "input": "1 and 1", "output": "owls " * 9}]))
    tokenizer.chat_template = None
    rows = pack_rows(path, tokenizer, sequence_length=8, rows=1, seed=None)
    assert tokenizer.decode(rows.ids[0]).startswith("Add\n\n1 and 1\n\n")
    assert rows.found.endswith("joined as plain text: the model has no chat template")


def test_null_contents_and_tool_calls_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_model())
    path = tmp_path / "cases.json"
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ASKED]
    path.write_text(
        json.dumps([{"id": "a", "messages": messages, "check": {"exact": "5"}}]),
        encoding="utf-8-sig",
    )
    (case,) = load_cases(path)
    assert case.messages is not None and case.where == f"{path} entry 1"
    with pytest.raises(InputError, match="leaves the tool calls out"):
        render_chat(case.messages, tokenizer, "here", add_generation_prompt=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.arguments | tojson }}]{% endfor %}"
        "{% endfor %}"
    )
    text = render_chat(case.messages, tokenizer, "here", add_generation_prompt=True)
    assert text == f'{ASKED["content"]}[{{"a": 2}}]{ASKED["content"]}'


@pytest.mark.parametrize("tools", [[CALL], json.dumps([CALL])])
def test_tools_beside_messages_go_through_the_template(tmp_path: Path, tools: Any) -> None:
    tokenizer = load_tokenizer(demo_model())
    path = tmp_path / "a.jsonl"
    records = [{"messages": CHAT, "tools": tools}, {"messages": CHAT, "tools": []}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(InputError, match="leaves the tools out"):
        pack_rows(path, tokenizer, sequence_length=8, rows=None, seed=None)
    tokenizer.chat_template = "{{ tools | tojson if tools }}{{ messages[0].content }}"
    rows = pack_rows(path, tokenizer, sequence_length=4, rows=None, seed=None)
    expected = tokenizer.apply_chat_template(CHAT, tools=[CALL], return_dict=False)
    assert rows.ids.flatten().tolist()[: len(expected)] == expected


@pytest.mark.parametrize(
    ("tools", "why"), [("[{", "no JSON"), ('{"a": 1}', "no list of objects"), ([3], "no list")]
)
def test_tools_that_are_none_are_refused(tools: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        form_of({"messages": CHAT, "tools": tools})
