"""Recipes and run folders for tests of the stages: a tiny model, a few rows, and the rooms called one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import chat_rows, write_jsonl

from fullrank import loading
from fullrank.models import export
from fullrank.models.load import load_chat_format, load_model, load_tokenizer
from fullrank.models.resolved import ResolvedModel
from fullrank.models.source import resolve
from fullrank.recipe import Recipe
from fullrank.records import DataCard, Plan, TrainCard
from fullrank.run import Run, read_json_lines

#: What every recipe of these tests says unless told otherwise; nothing is left to `auto`.
DEFAULTS: dict[str, Any] = {
    "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 128, "audit": {"accept": ["leak"]}},
    "train": {
        "epochs": 2,
        "global_batch_size": 4,
        "optimizer": {"learning_rate": 3e-3},
        "evaluate_every_steps": 3,
        "precision": "fp32",
    },
    "evaluate": {"max_new_tokens": 8},
    "machine": {"device": "cpu"},
}


def write_case(folder: Path, model: Path | str, *, rows: int = 16, name: str = "tiny", **sections: Mapping[str, Any]) -> Path:
    """Writes rows of data and a recipe; `sections` are laid over the defaults, key by key. Returns the recipe's path."""
    write_jsonl(folder / "train.jsonl", chat_rows(rows))
    write_jsonl(folder / "validation.jsonl", chat_rows(rows + 4)[rows:])
    document: dict[str, Any] = {"name": name, "model": {"source": str(model)}}
    for section in {**DEFAULTS, **sections}:
        document[section] = {**DEFAULTS.get(section, {}), **sections.get(section, {})}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")  # JSON is YAML
    return path


@dataclass
class Staged:
    """A recipe, the run it writes into, its base model, and what the stages told."""

    recipe: Recipe
    run: Run
    base: ResolvedModel
    heard: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def data(self) -> DataCard:
        from fullrank.data.stage import stage

        data = self.recipe.data
        chat = load_chat_format(self.base.folder, data.chat_template, data.template_date, self.recipe.model.source)
        return stage(self.recipe, self.run, self.base, chat)

    def plan(self) -> Plan:
        from fullrank.plan.stage import stage

        return stage(self.recipe, self.run, self.base)

    def train(self) -> TrainCard:
        from fullrank.train.stage import stage

        return stage(self.recipe, self.run, self.base)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The facts of every event of that name, in order."""
        return [facts for event, facts in self.heard if event == name]

    def reused(self, stage: str) -> bool:
        """Whether that stage said that it found its work done."""
        return any(facts["stage"] == stage for facts in self.events("reused"))

    def losses(self) -> list[float]:
        """The loss of every step, as `steps.jsonl` has it."""
        return [row["loss"] for row in read_json_lines(self.run.train / "steps.jsonl")]


def staged(recipe: Path, overrides: Sequence[str] = (), *, runs: Path | None = None) -> Staged:
    """Loads a recipe for calling its stages; the run lies beside the recipe unless `runs` names another place."""
    loaded = loading.load(recipe, overrides).recipe
    found = Staged(loaded, Run((runs or recipe.parent / "runs") / loaded.name), resolve(loaded.model))
    found.run.listener = lambda event, facts: found.heard.append((event, facts))
    return found


def leftovers(folder: Path) -> list[Path]:
    """Files and folders below that were begun and never put under their final name."""
    return sorted(path for path in folder.rglob("*") if path.name.endswith((".partial", ".old")))


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    """Lines of text as they are, for files that are not valid."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def fresh_here(folder: Path, ids_1T: torch.Tensor, text: str, device: torch.device, scratch: Path) -> export.Fresh:
    """What `export.fresh_process` finds, found in this process: starting another one takes seconds."""
    model = load_model(folder, device=torch.device("cpu"), dtype=None)
    tokenizer = load_tokenizer(folder)
    stops = model.generation_config.eos_token_id if model.generation_config else None
    return export.Fresh(
        logits_1TV=export.probe_logits(model, ids_1T),
        tied=export.tied_names(model),
        text_ids=list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        chat_template=str(tokenizer.chat_template) if tokenizer.chat_template else None,
        stop_ids=stops if isinstance(stops, list) else [int(stops)] if stops is not None else [],
        digests={name: export.digest(p) for name, p in model.named_parameters()},
    )
