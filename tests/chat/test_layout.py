"""Chat templates in Ollama's language: what Go makes of them is what transformers makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.base.errors import InputError
from quantkit.chat.layout import ChatLayout, Message, Turn, go_template, render
from quantkit.chat.observe import JinjaTemplate, Observed, conversations, observe
from tests.helpers.chat_templates import TEMPLATES

Go = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
# SmolLM2's "BOS" begins every turn, and isn't added to a prompt.
ADDS_BOS = {name: name != "smollm2" for name in TEMPLATES}


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Executes templates by Go's text/template, with what Ollama gives them."""
    if shutil.which("go") is None:
        pytest.skip("needs Go, in which Ollama executes templates (Debian: golang-go)")
    directory = tmp_path_factory.mktemp("go")
    program = directory / "run"
    environment = {**os.environ, "GOCACHE": str(directory / "cache"), "GO111MODULE": "off"}
    source = Path(__file__).with_name("ollama_template.go")
    subprocess.run(["go", "build", "-o", program, source], check=True, env=environment)

    def execute(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        done = subprocess.run(
            [program], input=json.dumps(cases), capture_output=True, text=True, check=True
        )
        results: list[dict[str, Any]] = json.loads(done.stdout)
        assert [result["error"] for result in results] == [""] * len(cases)
        return results

    return execute


def template_of(name: str) -> JinjaTemplate:
    source, bos, eos, *_ = TEMPLATES[name]
    return JinjaTemplate(source, {"bos_token": bos, "eos_token": eos})


def observed(name: str) -> Observed:
    return observe(template_of(name), adds_bos=ADDS_BOS[name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_writes_what_transformers_writes(name: str, go: Go) -> None:
    template, layout = template_of(name), observed(name).layout
    assert layout.place == TEMPLATES[name][3]
    chats = conversations(system=layout.place != "refused")
    cases = [{"template": go_template(layout), "messages": messages} for messages in chats]
    texts = [result["text"] for result in go(cases)]
    assert texts == [template.render(messages) for messages in chats]


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_writes_what_python_writes(name: str, go: Go) -> None:
    """Also where transformers has no say, or refuses: other orders, other roles."""
    layout = observed(name).layout
    chats: list[list[str]] = [
        ["user", "assistant"],
        ["system", "user", "assistant"],
        ["system", "user", "assistant", "system", "user"],
        ["user", "assistant", "system"],
        ["assistant", "user"],
        ["user", "tool", "user"],
        ["system"],
        [],
    ]
    talks = [[{"role": r, "content": f"{r} {i}"} for i, r in enumerate(c)] for c in chats]
    talks[0][1]["reasoning_content"] = "Hm."
    cases: list[dict[str, Any]] = [
        {"template": go_template(layout), "messages": messages, "think": think}
        for messages in talks
        for think in (None, True, False)
    ]
    made = [render(layout, case["messages"], think=case["think"]) for case in cases]
    assert [result["text"] for result in go(cases)] == made


def test_thinking_is_qwens(go: Go) -> None:
    """It is switched off as in transformers, and Ollama recognizes the text around it."""
    template, layout = template_of("qwen3"), observed("qwen3").layout
    messages = conversations(system=True)[-1]
    case = {"template": go_template(layout), "messages": messages}
    on, off = go([{**case, "think": True}, {**case, "think": False}])
    assert on["text"] == template.render(messages, enable_thinking=True)
    assert off["text"] == template.render(messages, enable_thinking=False)
    assert off["text"] == on["text"] + "<think>\n\n</think>\n\n"
    assert on["tags"] == ["<think>", "</think>"]
    chat: list[Message] = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "It is", "reasoning_content": "Easy."},
    ]
    text = template.render(chat, answer=False).removesuffix("<|im_end|>\n")
    assert go([{**case, "messages": chat}])[0]["text"] == text


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma3", "mistral-0.3", "qwen3", "phi4"])
def test_an_unfinished_answer_is_left_open(name: str) -> None:
    template, layout = template_of(name), observed(name).layout
    chat = conversations(system=True)[-1][:-1]
    whole = template.render(chat, answer=False)
    text = render(layout, chat)
    assert text.endswith("It's 3.") and whole.startswith(text)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("gemma2", "refuses system prompts"),
        ("alpaca", "ignores system prompts"),
        ("llama3.2", "writes the date"),
        ("deepseek-r1", "knows thoughts"),
    ],
)
def test_what_differs_is_noted(name: str, note: str) -> None:
    assert any(note in text for text in observed(name).notes)
    assert observed("chatml").notes == ()


def test_a_layout_knows_its_parts() -> None:
    layout = observed("llama3").layout
    role = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert layout == ChatLayout(
        place="turn",
        start="<|begin_of_text|>",
        opening="",
        system=Turn(role("system"), "<|eot_id|>"),
        user=Turn(role("user"), "<|eot_id|>"),
        assistant=Turn(role("assistant"), "<|eot_id|>"),
        generation=role("assistant"),
    )


def test_whatever_a_template_writes_is_text(go: Go) -> None:
    """Go's own signs, quotes, and what isn't printable or not in Unicode's first plane."""
    end = '{{ "end" }} \\ {% """ é\t\u200b\x7f🦙'
    source = TEMPLATES["chatml"][0].replace("'<|im_end|>'", "eos_token")
    template = JinjaTemplate(source, {"eos_token": end})
    layout = observe(template, adds_bos=False).layout
    assert layout.user.after == f"{end}\n"
    assert go_template(layout).replace("\n", "").isprintable()
    messages = conversations(system=True)[-1]
    made = go([{"template": go_template(layout), "messages": messages}])[0]["text"]
    assert made == template.render(messages)
    assert '"""' not in go_template(layout)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for m in messages %}{{ m.role ~ m.content | upper }}{% endfor %}", "leaves out"),
        ("{% for m in messages %}{{ m.role ~ m.content ~ m.content }}{% endfor %}", "repeats"),
        ("{% for m in messages[::-1] %}{{ m.role ~ m.content }}{% endfor %}", "order"),
        ("{% for m in messages %}{{ m.content | replace('2', 'two') }}{% endfor %}", "'two"),
        ("{% for m in messages %}{{ loop.index ~ m.content }}\n{% endfor %}", "where '31What"),
        ("{{ raise_exception('Never') }}", "(Never)"),
        ("{% if %}", "can't render a conversation"),
    ],
)
def test_a_layout_of_another_kind_is_refused(source: str, why: str) -> None:
    with pytest.raises(InputError, match="the chat template") as caught:
        observe(JinjaTemplate(source, {}), adds_bos=False)
    assert why in caught.value.what
    assert caught.value.fix is not None and "--template" in caught.value.fix
