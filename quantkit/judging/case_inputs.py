"""What regression cases ask and expect, as text for a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.results.comparison import CaseInput


def case_inputs(path: Path) -> tuple[CaseInput, ...]:
    """The cases of a JSONL file that has been read and found well-formed before."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return tuple(_input(json.loads(line)) for line in lines if line.strip())


def _input(case: dict[str, Any]) -> CaseInput:
    messages = case.get("messages") or ()
    said = [f"{message.get('role')}: {_content(message)}" for message in messages]
    if tools := case.get("tools"):
        said.insert(0, f"tools: {_json(tools)}")
    checks = case.get("check", ())
    expected = [
        f"{name}: {value if isinstance(value, str) else _json(value)}"
        for check in ([checks] if isinstance(checks, dict) else checks)
        for name, value in check.items()
    ]
    return CaseInput(case["id"], case.get("prompt") or "\n\n".join(said), "; ".join(expected))


def _content(message: dict[str, Any]) -> str:
    """A message's text; tool calls and parts that aren't text as JSON."""
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    content = message.get("content")
    text = content if isinstance(content, str) else _json(content) if content else ""
    return f"{text}\n{_json(rest)}".strip() if rest else text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
