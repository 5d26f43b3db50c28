"""Run folder -> Report: every record read once, and what follows from the records by rules that the page states.

Promises: a report holds what stands in the run folder and nothing more (a stage without a record is None); the verdict
and the choice of sample answers are pure functions of the records, so that the same folder gives the same report. It
measures nothing itself: scores, intervals and proofs are those that the stages wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from fullrank import loading
from fullrank.errors import UsageError
from fullrank.recipe import Recipe
from fullrank.records import DataCard, EvaluationCard, Forgotten, Plan, Prediction, Score, StepRow, TestScores, TrainCard
from fullrank.report import data_page
from fullrank.report.data_page import DataPage
from fullrank.run import Run, need_record, read_json_lines, read_record
from fullrank.units import plural

RowType = TypeVar("RowType", bound=BaseModel)
Outcome = Literal["better", "unclear", "worse"]
SampleKind = Literal["worse", "wrong", "improved", "unchanged"]

#: Scores that are better when smaller; every task of a recipe is better when larger.
LOWER_IS_BETTER = ("validation_loss", "perplexity")

#: Fewest test items for a claim. The coverage of the intervals is measured from 60 items on; below some thirty, bootstrap
#: and normal theory both mislead (Hesterberg 2015, "What Teachers Should Know About the Bootstrap").
ITEMS_FOR_A_CLAIM = 30

_METRIC_NAMES = {
    "exact_match": "Exact match",
    "f1": "F1",
    "f1_micro": "F1 (micro)",
    "f1_macro": "F1 (macro)",
    "rouge_l": "ROUGE-L",
    "numeric": "Right number",
    "bleu": "BLEU",
    "chrf": "chrF",
    "json_valid": "Valid JSON",
    "json_fields": "JSON fields",
    "json_fields_whole": "JSON as a whole",
    "choice": "Right choice (per byte)",
    "choice_per_token": "Right choice (per token)",
    "validation_loss": "Validation loss",
    "perplexity": "Perplexity",
}


@dataclass(frozen=True)
class Export:
    """The exported model folder."""

    folder: Path
    files: int
    bytes: int


@dataclass(frozen=True)
class Item:
    """One test item as both models answered it; `base` is None where the base model's answer is not on record."""

    base: Prediction | None
    tuned: Prediction


@dataclass(frozen=True)
class Sample:
    """A test item chosen for reading, and why."""

    kind: SampleKind
    item: Item


@dataclass(frozen=True)
class SampleSet:
    """The answers of one test set that are shown, with counts over all of them by the score `metric`."""

    test: str
    metric: str
    items: int
    improved: int
    unchanged: int
    worse: int
    wrong: int
    """Items on which the tuned model scores below 1."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Rule:
    """One condition of a claim, with what the records say about it."""

    text: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Verdict:
    """What may be said about the run, by the rules listed in it."""

    outcome: Outcome | Literal["unmeasured"]
    headline: str
    sentence: str
    test: str | None
    metric: str | None
    claimable: bool
    rules: tuple[Rule, ...]
    cautions: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Everything the page and the model card print."""

    root: Path
    recipe: Recipe
    recipe_text: str
    environment: dict[str, str]
    plan: Plan | None
    data: DataCard | None
    data_page: DataPage | None
    """What the data page prints; None where there is no data card."""
    train: TrainCard
    steps: tuple[StepRow, ...]
    """One row a step, ascending."""
    evaluation: EvaluationCard | None
    samples: tuple[SampleSet, ...]
    export: Export | None
    verdict: Verdict

    @property
    def tests(self) -> dict[str, TestScores]:
        """Scores by test set, the primary one first."""
        if self.evaluation is None:
            return {}
        primary = self.evaluation.primary
        return dict(sorted(self.evaluation.tests.items(), key=lambda entry: entry[0] != primary))

    @property
    def measured_peak_bytes(self) -> int:
        """Measured peak memory of training on the device that the plan speaks of."""
        return self.train.peak_bytes if self.train.device_peak_bytes is None else self.train.device_peak_bytes


