"""The inputs of the benchmarks: random checkpoints, adapters for them, calibration rows.

    python -m benchmarks.models MODEL [--work reports/bench]

makes, under ``WORK/MODEL``, ``model`` (safetensors in BF16, config.json, tokenizer), ``adapter``
(LoRA of rank 64 on all linears), ``rows.json`` (calibration rows of token ids, the ones that
``quantkit quantize`` draws from the same text) and ``text.txt`` (the text of those rows and of
``SPARE`` more). Parts that are there already are kept. The same seed gives the same bytes.

Weights are drawn from N(0, 0.02), norms are 1, and a few channels of the hidden state are larger
than the others, as in trained models. Tensors are written as they are drawn, a slice at a time, so
that memory stays far below the size of the model.

The tokenizer is a BPE of Llama 2's kind (``▁`` for spaces, byte fallback), trained on the bundled
text. llama.cpp's converter reads this kind from tokenizer.json. It recognizes a byte-level BPE only
by a hash of how the tokenizer splits one text, so that no newly trained one could be converted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = ROOT / "calibration" / "general-v1.jsonl"
WORK = Path("reports/bench")
SAMPLES, SEQUENCE_LENGTH = 16, 512
SPARE = 4  # more rows of text, because a peer may tokenize it into fewer tokens
RANK = 64
SHARD_BYTES = 2 * 10**9
SLICE = 2**22  # elements drawn at once
LOUD_CHANNELS, LOUDNESS = 4, 8.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, in elements."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def kv_width(self) -> int:
        """Outputs of the linears of keys and of values."""
        return self.hidden // self.heads * self.kv_heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the linears of one layer."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv_width, self.hidden),
            "self_attn.v_proj": (self.kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def others(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what else one layer has."""
        return {"input_layernorm": (self.hidden,), "post_attention_layernorm": (self.hidden,)}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for name, shape in self.linears().items():
                yield f"{prefix}.{name}.weight", shape
            for name, size in self.others().items():
                yield f"{prefix}.{name}.weight", size
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True)
class Mixture(Shape):
    """Sizes of a Qwen3-MoE: ``intermediate`` is of one of its ``experts``, each token takes
    ``active`` of them."""

    experts: int = 64
    active: int = 8

    def linears(self) -> dict[str, tuple[int, int]]:
        dense = super().linears()
        attention = {name: shape for name, shape in dense.items() if name.startswith("self_attn")}
        return attention | {
            f"mlp.experts.{expert}.{name.removeprefix('mlp.')}": shape
            for expert in range(self.experts)
            for name, shape in dense.items()
            if name.startswith("mlp")
        }

    def others(self) -> dict[str, tuple[int, ...]]:
        head = (self.hidden // self.heads,)
        norms = {"self_attn.q_norm": head, "self_attn.k_norm": head}
        return super().others() | norms | {"mlp.gate": (self.experts, self.hidden)}

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": self.hidden // self.heads,
            "moe_intermediate_size": self.intermediate,
            "num_experts": self.experts,
            "num_experts_per_tok": self.active,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }


SHAPES = {
    "tiny": Shape(2, 256, 512, 4, 2, 8192, tied=True),  # to try the scripts
    "82m": Shape(12, 768, 2048, 12, 4, 8192, tied=True),
    "1.1b": Shape(22, 2048, 5632, 32, 4, 32000),
    "1.1b-deep": Shape(44, 2048, 5632, 32, 4, 32000),
    "2b-8": Shape(8, 4096, 14336, 32, 8, 32000),  # eight layers of a model of eight billion
    "8b": Shape(32, 4096, 14336, 32, 8, 32000),
    "tiny-mixture": Mixture(2, 256, 128, 4, 2, 8192, tied=True, experts=8, active=2),
    "mixture-8": Mixture(8, 2048, 768, 32, 4, 32000),
    "7b": Shape(32, 4096, 11008, 32, 32, 32000),
}


