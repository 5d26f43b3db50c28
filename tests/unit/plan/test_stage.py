"""The plan of a tiny run: what it counts, when it is kept, how it makes itself fit, and what it refuses."""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from staging import Staged, staged, write_case
from tiny import write_jsonl

from fullrank.errors import FitError, UsageError
from fullrank.parallel.world import World
from fullrank.plan import clock
from fullrank.plan import stage as plan_stage
from fullrank.plan.speed import Speed
from fullrank.records import Plan
from fullrank.run import read_record
from fullrank.sequences.layout import micro_batches
from fullrank.sequences.order import Order
from fullrank.sequences.store import TokenStore

Usage = namedtuple("Usage", "total used free")
PROCESS = 5_000_000


SPEED = Speed(forward_per_token=1e-3, forward_backward_per_token=3e-3, optimizer_step=0.5, basis="a stated speed")


@pytest.fixture(autouse=True)
def _a_process_and_a_speed_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_stage, "resident_bytes", lambda: PROCESS)
    monkeypatch.setattr(clock.speed, "measure", lambda *arguments, **options: SPEED)


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    return write_case(tmp_path, tiny_model_folder("llama"), rows=22, train={"epochs": 2.5, "global_batch_size": 4})


def planned(case: Path, *overrides: str) -> tuple[Staged, Plan]:
    run = staged(case, overrides)
    run.data()
    return run, run.plan()


def peak(plan: Plan) -> int:
    return sum(line.bytes for line in plan.ledger)


def test_steps_and_tokens_are_those_that_training_takes(case: Path) -> None:
    run, plan = planned(case)
    order = Order(22, 4, 2.5, run.recipe.train.seed)
    assert (plan.examples, plan.steps, plan.steps_per_epoch) == (22, order.steps, 6)
    assert plan.steps == 2 * 6 + math.ceil(0.5 * 22 / 4)
    assert plan.warmup_steps == math.ceil(0.05 * plan.steps)
    store = TokenStore(run.run.data / "train")
    rows = [row for s in range(1, order.steps + 1) for row in micro_batches(store, order.step(s), 512, packed=True)]
    assert plan.train_tokens == sum(row.separate_tokens for row in rows)
    assert plan.shared_ratio == pytest.approx(1 - sum(row.tokens for row in rows) / plan.train_tokens) and plan.shared_ratio > 0.1
    validations = 1 + math.ceil(order.steps / 3)
    held = int(TokenStore(run.run.data / "validation").lengths.sum())
    by_hand = sum(row.tokens for row in rows) * 3e-3 + order.steps * 0.5 + validations * held * 1e-3
    assert plan.train_seconds_predicted == pytest.approx(by_hand) and plan.seconds_basis == "a stated speed"
    assert plan.fits and plan.recompute == "none"


def test_the_ledger_is_of_the_largest_row_and_of_this_model(case: Path) -> None:
    run, plan = planned(case)
    facts, n = run.base.facts, run.base.facts.parameters
    parts = {line.part: line.bytes for line in plan.ledger}
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * n, 4 * n, 8 * n)
    assert parts["process"] == PROCESS
    assert plan.peak_bytes_predicted == peak(plan)
    store, order = TokenStore(run.run.data / "train"), Order(22, 4, 2.5, 0)
    largest = max(
        row.tokens
        for s in range(1, order.steps + 1)
        for row in micro_batches(store, order.step(s), plan.micro_batch_tokens, packed=True)
    )
    widths = 4 * facts.hidden_size + 2 * (facts.heads + facts.key_value_heads) * facts.head_dim + 3 * facts.intermediate_size
    assert parts["activations"] == facts.layers * largest * widths * 4


def test_the_disk_holds_two_checkpoints_the_best_weights_and_the_export(case: Path) -> None:
    run, plan = planned(case)
    assert plan.disk_bytes_predicted == run.base.facts.parameters * (2 * 12 + 3 * 4 + 4)
    _, half = planned(case, "export.dtype=bf16", "name=half")
    assert half.disk_bytes_predicted == run.base.facts.parameters * (2 * 12 + 3 * 4 + 2)