def gather(run: Run) -> Report:
    """Reads a run folder.

    Raises:
        UsageError: there is no training record, or a row of a record file cannot be read.
        RecipeError: the saved recipe is not there or not valid.
    """
    train = need_record(run.train / "card.json", TrainCard, "train")
    recipe = loading.load(run.recipe_path, need_files=False).recipe
    prepared = data_page.read(run, recipe.data.audit.accept)
    evaluation = read_record(run.evaluate / "card.json", EvaluationCard)
    samples = []
    for test in _tests_in_order(evaluation):
        metric_keys = [task.key for task in recipe.evaluate.tasks]
        chosen = pick_samples(test, _items(run, test), metric_keys)
        if chosen is not None:
            samples.append(chosen)
    return Report(
        root=run.root,
        recipe=recipe,
        recipe_text=run.recipe_path.read_text(encoding="utf-8"),
        environment=_environment(run.environment_path),
        plan=read_record(run.plan_path, Plan),
        data=prepared.card if prepared else None,
        data_page=prepared,
        train=train,
        steps=_steps(run.train / "steps.jsonl"),
        evaluation=evaluation,
        samples=tuple(samples),
        export=_export(run.model),
        verdict=judge(recipe, train, evaluation),
    )


# ---- reading --------------------------------------------------------------------------------------------------------


def _environment(path: Path) -> dict[str, str]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return {str(key): str(value) for key, value in facts.items()} if isinstance(facts, dict) else {}


def _rows(path: Path, row_type: type[RowType]) -> list[RowType]:
    rows = []
    for number, facts in enumerate(read_json_lines(path), start=1):
        try:
            rows.append(row_type.model_validate(facts))
        except ValidationError as error:
            raise UsageError(
                f"{path}: row {number} is not a {row_type.__name__}: {error.errors()[0]['msg']}",
                hint="another version of fullrank wrote it; run its stage again",
            ) from error
    return rows


def _steps(path: Path) -> tuple[StepRow, ...]:
    # A resumed run repeats the steps after its checkpoint; the last row is the one whose weights went on.
    by_step = {row.step: row for row in _rows(path, StepRow)}
    return tuple(by_step[step] for step in sorted(by_step))


def _tests_in_order(evaluation: EvaluationCard | None) -> list[str]:
    return [] if evaluation is None else sorted(evaluation.tests, key=lambda test: test != evaluation.primary)


def _items(run: Run, test: str) -> list[Item]:
    def of(model: str) -> list[Prediction]:
        return _rows(run.evaluate / f"predictions-{test}-{model}.jsonl", Prediction)

    base = {(prediction.id, prediction.reference): prediction for prediction in of("base")}
    return [Item(base.get((tuned.id, tuned.reference)), tuned) for tuned in of("tuned")]


def _export(folder: Path) -> Export | None:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return Export(folder, len(sizes), sum(sizes)) if sizes else None


# ---- choosing sample answers ----------------------------------------------------------------------------------------


def pick_samples(
    test: str, items: Sequence[Item], metric_keys: Sequence[str], most_wrong: int = 3, most_improved: int = 2
) -> SampleSet | None:
    """Chooses answers by rule: where the tuned model is wrong first, then its largest gains, then one unchanged.

    `metric` is the first of `metric_keys` that the items have. Wrong are items that score below 1, those where the base
    model did better first, then the lowest; where no item scores below 1 by that metric, those below 1 by any other.
    Equal items keep the order of the test file.

    Args:
        most_wrong: items shown on which the tuned model is wrong or weakest.
        most_improved: items shown on which it gained.

    Returns:
        None when there is no item with a score.
    """
    scored = [item for item in items if item.tuned.scores]
    if not scored:
        return None
    known = list(scored[0].tuned.scores)
    metric = next((key for key in metric_keys if key in known), known[0])

    def score(prediction: Prediction) -> float:
        return prediction.scores.get(metric, 0.0)

    def mean(prediction: Prediction) -> float:
        return sum(prediction.scores.values()) / len(prediction.scores)

    def gain(item: Item) -> float:
        return score(item.tuned) - score(item.base) if item.base else 0.0

    wrong = [item for item in scored if score(item.tuned) < 1.0]
    weakest = wrong or [item for item in scored if mean(item.tuned) < 1.0]
    weakest = sorted(weakest, key=lambda item: (min(gain(item), 0.0), score(item.tuned), mean(item.tuned)))[:most_wrong]
    rest = [item for item in scored if item not in weakest]
    improved = sorted((item for item in rest if gain(item) > 0), key=lambda item: (-gain(item), -mean(item.tuned)))[
        :most_improved
    ]
    unchanged = [item for item in rest if item.base and gain(item) == 0][:1]
    samples = [Sample("worse" if gain(item) < 0 else "wrong", item) for item in weakest]
    samples += [Sample("improved", item) for item in improved]
    samples += [Sample("unchanged", item) for item in unchanged]
    return SampleSet(
        test=test,
        metric=metric,
        items=len(scored),
        improved=sum(gain(item) > 0 for item in scored),
        unchanged=sum(gain(item) == 0 and item.base is not None for item in scored),
        worse=sum(gain(item) < 0 for item in scored),
        wrong=len(wrong),
        samples=tuple(samples),
    )