def make(name: str, work: Path = WORK) -> Path:
    """Make everything for one model; returns its folder."""
    shape = SHAPES[name]
    folder = work / name
    with missing(folder / "model") as directory:
        if directory is not None:
            write_model(directory, shape)
            write_tokenizer(directory, shape.vocabulary)
    with missing(folder / "adapter") as directory:
        if directory is not None:
            write_adapter(directory, shape)
    if not (folder / "rows.json").is_file():
        write_rows(folder)
    return folder


@contextmanager
def missing(path: Path) -> Iterator[Path | None]:
    """A new directory, renamed to ``path`` when the block ends; None where ``path`` exists."""
    if path.is_dir():
        yield None
        return
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(path)


def write_model(directory: Path, shape: Shape, device: str = "cpu") -> None:
    """Write config.json and the weights, in shards of at most 2 GB.

    A GPU draws other numbers from the same seeds, and in seconds.
    """
    write_json(directory / "config.json", shape.config())
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, size in shape.tensors():
        nbytes = 2 * math.prod(size)
        if nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = size
        room -= nbytes
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, tensors, device)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(2 * math.prod(size) for _, size in shape.tensors())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def write_adapter(directory: Path, shape: Shape) -> None:
    """Write a LoRA adapter as PEFT saves it, both matrices random."""
    linears = {name: size for name, size in shape.linears().items() if ".experts." not in name}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(name.split(".")[-1] for name in linears),
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    write_json(directory / "adapter_config.json", config)
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        for name, (outputs, inputs) in linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = (RANK, inputs)
            tensors[f"{prefix}.lora_B.weight"] = (outputs, RANK)
    write_safetensors(directory / "adapter_model.safetensors", tensors)


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], device: str = "cpu") -> None:
    """Write random BF16 tensors of these shapes; the seed of each comes from its name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in tensors.items():
            for part in draw(name, shape, device):
                file.write(part.bfloat16().view(torch.uint8).cpu().numpy().tobytes())


def draw(name: str, shape: tuple[int, ...], device: str = "cpu") -> Iterator[Tensor]:
    """Yield float32 slices (rows, columns) of a tensor; its name gives the seed."""
    if len(shape) == 1:
        yield torch.ones(shape)
        return
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    rows, columns = shape
    for start in range(0, rows, step := max(1, SLICE // columns)):
        size = (min(step, rows - start), columns)
        part = torch.randn(size, generator=generator, device=device) * 0.02
        if name == "model.embed_tokens.weight":
            part[:, :: columns // LOUD_CHANNELS] *= LOUDNESS
        yield part


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """Train a BPE on the bundled text; unused tokens fill the vocabulary up to its size."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(), trainer)
    # Splitting into words matters in training only: no learned merge crosses a space.
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]  # not the bytes
    ids = content["model"]["vocab"]
    for index in range(len(ids), vocabulary):
        ids[f"<unused_{index}>"] = index
    write_json(directory / "tokenizer.json", content)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    write_json(directory / "tokenizer_config.json", settings)


def documents() -> list[str]:
    """The bundled texts."""
    files = sorted(CALIBRATION.parent.glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line)["text"] for line in lines]


def write_rows(folder: Path) -> None:
    """Write the rows that quantkit calibrates on, as token ids and as text."""
    from quantkit.calibration.text import load_tokenizer, pack_rows

    tokenizer = load_tokenizer(folder / "model")
    length, more = SEQUENCE_LENGTH, SAMPLES + SPARE
    rows = pack_rows(CALIBRATION, tokenizer, sequence_length=length, rows=more, seed=0).ids.tolist()
    if len(rows) < more:
        raise SystemExit(f"the text of {CALIBRATION} fills only {len(rows)} of {more} rows")
    (folder / "text.txt").write_text(
        "\n".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows),
        encoding="utf-8",
    )
    write_json(folder / "rows.json", rows[:SAMPLES])


def write_json(path: Path, value: object) -> None:
    """Write JSON to a partial file and rename it, so that a file that exists is complete."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="+", choices=SHAPES, metavar="MODEL", help=", ".join(SHAPES)
    )
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args()
    for name in options.models:
        print(make(name, options.work), file=sys.stderr)


if __name__ == "__main__":
    main()
