"""llama.cpp: convert to a BF16 GGUF, then quantize it, with importance weights or without.

Where the feed has bf16.gguf, this file is quantized and nothing is converted.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from arguments import Arguments, parse

SOURCE = Path(sys.prefix) / "llama.cpp"


def quantize(given: Arguments) -> None:
    tools = SOURCE / "build" / "bin"
    threads = str(os.cpu_count())
    given.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=given.out.parent) as name:
        bf16, importance = Path(name) / "bf16.gguf", Path(name) / "imatrix.gguf"
        if given.gguf.is_file():
            bf16 = given.gguf
        else:
            convert = [sys.executable, SOURCE / "convert_hf_to_gguf.py", given.model]
            run(*convert, "--outtype", "bf16", "--outfile", bf16)
        weighing = []
        if given.job.endswith("imatrix"):
            length, chunks = len(given.rows[0]), len(given.rows)
            collect = [tools / "llama-imatrix", "-m", bf16, "-f", given.text, "-o", importance]
            layers = "all" if given.device == "cuda" else "0"
            run(*collect, "-c", length, "--chunks", chunks, "-t", threads, "-ngl", layers)
            weighing = ["--imatrix", importance]
        result = given.out / f"model-{given.mix}.gguf"
        run(tools / "llama-quantize", *weighing, bf16, result, given.mix, threads)


def run(*command: object) -> None:
    """Run a tool; ends with its exit code if it fails, so that its message is the log's last."""
    code = subprocess.run([str(part) for part in command]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    quantize(parse())