# ---- the verdict ----------------------------------------------------------------------------------------------------


def metric_name(key: str) -> str:
    """A score's key as people write it: `rouge_l` is ROUGE-L."""
    return _METRIC_NAMES.get(key) or key.replace("_", " ").capitalize()


def outcome_of(key: str, difference: Score) -> Outcome:
    """Whether the interval of a paired difference (tuned - base) excludes 0, and on which side."""
    low, high = (-difference.high, -difference.low) if key in LOWER_IS_BETTER else (difference.low, difference.high)
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def score_text(value: float, digits: int = 3, signed: bool = False) -> str:
    """A number with so many decimals; more where rounding would turn 0.9997 into a 1 or 0.0002 into a 0."""
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    while digits < 6 and float(text) in (0.0, 1.0, -1.0) and float(text) != value:
        digits += 1
        text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text


def interval_text(score: Score, digits: int = 3, signed: bool = False) -> str:
    """`0.912 to 0.988`: the 95 % interval in words."""
    return f"{score_text(score.low, digits, signed)} to {score_text(score.high, digits, signed)}"


def p_text(p_value: float) -> str:
    """`p = 0.023`; `p < 0.001` where it is smaller than three decimals show."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def headline_key(recipe: Recipe, scores: TestScores) -> str | None:
    """The score that heads a test set: the recipe's first task, or the first score that both models have."""
    keys = [task.key for task in recipe.evaluate.tasks] + list(scores.difference)
    return next((key for key in keys if key in scores.difference and key in scores.base and key in scores.tuned), None)


def judge(recipe: Recipe, train: TrainCard, evaluation: EvaluationCard | None) -> Verdict:
    """The verdict and the rules it follows.

    The headline score is fixed by the recipe before training (its first task on its first test set), so one comparison
    is made and needs no correction for having looked at many.
    """
    training_rules = _training_rules(train)
    scores = evaluation.tests.get(evaluation.primary) if evaluation else None
    key = headline_key(recipe, scores) if scores else None
    if evaluation is None or scores is None or key is None:
        return Verdict(
            outcome="unmeasured",
            headline="Trained, not yet measured on a task.",
            sentence="No score of the base and the tuned model on the same items is on record, so none is claimed.",
            test=None,
            metric=None,
            claimable=False,
            rules=(Rule("Base and tuned model were scored on the same items", "no record", False), *training_rules),
            cautions=(),
        )
    name, difference = metric_name(key), scores.difference[key]
    outcome = outcome_of(key, difference)
    before, after = score_text(scores.base[key].value, 2), score_text(scores.tuned[key].value, 2)
    went = {True: "rose", False: "fell"}[difference.value > 0] if difference.value else "stayed"
    does = "predicts the validation data" if key in LOWER_IS_BETTER else "does the task"
    headline = {
        "better": f"The tuned model {does} better.",
        "unclear": "No significant difference between the base and the tuned model.",
        "worse": f"The tuned model {does} worse.",
    }[outcome]
    moved = f"{name} {went} at {after}" if went == "stayed" else f"{name} {went} from {before} to {after}"
    rules = (
        Rule(
            f"{name} {'fell' if key in LOWER_IS_BETTER else 'rose'}, and the 95 % interval of the paired difference excludes 0",
            f"{score_text(difference.value, signed=True)}, interval {interval_text(difference, signed=True)}, "
            f"{p_text(scores.p_value[key])}",
            outcome == "better",
        ),
        Rule(
            f"At least {ITEMS_FOR_A_CLAIM} test items (with fewer, an interval hangs on what one or two items show)",
            plural(scores.examples, "item"),
            scores.examples >= ITEMS_FOR_A_CLAIM,
        ),
        Rule(
            "The items are test data, not the validation data that chose the exported weights",
            _set_name(evaluation.primary),
            evaluation.primary != "validation",
        ),
        *training_rules,
    )
    return Verdict(
        outcome=outcome,
        headline=headline,
        sentence=f"{moved} on {plural(scores.examples, 'item')} of the {_set_name(evaluation.primary)}.",
        test=evaluation.primary,
        metric=key,
        claimable=all(rule.holds for rule in rules),
        rules=rules,
        cautions=tuple(_cautions(evaluation, key)),
    )


