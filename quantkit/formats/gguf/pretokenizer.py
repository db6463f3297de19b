"""The settings by which llama.cpp splits text as the checkpoint's tokenizer does.

llama.cpp has its pre-tokenizers compiled in and knows them by name. Which one belongs to a
tokenizer isn't read off its regexes but tried: llama.cpp tokenizes texts with one candidate after
the other, and the first that agrees with transformers on every id is the one. So is whether a space
is put before text (SentencePiece), and before it after every special token.

Plain text must come out right. Some tokenizers do what llama.cpp has no setting for, all of it
at special tokens; then the candidate that is right for chats is chosen, and notes tell the rest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from quantkit.base.errors import InputError
from quantkit.formats.gguf.cases import Case, Cases
from quantkit.formats.gguf.letters import LETTERS
from quantkit.formats.gguf.vocabulary import TokenType, Vocabulary, can_tokenize, loaded, tokenize

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

# llama.cpp has no metadata for tokens that drop the white space after them. It takes all special
# tokens but these for such where the model's name, general.name, has "phi-3" or "phi3" in it, and
# then doesn't load a vocabulary that lacks one of these or "</s>".
_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_NEEDED_BY_PHI3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")
_LONGEST_KEY = 12  # characters by which the texts' substrings are looked up
_CUT_AT = (TokenType.CONTROL, TokenType.USER_DEFINED)  # before anything else is done to a text
_SHOWN = 4  # tokens that an example shows
_LONGEST_SHOWN = 60  # characters of a text that an example shows


@dataclass(frozen=True)
class Proven:
    """A vocabulary with its settings; notes: what llama.cpp does otherwise than transformers."""

    vocabulary: Vocabulary
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Difference:
    """A text that llama.cpp tokenizes in another way."""

    case: Case
    got: list[int]

    @property
    def size(self) -> int:
        """How many tokens only one of the two has."""
        ours, theirs = Counter(self.got), Counter(self.case.ids)
        return (ours - theirs).total() + (theirs - ours).total() or 1


@dataclass(frozen=True)
class _Outcome:
    """How a candidate did.

    ``marked``: plain text was right once a space was put before it. The others: what came out
    otherwise.
    """

    vocabulary: Vocabulary
    marked: bool
    chats: list[_Difference]
    special: list[_Difference]
    spaced: list[_Difference]

    def rank(self) -> tuple[int, ...]:
        """Lower is better: chats are what most models are for."""
        chats, special, spaced = (
            sum(difference.size for difference in differences)
            for differences in (self.chats, self.special, self.spaced)
        )
        return chats, int(self.marked), special, spaced


def find_pretokenizer(
    vocabulary: Vocabulary,
    cases: Cases,
    *,
    drops_space: bool = False,
    strict: bool = True,
) -> Proven:
    """Return the vocabulary with the settings by which llama.cpp tokenizes the cases.

    ``vocabulary.name``: the model's; it is changed where llama.cpp would go wrong by it.
    ``drops_space``: some special tokens drop white space beside them. Plain text must come out
    right, and in chats the special tokens; otherwise the result is the best candidate, or an
    InputError if ``strict``. Raises MachineError when llama.cpp's library isn't installed.
    """
    part, ids = _needed_part(vocabulary, cases)
    search = _Search(vocabulary, part, ids, cases)
    best = None
    for name in candidate_names(vocabulary, drops_space):
        best = search.best_of(name, best)
        if best is not None and not any(best.rank()):
            break
    if best is None and strict:
        raise InputError(
            "llama.cpp has no pre-tokenizer that splits text as this tokenizer does: "
            f"{search.example}",
            fix="If you know which one is meant to be used, name it: quantize.pre_tokenizer.",
        )
    if best is None:
        return Proven(search.furthest)
    lost = [difference for difference in best.chats if search.loses_special(difference)]
    if lost and strict:
        raise InputError(
            "llama.cpp doesn't see the special tokens of this model's chats as transformers does: "
            f"{_example(lost, vocabulary)}",
            fix="If that is meant to be so, name a pre-tokenizer, default for SentencePiece: "
            "quantize.pre_tokenizer.",
        )
    chosen = replace(
        vocabulary,
        pre=best.vocabulary.pre,
        add_space_prefix=best.vocabulary.add_space_prefix,
        name=best.vocabulary.name,
    )
    return Proven(chosen, tuple(_notes(best, vocabulary, cases)))


def candidate_names(vocabulary: Vocabulary, drops_space: bool) -> list[str]:
    """The model's name, and the same with or without "phi-3", where that may be of use."""
    name = vocabulary.name
    possible = set(_NEEDED_BY_PHI3) <= set(vocabulary.tokens)
    if _PHI3.search(name):
        without = _PHI3.sub("Phi 3", name)
        return [name, without] if possible else [without]
    return [name, f"{name} (Phi-3 tokens)"] if possible and drops_space else [name]


