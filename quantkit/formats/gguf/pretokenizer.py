"""What llama.cpp makes of a vocabulary, compared with what the checkpoint's tokenizer makes.

llama.cpp has its pre-tokenizers compiled in and knows them by name. Which one splits text as
tokenizer.json does isn't read off its regexes but tried: llama.cpp itself (the ``xllamacpp``
wheel exports its C API) tokenizes texts with one candidate after the other, and the first that
agrees with the ``tokenizers`` library on every id is taken.

The texts are a fixed corpus of scripts, digits, code and spaces, and texts made of the
vocabulary's own tokens: a wrong pre-tokenizer can only show where a token crosses a boundary, so
one or two tokens of every shape (letters then digits, spaces then a letter, …) are among them.
For speed only the part of the vocabulary that these texts can need is given to llama.cpp.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError, MachineError, not_installed
from quantkit.methods.ggml.types import load_gguf, load_library

# One name for each of llama.cpp's behaviours, the common ones first: those that look words up in
# the vocabulary before merging (``ignore_merges``), and the others.
WHOLE_WORDS = ("llama-bpe", "tekken", "glm4", "youtu")
MERGES_ONLY = (
    *("qwen2", "gpt-2", "gpt-4o", "smollm", "starcoder", "refact", "command-r", "dbrx"),
    *("smaug-bpe", "olmo", "mpt", "stablelm2", "falcon", "qwen35", "deepseek-llm"),
    *("deepseek-coder", "deepseek-v3", "chatglm-bpe", "bloom", "gpt3-finnish", "poro-chat"),
    *("viking", "jais", "jais-2", "codeshell", "exaone", "exaone-moe", "chameleon"),
    *("minerva-7b", "superbpe", "trillion", "granite-docling", "bailingmoe", "seed-coder"),
    *("hunyuan", "hunyuan-dense", "kimi-k2", "grok-2", "afmoe", "minimax-m2", "solar-open"),
    *("tiny_aya", "joyai-llm", "mellum2", "default"),
)

CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "Hello, world! How's it going? I'm fine; we've SEEN it, they'll go, I'd say, you're it.",
    "IT'S DON'T WE'LL i'M 'tis rock'n'roll dogs' 's 'S can\u2019t",
    "0 1 12 123 1234 12345 123456 1234567 12345678 3.14159 1,234,567.89 -42 +7 1e-5 0xFF 50%",
    "In 1998 there were 2026 of v1.2.3 at 12:34:56 on 2024-05-17, a1b2c3 x86_64 H2O 3rd 21st",
    "½ ² ³ ٣٤٥ १२३ ４５６ Ⅷ ①",
    "def add(a, b):\n    return a + b\n\n\nclass A:\n\tx = [1, 2]\n\t\ty = {'k': \"v\"}\n",
    "for (int i=0;i<10;++i){printf(\"%d\\n\",i);}//end\r\n#include <stdio.h>\r\n",
    "if (a&&b||!c) { x->y.z += 1; } /* note */ <div class='a'>&nbsp;</div> </p> [[link]](url)",
    "SELECT * FROM t WHERE a >= 10 AND b != 'x'; -- done",
    "https://example.org/path?q=1&r=two#frag user.name+tag@example.com C:\\dir\\file.txt $HOME",
    " leading", "trailing ", "  two", "   three spaces   between   words    end     ",
    "\n", "\n\n", "\n\n\n", " \n", "\n ", " \n \n", "\t", "\t\t", "\r\n", "\r\n\r\n", "a\n\n\nb",
    "a \n b", "a\t\tb \t c", "x\n  y\n    z\n\tw", "end.\n\nNext", "a\u00a0b\u2003c\u3000d",
    "!!! ??? ... --- *** === ### $$$ ::: ;;; ''' \"\"\" ``` ~~~ ___ @@@ %%% ^^^ &&& |||",
    "(a) [b] {c} <d> «e» “f” ‘g’ „h“ a-b a–b a—b a…b a/b a\\b a_b #tag @name 1/2 ...and",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case HTMLParser iPhone McDonald's",
    "naïve café résumé Köln Ünïcödé façade Ångström señor Øresund İstanbul straße ĐẶNG Œuvre",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Zażółć gęślą jaźń. Árvíztűrő tükörfúrógép",
    "Быстрая коричневая лиса перепрыгивает через ленивую собаку. Ёжик ЩУКА 5кг",
    "Η γρήγορη αλεπού πηδάει πάνω από το σκυλί. ΆΈΉ ώστε",
    "我能吞下玻璃而不伤身体。北京市朝阳区2024年5月17日，价格￥1,234.50元！《书》「引」",
    "私はガラスを食べられます。それは私を傷つけません。カタカナ ひらがな 漢字 ﾊﾝｶｸ １２３",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요. 대한민국 2024년",
    "هذا نص عربي قصير، مع أرقام ١٢٣ وتشكيل مُحَمَّد. این متن فارسی است؟",
    "זהו טקסט בעברית עם נִקּוּד וסימנים.",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ ที่นี่ ๑๒๓",
    "यह हिन्दी में एक वाक्य है। क्षत्रिय ज्ञान",
    "আমি বাংলায় গান গাই। தமிழ் மொழி తెలుగు ಕನ್ನಡ മലയാളം ქართული Հայերեն አማርኛ ខ្មែរ",
    "Tiếng Việt có nhiều dấu: Đường Nguyễn Huệ, Thừa Thiên.",
    "🦙🚀✅ 👩‍👩‍👧 🏳️‍🌈 🇩🇪🇫🇷 👍🏽 😶‍🌫️ ❤️ ©®™ → ∑ √ ≠ ∞ ½ € £ ¥ ♥♦ ░▒▓ 𝔘𝔫𝔦 𝟙𝟚",
    "zero\u200bwidth soft\u00adhyphen x\u0301b \ufeffbom \u202eltr",
)  # fmt: skip

_SYMBOLS = (
    *("llama_model_default_params", "llama_model_load_from_file", "llama_model_free"),
    *("llama_model_get_vocab", "llama_tokenize", "llama_log_get", "llama_log_set"),
)
_PER_SHAPE, _MOST_TEXTS = 2, 3000
_LONGEST_KEY = 12  # characters by which the texts' substrings are looked up
_RUN = re.compile(r"(.)\1{4,}")
_WIDTH = 32  # of the model around the vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF has it.

    ``model``: "gpt2" (byte-level BPE) or "llama" (SentencePiece). ``tokens`` and ``types``: by
    id; ``merges``: pairs joined by a space (gpt2); ``scores``: by id (llama);
    ``ignore_merges``: words that are tokens are taken whole. ``pre`` and ``add_space_prefix``:
    what is to be found.
    """

    model: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ignore_merges: bool = False
    pre: str = "default"
    add_space_prefix: bool = False

    def metadata(self) -> dict[str, Any]:
        """The keys of ``tokenizer.ggml``, without that prefix."""
        values: dict[str, Any] = {"model": self.model, "pre": self.pre, "tokens": self.tokens}
        values["token_type"] = self.types
        if self.model == "gpt2":
            return values | {"merges": self.merges}
        return values | {"scores": self.scores, "add_space_prefix": self.add_space_prefix}


