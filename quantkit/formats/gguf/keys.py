"""Which of a checkpoint's tensors are the text model's, under which keys, and which no file holds.

A model of images and text has its text model inside, whose tensors have other names than in a
model of text alone. llama.cpp keeps the towers in a file of their own (mmproj), which its own
converter makes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable

from quantkit.base.names import listed
from quantkit.formats.gguf.architectures.architecture import Architecture
from quantkit.model.names import renaming
from quantkit.model.skeleton import Skeleton


def text_keys(skeleton: Skeleton, architecture: Architecture) -> dict[str, str]:
    """The checkpoint key of each of the text model's tensors, by its name in a model of text."""
    inside = skeleton.prefix.rpartition(".")[0]
    outside = architecture.blocks.rpartition(".")[0]
    renamed = {
        name.replace(f"{inside}.", f"{outside}.", 1): key
        for name, key in skeleton.names.items()
        if name.startswith(f"{inside}.")
    }
    heads = {
        f"{architecture.head}.{part}": skeleton.names[f"{skeleton.head}.{part}"]
        for part in ("weight", "bias")
        if f"{skeleton.head}.{part}" in skeleton.names
    }
    return {**skeleton.names, **renamed, **heads}


def older_keys(skeleton: Skeleton, keys: Iterable[str], present: Container[str]) -> dict[str, str]:
    """The keys of a checkpoint that has the names of transformers' model instead of older ones."""
    rename = renaming(skeleton.model)
    found = {key: skeleton.names.get(rename(key)[0]) for key in keys if key not in present}
    return {key: stored for key, stored in found.items() if stored is not None}


def beside_text(skeleton: Skeleton) -> set[str]:
    """Keys of tensors through which text doesn't run: of towers, projectors and further heads."""
    decoder = f"{skeleton.prefix.rpartition('.')[0]}."
    whole = skeleton.config.get_text_config(decoder=True) is skeleton.config
    apart = set()
    if not whole:
        apart = {
            key
            for name, key in skeleton.names.items()
            if not name.startswith((decoder, f"{skeleton.head}."))
        }
    return apart | set(skeleton.unused)


def remark_on(left_out: Collection[str], *, towers: bool) -> str:
    """A sentence on the tensors that a file doesn't hold; ``towers``: for images are among them."""
    groups = dict.fromkeys(re.split(r"(?<!^model)\.", key)[0] for key in sorted(left_out))
    names = listed(f"{group}.…" for group in groups)
    what = f"GGUF holds the text model only; left out: {len(left_out)} tensors of {names}."
    if not towers:
        return what
    return (
        f"{what} Images need a file of their own, which llama.cpp's converter makes "
        "(convert_hf_to_gguf.py --mmproj)."
    )