def check_pretokenizer(name: str) -> None:
    """Raise InputError for a pre-tokenizer that llama.cpp, where it is installed, doesn't know."""
    if not can_tokenize():
        return
    smallest = Vocabulary("gpt2", ["a", "b", "ab"], [1, 1, 1], ["a b"], [], pre=name)
    with loaded(smallest) as handle:
        if handle is None:
            raise InputError(
                f"llama.cpp knows no pre-tokenizer {name!r}",
                where="quantize.pre_tokenizer",
                fix=f"Known, among others: {', '.join((*WHOLE_WORDS, *MERGES_ONLY))}.",
            )


class _Search:
    """Tries candidates; ``furthest`` is the one that got most of the plain texts right."""

    def __init__(
        self, vocabulary: Vocabulary, part: Vocabulary, ids: list[int], cases: Cases
    ) -> None:
        self.furthest, self.example = vocabulary, ""
        self._whole, self._part, self._ids, self._cases = vocabulary, part, ids, cases
        self._most = -1

    def best_of(self, name: str, best: _Outcome | None) -> _Outcome | None:
        """The best of all candidates of this name, and of ``best``."""
        part = replace(self._part, name=name)
        candidates = _candidates(part)
        if best is not None and part.model == "gpt2":
            # Another name changes nothing in plain text.
            candidates = iter([(replace(part, pre=best.vocabulary.pre), False)])
        for candidate, marked in candidates:
            with loaded(candidate) as handle:
                if handle is None or not self._splits_plain(handle, candidate, marked):
                    continue
                outcome = _Outcome(
                    candidate,
                    marked,
                    self._differences(handle, self._cases.chats),
                    self._differences(handle, self._cases.special),
                    self._differences(handle, self._cases.spaced),
                )
            if best is None or outcome.rank() < best.rank():
                best = outcome
            if not any(best.rank()):
                break
        return best

    def loses_special(self, difference: _Difference) -> bool:
        """Whether special tokens are among those that differ."""
        ours, theirs = (
            [index for index in ids if self._whole.types[index] in _CUT_AT]
            for ids in (difference.got, difference.case.ids)
        )
        return ours != theirs

    def _splits_plain(self, handle: int, candidate: Vocabulary, marked: bool) -> bool:
        for count, case in enumerate(self._cases.plain):
            marks = marked and not (case.ids and self._whole.types[case.ids[0]] in _CUT_AT)
            got = self._tokenized(handle, f" {case.text}" if marks else case.text)
            if got == case.ids:
                continue
            if count > self._most:
                self._most = count
                self.furthest = replace(
                    self._whole,
                    pre=candidate.pre,
                    add_space_prefix=candidate.add_space_prefix,
                    name=candidate.name,
                )
                self.example = f"{case.text!r} is {case.ids} there and {got} by {candidate.pre!r}"
            return False
        return True

    def _differences(self, handle: int, cases: list[Case]) -> list[_Difference]:
        pairs = [_Difference(case, self._tokenized(handle, case.text)) for case in cases]
        return [pair for pair in pairs if pair.got != pair.case.ids]

    def _tokenized(self, handle: int, text: str) -> list[int]:
        return [self._ids[index] for index in tokenize(handle, text)]


def _candidates(vocabulary: Vocabulary) -> Iterator[tuple[Vocabulary, bool]]:
    """Vocabularies to try, and whether a space is put before plain texts."""
    if vocabulary.model == "gpt2":
        names = (*MERGES_ONLY, *WHOLE_WORDS)
        if vocabulary.ignore_merges:
            names = (*WHOLE_WORDS, *MERGES_ONLY)
        for name in names:
            yield replace(vocabulary, pre=name), False
    else:
        yield replace(vocabulary, add_space_prefix=True), False
        yield replace(vocabulary, add_space_prefix=False), False
        # transformers marks the beginning of a text, but not that of text after special tokens;
        # llama.cpp marks both or neither.
        yield replace(vocabulary, add_space_prefix=False), True


