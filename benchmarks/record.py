"""How a benchmark's results are written: machine, versions, commit, figures, and targets with whether they were met."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("fullrank", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def target(what: str, wanted: float, measured: float | None, unit: str, *, at_most: bool) -> dict[str, Any]:
    """A target and whether it was met; `measured` None means that it could not be measured here."""
    met = measured is not None and (measured <= wanted if at_most else measured >= wanted)
    return {"what": what, "target": f"{'<=' if at_most else '>='} {wanted:g}", "measured": measured, "unit": unit, "met": met}


def write(name: str, figures: dict[str, Any], targets: list[dict[str, Any]], checkout: Path = ROOT) -> Path:
    """Writes `benchmarks/results/<name>.json`; `checkout` is where the measured code was checked out."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    facts = {
        "machine": machine(),
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES}
        | {"python": platform.python_version()},
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "figures": figures,
        "targets": targets,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "accelerator": None,
    }
