"""The evaluate stage: base and tuned model on the same items, under the same template and decoding.

Reads `data/` and the export in `model/`; writes `evaluate/card.json` and every prompt, answer and score to
`evaluate/predictions-<test>-<model>.jsonl`. Decoding is greedy, so there is no seed to choose; where choices are compared by
likelihood and nothing else is asked of a test set, nothing is generated. The base model may be given instructions that the tuned
one has learned (`evaluate.base_instructions`); the record says so. Answers are kept as they come: a stage that was killed goes on
from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from fullrank.errors import DataError
from fullrank.evaluate import metrics
from fullrank.evaluate.answers import KeptAnswers
from fullrank.evaluate.choice import choice, likeliest
from fullrank.evaluate.forgetting import Asked
from fullrank.evaluate.metrics import Items
from fullrank.evaluate.significance import p_value
from fullrank.evaluate.statistics import interval, paired_difference
from fullrank.generation.decode import greedy
from fullrank.generation.likelihood import answer_losses, example_losses
from fullrank.meter import Meter
from fullrank.models.load import load_model, load_tokenizer
from fullrank.models.resolved import ResolvedModel
from fullrank.parallel import device as devices
from fullrank.recipe import Recipe, Task
from fullrank.records import (
    ChoiceLikelihood,
    DataCard,
    EvaluationCard,
    Forgotten,
    Plan,
    Prediction,
    TestItem,
    TestScores,
    TrainCard,
)
from fullrank.run import (
    Run,
    append_json_line,
    file_digest,
    fingerprint,
    need_record,
    new_folder,
    read_json_lines,
    read_record,
    write_record,
)
from fullrank.sequences.chat import ChatRenderer
from fullrank.sequences.store import TokenStore

Who = Literal["base", "tuned"]
_WHO: tuple[Who, ...] = ("base", "tuned")
VALIDATION = "validation"


@dataclass
class _Measured:
    """One model on one test set."""

    scores: dict[str, Items]
    predictions: list[Prediction]
    generated: bool = False
    """Whether the answers were generated; else they are the likeliest choices."""


def stage(recipe: Recipe, run: Run, base: ResolvedModel) -> EvaluationCard:
    """Evaluates base and tuned model, or finds it done.

    Raises:
        UsageError: nothing was trained yet, or an extra is missing.
        DataError: a reference that the task's pattern does not match.
    """
    data = need_record(run.data / "card.json", DataCard, "train")
    plan = need_record(run.plan_path, Plan, "train")
    need_record(run.train / "card.json", TrainCard, "train")
    current = _fingerprint(recipe, run, data, base)
    card = read_record(run.evaluate / "card.json", EvaluationCard)
    if card and card.fingerprint == current:
        run.tell("reused", stage="evaluate", what="the scores measured before")
        return card
    run.tell("started", stage="evaluate")
    with Meter() as meter, new_folder(run.evaluate) as folder:
        kept = KeptAnswers(run.root / ".evaluate.answers", current)
        evaluation = _Evaluation(recipe, run, base, plan, kept, stop_ids=data.stop_ids)
        measured = {who: evaluation.measure(who) for who in _WHO}
        forgotten = evaluation.forgotten
        tests = {name: _compare({who: measured[who][name] for who in _WHO}) for name in measured["tuned"]}
        for who in _WHO:
            for name, result in measured[who].items():
                _write_predictions(folder / f"predictions-{name}-{who}.jsonl", result.predictions)
        card = EvaluationCard(
            fingerprint=current,
            seconds=meter.seconds,
            peak_bytes=meter.peak_bytes,
            primary=next(iter(recipe.data.test), VALIDATION),
            tests=tests,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            base_was_instructed=recipe.evaluate.base_instructions is not None,
            forgotten=forgotten,
            signatures=_signatures(measured["tuned"].values()),
        )
        write_record(folder / "card.json", card)
    kept.clear()
    run.tell("finished", stage="evaluate", seconds=card.seconds)
    return card


def rehearse(recipe: Recipe, run: Run) -> None:
    """Scores every reference against itself, so that a pattern or an extra that is missing is told before anything is trained.

    Raises:
        DataError: a reference that cannot be scored, or choices that are not there.
        UsageError: a metric's extra is not installed, or a function of the user's fails.
    """
    measured: list[Task] = []
    for name in recipe.data.test:
        items = _test_items(recipe, run, name)
        tasks = _tasks(recipe, name, items)
        if not tasks:
            raise DataError(
                f"data.test.{name}: no task of the recipe measures it",
                hint="see `tests` of evaluate.tasks, or leave the test set out",
            )
        measured += tasks
        references = [item.reference for item in items]
        for task in tasks:
            if task.generates:
                metrics.score(task, references, references, [item.id for item in items], [_asked(item) for item in items])
            elif without := next((item for item in items if item.choices is None), None):
                raise DataError(
                    f"{without.id}: task {task.key}: the record has no choices",
                    hint="such a record has `question`, `choices` and `answer`; `tests` says which test sets a task measures",
                )
    for task in recipe.evaluate.tasks:
        if recipe.data.test and task not in measured:
            raise DataError(
                f"task {task.key}: no test record has choices", hint="a record of a choice has `question`, `choices` and `answer`"
            )


def _tasks(recipe: Recipe, name: str, items: list[TestItem]) -> list[Task]:
    """The tasks that measure a test set: those that name it, and of those that name none, all but a choice without choices."""
    has_choices = any(item.choices for item in items)
    return [
        task
        for task in recipe.evaluate.tasks
        if (name in task.tests if task.tests is not None else task.generates or has_choices)
    ]


def _asked(item: TestItem) -> str:
    """What a function of the user's is told of the prompt: its text, or that of the conversation's last user turn."""
    turns = [message.get("content") or "" for message in item.messages or [] if message["role"] == "user"]
    return item.prompt if item.prompt is not None else turns[-1] if turns else ""


def _test_items(recipe: Recipe, run: Run, name: str) -> list[TestItem]:
    lines = read_json_lines(run.data / "tests" / f"{name}.jsonl")
    return [TestItem.model_validate(line) for line in lines[: recipe.evaluate.limit]]


def _fingerprint(recipe: Recipe, run: Run, data: DataCard, base: ResolvedModel) -> str:
    weights = {path.name: file_digest(path) for path in sorted(run.model.glob("*.safetensors"))}
    files = [metrics.digests(task) for task in recipe.evaluate.tasks]
    return fingerprint(recipe.evaluate.model_dump(mode="json"), files, data.records_fingerprint, base.facts.fingerprint, weights)


def _signatures(measured: Iterable[_Measured]) -> dict[str, str]:
    return {key: items.signature for result in measured for key, items in result.scores.items() if items.signature}


def _compare(by_who: dict[Who, _Measured]) -> TestScores:
    base, tuned = by_who["base"], by_who["tuned"]
    stopped = {
        who: sum(p.stopped for p in result.predictions) / len(result.predictions)
        for who, result in by_who.items()
        if result.generated
    }
    return TestScores(
        examples=len(next(iter(tuned.scores.values())).stats_NK),
        base={key: interval(items) for key, items in base.scores.items()},
        tuned={key: interval(items) for key, items in tuned.scores.items()},
        difference={key: paired_difference(tuned.scores[key], base.scores[key]) for key in tuned.scores},
        p_value={key: p_value(tuned.scores[key], base.scores[key]) for key in tuned.scores},
        stopped_ratio=dict(stopped),
    )


def _write_predictions(path: Path, predictions: list[Prediction]) -> None:
    for prediction in predictions:
        append_json_line(path, prediction.model_dump())


class _Evaluation:
    """What is the same for both models: items, template, decoding."""

    def __init__(
        self, recipe: Recipe, run: Run, base: ResolvedModel, plan: Plan, kept: KeptAnswers, *, stop_ids: list[int]
    ) -> None:
        self.recipe, self.run, self.base, self.kept, self.stop_ids = recipe, run, base, kept, stop_ids
        self.device = devices.choose(plan.machine.device)
        self.budget_tokens = plan.micro_batch_tokens
        self.tokenizer = load_tokenizer(run.model)  # as training had it, its chat template included
        self.renderer = ChatRenderer(self.tokenizer, recipe.data.template_date, recipe.model.source)
        self.items = {name: _test_items(recipe, run, name) for name in recipe.data.test}
        self.forgotten: Forgotten | None = None
        self._asked: Asked | None = None

    def measure(self, who: Who) -> dict[str, _Measured]:
        """Scores and predictions of a model by test set; the validation loss comes as a set of its own."""
        folder = self.base.folder if who == "base" else self.run.model
        # CPUs without bf16 units compute fp32 several times faster; the stored values are the same
        model = load_model(folder, device=self.device, dtype=torch.float32 if self.device.type == "cpu" else None)
        results = {name: self._test(model, who, name, items) for name, items in self.items.items()}
        self._ask(model, who)
        return results | {VALIDATION: _Measured(self._validation(model, who), [])}

    def _ask(self, model: PreTrainedModel, who: Who) -> None:
        """What the base says and knows by itself, and what is left of it in the tuned model."""
        wanted = self.recipe.evaluate.forgetting
        if wanted is None:
            return
        self.run.show("measuring", who=who, test="what it writes and knows by itself")
        if self._asked is None:
            self._asked = Asked(
                model,
                self.base.facts.fingerprint,
                self.renderer,
                wanted,
                stop_ids=self.stop_ids,
                budget_tokens=self.budget_tokens,
                texts_folder=self.run.root.parent / ".texts",
                general={name: self.run.data / f"general-{name}" for name in self.recipe.data.general},
            )
        else:
            self.forgotten = self._asked.against(model, self.base.folder, self.run.model)

    def _validation(self, model: PreTrainedModel, who: Who) -> dict[str, Items]:
        self.run.show("measuring", who=who, test=VALIDATION)
        store = TokenStore(self.run.data / "validation")
        losses = sorted(example_losses(model, store, self.budget_tokens))
        return metrics.loss_items([loss for _, loss, _ in losses], [tokens for _, _, tokens in losses])

    def _test(self, model: PreTrainedModel, who: Who, name: str, items: list[TestItem]) -> _Measured:
        prompts = [self._prompt(item, who) for item in items]
        prompt_ids = [self._prompt_ids(item, who) for item in items]
        tasks = _tasks(self.recipe, name, items)
        generates = any(task.generates for task in tasks)
        chosen = None if all(task.generates for task in tasks) else self._choices(model, items, prompts, prompt_ids)
        if generates:
            answers, stopped = self._answers(model, who, name, prompt_ids)
        else:
            answers, stopped = [likeliest(options) for options in chosen or []], [True] * len(items)
        references, places = [item.reference for item in items], [item.id for item in items]
        asked = [_asked(item) for item in items]
        scores: dict[str, Items] = {}
        for task in tasks:
            if task.generates:
                scores |= metrics.score(task, references, answers, places, asked)
            else:
                scores |= choice(task, references, chosen or [])
        by_item = {key: result.per_item for key, result in scores.items()}
        predictions = [
            Prediction(
                id=item.id,
                prompt=prompts[n],
                reference=item.reference,
                answer=answers[n],
                stopped=stopped[n],
                scores={key: values[n] for key, values in by_item.items()},
                choices=chosen[n] if chosen else None,
            )
            for n, item in enumerate(items)
        ]
        return _Measured(scores, predictions, generates)

    def _choices(
        self, model: PreTrainedModel, items: list[TestItem], prompts: list[str], prompt_ids: list[list[int]]
    ) -> list[list[ChoiceLikelihood]]:
        """Every choice of every item with its likelihood after the prompt."""
        texts = [item.choices or [] for item in items]
        asked = [
            (prompt_ids[n], self.renderer.answer_ids(prompts[n], text)) for n, options in enumerate(texts) for text in options
        ]
        losses = iter(answer_losses(model, asked, self.budget_tokens))
        return [
            [
                ChoiceLikelihood(text=text, log_likelihood=-loss, tokens=tokens)
                for text, (loss, tokens) in zip(options, losses, strict=False)  # as many as there are options
            ]
            for options in texts
        ]

    def _answers(self, model: PreTrainedModel, who: Who, name: str, prompt_ids: list[list[int]]) -> tuple[list[str], list[bool]]:
        """The answer to every prompt, and whether it ended by itself."""
        given = self.kept.take_up(f"{name}-{who}", prompt_ids)
        left = [n for n in range(len(prompt_ids)) if n not in given]
        if given:
            self.run.tell("note", stage="evaluate", words=f"{len(given)} answers of the {who} model to {name} are there already")
        for answer in greedy(
            model,
            [prompt_ids[n] for n in left],
            stop_ids=self.stop_ids,
            max_new_tokens=self.recipe.evaluate.max_new_tokens,
            tell=lambda words: self.run.tell("note", stage="evaluate", words=words),
        ):
            text = str(self.tokenizer.decode(answer.ids, skip_special_tokens=True))
            given[left[answer.prompt]] = text, answer.stopped
            self.kept.add(f"{name}-{who}", left[answer.prompt], text, stopped=answer.stopped)
            self.run.show("answered", who=who, test=name, done=len(given), total=len(prompt_ids))
        return [given[n][0] for n in range(len(prompt_ids))], [given[n][1] for n in range(len(prompt_ids))]

    def _prompt(self, item: TestItem, who: Who) -> str:
        if item.messages is None:
            return _with_instructions(item.prompt or "", self._instructions(who))
        return self.renderer.prompt(_instructed(item.messages, self._instructions(who)), tools=item.tools)

    def _prompt_ids(self, item: TestItem, who: Who) -> list[int]:
        if item.messages is None:
            return self.renderer.text_ids(self._prompt(item, who))
        return self.renderer.prompt_ids(_instructed(item.messages, self._instructions(who)), tools=item.tools)

    def _instructions(self, who: Who) -> str | None:
        return self.recipe.evaluate.base_instructions if who == "base" else None


def _instructed(messages: list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation with instructions in its last user turn: every template takes a user turn."""
    if not instructions:
        return messages
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        return messages
    changed = {**messages[last], "content": _with_instructions(messages[last]["content"], instructions)}
    return [*messages[:last], changed, *messages[last + 1 :]]


def _with_instructions(prompt: str, instructions: str | None) -> str:
    if not instructions:
        return prompt
    return instructions.replace("{prompt}", prompt) if "{prompt}" in instructions else f"{instructions}\n\n{prompt}"