def _notes(best: _Outcome, vocabulary: Vocabulary, cases: Cases) -> Iterator[str]:
    """What the best candidate does otherwise than transformers."""
    if best.vocabulary.name != vocabulary.name:
        yield (
            f"The model's name in the file is {best.vocabulary.name!r}: by it llama.cpp decides "
            "whether special tokens drop the white space after them."
        )
    if best.chats:
        yield (
            f"llama.cpp splits {len(best.chats)} of {len(cases.chats)} chats by the model's own "
            f"template otherwise than transformers: {_example(best.chats, vocabulary)}."
        )
    if best.marked:
        yield (
            "llama.cpp doesn't mark the beginning of a text that begins with no special token, as "
            "transformers does: put a space before such prompts. Chats don't need it."
            if not best.chats
            else "llama.cpp doesn't mark the beginning of a text that begins with no special "
            "token, as transformers does: put a space before such prompts."
        )
    elif best.special:
        yield (
            f"llama.cpp splits text beside special tokens otherwise than transformers in "
            f"{len(best.special)} of {len(cases.special)} texts: "
            f"{_example(best.special, vocabulary)}."
        )
    if best.spaced:
        yield (
            "llama.cpp splits text that begins with a space otherwise than transformers: "
            f"{_example(best.spaced, vocabulary)}."
        )


def _example(differences: list[_Difference], vocabulary: Vocabulary) -> str:
    """The shortest text, and where it becomes other tokens."""
    pair = min(differences, key=lambda difference: len(difference.case.text))
    first = 0
    while [*pair.got, None][first] == [*pair.case.ids, None][first]:
        first += 1
    start = max(first - 1, 0)

    def shown(ids: list[int]) -> str:
        tokens = [repr(vocabulary.tokens[index]) for index in ids[start : start + _SHOWN]]
        return " ".join(tokens) or "nothing"

    text = repr(pair.case.text) if len(pair.case.text) <= _LONGEST_SHOWN else "one"
    return f"{text} has {shown(pair.got)} where it should be {shown(pair.case.ids)}"


def _needed_part(vocabulary: Vocabulary, cases: Cases) -> tuple[Vocabulary, list[int]]:
    """The tokens that tokenizing the cases can touch, and their ids in the whole vocabulary.

    Bytes and the unknown token are always among the result: any text can need them.
    """
    # Loading all of a large vocabulary for every candidate would take seconds each.
    texts, used = cases.texts(), cases.used()
    raw = "\0".join(texts)
    cut_at = [
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in _CUT_AT and token in raw
    ]
    written = _written(texts, vocabulary.model, cut_at)
    keys = {
        written[start : start + length]
        for length in range(1, _LONGEST_KEY + 1)
        for start in range(len(written) - length + 1)
    }

    def occurs(token: str) -> bool:
        return token[:_LONGEST_KEY] in keys and (len(token) <= _LONGEST_KEY or token in written)

    always = {*cut_at, *_NEEDED_BY_PHI3}
    ids = [
        index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if index in used
        or token in always
        or (kind == TokenType.NORMAL and occurs(token))
        or kind in (TokenType.UNKNOWN, TokenType.BYTE)
    ]
    merges = [merge for merge in vocabulary.merges if occurs(merge.replace(" ", "", 1))]
    return vocabulary.part(ids, merges), ids


def _written(texts: list[str], model: str, cut_at: list[str]) -> str:
    """The texts in the letters of the vocabulary, with a character between that it lacks.

    ``cut_at``: tokens after which a text may be marked as at its beginning (llama).
    """
    if model == "gpt2":
        return "\0".join(text.encode().decode("latin-1").translate(LETTERS) for text in texts)
    parts = texts
    if cut_at:
        cuts = re.compile("|".join(map(re.escape, cut_at)))
        parts = [part for text in texts for part in cuts.split(text)]
    marked = {
        start + part for text in parts for part in (text, text.lstrip()) for start in (" ", "  ")
    }
    return "\0".join(part.replace(" ", "▁") for part in sorted(marked))
