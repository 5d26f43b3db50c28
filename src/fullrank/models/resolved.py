"""A base model that was found: where it is and what it is. Needs neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fullrank.records import ModelFacts


@dataclass(frozen=True)
class ResolvedModel:
    """A base model on this machine."""

    folder: Path
    facts: ModelFacts