def find(
    vocabulary: Vocabulary, tokenizer: Any, special: Iterable[int], *, strict: bool = True
) -> Vocabulary:
    """Return the vocabulary with the settings by which llama.cpp tokenizes like ``tokenizer``.

    ``tokenizer``: of the ``tokenizers`` library. ``special``: types of tokens that text is cut at
    before anything else. When no setting agrees on every text, that is an InputError if
    ``strict``, else the one that agrees furthest is taken. Raises MachineError when llama.cpp's
    library isn't installed.
    """
    texts = [*CORPUS, *_own_texts(vocabulary)]
    if vocabulary.model == "llama":
        # SentencePiece marks the beginning of a text even before a space; the tokenizers
        # library's Metaspace doesn't. llama.cpp does as SentencePiece.
        texts = [text for text in texts if not text.startswith(" ")]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    expected = [encoding.ids for encoding in encodings]
    part, ids = _needed_part(vocabulary, texts, set(special), set().union(*expected))
    furthest, best, example = -1, vocabulary, ""
    for candidate in _candidates(part):
        with _loaded(candidate) as vocab:
            if vocab is None:
                continue
            agreed, got = _agreement(vocab, ids, texts, expected)
        if agreed > furthest:
            furthest = agreed
            best = replace(
                vocabulary, pre=candidate.pre, add_space_prefix=candidate.add_space_prefix
            )
        if agreed == len(texts):
            return best
        if agreed == furthest:
            text, wanted = texts[agreed], expected[agreed]
            example = f"{text!r} is {wanted} there and {got} by {candidate.pre!r}"
    if not strict:
        return best
    raise InputError(
        f"llama.cpp has no pre-tokenizer that splits text as this tokenizer does: {example}",
        fix="If you know which one is meant to be used, name it: quantize.pre_tokenizer.",
    )


