"""llama.cpp: its converter, then llama-quantize."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from arguments import Job, parse

SOURCE = Path(sys.prefix) / "llama.cpp"
# The converter recognizes pre-tokenizers by a hash of what they make of one text. It doesn't know
# the demo's, which splits text as Qwen2's does.
CONVERT = """
import runpy, sys
sys.path[:0] = [{source!r}, {library!r}]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path({source!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def run(job: Job) -> None:
    job.artifact.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=job.artifact.parent) as name:
        whole = Path(name) / "bf16.gguf"
        program = CONVERT.format(source=str(SOURCE), library=str(SOURCE / "gguf-py"))
        convert = [sys.executable, "-c", program, job.model]
        call(*convert, "--outtype", "bf16", "--outfile", whole)
        target = job.artifact / f"model-{job.variant}.gguf"
        quantize = SOURCE / "build" / "bin" / "llama-quantize"
        call(quantize, whole, target, job.variant, str(os.cpu_count()))


def call(*command: object) -> None:
    """Run a tool. Raises CalledProcessError."""
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    run(parse())
