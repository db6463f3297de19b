"""The vocabulary of a GGUF file in llama.cpp, by its C API."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.formats.gguf.vocabulary import ends_generation, llama_library, tokenize


@dataclass(frozen=True)
class LlamaVocabulary:
    """A loaded file. ``model``: its handle; ``handle``: of its vocabulary."""

    model: int
    handle: int

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text with special tokens in it, without BOS and EOS."""
        return tokenize(self.handle, text)

    def ends(self, size: int) -> set[int]:
        """The ids below ``size`` at which llama.cpp ends a generation."""
        return {token for token in range(size) if ends_generation(self.handle, token)}

    def template(self, name: str | None = None) -> str | None:
        """A chat template, the default one without a name."""
        function = llama_library().llama_model_chat_template
        function.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        function.restype = ctypes.c_char_p
        text = function(self.model, name.encode() if name else None)
        return text.decode() if text is not None else None


@contextmanager
def llama_vocabulary(path: Path) -> Iterator[LlamaVocabulary]:
    """Load a file in llama.cpp; an AssertionError where it can't."""
    library = llama_library()
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    assert model, f"llama.cpp doesn't load {path}"
    try:
        yield LlamaVocabulary(model, library.llama_model_get_vocab(model))
    finally:
        library.llama_model_free(model)