def check_name(name: str) -> None:
    """Raise InputError for a pre-tokenizer that llama.cpp, where it is installed, doesn't know."""
    if load_library(_SYMBOLS) is None:
        return
    smallest = Vocabulary("gpt2", ["a", "b", "ab"], [1, 1, 1], ["a b"], [], pre=name)
    with _loaded(smallest) as vocab:
        if vocab is None:
            raise InputError(
                f"llama.cpp knows no pre-tokenizer {name!r}",
                where="quantize.pre_tokenizer",
                fix=f"Known, among others: {', '.join((*WHOLE_WORDS, *MERGES_ONLY))}.",
            )


def _agreement(
    vocab: int, ids: list[int], texts: list[str], expected: list[list[int]]
) -> tuple[int, list[int]]:
    """How many texts from the first on llama.cpp tokenizes as expected, and the next one's ids."""
    for count, (text, wanted) in enumerate(zip(texts, expected, strict=True)):
        got = [ids[index] for index in _tokenize(vocab, text)]
        if got != wanted:
            return count, got
    return len(texts), []


def _candidates(vocabulary: Vocabulary) -> Iterator[Vocabulary]:
    if vocabulary.model == "gpt2":
        names = (*MERGES_ONLY, *WHOLE_WORDS)
        if vocabulary.ignore_merges:
            names = (*WHOLE_WORDS, *MERGES_ONLY)
        for name in names:
            yield replace(vocabulary, pre=name)
    else:
        for prefix in (True, False):
            yield replace(vocabulary, add_space_prefix=prefix)


def _own_texts(vocabulary: Vocabulary) -> list[str]:
    """Texts made of one or two tokens of every shape in the vocabulary."""
    seen: dict[str, int] = {}
    texts: list[str] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        text = _text_of(token, vocabulary.model) if kind == 1 else None
        # Normalizers such as NFC are left to the text's author, so only settled text is tried.
        if not text or not (text.isascii() or unicodedata.is_normalized("NFC", text)):
            continue
        shape = _RUN.sub(r"\1\1\1\1", text.translate(_SHAPES))
        seen[shape] = seen.get(shape, 0) + 1
        if seen[shape] <= _PER_SHAPE and len(texts) < _MOST_TEXTS:
            texts += [text, f"x{text}x{text}"]
    return texts


