"""The peers' environments: one virtual environment each, made once and kept.

Every peer is pinned here. Requirements of theirs that aren't pinned are resolved by pip on the day
the environment is made; the results name the installed versions. All have the same torch, so that
no tool is faster for its torch alone.

    python -m benchmarks.environments [NAME...] [--directory .venv-peers]

makes the environments that are named, or all. On Linux ``torch==2.13.0`` is a CUDA build; on a
machine without a GPU ``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`` saves gigabytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_TARGETS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
DIRECTORY = Path(".venv-peers")


@dataclass(frozen=True)
class Environment:
    """One tool's environment.

    installs: arguments of ``pip install``, which is called once for each of them, in this order.
    shown: the distributions whose versions the results name.
    removes: distributions that a pin requires and that are uninstalled again.
    build: called last with the environment's directory, to build what pip doesn't install.
    """

    installs: tuple[tuple[str, ...], ...]
    shown: tuple[str, ...]
    removes: tuple[str, ...] = ()
    build: Callable[[Path], None] | None = None

    @property
    def digest(self) -> str:
        """sha256 of everything that decides what is in the environment."""
        pins = (*self.installs, (LLAMA_CPP, *LLAMA_CPP_TARGETS)) if self.build else self.installs
        if self.removes:
            pins = (*pins, ("without", *self.removes))
        return hashlib.sha256(repr(pins).encode()).hexdigest()


class EnvironmentFailed(Exception):
    """An environment can't be made; the message is the last line of the installer's output."""


def build_llama_cpp(directory: Path) -> None:
    """Build llama.cpp's tools in ``directory`` from the source that llama-cpp-python carries."""
    python = directory / "bin" / "python"
    source = directory / "llama.cpp"
    pip = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--no-binary", ":all:", "--dest", str(directory), LLAMA_CPP])
    [archive] = directory.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(directory, filter="data")
    archive.unlink()
    [unpacked] = directory.glob("llama_cpp_python-*")
    (unpacked / "vendor" / "llama.cpp").rename(source)
    shutil.rmtree(unpacked)
    tools = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    off = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER", "LLAMA_CURL")
    flags = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in off)]
    build = source / "build"
    run(["cmake", "-G", "Ninja", "-S", str(source), "-B", str(build), *flags], tools)
    run(["cmake", "--build", str(build), "--target", *LLAMA_CPP_TARGETS], tools)


ENVIRONMENTS = {
    "llm-compressor": Environment(
        installs=((TORCH, "llmcompressor==0.14.0.1"),),
        shown=("llmcompressor", "compressed-tensors", "transformers", "torch"),
    ),
    # It requires a newer torch. --no-deps keeps the one that all others use; its other
    # requirements are therefore listed here.
    "gptqmodel": Environment(
        installs=(
            (TORCH, "transformers==5.23.0", "accelerate", "datasets", "setuptools", "wheel"),
            ("threadpoolctl", "protobuf", "pillow", "device-smi", "pypcre", "tokenicer", "logbar"),
            ("ninja", "maturin", "pyarrow", "dill", "torchao", "defuser", "requests", "jinja2"),
            ("--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"),
        ),
        shown=("gptqmodel", "transformers", "torch"),
    ),
    "auto-round": Environment(
        installs=((TORCH, "auto-round==0.16.1", "transformers==5.23.0"),),
        shown=("auto-round", "transformers", "torch"),
    ),
    # This transformers is the last that it was tested with. Its setup imports torch.
    "autoawq": Environment(
        installs=(
            (TORCH, "transformers==4.51.3", "setuptools", "wheel"),
            ("--no-build-isolation", "autoawq==0.2.9", "transformers==4.51.3"),
        ),
        shown=("autoawq", "transformers", "torch"),
    ),
    # First what convert_hf_to_gguf.py imports, then what builds llama.cpp.
    "llama.cpp": Environment(
        installs=(
            (TORCH, "transformers==4.57.6", "numpy~=2.2.6", "sentencepiece<0.3", "protobuf<5"),
            ("cmake", "ninja", "scikit-build-core"),
        ),
        shown=("transformers", "torch"),
        build=build_llama_cpp,
    ),
}


def python_of(name: str, directory: Path = DIRECTORY) -> Path:
    """The interpreter of a peer's environment."""
    return directory.resolve() / name / "bin" / "python"


def make(name: str, directory: Path = DIRECTORY) -> None:
    """Make a peer's environment in ``directory`` unless it is there. Raises EnvironmentFailed."""
    make_at(directory.resolve() / name, ENVIRONMENTS[name])


def make_at(target: Path, environment: Environment) -> None:
    """Make an environment at ``target`` unless it is there with the same pins.

    Raises EnvironmentFailed.
    """
    # Written last: an environment whose making was interrupted has none, and is made anew.
    ready = target / ".ready"
    if ready.is_file() and ready.read_text() == environment.digest:
        return
    print(f"making {target}", file=sys.stderr, flush=True)
    shutil.rmtree(target, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(target)])
    pip = [str(target / "bin" / "python"), "-m", "pip"]
    for packages in environment.installs:
        run([*pip, "install", "--quiet", *packages])
    if environment.removes:
        run([*pip, "uninstall", "--quiet", "--yes", *environment.removes])
    if environment.build is not None:
        environment.build(target)
    ready.write_text(environment.digest)


def run(command: list[str], settings: dict[str, str] | None = None) -> None:
    """Run an installer with ``settings`` added to the environment variables.

    Raises EnvironmentFailed with the last line of its output.
    """
    done = subprocess.run(
        command,
        env=os.environ | (settings or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise EnvironmentFailed(lines[-1] if lines else f"exit code {done.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ENVIRONMENTS), metavar="NAME")
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    options = parser.parse_args()
    if unknown := set(options.names) - set(ENVIRONMENTS):
        parser.error(
            f"there is no environment {', '.join(sorted(unknown))}; "
            f"there are {', '.join(ENVIRONMENTS)}"
        )
    for name in options.names:
        try:
            make(name, options.directory)
        except EnvironmentFailed as failure:
            raise SystemExit(f"{name}: {failure}") from None


if __name__ == "__main__":
    main()
