"""A tiny run's training: what it leaves, what it refuses, and how it goes on after a stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from staging import Staged, fresh_here, leftovers, staged, write_case
from tiny import chat_rows, write_jsonl

from fullrank.errors import ProofError, Stopped, TrainingError, UsageError
from fullrank.models import export
from fullrank.models import rows as rows_of_models
from fullrank.models.load import load_model
from fullrank.parallel.single import SingleDevice
from fullrank.plan import speed
from fullrank.records import Rehearsal, StepRow
from fullrank.run import read_json_lines, read_record, verify_manifest
from fullrank.sequences.order import Order
from fullrank.train import setup
from fullrank.train import stage as train_stage

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timing of blocks, and the export's fresh load in this process: starting another one takes seconds."""
    monkeypatch.setattr(export, "fresh_process", fresh_here)
    monkeypatch.setattr(speed, "measure", lambda *arguments, **options: None)


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    return write_case(tmp_path, tiny_model_folder("llama"))  # 16 examples, 4 a step, 2 epochs: 8 steps


def ready(case: Path, *overrides: str, runs: str = "runs") -> Staged:
    run = staged(case, overrides, runs=case.parent / runs)
    run.data()
    run.plan()
    return run


def weights(run: Staged) -> bytes:
    return (run.run.model / "model.safetensors").read_bytes()


def on(run: Staged, event: str, action: Callable[[dict[str, Any]], None]) -> None:
    """Does something when the run tells an event, after it was written down."""
    earlier = run.run.listener
    assert earlier is not None

    def listener(told: str, facts: dict[str, Any]) -> None:
        earlier(told, facts)
        if told == event:
            action(facts)

    run.run.listener = listener


def stop_at(run: Staged, step: int) -> None:
    on(run, "step", lambda facts: os.kill(os.getpid(), signal.SIGTERM) if facts["row"].step == step else None)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that training loads: the one it trains."""
    loaded: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        loaded.append(load_model(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(setup, "load_model", load)
    return loaded


# ---- a run to its end -----------------------------------------------------------------------------------------------


def test_a_whole_run_and_its_records(case: Path) -> None:
    run = ready(case)
    card = run.train()
    rows = [StepRow.model_validate(line) for line in read_json_lines(run.run.train / "steps.jsonl")]
    assert [row.step for row in rows] == list(range(1, 9))
    assert [row.step for row in rows if row.validation_loss is not None] == [3, 6, 8]
    order = Order(16, 4, 2, 0)
    ledger = read_json_lines(run.run.train / "ledger.jsonl")
    assert ledger == [{"step": s, "examples": order.step(s).tolist()} for s in range(1, 9)]
    assert (card.steps, card.steps_planned, card.stopped_early, card.examples_seen) == (8, 8, False, 32)
    assert card.tokens_seen == sum(row.tokens for row in rows)
    assert card.supervised_tokens_seen == sum(row.supervised_tokens for row in rows)
    assert card.validation_loss_best < card.validation_loss_before
    validations = run.events("validation")
    assert [facts["step"] for facts in validations] == [0, 3, 6, 8]
    assert card.validation_loss_best == min(facts["loss"] for facts in validations[1:])
    assert card.proof.changed_tensors == card.proof.trainable_tensors > 10
    assert card.proof.export_logits_identical and card.packed and card.resumed_from_steps == []
    assert verify_manifest(run.run.model) is None
    assert sorted(path.name for path in run.run.train.iterdir()) == [
        "card.json",
        "inputs.json",
        "layout.json",
        "ledger.jsonl",
        "steps.jsonl",
    ]
    assert leftovers(run.run.root) == []


def test_a_finished_run_is_used_as_it_is(case: Path) -> None:
    run = ready(case, "train.epochs=1")
    card, before = run.train(), weights(run)
    again = ready(case, "train.epochs=1")
    assert again.train() == card and again.reused("train") and weights(again) == before


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "gemma3"])
def test_other_families_train_and_prove(family: str, tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    case = write_case(tmp_path, tiny_model_folder(family), rows=8, train={"epochs": 1})
    proof = ready(case).train().proof
    assert proof.changed_tensors == proof.trainable_tensors and proof.export_keys_equal and proof.ties_kept


# ---- the proof ------------------------------------------------------------------------------------------------------

NORM = "model.layers.1.input_layernorm.weight"


def test_a_tensor_that_no_gradient_reaches_is_listed(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an expert that is never routed to: its gradient is zero in every step."""

    def load(*arguments: Any, **options: Any) -> Any:
        model = load_model(*arguments, **options)
        model.get_parameter(NORM).register_hook(torch.zeros_like)
        return model

    monkeypatch.setattr(setup, "load_model", load)
    proof = ready(case, "train.epochs=1").train().proof
    assert proof.never_reached_tensors == [NORM]
    assert proof.changed_tensors == proof.trainable_tensors - 1