class _Shapes(dict[int, str]):
    """Every character → one that stands for its kind: category, and the script of letters."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        kind = character
        if category == "Lo":
            kind = chr(0xE000 + (code >> 9))
        elif category[0] in "LNM":
            kind = {"Lu": "A", "Lt": "A", "Ll": "a", "Lm": "m"}.get(category, category[0].lower())
        elif code > 127:
            kind = "?"
        self[code] = kind
        return kind


_SHAPES = _Shapes()


def _letters() -> dict[int, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}


_LETTERS = _letters()  # byte → code point
_BYTES = {code: byte for byte, code in _LETTERS.items()}


def _text_of(token: str, model: str) -> str | None:
    """The text that a token stands for, or None for a part of a character."""
    if model == "llama":
        return token.replace("▁", " ")
    try:
        return token.translate(_BYTES).encode("latin-1").decode("utf-8")
    except UnicodeError:
        return None


def _needed_part(
    vocabulary: Vocabulary, texts: list[str], special: set[int], used: set[int]
) -> tuple[Vocabulary, list[int]]:
    """The tokens that tokenizing ``texts`` can touch, and their ids in the whole vocabulary.

    ``special``: types of tokens that are looked for in the raw text; those and tokens that
    stand for themselves (bytes, unknown) are kept as they are.
    """
    raw = "\0".join(texts)
    written = _written(texts, vocabulary.model)
    keys = {
        written[start : start + length]
        for length in range(1, _LONGEST_KEY + 1)
        for start in range(len(written) - length + 1)
    }

    def occurs(token: str) -> bool:
        return token[:_LONGEST_KEY] in keys and (len(token) <= _LONGEST_KEY or token in written)

    ids = [
        index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if index in used
        or (kind == 1 and occurs(token))
        or (kind in special and token in raw)
        or kind in (2, 6)
    ]
    part = replace(
        vocabulary,
        tokens=[vocabulary.tokens[index] for index in ids],
        types=[vocabulary.types[index] for index in ids],
        merges=[merge for merge in vocabulary.merges if occurs(merge.replace(" ", "", 1))],
        scores=[vocabulary.scores[index] for index in ids] if vocabulary.scores else [],
    )
    return part, ids


def _written(texts: list[str], model: str) -> str:
    """The texts in the letters of the vocabulary, with something between that it lacks."""
    if model == "llama":
        return "\0".join("▁" + text.replace(" ", "▁") for text in texts)
    return "\0".join(text.encode().decode("latin-1").translate(_LETTERS) for text in texts)


class _ModelParams(ctypes.Structure):
    """llama_model_params as llama.cpp fills it in: passed on unread, so only large enough."""

    _fields_ = (("bytes", ctypes.c_uint8 * 1024),)


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


# Names that this llama.cpp doesn't know are expected: nothing of it is to be seen.
_ignore = _LogCallback(lambda level, text, data: None)


@cache
def _llama() -> ctypes.CDLL:
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
        ctypes.c_int32,  # room for so many
        ctypes.c_bool,  # add BOS and EOS
        ctypes.c_bool,  # take special tokens in the text for such
    ]
    library.llama_tokenize.restype = ctypes.c_int32
    library.llama_log_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.llama_log_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library


@contextmanager
def _loaded(vocabulary: Vocabulary) -> Iterator[int | None]:
    """A handle of the vocabulary in llama.cpp; None when it doesn't know the pre-tokenizer."""
    library = _llama()
    callback, data = ctypes.c_void_p(), ctypes.c_void_p()
    library.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    library.llama_log_set(ctypes.cast(_ignore, ctypes.c_void_p), None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            _write_model(path, vocabulary.metadata(), len(vocabulary.tokens))
            parameters = library.llama_model_default_params()
            model = library.llama_model_load_from_file(str(path).encode(), parameters)
            try:
                yield library.llama_model_get_vocab(model) if model else None
            finally:
                if model:
                    library.llama_model_free(model)
    finally:
        library.llama_log_set(callback, data)


def _tokenize(vocab: int, text: str) -> list[int]:
    data = text.encode()
    room = len(data) + 2
    ids = (ctypes.c_int32 * room)()
    count = _llama().llama_tokenize(vocab, data, len(data), ids, room, False, True)
    if count < 0:
        raise MachineError(f"llama.cpp couldn't tokenize {text!r}")
    return list(ids[:count])


def _write_model(path: Path, metadata: Mapping[str, Any], tokens: int) -> None:
    """The smallest model that llama.cpp loads, all zeros, around the vocabulary."""
    import numpy as np

    gguf = load_gguf()
    writer = gguf.GGUFWriter(path, "llama")
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
