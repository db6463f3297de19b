"""llama.cpp: its converter, then llama-quantize."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from told import Job, parse

SOURCE = Path(sys.prefix) / "llama.cpp"


def run(job: Job) -> None:
    job.artifact.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=job.artifact.parent) as name:
        whole = Path(name) / "bf16.gguf"
        convert = [sys.executable, SOURCE / "convert_hf_to_gguf.py", job.model]
        call(*convert, "--outtype", "bf16", "--outfile", whole)
        target = job.artifact / f"model-{job.variant}.gguf"
        quantize = SOURCE / "build" / "bin" / "llama-quantize"
        call(quantize, whole, target, job.variant, str(os.cpu_count()))


def call(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    run(parse())
