"""The suite against the lowest versions that pyproject.toml declares: `make test-lowest`.

Makes an environment of its own in `.venv-lowest`. The lowest transformers comes from the package index as everything does. The
lowest torch is installed only from an index named by TORCH_INDEX: elsewhere older wheels may bring gigabytes of CUDA packages, so
the tested torch stays and this says so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-lowest"
#: What the lowest transformers resolves for itself.
FREE = {"transformers", "huggingface_hub", "tokenizers", "safetensors", "torch"}
TESTS = [
    "tests/unit/models",
    "tests/unit/sequences",
    "tests/unit/generation",
    "tests/unit/parallel",
    "tests/laws",
    "tests/reference",
]


def lowest(package: str) -> str:
    """The lower bound that pyproject.toml declares for a package."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds = [match[1] for line in declared if (match := re.match(rf"{package}>=([\d.]+)", line))]
    return bounds[0] if bounds[0].count(".") > 1 else f"{bounds[0]}.0"


def main() -> int:
    """Makes the environment and runs the tests in it."""
    index = os.environ.get("TORCH_INDEX")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in pinned if "==" in line)
    torch = lowest("torch") if index else tested["torch"]
    if not index:
        print(f"lowest torch {lowest('torch')} not installed: no TORCH_INDEX is given; torch {torch} stays", flush=True)
    if not (FOLDER / "bin" / "python").exists():
        venv.create(FOLDER, with_pip=True)
    constraints = FOLDER / "constraints.txt"
    kept = [line for line in pinned if line.split("==")[0] not in FREE]
    constraints.write_text(
        "\n".join([*kept, f"transformers=={lowest('transformers')}", f"torch=={torch}"]) + "\n", encoding="utf-8"
    )
    python = str(FOLDER / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--constraint", str(constraints)]
    subprocess.run([*pip, *(["--index-url", index] if index else []), "torch"], check=True)
    subprocess.run([*pip, "--editable", f"{ROOT}[gguf,rouge,report,dev]"], check=True)
    show = "import torch, transformers; print('with torch', torch.__version__, 'and transformers', transformers.__version__)"
    subprocess.run([python, "-c", show], check=True)
    return subprocess.run([python, "-m", "pytest", *TESTS], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
