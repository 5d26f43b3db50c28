"""gather: what the folder holds comes back, once; the verdict and the sample answers follow their stated rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fullrank.errors import RecipeError, UsageError
from fullrank.recipe import Recipe
from fullrank.records import EvaluationCard, Prediction, Score, TrainCard
from fullrank.records import TestScores as ScoresOfATest
from fullrank.report import gather as room
from fullrank.run import Run, append_json_line

MakeRun = Callable[..., Run]


def test_a_complete_folder_is_read_in_full(make_run: MakeRun) -> None:
    report = room.gather(make_run())
    assert report.plan and report.data and report.evaluation and report.export
    assert report.environment["torch"] == "2.13.0"
    assert [row.step for row in report.steps] == list(range(1, report.train.steps + 1))
    assert list(report.tests) == ["seen", "unseen_wordings"]
    assert [chosen.items for chosen in report.samples] == [80, 60]


def test_the_primary_test_set_comes_first(make_run: MakeRun) -> None:
    run = make_run()
    card = run.evaluate / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "primary": "unseen_wordings"}))
    report = room.gather(run)
    assert list(report.tests) == ["unseen_wordings", "seen"]
    assert [chosen.test for chosen in report.samples] == ["unseen_wordings", "seen"]


def test_training_alone_is_enough_and_nothing_else_is(make_run: MakeRun, tmp_path: Path) -> None:
    report = room.gather(make_run(only_training=True))
    assert (report.plan, report.data, report.evaluation, report.export) == (None, None, None, None)
    assert report.steps == () and report.samples == () and report.environment == {}
    with pytest.raises(UsageError, match=r"train.card\.json"):
        room.gather(Run(tmp_path / "empty"))


def test_the_last_row_of_a_step_wins(make_run: MakeRun) -> None:
    run = make_run()
    repeated = room.gather(run).steps[39]
    append_json_line(run.train / "steps.jsonl", {**repeated.model_dump(), "loss": 7.5})
    steps = room.gather(run).steps
    assert len(steps) == 90
    assert steps[39].step == 40 and steps[39].loss == 7.5


def test_a_row_of_another_form_is_refused_by_file_and_number(make_run: MakeRun) -> None:
    run = make_run()
    append_json_line(run.train / "steps.jsonl", {"step": 91})
    with pytest.raises(UsageError, match=r"steps\.jsonl: row 91 is not a StepRow"):
        room.gather(run)


def test_data_files_that_moved_away_do_not_matter(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    (tmp_path / "train.jsonl").unlink()
    assert room.gather(run).recipe.name == "prudential-directives"
    run.recipe_path.unlink()
    with pytest.raises(RecipeError, match="no such recipe"):
        room.gather(run)


# ---- the verdict ----------------------------------------------------------------------------------------------------


def evaluated(low: float, high: float, items: int = 80, key: str = "f1", value: float | None = None) -> EvaluationCard:
    """An evaluation with one score whose paired difference has the interval given."""
    middle = (low + high) / 2 if value is None else value
    scores = ScoresOfATest(
        examples=items,
        base={key: Score(value=0.5, low=0.4, high=0.6)},
        tuned={key: Score(value=0.5 + middle, low=0.45 + middle, high=0.55 + middle)},
        difference={key: Score(value=middle, low=low, high=high)},
        p_value={key: 0.03},
        stopped_ratio={"base": 1.0, "tuned": 1.0},
    )
    return EvaluationCard(
        fingerprint="0",
        seconds=1,
        peak_bytes=1,
        primary="seen",
        tests={"seen": scores},
        max_new_tokens=64,
        base_was_instructed=True,
    )


@pytest.mark.parametrize(
    ("low", "high", "outcome", "claimable"),
    [
        (0.01, 0.3, "better", True),
        (0.0, 0.3, "unclear", False),
        (-0.05, 0.3, "unclear", False),
        (-0.3, -0.01, "worse", False),
    ],
)
def test_the_interval_of_the_difference_decides(
    recipe: Recipe, a_train_card: TrainCard, low: float, high: float, outcome: str, claimable: bool
) -> None:
    verdict = room.judge(recipe, a_train_card, evaluated(low, high))
    assert (verdict.outcome, verdict.claimable) == (outcome, claimable)
    assert verdict.sentence.startswith("F1 rose from 0.50" if low + high > 0 else "F1 fell from 0.50")


def test_a_falling_loss_is_better(recipe: Recipe, a_train_card: TrainCard) -> None:
    verdict = room.judge(recipe, a_train_card, evaluated(-0.3, -0.1, key="validation_loss"))
    assert verdict.outcome == "better" and verdict.sentence.startswith("Validation loss fell")


def test_few_items_are_not_enough_for_a_claim(recipe: Recipe, a_train_card: TrainCard) -> None:
    verdict = room.judge(recipe, a_train_card, evaluated(0.2, 0.4, items=room.ITEMS_FOR_A_CLAIM - 1))
    assert verdict.outcome == "better" and not verdict.claimable
    assert [rule.holds for rule in verdict.rules] == [True, False, True, True, True, True]


def test_validation_data_chose_the_weights_and_cannot_carry_a_claim(recipe: Recipe, a_train_card: TrainCard) -> None:
    card = evaluated(-0.3, -0.1, key="validation_loss")
    card = card.model_copy(update={"primary": "validation", "tests": {"validation": card.tests["seen"]}})
    verdict = room.judge(recipe, a_train_card, card)
    assert verdict.outcome == "better" and verdict.headline == "The tuned model predicts the validation data better."
    assert not verdict.claimable and any("data.test" in caution for caution in verdict.cautions)


@pytest.mark.parametrize("broken", ["export_logits_identical", "export_keys_equal", "ties_kept", "tokenizer_travels"])
def test_a_failed_proof_forbids_the_claim(recipe: Recipe, a_train_card: TrainCard, broken: str) -> None:
    proof = a_train_card.proof.model_copy(update={broken: False})
    assert not room.judge(recipe, a_train_card.model_copy(update={"proof": proof}), evaluated(0.2, 0.4)).claimable


def test_unreached_tensors_are_allowed_and_named_unchanged_ones_are_not(recipe: Recipe, a_train_card: TrainCard) -> None:
    unreached = a_train_card.proof.model_copy(update={"changed_tensors": 271, "never_reached_tensors": ["expert.7"]})
    verdict = room.judge(recipe, a_train_card.model_copy(update={"proof": unreached}), evaluated(0.2, 0.4))
    assert verdict.claimable and any("1 never reached" in rule.found for rule in verdict.rules)
    unchanged = a_train_card.proof.model_copy(update={"changed_tensors": 271})
    assert not room.judge(recipe, a_train_card.model_copy(update={"proof": unchanged}), evaluated(0.2, 0.4)).claimable


def test_without_an_evaluation_nothing_is_claimed(recipe: Recipe, a_train_card: TrainCard) -> None:
    verdict = room.judge(recipe, a_train_card, None)
    assert verdict.outcome == "unmeasured" and not verdict.claimable


def test_cautions_follow_from_the_records(recipe: Recipe, a_train_card: TrainCard) -> None:
    card = evaluated(0.2, 0.4)
    worse = evaluated(-0.4, -0.2).tests["seen"].model_copy(update={"stopped_ratio": {"tuned": 0.95}})
    card = card.model_copy(update={"tests": {**card.tests, "unseen": worse}, "base_was_instructed": False})
    words = " ".join(room.judge(recipe, a_train_card, card).cautions)
    assert "F1 on the test set “unseen” became worse: -0.300" in words
    assert "4 answers of 80" in words and "64 new tokens" in words
    assert "bare prompt" in words
    assert "became worse" not in " ".join(room.judge(recipe, a_train_card, evaluated(0.2, 0.4)).cautions)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_a_p_value_is_never_shown_as_zero() -> None:
    assert room.p_text(0.0001) == "p < 0.001"
    assert (room.p_text(0.001), room.p_text(0.0384), room.p_text(1.0)) == ("p = 0.001", "p = 0.038", "p = 1.000")


def test_rounding_never_makes_a_score_perfect() -> None:
    assert room.score_text(0.9997) == "0.9997"
    assert room.score_text(0.0002, 2) == "0.0002"
    assert room.score_text(1.0) == "1.000" and room.score_text(0.0, 2) == "0.00"
    assert room.score_text(0.25, 2, signed=True) == "+0.25"


# ---- samples --------------------------------------------------------------------------------------------------------


def items(*scores: tuple[float, float]) -> list[room.Item]:
    def answer(number: int, value: float) -> Prediction:
        return Prediction(
            id=str(number), prompt="p", reference="r", answer="a", stopped=True, scores={"rouge_l": 0.5, "f1": value}
        )

    return [room.Item(answer(n, before), answer(n, after)) for n, (before, after) in enumerate(scores)]


def chosen(*scores: tuple[float, float]) -> list[tuple[str, str]]:
    found = room.pick_samples("seen", items(*scores), ["f1", "rouge_l"])
    assert found is not None and found.metric == "f1"
    return [(sample.kind, sample.item.tuned.id) for sample in found.samples]


def test_failures_of_the_tuned_model_come_first_and_regressions_before_them() -> None:
    assert chosen((0, 1), (0, 0.5), (1, 0.4), (1, 1), (0, 0.1)) == [
        ("worse", "2"),
        ("wrong", "4"),
        ("wrong", "1"),
        ("improved", "0"),
        ("unchanged", "3"),
    ]


def test_one_failure_among_many_successes_is_shown() -> None:
    assert chosen(*[(0.0, 1.0)] * 40, (0.0, 0.9)) == [("wrong", "40"), ("improved", "0"), ("improved", "1")]


def test_counts_cover_every_item() -> None:
    found = room.pick_samples("seen", items((0, 1), (1, 0.5), (1, 1), (0, 0.5), (0, 0)), ["f1"])
    assert found is not None
    assert (found.items, found.improved, found.unchanged, found.worse, found.wrong) == (5, 2, 2, 1, 3)


def test_items_of_a_validation_set_without_scores_give_no_samples() -> None:
    assert room.pick_samples("validation", [], ["f1"]) is None
