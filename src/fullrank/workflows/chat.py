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
from fullrank.run import find_run, read_json_lines
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
    device = devices.choose("auto")
    if (Path(target) / "config.json").is_file():
        folder, date, template = resolve(Model(source=target)).folder, Data.model_fields["template_date"].default, None
    else:
        run = find_run(target, runs_dir)
        recipe = load(run.recipe_path, need_files=False).recipe
        date, template = recipe.data.template_date, recipe.data.chat_template
        if system is None:
            system = _system_of(run.data / "tests")
        if use_base:
            folder = resolve(recipe.model).folder
        elif (run.model / "MANIFEST.json").is_file():
            folder = run.model
        else:
            raise UsageError(
                f"{run.root}: no model has been exported yet", hint=f"finish it with: fullrank run {run.recipe_path}"
            )
    model = load_model(folder, device=device, dtype=torch.float32 if device.type == "cpu" else None)
    renderer = ChatRenderer(load_tokenizer(folder, template), date, str(folder))
    return ChatSession(f"{target}{' (base)' if use_base else ''}", model, renderer, system=system, max_new_tokens=max_new_tokens)


def _system_of(tests: Path) -> str | None:
    """The system turn that all test records share, if they do."""
    systems = set()
    for path in tests.glob("*.jsonl"):
        for line in read_json_lines(path):
            first = (line["messages"] or [{}])[0]
            systems.add(first.get("content") if first.get("role") == "system" else None)
    return systems.pop() if len(systems) == 1 else None
