"""What a tuned model has forgotten, measured by default on what needs no data of anyone's.

Three readings, each paired: how far its predictions are from the base model's on text that the base wrote by itself, and on
general data where the recipe has some (forward KL a token; Shenfeld et al. 2025, RL's Razor, find that forgetting follows this
divergence, on the new task's inputs); how a small general probe fares (`fullrank.generation.probe`); and, as a diagnosis, how
far every block's weights and states have moved. The base model is asked first and need not stay in memory: its last hidden
states and its head are kept (`fullrank.generation.divergence`).

It says nothing of what none of them touches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from fullrank.evaluate.items import Items, mean
from fullrank.evaluate.metrics import loss_items
from fullrank.evaluate.statistics import interval, paired_difference
from fullrank.generation import probe
from fullrank.generation.divergence import Remembered
from fullrank.generation.samples import neutral_prompts, prompt_ids, sampled
from fullrank.models.stored import StoredTensor, StoredTensors, weight_files
from fullrank.recipe import Forgetting
from fullrank.records import BlockDrift, Forgotten, GroupScores, TextScores
from fullrank.run import fingerprint, write_text
from fullrank.sequences.chat import ChatRenderer, Tokens
from fullrank.sequences.store import Example, TokenStore

#: Tokens of the base's own text whose states after every block are compared.
_STATE_TOKENS = 256
#: Tokens of general data that are measured: their hidden states are kept, of 2,304 bytes each for a model of 576 channels.
_MOST_TOKENS = 1 << 16


class Asked:
    """The base model's answers, kept until the tuned model has given its own.

    Args:
        model: the base.
        base_fingerprint: of its weights.
        renderer: of the tokenizer and chat template that both are asked with.
        wanted: the recipe's section.
        stop_ids: ids that end an answer.
        budget_tokens: most tokens of a row.
        texts_folder: where texts that base models wrote are kept for other runs.
        general: stores of data that the task does not cover, by name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base_fingerprint: str,
        renderer: ChatRenderer,
        wanted: Forgetting,
        *,
        stop_ids: Sequence[int],
        budget_tokens: int,
        texts_folder: Path,
        general: Mapping[str, Path] = {},
    ) -> None:
        self._renderer, self._budget = renderer, budget_tokens
        prompts = [prompt_ids(renderer, prompt) for prompt in neutral_prompts()[: wanted.texts]]
        what = fingerprint(base_fingerprint, prompts, list(stop_ids), wanted.tokens, wanted.seed)
        self._texts = _kept(texts_folder / f"{what}.json")
        if not self._texts:
            drawn = sampled(model, prompts, stop_ids=stop_ids, max_new_tokens=wanted.tokens, seed=wanted.seed)
            self._texts = [text for text in drawn if any(text.supervised)]
            _keep(texts_folder / f"{what}.json", self._texts)
        self._remembered = Remembered(model, _as_examples(self._texts), budget_tokens)
        self._general = {
            name: Remembered(model, _beginning(TokenStore(folder)), budget_tokens) for name, folder in general.items()
        }
        self._answers = probe.answered(model, renderer, probe.questions(), budget_tokens)
        self._states = _states(model, self._texts)

    def against(self, model: PreTrainedModel, base: Path, tuned: Path) -> Forgotten:
        """What the tuned model makes of the same.

        Args:
            model: the tuned one.
            base: folder of the base model's weights.
            tuned: folder of the tuned model's.
        """
        answers = probe.answered(model, self._renderer, probe.questions(), self._budget)
        return Forgotten(
            own_text=_text_scores(self._remembered, model),
            general={name: _text_scores(remembered, model) for name, remembered in self._general.items()},
            probe=_by_group(self._answers, answers),
            drift=_drift(base, tuned, self._states, _states(model, self._texts)),
        )


def _as_examples(texts: Sequence[Tokens]) -> list[Example]:
    return [Example(np.asarray(text.ids), np.asarray(text.supervised)) for text in texts]


def _beginning(store: TokenStore) -> list[Example]:
    """The first examples of a store, as many as can be kept in memory."""
    chosen: list[Example] = []
    tokens = 0
    for number in range(len(store)):
        chosen.append(store[number])
        tokens += chosen[-1].supervised_targets
        if tokens >= _MOST_TOKENS:
            break
    return chosen


