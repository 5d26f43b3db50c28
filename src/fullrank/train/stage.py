"""The train stage: from the base model to a proven export, resumable at any moment.

Reads `data/` and `plan.json`; writes `train/` (steps.jsonl, ledger.jsonl, checkpoints, card.json) and `model/`. The same command
continues from the newest checkpoint and ends with bitwise the same weights. Checkpoints are removed once the export is proven.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fullrank.errors import FitError, ProofError, Stopped, UsageError
from fullrank.loading import differences
from fullrank.meter import Meter
from fullrank.models.export import export_dtype, tied_parameters
from fullrank.models.load import blank_model, load_tokenizer
from fullrank.models.resolved import ResolvedModel
from fullrank.parallel import device as devices
from fullrank.parallel.engine import Engine
from fullrank.parallel.fsdp2 import Fsdp2
from fullrank.parallel.groups import freeze
from fullrank.parallel.heartbeat import Heartbeat
from fullrank.parallel.quiet import are_long, between_steps, quiet
from fullrank.parallel.world import ALONE, World
from fullrank.parallel.zero import Zero
from fullrank.recipe import EarlyStopping, Recipe
from fullrank.records import DataCard, Plan, Proof, StepRow, TrainCard
from fullrank.run import (
    Run,
    append_json_line,
    fingerprint,
    need_record,
    new_folder,
    read_json_lines,
    read_record,
    verify_manifest,
    write_manifest,
    write_record,
    write_text,
)
from fullrank.sequences.store import TokenStore
from fullrank.train import checkpoint, proof, roll
from fullrank.train.guard import Interrupted, StopRequest, check_finite, check_finite_validation
from fullrank.train.loop import Step, steps, validation_loss
from fullrank.train.rehearse import rehearsed
from fullrank.train.setup import set_up
from fullrank.units import format_bytes

#: Saving may take at most this share of the time, and happens at most once a minute.
_SAVING_SHARE = 0.03
_SHORTEST_GAP_SECONDS = 60.0
_PROBE_TOKENS = 512


def stage(
    recipe: Recipe,
    run: Run,
    base: ResolvedModel,
    world: World = ALONE,
    end: Callable[[str], None] | None = None,
) -> TrainCard | None:
    """Trains, proves and exports, or finds it done; all ranks do it together, and the first one writes what is written once.

    Args:
        recipe: resolved.
        run: with its data and its plan.
        base: the model.
        world: the ranks.
        end: what a rank does once another one was seen to be dead or to hang (`fullrank.parallel.heartbeat`); by default it says
            so and ends the process.

    Returns:
        The card on the first rank.

    Raises:
        Stopped: after SIGINT or SIGTERM, with the state saved.
        TrainingError: a loss or gradient was not finite.
        ProofError: what the run would claim does not hold.
        UsageError: the run folder holds training of another recipe.
    """
    data = need_record(run.data / "card.json", DataCard, "plan")
    plan = need_record(run.plan_path, Plan, "plan")
    inputs = _inputs(recipe, data, base)
    current = fingerprint(inputs)
    card = read_record(run.train / "card.json", TrainCard)
    if card and card.fingerprint == current and run.model.is_dir():
        _refuse_damaged_export(run)
        run.tell("reused", stage="train", what=f"the model trained before ({card.steps} steps)")
        return card
    _refuse_other_inputs(run, inputs)
    run.tell("started", stage="train")
    with Meter() as meter, Heartbeat(world, run.train, end or _end) as heart:
        try:
            with quiet(large_apart=world.size > 1 or are_long(plan.micro_batch_tokens, base.facts.hidden_size)):
                heart.at("the roll call")
                roll.call(recipe, run, base, data, world, devices.choose(plan.machine.device))
                training = _Training(recipe, run, base, data, plan, meter, world, heart)
                if world.is_first:
                    _begin(run, inputs)
                training.fit()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not devices.out_of_memory(error):
                raise
            raise FitError(
                f"out of memory, although {format_bytes(plan.peak_bytes_predicted)} were "
                f"planned of {format_bytes(plan.machine.memory_available_bytes)}",
                hint=f"set machine.memory_limit lower and delete {run.plan_path}: a new plan takes smaller rows",
            ) from error
        heart.at("the export")
        checked = training.export()
    if checked is None:
        return None
    card = training.card(current, checked)
    write_record(run.train / "card.json", card)
    for leftover in (training.checkpoints, training.best_folder, run.train / "waiting"):
        shutil.rmtree(leftover, ignore_errors=True)
    run.tell("finished", stage="train", seconds=card.seconds, steps=card.steps, validation_loss=card.validation_loss_best)
    return card


def _end(seen: str) -> None:
    """Ends a rank whose other threads may be waiting for one that will not come."""
    print(f"error: {seen}", file=sys.stderr, flush=True)
    os._exit(1)


def _inputs(recipe: Recipe, data: DataCard, base: ResolvedModel) -> dict[str, Any]:
    """Everything the trained weights depend on; the plan is not among it."""
    return {
        "model": base.facts.fingerprint,
        "data": data.training_fingerprint,
        "train": recipe.train.model_dump(mode="json"),
        "export": recipe.export.model_dump(mode="json"),
    }


def _refuse_damaged_export(run: Run) -> None:
    problem = verify_manifest(run.model, ignoring={"README.md"})  # a model card may be edited
    if problem:
        raise ProofError(
            f"{run.model}: {problem}, so it is not the model that was proven",
            hint=f"restore the file, or delete {run.train} and {run.model} to train again",
        )


def _refuse_other_inputs(run: Run, inputs: dict[str, Any]) -> None:
    """Training begun with one recipe is never continued with another."""
    begun = read_json_lines(run.train / "inputs.json")
    if begun and begun[0] != inputs:
        changed = "\n".join(differences(begun[0], inputs))
        raise UsageError(
            f"{run.root}: its training was begun with other inputs:\n{changed}",
            hint=f"give this recipe another `name`, or delete {run.train} and {run.model} to train anew",
        )


def _begin(run: Run, inputs: dict[str, Any]) -> None:
    """Notes what is trained on, once its worst has been seen to fit: until then another recipe may be tried.

    What an earlier model of this folder scored says nothing of the new one, so it goes.
    """
    path = run.train / "inputs.json"
    if not path.is_file():
        for stale in (run.evaluate, run.report):
            shutil.rmtree(stale, ignore_errors=True)
        write_text(path, _json_line(inputs))


def _json_line(facts: dict[str, Any]) -> str:
    return json.dumps(facts) + "\n"


@dataclass
class _Progress:
    """The loop's own state, saved with every checkpoint."""

    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    last_loss: float = float("inf")
    first_loss: float = float("inf")
    without_improvement: int = 0
    loss_to_beat: float = float("inf")
    loop_seconds: float = 0.0
    peak_bytes: int = 0
    device_peak_bytes: int = 0
    resumed_from: list[int] = field(default_factory=list)

    def validated(self, loss: float, step: int, stopping: EarlyStopping | None) -> bool:
        """Takes in a validation loss; True when it is the best so far."""
        if step == 0:  # the base model: what the run is compared with, not one of its results
            self.first_loss = loss
            return False
        self.last_loss = loss
        if loss < self.loss_to_beat - (stopping.min_delta if stopping else 0.0):  # min_delta is about patience alone
            self.loss_to_beat, self.without_improvement = loss, 0
        else:
            self.without_improvement += 1
        is_best = loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step = loss, step
        return is_best


