"""export: artifact → the files that another program needs to run it. For Ollama, a Modelfile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.base.files import write_whole
from quantkit.base.version import __version__
from quantkit.chat import modelfile
from quantkit.chat.gguf import ChatMetadata, read_chat
from quantkit.chat.layout import ChatLayout, go_template
from quantkit.chat.modelfile import Modelfile, Parameter
from quantkit.chat.observe import JinjaTemplate, observe
from quantkit.results.manifest import MANIFEST

# Ollama reserves the key-value cache of the whole context when it loads a model.
_LARGEST_CONTEXT = 8192
_NO_CHAT = "{{ .Prompt }}"


@dataclass(frozen=True)
class Export:
    """The Modelfile that was written.

    layout: of the chat template; None where there is none, or a Go template was given instead.
    """

    path: Path
    content: Modelfile
    layout: ChatLayout | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        content = self.content
        return {
            "modelfile": str(self.path),
            "from": content.source,
            "template": content.template,
            "system": content.system,
            "parameters": [list(pair) for pair in content.parameters],
            "layout": None if self.layout is None else asdict(self.layout),
            "notes": list(self.notes),
        }


def export_ollama(
    artifact: Path,
    out: Path | None = None,
    *,
    template: Path | None = None,
    system: str | None = None,
    parameters: Sequence[str] = (),
    force: bool = False,
) -> Export:
    """Write a Modelfile for the GGUF in ``artifact`` into ``out``, ARTIFACT-ollama if None.

    template: a file with a Go template to use instead of the chat template's translation; system:
    a system prompt, or the path of a file that holds one; parameters: each NAME=VALUE.

    Raises InputError for a directory without exactly one GGUF file, a chat template of no known
    layout, an unknown parameter, an output that exists already (without ``force``) or that is an
    artifact; MachineError where it can't be written.
    """
    gguf = _gguf(artifact)
    path = _output(artifact, out, force=force)
    chosen = modelfile.parse_parameters(parameters)
    prompt = None if system is None else _text_or_file(system)
    chat = read_chat(gguf)
    layout, notes = (None, ()) if template else _layout(chat, gguf)
    if template is not None:
        go = _read(template)
    else:
        go = _NO_CHAT if layout is None else go_template(layout)
    if layout is not None and layout.place == "ignored" and prompt is not None:
        raise InputError("the chat template ignores system prompts", where="--system")
    content = Modelfile(
        comment=f"QuantKit {__version__}. In this directory: ollama create NAME",
        source=_from(gguf, path),
        template=go,
        system=prompt,
        parameters=tuple(_parameters(chat, layout, chosen)),
    )
    write_whole(path, content.text())
    return Export(path, content, layout, notes)


def _gguf(artifact: Path) -> Path:
    if not artifact.is_dir():
        raise InputError("no such directory", where=str(artifact))
    files = sorted(artifact.glob("*.gguf"))
    if not files:
        raise InputError(
            "holds no .gguf file, and Ollama takes the weights as GGUF",
            subject=str(artifact),
            fix="Make the artifact by a recipe of format gguf, such as gguf-q4-k-m.",
        )
    if len(files) > 1:
        raise InputError(f"holds {len(files)} .gguf files, not one", subject=str(artifact))
    return files[0]


# The Modelfile gets a directory of its own: an artifact's manifest lists every file in its
# directory, and must stay true.
def _output(artifact: Path, out: Path | None, *, force: bool) -> Path:
    whole = artifact.resolve()
    out = whole.with_name(f"{whole.name}-ollama") if out is None else out
    if (out / MANIFEST).is_file():
        raise InputError(
            f"is an artifact, whose {MANIFEST} lists every file in it",
            subject=str(out),
            fix="Choose another --out.",
        )
    path = out / modelfile.NAME
    if out.exists() and not out.is_dir():
        raise InputError("isn't a directory", subject=str(out), fix="Choose another --out.")
    if path.exists() and not force:
        raise InputError(
            "exists already", subject=str(path), fix="Choose another --out, or pass --force."
        )
    return path


def _layout(chat: ChatMetadata, gguf: Path) -> tuple[ChatLayout | None, tuple[str, ...]]:
    """The chat template's layout, without the BOS token that Ollama adds itself, and notes."""
    if chat.template is None:
        but = f" but {', '.join(chat.others)}" if chat.others else ""
        return None, (f"The model has no chat template{but}: Ollama passes prompts on unchanged.",)
    template = JinjaTemplate(chat.template, chat.tokens)
    try:
        observed = observe(template, adds_bos=chat.adds_bos)
    except InputError as error:
        raise InputError(error.what, where=str(gguf), fix=error.fix) from error
    layout, notes = observed.layout, observed.notes
    if chat.adds_bos and not layout.start:
        notes += ("llama.cpp puts BOS before a prompt, which the chat template doesn't.",)
    return replace(layout, start="") if chat.adds_bos else layout, notes


def _parameters(
    chat: ChatMetadata, layout: ChatLayout | None, chosen: Sequence[tuple[str, Parameter]]
) -> list[tuple[str, Parameter]]:
    """Stop texts and the context length, then the user's parameters, which override them."""
    ends = list(chat.ends)
    if layout is not None:
        # Where a turn ends in white space alone, the beginning of the next one marks its end.
        turn = layout.assistant.after.strip() or layout.user.before.strip()
        ends.append(turn.removesuffix(chat.tokens.get("bos_token", "")).strip())
    stops = dict.fromkeys(end for end in ends if end)
    defaults: list[tuple[str, Parameter]] = [("stop", stop) for stop in stops]
    context = dict(chosen).get("num_ctx")
    if chat.context is not None and isinstance(context, int) and context > chat.context:
        raise InputError(
            f"the model was trained on {chat.context} tokens, and Ollama uses no more",
            where=f"--parameter num_ctx={context}",
        )
    if chat.context is not None and context is None:
        usual = min(chat.context, chat.short_context or chat.context)
        defaults.append(("num_ctx", min(usual, _LARGEST_CONTEXT)))
    return defaults + [pair for pair in chosen if pair not in defaults]


# The weights are named by their path: a copy would be a second one, since Ollama keeps its own,
# and through a link the artifact's file could be overwritten.
def _from(gguf: Path, path: Path) -> str:
    """The path of the weights for the Modelfile at ``path``.

    Relative between directories side by side, which may then be moved together; else absolute.
    """
    weights, place = gguf.resolve(), path.parent.resolve()
    if weights.parent.parent == place.parent:
        return f"../{weights.parent.name}/{weights.name}"
    return str(weights)


def _text_or_file(value: str) -> str:
    try:
        is_file = Path(value).is_file()
    except OSError:  # a text too long for a path
        is_file = False
    if not is_file and not value.strip():
        raise InputError("is empty", subject="--system")
    return _read(Path(value)).rstrip("\n") if is_file else value


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't be read as UTF-8 text ({error})", subject=str(path)) from error
    if not text.strip():
        raise InputError("is empty", subject=str(path))
    return text