def _text_scores(remembered: Remembered, model: PreTrainedModel) -> TextScores:
    moved = sorted(remembered.against(model), key=lambda one: one.example)
    tokens = [one.tokens for one in moved]
    before, after = (
        loss_items([getattr(one, name) for one in moved], tokens)["validation_loss"] for name in ("loss_before", "loss_after")
    )
    return TextScores(
        texts=len(moved),
        tokens=sum(tokens),
        kl=interval(loss_items([one.kl for one in moved], tokens)["validation_loss"]),
        loss_difference=paired_difference(after, before),
    )


# ---- texts ----------------------------------------------------------------------------------------------------------


def _kept(path: Path) -> list[Tokens]:
    try:
        return [Tokens(ids, supervised) for ids, supervised in json.loads(path.read_text(encoding="utf-8"))]
    except (FileNotFoundError, ValueError):
        return []


def _keep(path: Path, texts: Sequence[Tokens]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([[list(text.ids), list(text.supervised)] for text in texts]))


# ---- the probe ------------------------------------------------------------------------------------------------------


def _by_group(before: Sequence[probe.Answered], after: Sequence[probe.Answered]) -> dict[str, GroupScores]:
    groups = [question.group for question in probe.questions()]
    found = {}
    for group in ("all", *dict.fromkeys(groups)):
        chosen = [n for n, own in enumerate(groups) if group in ("all", own)]
        base, tuned = (_right([some[n] for n in chosen]) for some in (before, after))
        loss_before, loss_after = (
            loss_items([some[n].loss for n in chosen], [some[n].tokens for n in chosen])["validation_loss"]
            for some in (before, after)
        )
        found[group] = GroupScores(
            questions=len(chosen),
            base=interval(base),
            tuned=interval(tuned),
            difference=paired_difference(tuned, base),
            loss_difference=paired_difference(loss_after, loss_before),
        )
    return found


def _right(answers: Sequence[probe.Answered]) -> Items:
    return mean([float(answer.is_right) for answer in answers])


# ---- drift ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _states(model: PreTrainedModel, texts: Sequence[Tokens]) -> list[torch.Tensor]:
    """What comes out of the embedding and of every block, [T, H] each, at the first tokens drawn."""
    was_training = model.training
    model.eval()
    parts: list[list[torch.Tensor]] = []
    left = _STATE_TOKENS
    try:
        for text in texts:
            if left <= 0:
                break
            ids_1T = torch.tensor([text.ids], device=model.device)
            out = model.base_model(input_ids=ids_1T, output_hidden_states=True, use_cache=False)
            drawn = torch.tensor(text.supervised, device=model.device).nonzero()[:left, 0]
            left -= len(drawn)
            parts.append([states_1TH[0, drawn].float().cpu() for states_1TH in out.hidden_states])
    finally:
        model.train(was_training)
    return [torch.cat(of_a_block) for of_a_block in zip(*parts, strict=True)]


def _drift(base: Path, tuned: Path, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> list[BlockDrift]:
    weights = _weights_moved(base, tuned)
    apart = [1 - float(torch.cosine_similarity(a, b, dim=1).mean()) for a, b in zip(before, after, strict=True)]
    states = {"embeddings": apart[0], **{f"block {n}": value for n, value in enumerate(apart[1:])}}
    # Many models hand out the last block's states after the last norm, whose weights stand with the head.
    return [BlockDrift(part=part, weights=moved, states=states.get(part)) for part, moved in weights.items()]


def _weights_moved(base: Path, tuned: Path) -> dict[str, float]:
    """Part -> 2-norm of the difference over that of the base, of stored tensors that both have."""
    ours, theirs = (StoredTensors(*weight_files(folder)).index for folder in (tuned, base))
    sums: dict[str, list[float]] = {}
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].shape == theirs[name].shape:
            added, size = _squares(theirs[name], ours[name])
            of_part = sums.setdefault(_part(name, theirs), [0.0, 0.0])
            of_part[0] += added
            of_part[1] += size
    return {
        part: (added / size) ** 0.5 if size else 0.0
        for part, (added, size) in sorted(sums.items(), key=lambda one: _place(one[0]))
    }


def _squares(before: StoredTensor, after: StoredTensor) -> tuple[float, float]:
    numbers, others = before.read().float(), after.read().float()
    return float((others - numbers).double().square().sum()), float(numbers.double().square().sum())


def _part(name: str, stored: Mapping[str, StoredTensor]) -> str:
    if number := re.search(r"\.(\d+)\.", f".{name}."):
        return f"block {number[1]}"
    return "embeddings" if re.search(r"embed|wte|wpe", name) else "head and norms"


def _place(part: str) -> tuple[int, int]:
    return {"embeddings": (0, 0), "head and norms": (2, 0)}.get(part) or (1, int(part.split()[1]))
