"""llama.cpp as an engine: the server of the ``xllamacpp`` wheel, inside this process.

The server listens on a port of localhost, locked with a random key: only its own ``/completion``
returns token ids (the handlers that xllamacpp exports return text, and withhold incomplete
characters). Streams go through the handlers. llama.cpp's log goes to stderr, errors only.
"""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from quantkit.base.errors import InputError, not_installed
from quantkit.base.files import openable

_ERRORS_ONLY = 1  # llama.cpp's log verbosity
_ALL = 2**31 - 1  # of the vocabulary, however large
_GREEDY = {
    "temperature": 0.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class Generation:
    """A greedy continuation.

    ``ids``: the new tokens, as transformers returns them: with the one that ends it, if any.
    ``text``: without that one. ``ended``: whether there is one; if not, the limit was reached.
    """

    ids: list[int]
    text: str
    prompt_tokens: int
    ended: bool


@dataclass(frozen=True)
class Timing:
    """How long requests that ran together took. Rates are tokens a second.

    ``first_token_seconds``: from sending a request to its first text, the mean over requests.
    ``prefill_rate``: all prompt tokens, from the first sending to the last first token.
    ``decode_rate``: all new tokens but each request's first (which the prefill yields), from the
    earliest first token to the last token of all. For one request both are the server's own.
    """

    requests: int
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    prefill_rate: float
    decode_rate: float


@dataclass(frozen=True)
class _Streamed:
    """One streamed request: when it was sent, its first and last token, the server's timings."""

    sent: float
    first: float
    last: float
    timings: dict[str, Any]


class LlamaCpp:
    """A GGUF file loaded in llama.cpp; a context manager that frees it."""

    def __init__(
        self, path: Path, *, threads: int | None = None, context: int = 2048, parallel: int = 1
    ) -> None:
        """Load the file. ``threads`` defaults to llama.cpp's choice; ``context`` is in tokens
        for each of the ``parallel`` requests that may run at once.

        Raises MachineError when xllamacpp isn't installed, InputError when the file won't load.
        """
        try:
            import xllamacpp
        except ImportError as error:
            raise not_installed("xllamacpp", "gguf") from error
        if not path.is_file():
            raise InputError("no such file", where=str(path))
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(openable(path))
        parameters.n_ctx = context * parallel
        parameters.n_parallel = parallel
        parameters.verbosity = _ERRORS_ONLY
        self._key = secrets.token_hex()
        parameters.api_keys = [self._key]
        # Nothing is kept between requests, or a second one would look faster than it is.
        parameters.cache_prompt = False
        parameters.cache_ram_mib = 0
        # Load as asked, or fail: no silent change of context or offload to make it fit.
        parameters.fit_params = False
        if threads is not None:
            parameters.cpuparams.n_threads = threads
            parameters.cpuparams_batch.n_threads = threads
        self.parallel = parallel
        self._path = path
        try:
            self._server: Any = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise InputError(f"llama.cpp can't load it ({error})", where=str(path)) from error

    def close(self) -> None:
        """Stop the server and free the model."""
        self._server = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def generate(self, prompt: str | Sequence[int], max_new_tokens: int) -> Generation:
        """Continue ``prompt`` greedily.

        Ids are used as given. Text is tokenized by llama.cpp, with special tokens in it, and BOS
        is added where the file's metadata asks for it.

        Raises InputError when the prompt doesn't fit the context or holds an unknown id.
        """
        answer = self._post(
            "/completion",
            {
                **_GREEDY,
                "prompt": prompt if isinstance(prompt, str) else list(prompt),
                "n_predict": max_new_tokens,
                "return_tokens": True,
            },
        )
        ended = answer["stop_type"] == "eos"
        ids = [int(token) for token in answer["tokens"]]
        return Generation(ids, str(answer["content"]), int(answer["tokens_evaluated"]), ended)

    def log_probabilities(self, prompt: Sequence[int]) -> list[float]:
        """Natural logarithms of every token's probability after ``prompt``, by token id.

        Raises InputError as ``generate`` does.
        """
        # llama.cpp reports nothing at a token that ends the answer or is part of a character, so
        # another one is forced. That changes what is sampled, not the reported probabilities.
        [*_, plain] = self._post("/tokenize", {"content": "a", "add_special": False})["tokens"]
        request = {**_GREEDY, "prompt": list(prompt), "n_predict": 1, "n_probs": _ALL}
        request["logit_bias"] = [[plain, 1e6]]
        [step] = self._post("/completion", request)["completion_probabilities"]
        by_id = {int(token["id"]): float(token["logprob"]) for token in step["top_logprobs"]}
        return [by_id[token] for token in range(len(by_id))]

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of ``text`` as ``generate`` would read it."""
        request = {"content": text, "add_special": True, "parse_special": True}
        return [int(token) for token in self._post("/tokenize", request)["tokens"]]

    def measure(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        """Time one request for every prompt (token ids), all at once, each of ``new_tokens``.

        Raises InputError for more prompts than ``parallel`` (they would wait for each other)
        and for fewer than two new tokens (nothing is between the first and the last).
        """
        if new_tokens < 2:
            raise InputError("a decoding rate takes at least two new tokens")
        if len(prompts) > self.parallel:
            raise InputError(f"{len(prompts)} requests at once in {self.parallel} slots")
        with ThreadPoolExecutor(len(prompts)) as pool:
            runs = list(pool.map(lambda prompt: self._stream(prompt, new_tokens), prompts))
        prompt_tokens = sum(run.timings["prompt_n"] for run in runs)
        decoded = sum(run.timings["predicted_n"] for run in runs)
        if len(runs) == 1:
            prefill_seconds = runs[0].timings["prompt_ms"] / 1000
            decode_seconds = runs[0].timings["predicted_ms"] / 1000
        else:
            prefill_seconds = max(run.first for run in runs) - min(run.sent for run in runs)
            decode_seconds = max(run.last for run in runs) - min(run.first for run in runs)
        return Timing(
            requests=len(runs),
            prompt_tokens=prompt_tokens,
            new_tokens=decoded,
            first_token_seconds=sum(run.first - run.sent for run in runs) / len(runs),
            prefill_rate=prompt_tokens / prefill_seconds,
            decode_rate=(decoded - len(runs)) / decode_seconds,
        )

    def _stream(self, prompt: Sequence[int], new_tokens: int) -> _Streamed:
        times: list[float] = []
        chunks: list[dict[str, Any]] = []

        def receive(chunk: dict[str, Any]) -> None:
            times.append(time.perf_counter())
            chunks.append(chunk)

        request = {
            **_GREEDY,
            "prompt": list(prompt),
            "max_tokens": new_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        sent = time.perf_counter()
        self._server.handle_completions(request, receive)
        self._check(chunks[-1])
        # The last chunk carries the timings but no token.
        return _Streamed(sent, times[0], times[-2], chunks[-1]["timings"])

    def _post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        # http.client rather than urllib, which would send even this through a proxy.
        connection = http.client.HTTPConnection(urlsplit(self._server.listening_address).netloc)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
            connection.request("POST", path, json.dumps(request), headers)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        self._check(answer)
        return answer

    def _check(self, answer: dict[str, Any]) -> None:
        if "error" in answer:
            reason = answer["error"]["message"]
            raise InputError(f"llama.cpp refuses the request: {reason}", where=str(self._path))
