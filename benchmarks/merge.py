"""Time and memory of merging a LoRA adapter: quantkit merge against PEFT.

A random Llama of 1.1 billion parameters (22 layers; --layers changes that) and a random adapter
of rank 64 on all its linears are made in a temporary directory. Each way of merging then runs
in a fresh process: ``quantkit merge --no-proof``, and PEFT's ``merge_and_unload`` followed by
``save_pretrained``, both in bfloat16. A third process only imports torch: what it needs is the
floor of any program that uses it.

    python benchmarks/merge.py [--layers 22] [--rank 64] [--repeats 1] [--directory DIR]

Needs: peft. Disk: three times the model (6.6 GB for 22 layers).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MAKE = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

out, layers, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
    num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(f"{out}/base", max_shard_size="1GB")
model = AutoModelForCausalLM.from_pretrained(f"{out}/base", dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.01)
model.save_pretrained(f"{out}/adapter")
"""

PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(
    out, max_shard_size="1GB"
)
"""


@dataclass(frozen=True)
class Measured:
    """Seconds of wall and of CPU time, and peak resident bytes, of one process."""

    wall: float
    cpu: float
    peak: int


def run(command: list[str]) -> Measured:
    """Run a command to its end in a fresh process. Raises CalledProcessError if it fails."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Measured(wall, usage.ru_utime + usage.ru_stime, peak_bytes(usage))


def peak_bytes(usage: resource.struct_rusage) -> int:
    """Linux counts in kibibytes, macOS in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def differences(one: Path, other: Path) -> tuple[float, float]:
    """Largest |Δ| over largest |W| of two checkpoints, and the share of unequal elements."""
    from quantkit.checkpoint.reader import Checkpoint

    first, second = Checkpoint(one), Checkpoint(other)
    worst, unequal, count = 0.0, 0, 0
    for key in first.keys():  # noqa: SIM118 (it's no dictionary)
        a, b = first.read(key), second.read(key)
        worst = max(worst, ((a.float() - b.float()).abs().max() / a.abs().max()).item())
        unequal += int((a != b).sum())
        count += a.numel()
    return worst, unequal / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="the fastest of each counts")
    parser.add_argument("--directory", type=Path, help="where to make the temporary directory")
    arguments = parser.parse_args()
    python = sys.executable
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        root = Path(name)
        subprocess.run(
            [python, "-c", MAKE, name, str(arguments.layers), str(arguments.rank)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        base, adapter = str(root / "base"), str(root / "adapter")
        ours, theirs = root / "ours", root / "peft"
        quantkit = [python, "-m", "quantkit.cli", "merge", base, adapter, "--out", str(ours)]
        commands = {
            "import torch": [python, "-c", "import torch"],
            "quantkit merge": [*quantkit, "--no-proof", "--force"],
            "peft merge, save": [python, "-c", PEFT, base, adapter, str(theirs)],
        }
        found: dict[str, Measured] = {}
        for _ in range(arguments.repeats):
            for label, command in commands.items():
                measured = run(command)
                if label not in found or measured.wall < found[label].wall:
                    found[label] = measured
        manifest = json.loads((ours / "quantkit.json").read_text())
        worst, unequal = differences(ours, theirs)
    idle, own, peft = found.values()
    print(f"{manifest['parameters'] / 1e9:.2f} billion parameters, rank {arguments.rank}, bfloat16")
    print(f"{'':18} {'wall s':>8} {'CPU s':>8} {'peak GB':>8} {'above idle':>11}")
    for label, measured in found.items():
        above = (measured.peak - idle.peak) / 1e9
        print(
            f"{label:18} {measured.wall:8.2f} {measured.cpu:8.2f} {measured.peak / 1e9:8.2f} "
            f"{above:11.2f}"
        )
    print(
        f"quantkit / peft: wall {own.wall / peft.wall:.2f}, CPU {own.cpu / peft.cpu:.2f}, "
        f"peak {own.peak / peft.peak:.2f}"
    )
    print(f"results differ by {worst:.1e} of the largest weight, in {unequal:.2%} of the elements")


if __name__ == "__main__":
    main()