def test_the_plan_made_before_is_kept_to_the_byte(case: Path) -> None:
    run, plan = planned(case)
    written = run.run.plan_path.read_bytes()
    again = staged(case)
    assert again.plan() == plan
    assert again.reused("plan")
    assert run.run.plan_path.read_bytes() == written


@pytest.mark.parametrize("change", ["train.epochs=1", "train.seed=3", "machine.memory_limit=6GB", "export.dtype=bf16"])
def test_a_change_makes_another_plan(case: Path, change: str) -> None:
    _, plan = planned(case)
    again, other = planned(case, change)
    assert not again.reused("plan")
    assert other.fingerprint != plan.fingerprint


def test_scores_do_not_touch_the_plan(case: Path) -> None:
    planned(case)
    again, _ = planned(case, "evaluate.max_new_tokens=3")
    assert again.reused("plan")


def test_rows_shrink_before_blocks_are_recomputed(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    # Deep enough that a block computed again in the backward pass is less than what its like keep.
    case = write_case(tmp_path, tiny_model_folder("llama", num_hidden_layers=8), rows=22)
    run, roomy = planned(case)
    longest = int(TokenStore(run.run.data / "train").lengths.max())
    by_row = sum(line.bytes for line in roomy.ledger if line.part in ("activations", "heap", "logits"))
    seen: list[tuple[str, int]] = []
    for limit in range(peak(roomy), peak(roomy) - by_row, -by_row // 60):
        try:
            _, plan = planned(case, f"machine.memory_limit={limit}")
        except FitError:
            break
        assert peak(plan) <= limit
        seen.append((plan.recompute, plan.micro_batch_tokens))
    assert seen[0] == ("none", roomy.micro_batch_tokens)
    smaller = [n for n, (recompute, tokens) in enumerate(seen) if recompute == "none" and tokens < roomy.micro_batch_tokens]
    some, whole = ([n for n, (recompute, _) in enumerate(seen) if recompute == how] for how in ("selective", "block"))
    assert smaller and some and whole, seen
    assert max(smaller) < min(some) and max(some) < min(whole)
    assert ("none", longest) in seen  # recomputation came only after the smallest rows there are


def test_a_run_that_cannot_fit_names_the_max_length_that_does(case: Path) -> None:
    every_token = "data.loss_on=all"  # so that a shorter example has something to learn, wherever it is cut
    _, roomy = planned(case, every_token)
    by_row = sum(line.bytes for line in roomy.ledger if line.part in ("activations", "heap", "logits", "mask"))
    limit = f"machine.memory_limit={peak(roomy) - by_row + 120_000}"  # room for a few tokens, recomputed
    with pytest.raises(FitError) as caught:
        planned(case, limit, every_token)
    assert caught.value.exit_code == 4
    message = caught.value.message
    assert "does not fit" in message and "recomputed blocks" in message and "optimizer" in message
    found = re.search(r"the smallest change that fits: data\.max_length: (\d+)", message)
    assert found, message
    _, mended = planned(case, limit, every_token, f"data.max_length={found[1]}", "data.too_long=truncate")  # as the message says
    assert mended.fits


def test_weights_that_do_not_fit_name_the_memory_needed(case: Path) -> None:
    with pytest.raises(FitError) as caught:
        planned(case, f"machine.memory_limit={PROCESS + 1000}")
    message = caught.value.message
    assert "machine.memory_limit (or memory) of at least" in message and "model.source" in message
    assert "max_length:" not in message.replace("data.max_length", "max_length")


def test_a_refused_plan_is_written_down_and_not_taken_for_one_that_fits(case: Path) -> None:
    with pytest.raises(FitError) as caught:
        run, _ = planned(case, f"machine.memory_limit={PROCESS + 1000}")
    run = staged(case)
    refused = read_record(run.run.plan_path, Plan)
    assert refused is not None and not refused.fits and refused.refusal == caught.value.message
    assert refused.train_seconds_predicted == 0 and "not estimated" in refused.seconds_basis
    assert run.plan().fits


def test_a_disk_that_is_too_small_is_refused(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(FitError, match="does not fit on the disk") as caught:
        planned(case)
    assert "1 KB free" in caught.value.message and "--runs-dir" in caught.value.message


def test_without_prepared_data_the_stage_before_is_named(case: Path) -> None:
    with pytest.raises(UsageError, match=r"data.card\.json"):
        staged(case).plan()


def test_predicted_tokens_leave_out_what_follows_the_last_answer(case: Path) -> None:
    run, plan = planned(case)
    store, order = TokenStore(run.run.data / "train"), Order(22, 4, 2.5, 0)
    examples = np.concatenate([order.step(s) for s in range(1, order.steps + 1)])
    assert plan.train_tokens < int(store.lengths[examples].sum())


def test_rows_are_longer_where_long_beginnings_are_shared(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    """Four answers to a long prompt do not fit a usual row together; computing the prompt once for all is worth a longer one."""
    case = write_case(tmp_path, tiny_model_folder("llama", max_position_embeddings=4096), data={"max_length": 2048})
    _, usual = planned(case)
    prompt = " ".join(f"the bank of number {n} is solvent" for n in range(40))
    answers = [" ".join(["yes", "no", "perhaps", "never"][n % 4] for _ in range(200)) for n in range(4)]
    rows = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for answer in answers]
    write_jsonl(tmp_path / "train.jsonl", [{"messages": row} for row in rows])
    run, plan = planned(case, "name=long", "data.audit.accept=[leak, label_conflict]")
    lengths = TokenStore(run.run.data / "train").lengths
    assert usual.micro_batch_tokens == 1024 < lengths.max() < plan.micro_batch_tokens
    assert plan.shared_ratio > 0.3


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_dropout_shares_nothing(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    rates = {"attn_pdrop": 0.0, "resid_pdrop": 0.1, "embd_pdrop": 0.0}
    shared = write_case(_made(tmp_path / "a"), tiny_model_folder("gpt2", **(rates | {"resid_pdrop": 0.0})), rows=22)
    drawn = write_case(_made(tmp_path / "b"), tiny_model_folder("gpt2", **rates), rows=22)
    assert planned(shared)[1].shared_ratio > 0.1 and planned(drawn)[1].shared_ratio == 0.0


# ---- what fits instead ---------------------------------------------------------------------------------------------------


@pytest.fixture
def deep(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    """Blocks are most of the parameters, parameters most of the memory."""
    folder = tiny_model_folder("llama", num_hidden_layers=40)
    return write_case(tmp_path, folder, rows=22, train={"epochs": 2.5, "global_batch_size": 4})


def refused(case: Path, *overrides: str) -> str:
    with pytest.raises(FitError) as caught:
        planned(case, *overrides)
    return caught.value.message


def needed(case: Path, *overrides: str) -> int:
    """The least memory that a recipe can be planned in, found from the refusal of none."""
    found = re.search(r"does not fit: [\d.]+ \w+ needed", refused(case, f"machine.memory_limit={PROCESS + 1000}", *overrides))
    assert found
    plan = read_record(staged(case, overrides).run.plan_path, Plan)
    assert plan is not None
    return plan.peak_bytes_predicted


SPILL = "machine.gradients=spill"


def test_the_smallest_change_is_named_with_bytes_and_time_and_fits(deep: Path) -> None:
    limit = f"machine.memory_limit={(needed(deep) + needed(deep, SPILL)) // 2}"
    message = refused(deep, limit)
    found = re.search(r"the smallest change that fits: (\S+)  \((.+), about ([\d.]+) times the time, the same weights\)", message)
    assert found and found[1] == SPILL, message
    assert "or: machine.gradients=release  (" in message and "machine.gradients=spill machine" not in message
    _, plan = planned(deep, limit, found[1])
    assert plan.fits and plan.gradients == "spill" and "waiting in a file" in plan.waiting
    # Twice through the blocks takes longer: the stated speed has 3 for forward and backward and 1 for forward.
    times = [float(ratio) for ratio in re.findall(r"about ([\d.]+) times", message)]
    assert times[1] > times[0]


def test_another_step_is_named_only_where_the_same_weights_do_not_fit(
    tmp_path: Path, tiny_model_folder: Callable[..., Path]
) -> None:
    deep = write_case(tmp_path, tiny_model_folder("llama", num_hidden_layers=150), rows=22)
    least = needed(deep, SPILL, "machine.optimizer_states=disk")
    other = needed(deep, "train.precision=bf16-stochastic", "train.optimizer={name: adalomo}")
    assert other < least
    # As the recipe is once `auto` is resolved, which is how plans see it.
    resolved = ("machine.gradients=keep", "train.max_grad_norm=1.0")
    message = refused(deep, f"machine.memory_limit={(least + other) // 2}", *resolved)
    assert "another step: it learns differently" in message and "the same weights" not in message
    changes = re.search(r"the smallest change that fits: (.+?)  \(", message)
    assert changes
    _, plan = planned(deep, f"machine.memory_limit={(least + other) // 2}", *shlex.split(changes[1]))
    assert plan.fits and plan.precision == "bf16-stochastic" and plan.backward_passes == 1


def test_what_waits_in_files_takes_room_on_the_disk(deep: Path) -> None:
    _, plain = planned(deep)
    _, plan = planned(deep, SPILL, "machine.optimizer_states=disk", "name=elsewhere")
    assert plan.disk_bytes_predicted == plain.disk_bytes_predicted + 12 * plan.trained_parameters
    assert plan.peak_bytes_predicted < plain.peak_bytes_predicted


def test_frozen_parts_have_neither_gradient_nor_state(deep: Path) -> None:
    _, whole = planned(deep)
    _, part = planned(deep, "train.frozen=[model.layers]", "name=part")
    parts = {line.part: line.bytes for line in part.ledger}
    assert part.trained_parameters < whole.trained_parameters == whole.model.parameters
    assert (parts["gradients"], parts["optimizer"]) == (4 * part.trained_parameters, 8 * part.trained_parameters)
    assert parts["weights"] == 4 * part.model.parameters


def test_a_begun_run_that_moves_elsewhere_is_planned_anew(case: Path) -> None:
    run, plan = planned(case)
    run.run.train.mkdir(exist_ok=True)
    (run.run.train / "inputs.json").write_text("{}\n")
    again, kept = planned(case, "machine.memory_limit=9GB")
    assert again.reused("plan") and kept == plan
    again, moved = planned(case, SPILL)
    assert not again.reused("plan") and moved.gradients == "spill"


# ---- ranks that share rows ------------------------------------------------------------------------------------------------


def among(case: Path, ranks: int, *overrides: str) -> Plan:
    """The plan of so many ranks on this machine, fitting or not."""
    run = staged(case, overrides)
    run.data()
    with contextlib.suppress(FitError):
        plan_stage.stage(run.recipe, run.run, run.base, World(0, ranks, 0, ranks))
    plan = read_record(run.run.plan_path, Plan)
    assert plan is not None
    return plan


def test_ranks_that_share_rows_hold_fewer_activations_each(case: Path) -> None:
    alone, shared = among(case, 2), among(case, 2, "parallel.context=2", "name=shared")
    assert (alone.context, shared.context) == (1, 2)
    assert shared.micro_batch_tokens == 2 * alone.micro_batch_tokens
    parts = {line.part: line for line in shared.ledger}
    assert parts["activations"].formula.startswith("L x T / 2 x ") and "ring" in parts
    assert parts["weights"].bytes == {line.part: line.bytes for line in alone.ledger}["weights"]


def test_ranks_that_cannot_be_divided_are_refused_by_name(case: Path) -> None:
    for ranks, context in ((1, 2), (4, 3)):
        with pytest.raises(UsageError, match=f"parallel.context: {context} does not divide {ranks} ranks"):
            among(case, ranks, f"parallel.context={context}")


def test_a_refusal_names_more_ranks_for_each_row(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    case = write_case(tmp_path, tiny_model_folder("llama", num_hidden_layers=150), rows=22)
    needed = [among(case, 4, f"parallel.context={n}", "machine.memory_limit=10MB").peak_bytes_predicted for n in (1, 2)]
    assert needed[1] < needed[0]
    limit = f"machine.memory_limit={sum(needed) // 2}"
    refusal = among(case, 4, limit).refusal
    assert "parallel.context=2  (" in refusal and "time not estimated, the same weights" in refusal
    assert among(case, 4, limit, "parallel.context=2").fits