class _Training:
    """One sitting of a training run."""

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        base: ResolvedModel,
        data: DataCard,
        plan: Plan,
        meter: Meter,
        world: World,
        heart: Heartbeat,
    ) -> None:
        self.recipe, self.run, self.base, self.data, self.meter, self.world = recipe, run, base, data, meter, world
        self.heart = heart
        self.checkpoints = run.train / "checkpoints"
        self.best_folder = run.train / "best"
        self.steps_path = run.train / "steps.jsonl"
        self.ledger_path = run.train / "ledger.jsonl"
        self.validation_store = TokenStore(run.data / "validation")
        self.tokenizer = load_tokenizer(base.folder, recipe.data.chat_template)
        heart.at("loading")
        setup = set_up(recipe, run, base, plan, world)
        heart.at("the rehearsal")
        setup, rehearsal = rehearsed(setup, run, plan, self.validation_store)
        self.device, self.train_store, self.order = setup.device, setup.store, setup.order
        self.model, self.layout, self.layout_note = setup.rows.model, setup.layout, setup.rows.why
        self.engine: Engine = setup.engine
        if world.size > 1:
            self.engine.watch = heart.phase
        self.divided = setup.engine if isinstance(setup.engine, Fsdp2 | Zero) else None
        self.progress = _Progress()
        self._sitting_started = time.monotonic()
        self._last_save = time.monotonic()
        self._save_seconds = rehearsal.save_seconds
        self._saved_step = -1

    # ---- the loop's consumer ----------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Runs the steps that are left; the best weights are then in the engine."""
        self._resume()
        self._sitting_started = time.monotonic()
        with StopRequest() as stop:
            if self.progress.first_loss == float("inf"):
                self._validate()
            rows = steps(
                self.engine,
                self.train_store,
                self.order,
                self.recipe.train,
                self.layout,
                first=self.progress.step + 1,
                world=self.world,
                # Ranks compute in step, so they stop after the same step; a single one need not wait for its end.
                interruptible=stop.between if self.world.size == 1 else iter,
            )
            try:
                if not self._out_of_patience():
                    for step in rows:
                        check_finite(step, self.train_store)
                        self.progress.step = step.row.step
                        self.heart.at("what follows a step", step.row.step)
                        is_last = step.row.step == self.order.steps
                        due = is_last or step.row.step % self.recipe.train.evaluate_every_steps == 0
                        self._record(step, validation_loss=self._validate() if due else None)
                        if self._out_of_patience():
                            break
                        save, stopping = self._agreed(self._save_is_due() and not is_last, stop.requested)
                        if save and not stopping:
                            self._save()
                        if stopping:
                            raise Interrupted
                        between_steps()
            except Interrupted:
                self._save()
                raise Stopped(
                    f"stopped at step {self.progress.step} of {self.order.steps}; the state is saved in {self.checkpoints}",
                    hint="type the same command to continue",
                ) from None
        if self._saved_step != self.progress.step and self._minutes_are_at_stake():
            self._save()  # whatever happens to the export, long work is not done twice
        self._take_stock()
        peaks = self.world.gathered([self.progress.peak_bytes, self.progress.device_peak_bytes])
        self.progress.peak_bytes, self.progress.device_peak_bytes = (max(column) for column in zip(*peaks, strict=True))
        if self.progress.best_step != self.progress.step:
            self.engine.load_weights(checkpoint.load_weights(self.best_folder, self.progress.best_step))

    def _agreed(self, save: bool, stop: bool) -> tuple[bool, bool]:
        """What all ranks do: they save when the first one's clock says so, and stop when one of them was asked to."""
        saving, stopping = self.world.summed(float(save and self.world.is_first), float(stop))
        return saving > 0, stopping > 0

    def _record(self, step: Step, validation_loss: float | None) -> None:
        if not self.world.is_first:
            return
        row = step.row.model_copy(update={"validation_loss": validation_loss})
        self._write_row(row)
        append_json_line(self.ledger_path, {"step": row.step, "examples": step.examples.tolist()})

    def _write_row(self, row: StepRow) -> None:
        append_json_line(self.steps_path, row.model_dump())
        self.run.show("step", row=row, steps=self.order.steps, micro_batch_tokens=self.layout.budget_tokens)

    def _validate(self) -> float:
        self.run.show("validating", step=self.progress.step)
        self.heart.at("a validation")
        loss = validation_loss(self.engine, self.validation_store, self.layout, self.world)
        step = self.progress.step
        check_finite_validation(loss, step)
        is_best = self.progress.validated(loss, step, self.recipe.train.early_stopping)
        if is_best and step < self.order.steps:  # the last step's weights are still in memory when they are exported
            checkpoint.save_weights(self.best_folder, step, self.engine.weights(), self.world)
        self.run.tell("validation", step=step, loss=loss, best=is_best)
        return loss

    def _out_of_patience(self) -> bool:
        stopping = self.recipe.train.early_stopping
        return stopping is not None and self.progress.without_improvement >= stopping.patience

    # ---- saving and resuming ----------------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        gap = max(_SHORTEST_GAP_SECONDS, self._save_seconds / _SAVING_SHARE)
        return time.monotonic() - self._last_save >= gap

    def _minutes_are_at_stake(self) -> bool:
        return self.world.any(time.monotonic() - self._last_save >= _SHORTEST_GAP_SECONDS)

    def _save(self) -> None:
        started = time.monotonic()
        self.heart.at("a save")
        self._take_stock()
        checkpoint.save(self.checkpoints, self.progress.step, self.engine.state(), asdict(self.progress), self.world)
        self._last_save, self._saved_step = time.monotonic(), self.progress.step
        self._save_seconds = self._last_save - started
        self.run.tell("saved", step=self.progress.step, seconds=self._save_seconds)

    def _take_stock(self) -> None:
        """Brings seconds and peaks of this sitting into the progress, which outlives it."""
        now = time.monotonic()
        self.progress.loop_seconds += now - self._sitting_started
        self._sitting_started = now
        self.progress.peak_bytes = max(self.progress.peak_bytes, self.meter.peak_bytes)
        self.progress.device_peak_bytes = max(self.progress.device_peak_bytes, devices.device_peak_bytes(self.device) or 0)

    def _resume(self) -> None:
        def complain(words: str) -> None:
            self.run.tell("note", stage="train", words=words)

        # One rank reads all of it to see whether it is whole, and tells the others.
        newest = checkpoint.newest(self.checkpoints, complain) if self.world.is_first else None
        name = self.world.gathered(newest.name if newest else None)[0]
        folder = self.checkpoints / name if name else None
        step = 0
        if folder is not None:
            step, state, facts = checkpoint.load(folder)
            self.engine.load_state(state)
            self.progress = _Progress(**facts)
            self.progress.resumed_from.append(step)
            self._saved_step = step
            self.run.tell("resumed", step=step, steps=self.order.steps)
        elif any(self.checkpoints.glob("step-*")):
            complain("no checkpoint is whole: starting again from the base model")
        for path in (
            (self.steps_path, self.ledger_path) if self.world.is_first else ()
        ):  # what came after the checkpoint is done again
            kept = [line for line in read_json_lines(path) if line["step"] <= step and folder is not None]
            write_text(path, "".join(_json_line(line) for line in kept))

    # ---- the end ----------------------------------------------------------------------------------------------------

    def export(self) -> Proof | None:
        """Writes `model/` once everything about it has been checked; the first rank does, with what the others hand it.

        Returns:
            None on the other ranks.
        """
        self.run.show("exporting")
        never_reached = self.engine.never_reached()
        probe_ids_1T = torch.from_numpy(self.validation_store[0].ids[:_PROBE_TOKENS].astype("int64"))[None]
        dtype = export_dtype(self.recipe.export.dtype, self.base.facts.dtype)
        if self.divided is not None:
            return self._export_divided(self.divided, never_reached, dtype, probe_ids_1T)
        self.engine.close()
        del self.engine  # the optimizer's memory
        unreached, unmoved = self._moved(proof.unchanged_tensors(self.model, self.base.folder), never_reached)
        with new_folder(self.run.model) as folder:
            checked = proof.export_and_prove(
                self.model,
                self.tokenizer,
                self.base,
                dtype=dtype,
                stop_ids=self.data.stop_ids,
                probe_ids_1T=probe_ids_1T,
                unreached=unreached,
                unmoved=unmoved,
                folder=folder,
            )
            write_manifest(folder)
        return checked

    def _export_divided(
        self, engine: Fsdp2 | Zero, never_reached: set[str], dtype: torch.dtype, probe_ids_1T: torch.Tensor
    ) -> Proof | None:
        engine.forget()
        model = self.model
        if isinstance(engine, Zero):  # which leaves a divided parameter no shape
            model = blank_model(self.base.folder, dtype=torch.float32)
            freeze(model, self.recipe.train.frozen)
        if not self.world.is_first:
            for _ in engine.whole_weights():
                pass
            engine.close()
            return None
        with new_folder(self.run.model) as folder:
            unchanged, digests = proof.export_divided(
                model,
                engine.whole_weights(),
                self.tokenizer,
                self.base,
                dtype=dtype,
                stop_ids=self.data.stop_ids,
                folder=folder,
            )
            unreached, unmoved = self._moved(unchanged, never_reached)
            checked = proof.prove_divided(
                digests,
                tied_parameters(model),
                self.tokenizer,
                self.base,
                trainable=sum(p.requires_grad for p in self.model.parameters()),
                dtype=dtype,
                stop_ids=self.data.stop_ids,
                probe_ids_1T=probe_ids_1T,
                unreached=unreached,
                unmoved=unmoved,
                folder=folder,
            )
            write_manifest(folder)
        engine.close()
        return checked

    def _moved(self, unchanged: list[str], never_reached: set[str]) -> tuple[list[str], list[str]]:
        """See `fullrank.train.proof.check_changed`."""
        return proof.check_changed(
            unchanged,
            never_reached,
            rounded=self.recipe.train.rounding != "none",
            trained=sum(p.requires_grad for p in self.model.parameters()),
        )

    def card(self, current: str, checked: Proof) -> TrainCard:
        """What this run's training did, over all its sittings."""
        rows = [StepRow.model_validate(line) for line in read_json_lines(self.steps_path)]
        tokens = sum(row.tokens for row in rows)
        return TrainCard(
            fingerprint=current,
            seconds=self.meter.seconds,
            peak_bytes=max(self.progress.peak_bytes, self.meter.peak_bytes),
            model=self.base.facts,
            steps=self.progress.step,
            steps_planned=self.order.steps,
            stopped_early=self.progress.step < self.order.steps,
            best_step=self.progress.best_step,
            examples_seen=sum(row.examples for row in rows),
            tokens_seen=tokens,
            computed_tokens_seen=sum(row.computed_tokens for row in rows),
            supervised_tokens_seen=sum(row.supervised_tokens for row in rows),
            validation_loss_before=self.progress.first_loss,
            validation_loss_best=self.progress.best_loss,
            validation_loss_last=self.progress.last_loss,
            loop_seconds=self.progress.loop_seconds,
            tokens_per_second=tokens / sum(row.seconds for row in rows),
            packed=self.layout.packed,
            shared=self.layout.shared,
            layout_note=self.layout_note,
            device_peak_bytes=self.progress.device_peak_bytes or None,
            resumed_from_steps=self.progress.resumed_from,
            proof=checked,
        )