def test_a_tensor_with_gradients_that_did_not_move_is_an_error(case: Path, models: list[Any]) -> None:
    run = ready(case, "train.epochs=1")
    base = load_model(run.base.folder, device=CPU).get_parameter(NORM).detach()
    on(run, "step", lambda facts: models[0].get_parameter(NORM).data.copy_(base))
    with pytest.raises(ProofError, match=NORM):
        run.train()
    assert not run.run.model.exists() and leftovers(run.run.root) == []


def test_an_export_that_differs_is_not_put_under_its_name(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready(case, "train.epochs=1")
    monkeypatch.setattr(export, "fresh_process", lambda *arguments: replace(fresh_here(*arguments), logits_1TV=torch.zeros(1)))
    with pytest.raises(ProofError, match="other logits"):
        run.train()
    assert not run.run.model.exists() and not (run.run.train / "card.json").exists() and leftovers(run.run.root) == []


# ---- early stopping -------------------------------------------------------------------------------------------------


def test_the_best_weights_are_exported_when_patience_ends(case: Path, models: list[Any]) -> None:
    # a rate at which this model soon gets worse
    run = ready(
        case,
        "train.epochs=20",
        "train.evaluate_every_steps=1",
        "train.early_stopping={patience: 3}",
        "train.optimizer.learning_rate=0.1",
        "train.schedule={name: constant, warmup_ratio: 0}",
    )
    at: dict[int, dict[str, torch.Tensor]] = {}
    losses: dict[int, float] = {}

    def remember(facts: dict[str, Any]) -> None:
        at[facts["step"]] = {name: p.detach().clone() for name, p in models[0].named_parameters()}
        losses[facts["step"]] = facts["loss"]

    on(run, "validation", remember)
    card = run.train()
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert card.stopped_early and card.best_step == best and card.steps == best + 3 < 80
    assert card.validation_loss_best == losses[best] and card.validation_loss_last == losses[card.steps]
    exported = load_file(run.run.model / "model.safetensors")
    assert exported.keys() == at[best].keys()
    assert all(torch.equal(exported[name], at[best][name]) for name in exported)


def test_without_early_stopping_the_best_weights_are_exported_all_the_same(case: Path) -> None:
    run = ready(case, "train.evaluate_every_steps=1", "train.optimizer.learning_rate=0.1", "train.epochs=4")
    card = run.train()
    assert not card.stopped_early and card.steps == 16
    assert card.validation_loss_best == min(facts["loss"] for facts in run.events("validation")[1:])


# ---- numbers that go wrong ------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_update(case: Path, models: list[Any]) -> None:
    run = ready(case)
    poisoned: dict[str, torch.Tensor] = {}

    def poison(facts: dict[str, Any]) -> None:
        if facts["row"].step == 4:
            models[0].lm_head.weight.data[3, 3] = float("nan")
            poisoned.update({name: p.detach().clone() for name, p in models[0].named_parameters()})

    on(run, "step", poison)
    with pytest.raises(TrainingError) as caught:
        run.train()
    lines = [f"{case.parent / 'train.jsonl'}:{example + 1}" for example in Order(16, 4, 2, 0).step(5)]
    assert "step 5: loss nan" in caught.value.message
    assert caught.value.message.endswith("its examples: " + ", ".join(lines))
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), poisoned[name].nan_to_num(7.0)), name
    assert [line["step"] for line in read_json_lines(run.run.train / "steps.jsonl")] == [1, 2, 3, 4]
    assert not run.run.model.exists() and leftovers(run.run.root) == []


