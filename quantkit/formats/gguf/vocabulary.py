"""A tokenizer's vocabulary as GGUF has it, and as llama.cpp reads it.

llama.cpp itself (the ``xllamacpp`` wheel exports its C API) tokenizes by a vocabulary, loaded from
the smallest model file that can carry one.
"""

from __future__ import annotations

import ctypes
import enum
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.base.errors import MachineError, not_installed
from quantkit.methods.ggml.library import load_gguf, load_library

_SYMBOLS = (
    *("llama_model_default_params", "llama_model_load_from_file", "llama_model_free"),
    *("llama_model_get_vocab", "llama_tokenize", "llama_vocab_is_eog"),
    *("llama_log_get", "llama_log_set"),
)
# Tokens at which llama.cpp ends a generation by their text alone (``special_eog_ids``).
ENDS_BY_TEXT = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "</s>"),
    *("<end_of_turn>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>"),
}
_WIDTH = 32  # of the model around the vocabulary


class TokenType(enum.IntEnum):
    """The kinds of tokens in GGUF (``llama_token_type``)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF has it.

    ``model``: "gpt2" (byte-level BPE) or "llama" (SentencePiece). ``tokens`` and ``types`` (of
    ``TokenType``): by id; ``merges``: pairs joined by a space (gpt2); ``scores``: by id (llama);
    ``ignore_merges``: a word that is itself a token isn't split. ``pre`` (llama.cpp's name of a
    pre-tokenizer, gpt2), ``add_space_prefix`` (llama) and ``name`` (the file's ``general.name``, by
    which llama.cpp decides whether special tokens drop the white space after them) are what
    ``pretokenizer`` finds out.
    """

    model: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ignore_merges: bool = False
    pre: str = "default"
    add_space_prefix: bool = False
    name: str = ""

    def metadata(self) -> dict[str, Any]:
        """The keys of ``tokenizer.ggml``, without that prefix."""
        values: dict[str, Any] = {"model": self.model, "pre": self.pre, "tokens": self.tokens}
        values["token_type"] = self.types
        if self.model == "gpt2":
            return values | {"merges": self.merges}
        return values | {
            "scores": self.scores,
            "add_space_prefix": self.add_space_prefix,
            "remove_extra_whitespaces": False,
        }

    def part(self, ids: Iterable[int], merges: list[str]) -> Vocabulary:
        """The vocabulary of some of the tokens, in the order given."""
        ids = list(ids)
        return replace(
            self,
            tokens=[self.tokens[index] for index in ids],
            types=[self.types[index] for index in ids],
            scores=[self.scores[index] for index in ids] if self.scores else [],
            merges=merges,
        )


def can_tokenize() -> bool:
    """Whether llama.cpp's library is installed and has what is called here."""
    return load_library(_SYMBOLS) is not None


class _ModelParams(ctypes.Structure):
    """llama_model_params: filled in by llama.cpp and passed back to it unread."""

    # Its fields change with every release. Room for all of them is enough.
    _fields_ = (("bytes", ctypes.c_uint8 * 1024),)


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


# Names that this llama.cpp doesn't know are expected, and no reason for it to print errors.
_ignore = _LogCallback(lambda level, text, data: None)


@cache
def llama_library() -> ctypes.CDLL:
    """llama.cpp's library. Raises MachineError where it isn't installed."""
    library = load_library(_SYMBOLS)
    if library is None:
        raise not_installed("xllamacpp", "gguf")
    library.llama_model_default_params.restype = _ModelParams
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_free.argtypes = [ctypes.c_void_p]
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p,  # vocabulary
        ctypes.c_char_p,  # UTF-8 text
        ctypes.c_int32,  # its bytes
        ctypes.POINTER(ctypes.c_int32),  # ids
        ctypes.c_int32,  # how many there is room for
        ctypes.c_bool,  # add BOS and EOS
        ctypes.c_bool,  # read special tokens in the text as such
    ]
    library.llama_tokenize.restype = ctypes.c_int32
    library.llama_vocab_is_eog.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.llama_vocab_is_eog.restype = ctypes.c_bool
    library.llama_log_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.llama_log_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library


@contextmanager
def loaded(
    vocabulary: Vocabulary, special: Mapping[str, int] | None = None
) -> Iterator[int | None]:
    """A handle of the vocabulary in llama.cpp; None when it can't load it.

    ``special``: ids of special tokens, by GGUF's keys without ``tokenizer.ggml``.

    Raises MachineError when llama.cpp's library isn't installed.
    """
    library = llama_library()
    callback, data = ctypes.c_void_p(), ctypes.c_void_p()
    library.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    library.llama_log_set(ctypes.cast(_ignore, ctypes.c_void_p), None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            metadata = {**vocabulary.metadata(), **(special or {})}
            _write_model(path, vocabulary.name, metadata, len(vocabulary.tokens))
            parameters = library.llama_model_default_params()
            model = library.llama_model_load_from_file(os.fsencode(path), parameters)
            try:
                yield library.llama_model_get_vocab(model) if model else None
            finally:
                if model:
                    library.llama_model_free(model)
    finally:
        library.llama_log_set(callback, data)


def tokenize(handle: int, text: str) -> list[int]:
    """The ids of a text, with special tokens in it and without BOS and EOS."""
    data = text.encode()
    # A byte gives at most itself and the mark of a beginning, after a special token of one byte.
    room = 2 * len(data) + 2
    ids = (ctypes.c_int32 * room)()
    count = llama_library().llama_tokenize(handle, data, len(data), ids, room, False, True)
    if count < 0:
        raise MachineError(f"llama.cpp couldn't tokenize {text!r}")
    return list(ids[:count])


def ends_generation(handle: int, token: int) -> bool:
    """Whether llama.cpp ends a generation at the token."""
    return bool(llama_library().llama_vocab_is_eog(handle, token))


def _write_model(path: Path, model_name: str, metadata: Mapping[str, Any], tokens: int) -> None:
    """Write the smallest model that llama.cpp loads with the vocabulary, all zeros."""
    # llama.cpp can load a vocabulary alone (vocab_only), but through a field of its parameters,
    # whose place changes with its releases.
    import numpy as np

    gguf = load_gguf()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(model_name)
    writer.add_block_count(1)
    writer.add_context_length(_WIDTH)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (tokens, _WIDTH),
        **dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (_WIDTH,)),
    }
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{part}"] = (_WIDTH, _WIDTH)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
