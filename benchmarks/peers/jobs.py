"""The jobs, and the tools that do each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "peer_jobs"
OURS = "quantkit"


@dataclass(frozen=True)
class Tool:
    """One way to do a job.

    arguments: of its interpreter; {feed}, {out} and {device} are filled in.
    environment: the name of the environment that has the interpreter; our own when None.
    small: on a CPU it is run on the smallest models only, because it takes hours on others.
    note: a remark that is printed below the table.
    """

    name: str
    arguments: tuple[str, ...]
    environment: str | None = None
    small: bool = False
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


def ours(recipe: str, *settings: str, name: str = OURS) -> Tool:
    """Quantkit by a shipped recipe, changed by ``settings`` ("quantize.bits=3")."""
    flags = [part for setting in settings for part in ("--set", setting)]
    place = ("--model", "{feed}/model", "--out", "{out}", "--device", "{device}")
    return Tool(name, ("-m", "quantkit.cli", "quantize", recipe, "--no-cache", *place, *flags))


def peer(
    name: str,
    job: str,
    script: str,
    environment: str | None,
    *,
    small: bool = False,
    note: str = "",
) -> Tool:
    """A peer by its script in benchmarks/peer_jobs."""
    path = str(SCRIPTS / script)
    arguments = (path, job, "--feed", "{feed}", "--out", "{out}", "--device", "{device}")
    return Tool(name, arguments, environment, small, note)


SAMPLES = "calibration.samples=16"
GPTQMODEL_NOTE = (
    "with fewer than three cores GPTQMODEL_CPU_WORKERS=2 is set, without which it raises at "
    "import; made with an older torch than it asks for"
)
JOBS: dict[str, tuple[Tool, ...]] = {
    "gptq": (
        *(
            ours(
                "gptq-w4-g128",
                SAMPLES,
                f"quantize.propagate={propagate}",
                name=f"{OURS}, propagate: {propagate}",
            )
            for propagate in ("original", "quantized", "corrected")
        ),
        peer("llm-compressor", "gptq", "llm_compressor.py", "llm-compressor"),
        peer("GPTQModel", "gptq", "gptq_model.py", "gptqmodel", note=GPTQMODEL_NOTE),
        peer(
            "AutoRound",
            "gptq",
            "autoround.py",
            "auto-round",
            small=True,
            note="another method, 200 iterations of signed gradient descent",
        ),
    ),
    "awq": (
        ours("awq-w4-g128", SAMPLES),
        peer(
            "AutoAWQ",
            "awq",
            "auto_awq.py",
            "autoawq",
            small=True,
            note="archived; with the last transformers it was made for",
        ),
        peer("llm-compressor", "awq", "llm_compressor.py", "llm-compressor"),
        peer("GPTQModel", "awq", "gptq_model.py", "gptqmodel", small=True, note=GPTQMODEL_NOTE),
    ),
    "q4_k_m": (
        ours("gguf-q4-k-m", "calibration=null"),
        peer(
            "llama.cpp",
            "q4_k_m",
            "llama_cpp.py",
            "llama.cpp",
            note="convert_hf_to_gguf.py to a BF16 file, then llama-quantize",
        ),
    ),
    "q4_k_m-imatrix": (
        ours("gguf-q4-k-m", SAMPLES),
        ours("gguf-q4-k-m-gptq", SAMPLES, name=f"{OURS}, error feedback"),
        ours("gguf-q4-k-m-corrected", SAMPLES, name=f"{OURS}, error feedback, corrected"),
        peer(
            "llama.cpp",
            "q4_k_m-imatrix",
            "llama_cpp.py",
            "llama.cpp",
            note="as above, with llama-imatrix on as many tokens of the same text",
        ),
    ),
    "nf4": (ours("nf4"), peer("transformers + bitsandbytes", "nf4", "hf_nf4.py", None)),
    "merge": (
        Tool(
            OURS,
            (
                *("-m", "quantkit.cli", "merge", "{feed}/model", "{feed}/adapter"),
                *("--out", "{out}", "--no-proof"),
            ),
        ),
        peer("PEFT", "merge", "hf_merge.py", None, note="merge_and_unload, save_pretrained"),
    ),
    "idle": (
        Tool("import torch", ("-c", "import torch")),
        Tool("import torch, transformers", ("-c", "import torch, transformers")),
    ),
}
TITLES = {
    "gptq": "GPTQ, 4 bits symmetric, groups of 128, 16 × 512 tokens",
    "awq": "AWQ, 4 bits asymmetric, groups of 128, 16 × 512 tokens",
    "q4_k_m": "GGUF Q4_K_M without importance weights",
    "q4_k_m-imatrix": "GGUF Q4_K_M with importance weights of 16 × 512 tokens",
    "nf4": "NF4 with double quantization",
    "merge": "Merging a LoRA adapter of rank 64, BF16",
    "idle": "What only importing costs",
}


def peer_names() -> list[str]:
    """Every tool that isn't ours, once, in the order of the jobs."""
    return list(dict.fromkeys(t.name for tools in JOBS.values() for t in tools if not t.is_ours))