# ---- stopping and going on ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> tuple[bytes, list[float]]:
    """Weights and losses of the same run without a stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "measure", lambda *arguments, **options: None)
        patch.setattr(train_stage.proof, "export_and_prove", _export_only)
        run = ready(write_case(tmp_path_factory.mktemp("whole"), tiny_model_folder("llama")))
        with pytest.raises(_Exported):
            run.train()
        return _export_only.weights, run.losses()


class _Exported(Exception):
    pass


def _export_only(model: Any, tokenizer: Any, *rest: Any, folder: Path, **options: Any) -> None:
    model.save_pretrained(folder)
    _export_only.weights = (folder / "model.safetensors").read_bytes()  # type: ignore[attr-defined]
    raise _Exported


@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(
    step: int, case: Path, uninterrupted: tuple[bytes, list[float]]
) -> None:
    run = ready(case)
    stop_at(run, step)
    with pytest.raises(Stopped, match=f"stopped at step {step} of 8") as caught:
        run.train()
    assert caught.value.exit_code == 75 and not run.run.model.exists()
    assert [path.name for path in (run.run.train / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    again = ready(case)
    card = again.train()
    assert again.events("resumed") == [{"step": step, "steps": 8}]
    assert card.resumed_from_steps == [step] and card.examples_seen == 32
    assert (weights(again), again.losses()) == uninterrupted
    assert [line["step"] for line in read_json_lines(again.run.train / "steps.jsonl")] == list(range(1, 9))
    assert [line["step"] for line in read_json_lines(again.run.train / "ledger.jsonl")] == list(range(1, 9))


#: Ways of little memory: each keeps its state elsewhere, in other types, or updates within the backward pass.
LITTLE_MEMORY = {
    "spilled, states on disk": ("machine.gradients=spill", "machine.optimizer_states=disk"),
    "int8, released": ("train.optimizer={name: adamw, moments: int8}", "machine.gradients=release"),
    "bf16-stochastic, int8": ("train.precision=bf16-stochastic", "train.optimizer={name: adamw, moments: int8}"),
    "bf16-kahan": ("train.precision=bf16-kahan",),
    "adalomo, bf16-stochastic": ("train.precision=bf16-stochastic", "train.optimizer={name: adalomo}"),
    "lomo, bf16-nearest": ("train.precision=bf16-nearest", "train.optimizer={name: lomo}"),
    "muon": ("train.optimizer={name: muon, learning_rate: 0.003}",),
    "adafactor": ("train.optimizer={name: adafactor}",),
}


@pytest.mark.parametrize("way", LITTLE_MEMORY)
def test_a_stopped_run_of_little_memory_goes_on_and_ends_with_the_same_weights(way: str, case: Path) -> None:
    overrides = LITTLE_MEMORY[way]
    whole = ready(case, *overrides, runs="whole")
    whole.train()
    run = ready(case, *overrides)
    stop_at(run, 5)
    with pytest.raises(Stopped, match="stopped at step 5 of 8"):
        run.train()
    again = ready(case, *overrides)
    assert again.train().resumed_from_steps == [5]
    assert (weights(again), again.losses()) == (weights(whole), whole.losses())


def test_steps_after_the_checkpoint_are_done_again_and_told_once(
    case: Path, uninterrupted: tuple[bytes, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash at step 6 whose newest checkpoint is of step 5, with a torn last line."""
    monkeypatch.setattr(train_stage, "_SHORTEST_GAP_SECONDS", 0.0)
    monkeypatch.setattr(train_stage, "_SAVING_SHARE", 1e9)
    run = ready(case)

    def crash(facts: dict[str, Any]) -> None:
        if facts["row"].step == 6:
            raise RuntimeError("the machine went down")

    on(run, "step", crash)
    with pytest.raises(RuntimeError):
        run.train()
    with (run.run.train / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')
    again = ready(case)
    assert again.train().resumed_from_steps == [5]
    assert (weights(again), again.losses()) == uninterrupted


def test_a_damaged_checkpoint_is_told_and_the_run_begins_anew(case: Path, uninterrupted: tuple[bytes, list[float]]) -> None:
    run = ready(case)
    stop_at(run, 4)
    with pytest.raises(Stopped):
        run.train()
    moments = run.run.train / "checkpoints" / "step-00000004" / "exp_avg.safetensors"
    raw = bytearray(moments.read_bytes())
    raw[-1] ^= 1
    moments.write_bytes(raw)
    again = ready(case)
    card = again.train()
    assert [f["words"] for f in again.events("note") if "exp_avg.safetensors differs from its manifest" in f["words"]]
    assert again.events("resumed") == [] and card.resumed_from_steps == []
    assert (weights(again), again.losses()) == uninterrupted


def test_patience_that_ended_is_remembered(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ("train.evaluate_every_steps=1", "train.early_stopping={patience: 2}", "train.optimizer.learning_rate=0.5")
    run = ready(case, *changes, "train.epochs=10")
    card = run.train()
    whole = weights(run)
    assert card.stopped_early
    broken = ready(case, *changes, "train.epochs=10", runs="other")
    stop_at(broken, card.steps - 1)
    with pytest.raises(Stopped):
        broken.train()
    again = ready(case, *changes, "train.epochs=10", runs="other")
    resumed = again.train()
    assert (resumed.steps, resumed.best_step) == (card.steps, card.best_step) and weights(again) == whole


def test_another_recipe_is_refused_with_what_differs(case: Path) -> None:
    run = ready(case)
    stop_at(run, 2)
    with pytest.raises(Stopped):
        run.train()
    other = staged(case, ["train.epochs=3", "train.optimizer.learning_rate=1e-5"])
    other.plan()
    with pytest.raises(UsageError) as caught:
        other.train()
    assert caught.value.message.splitlines()[1:] == [
        "train.epochs: 2.0 then, 3.0 now",
        "train.optimizer.learning_rate: 0.003 then, 1e-05 now",
    ]
    assert "`name`" in caught.value.hint
    assert (run.run.train / "checkpoints" / "step-00000002").is_dir()


def test_micro_batches_and_recomputation_may_change_between_sittings(case: Path) -> None:
    """The plan is no part of what is learned, so another one goes on with the same training."""
    run = ready(case)
    stop_at(run, 3)
    with pytest.raises(Stopped):
        run.train()
    plan = run.plan().model_copy(update={"micro_batch_tokens": 40, "recompute": "block"})
    run.run.plan_path.write_text(plan.model_dump_json(), encoding="utf-8")
    again = staged(case)
    assert again.train().resumed_from_steps == [3]
    laid_out = read_record(run.run.train / "layout.json", Rehearsal)
    assert laid_out is not None and (laid_out.micro_batch_tokens, laid_out.recompute) == (40, "block")


def test_without_a_plan_the_verb_to_type_is_named(case: Path) -> None:
    run = staged(case)
    run.data()
    with pytest.raises(UsageError) as caught:
        run.train()
    assert "fullrank plan" in caught.value.hint


def test_a_model_that_mixes_packed_examples_gets_rows_of_one(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_of_models, "_trial", lambda rows: (False, False, "this model mixes them: one example a row"))
    rows: list[int] = []
    real = SingleDevice.step

    def step(engine: Any, micro_batches: Any, *rest: Any, **options: Any) -> Any:
        given = list(micro_batches)
        if options["learning_rate"]:  # not the rehearsal's
            rows.extend(len(row.examples) for row in given)
        return real(engine, given, *rest, **options)

    monkeypatch.setattr(SingleDevice, "step", step)
    run = ready(case, "train.epochs=1")
    card = run.train()
    assert not card.packed and set(rows) == {1} and len(rows) == 16
    assert "one example a row" in card.layout_note
    assert any(facts["words"] == card.layout_note for facts in run.events("note"))


def test_data_that_changed_under_a_begun_run_are_refused(case: Path) -> None:
    run = ready(case)
    stop_at(run, 2)
    with pytest.raises(Stopped):
        run.train()
    write_jsonl(case.parent / "train.jsonl", chat_rows(12))
    with pytest.raises(UsageError, match="have changed since"):
        staged(case).data()
