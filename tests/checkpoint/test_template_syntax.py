"""Chat templates that aren't Jinja are refused before work, wherever they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.checkpoint.sidecars import check_sidecars
from tests.helpers.cli import run

GOOD = (
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}"
    "{{ raise_exception('x') if false }}{{ strftime_now('%Y') }}"
)
BROKEN = "{% for m in messages %}\n{{ m.content }"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model(), tmp_path / "model"))


def put(model: Path, place: str, template: str) -> None:
    if place in ("inline", "named"):
        path = model / "tokenizer_config.json"
        (model / "chat_template.jinja").unlink()
        several = [{"name": "default", "template": GOOD}, {"name": "rag", "template": template}]
        value = template if place == "inline" else several
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": value}))
        return
    path = model / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(template)


PLACES = ["chat_template.jinja", "inline", "named", "additional_chat_templates/rag.jinja"]


@pytest.mark.parametrize("place", PLACES)
def test_what_transformers_understands_passes(model: Path, place: str) -> None:
    put(model, place, GOOD)
    check_sidecars(model)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_jinja_is_refused(model: Path, place: str) -> None:
    put(model, place, BROKEN)
    with pytest.raises(InputError, match=r"isn't valid Jinja: .* in its line 2") as caught:
        check_sidecars(model)
    where = {"inline": "(chat_template)", "named": "(chat_template), rag"}.get(place, place)
    assert str(caught.value.where).endswith(where)


@pytest.mark.parametrize(
    "command", [("merge", "{model}", "demo"), ("quantize", "rtn-w4-g128", "--model", "{model}")]
)
def test_the_commands_refuse_it(model: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    put(model, "chat_template.jinja", BROKEN)
    out = tmp_path / "out"
    done = run(*(part.format(model=model) for part in command), "--out", str(out))
    assert done.exit_code == 2 and "isn't valid Jinja" in done.stderr
    assert not out.exists()
