"""llama.cpp's own measurement of a GGUF file: ``llama-perplexity --kl-divergence``.

It cuts the text into chunks, judges the second half of each, and computes in the precision of its
own kernels. These round activations, so that no file, however good, has a divergence of zero.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from benchmarks import environments

_MEAN = re.compile(r"Mean\s+KLD:\s+(-?[\d.]+)\s+±\s+([\d.]+)")


class Judge:
    """Measures files against ``baseline``, on the first ``chunks`` chunks of a text."""

    def __init__(
        self, baseline: Path, text: Path, *, chunks: int, length: int, directory: Path
    ) -> None:
        """``directory``: of the peers' environments. The baseline's logits are kept beside it."""
        environments.make("llama.cpp", directory)
        folder = environments.python_of("llama.cpp", directory).parent.parent
        self._tool = folder / "llama.cpp" / "build" / "bin" / "llama-perplexity"
        self._text = ["-f", str(text), "-c", str(length), "--chunks", str(chunks), "-ngl", "0"]
        self._logits = baseline.with_name("llama-perplexity.logits")
        if not self._logits.is_file():
            self._run(baseline, "--kl-divergence-base", str(self._logits))

    def mean_kl(self, file: Path) -> tuple[float, float]:
        """Mean KL divergence of ``file`` in nats, and its standard error."""
        for _ in range(2):  # once in some hundred runs it succeeds but prints no summary
            output = self._run(file, "--kl-divergence-base", str(self._logits), "--kl-divergence")
            result = parse_mean_kl(output)
            if result is not None:
                return result
        raise SystemExit(f"{self._tool.name} reported no mean KL divergence of {file}")

    def _run(self, model: Path, *arguments: str) -> str:
        command = [str(self._tool), "-m", str(model), *self._text, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{self._tool.name} failed: {done.stderr.strip()[-500:]}")
        return done.stdout


def parse_mean_kl(output: str) -> tuple[float, float] | None:
    """Mean and standard error in the tool's summary; None where there is no summary."""
    match = _MEAN.search(output)
    return (float(match[1]), float(match[2])) if match else None