def _set_name(test: str) -> str:
    return "validation data" if test == "validation" else "test set" if test == "test" else f"test set “{test}”"


def _training_rules(train: TrainCard) -> tuple[Rule, ...]:
    proof = train.proof
    reached = proof.trainable_tensors - len(proof.never_reached_tensors)
    never = f", {len(proof.never_reached_tensors)} never reached by a gradient" if proof.never_reached_tensors else ""
    if proof.unmoved_tensors:
        never += f", {len(proof.unmoved_tensors)} left where they were by rounding to 16 bits"
    export_holds = proof.export_is_the_model and proof.export_keys_equal and proof.ties_kept and proof.tokenizer_travels
    return (
        Rule(
            "The validation loss of the exported weights is below the base model's",
            f"{train.validation_loss_before:.4g} before, {train.validation_loss_best:.4g} after",
            train.validation_loss_best < train.validation_loss_before,
        ),
        Rule(
            "Every trainable tensor that a gradient reached has changed in training",
            f"{proof.changed_tensors:,} of {proof.trainable_tensors:,}{never}",
            proof.changed_tensors >= reached,
        ),
        Rule(
            "The export, reloaded in a fresh process, is the trained model",
            f"same {'weights' if proof.export_logits_identical is None else 'logits'}, tensor names and ties"
            if export_holds
            else "it differs; see the proof table",
            export_holds,
        ),
    )


def _cautions(evaluation: EvaluationCard, headline: str) -> list[str]:
    """What a reader should know before repeating the headline; each follows from a record."""
    words = []
    for test, scores in evaluation.tests.items():
        for key, difference in scores.difference.items():
            if outcome_of(key, difference) == "worse" and (test, key) != (evaluation.primary, headline):
                words.append(
                    f"{metric_name(key)} on the {_set_name(test)} became worse: "
                    f"{score_text(difference.value, signed=True)} "
                    f"(95 % interval {interval_text(difference, signed=True)})."
                )
        stopped = scores.stopped_ratio.get("tuned", 1.0)
        if stopped < 1.0:
            words.append(
                f"On the {_set_name(test)} the tuned model ran into the limit of {evaluation.max_new_tokens} new "
                "tokens in "
                f"{plural(round((1 - stopped) * scores.examples), 'answer')} of {scores.examples:,}; such answers "
                "are scored as cut."
            )
    if evaluation.primary == "validation":
        words.append("No test data were named in the recipe (data.test): validation data also chose the exported weights.")
    elif not evaluation.base_was_instructed:
        words.append(
            "The base model was given the bare prompt, without instructions: part of the difference is knowing what "
            "is asked, "
            "not being able to do it. evaluate.base_instructions in the recipe asks it fairly."
        )
    if evaluation.forgotten is None:
        words.append("What the model forgot outside this task was not measured in this run.")
    else:
        words += _forgotten(evaluation.forgotten)
    return words


def _forgotten(forgotten: Forgotten) -> list[str]:
    """What was found of forgetting, a sentence each."""
    kl, everything = forgotten.own_text.kl, forgotten.probe["all"]
    likelier = math.exp(-forgotten.own_text.loss_difference.value)
    changed = outcome_of("accuracy", everything.difference)
    what = {"worse": "fewer", "better": "more", "unclear": "about as many"}[changed]
    return [
        f"On text that the base model writes by itself, its predictions are {score_text(kl.value)} nats a token from the base's "
        f"(95 % interval {interval_text(kl)}); a token there has become {likelier:.2f} times as likely.",
        f"Of {everything.questions:,} general questions it answers {what} right: {score_text(everything.base.value)} before, "
        f"{score_text(everything.tuned.value)} after (difference {score_text(everything.difference.value, signed=True)}, 95 % "
        f"interval {interval_text(everything.difference, signed=True)}). What neither touches was not measured.",
    ]
