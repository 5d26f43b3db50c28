"""Opening a conversation with a run's model, its base model, or any model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from fullrank.errors import UsageError
from fullrank.generation.chat import ChatSession
from fullrank.loading import load
from fullrank.models.load import load_model, load_tokenizer
from fullrank.models.source import resolve
from fullrank.parallel import device as devices
from fullrank.recipe import Data, Model
from fullrank.records import DataCard
from fullrank.run import Run, find_run, need_record, read_json_lines
from fullrank.sequences.chat import ChatRenderer


def open_chat(target: str, runs_dir: Path, *, use_base: bool, system: str | None, max_new_tokens: int) -> ChatSession:
    """A session with the tuned model of a run (or its base), or with a model folder.

    Args:
        target: name or folder of a run, or a model folder.
        runs_dir: folder of the runs.
        use_base: talk to the base model of the run.
        system: system turn; by default the one of the run's test data, which the model was trained with.
        max_new_tokens: longest answer.

    Raises:
        UsageError: no such run, or it has no exported model yet.
    """
    if (Path(target) / "config.json").is_file():
        if use_base:
            raise UsageError(f"{target}: a model folder has no base model to talk to", hint="--base is for runs")
        folder = tokenizer_folder = resolve(Model(source=target)).folder
        date, device, stop_ids = Data.model_fields["template_date"].default, "auto", None
    else:
        run = find_run(target, runs_dir)
        recipe = load(run.recipe_path, need_files=False).recipe
        date, device = recipe.data.template_date, recipe.machine.device
        stop_ids = need_record(run.data / "card.json", DataCard, "run").stop_ids
        system = _system_of(run.data / "tests") if system is None else system
        tokenizer_folder = _export_of(run)  # the base is asked through the template that training used
        folder = resolve(recipe.model).folder if use_base else tokenizer_folder
    chosen = devices.choose(device)
    model = load_model(folder, device=chosen, dtype=torch.float32 if chosen.type == "cpu" else None)
    tokenizer = load_tokenizer(tokenizer_folder)
    renderer = ChatRenderer(tokenizer, date, str(folder))
    return ChatSession(
        f"{target}{' (base)' if use_base else ''}",
        model,
        tokenizer,
        renderer,
        system=system,
        stop_ids=stop_ids or _stops_of(model, renderer),
        max_new_tokens=max_new_tokens,
    )


def _export_of(run: Run) -> Path:
    if not (run.model / "MANIFEST.json").is_file():
        raise UsageError(f"{run.root}: no model has been exported yet", hint=f"finish it with: fullrank run {run.root}")
    return run.model


def _stops_of(model: torch.nn.Module, renderer: ChatRenderer) -> list[int]:
    """What a model folder itself says ends an answer."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [told] if isinstance(told, int) else list(told or renderer.stop_ids())


def _system_of(tests: Path) -> str | None:
    """The system turn that all test records share, if they do."""
    systems = set()
    for path in tests.glob("*.jsonl"):
        for line in read_json_lines(path):
            first = (line["messages"] or [{}])[0]
            systems.add(first.get("content") if first.get("role") == "system" else None)
    return systems.pop() if len(systems) == 1 else None
