"""What a person sees while a run works: a live line on a terminal, plain lines elsewhere, and the result at the end.

Progress goes to standard error, results to standard output, so that `--json` leaves one object alone on standard output. What
libraries print while a workflow runs is no result and goes to standard error, too.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Column, Table

from fullrank.records import EvaluationCard, Plan, StepRow, TrainCard
from fullrank.run import Run, read_record
from fullrank.units import format_bytes, format_count, format_seconds, plural

#: Where there is no terminal, a step line is printed at most this often.
_QUIET_SECONDS = 5.0
#: Columns of a terminal that has room for a bar beside the facts of a step.
_ROOM_FOR_A_BAR = 120
_VERBS = {"data": "preparing data", "plan": "planning", "train": "training", "evaluate": "evaluating", "profile": "timing steps"}


class Console:
    """`with Console() as console:` and hand `console.hear` to a workflow.

    Args:
        quiet_results: leave standard output to someone else.
    """

    def __init__(self, quiet_results: bool = False) -> None:
        self._progress_out = RichConsole(stderr=True, highlight=False)
        self._results_out = RichConsole(file=sys.stderr if quiet_results else sys.stdout, highlight=False)
        self._live = self._progress_out.is_terminal
        columns: list[ProgressColumn] = [TextColumn("  {task.description}", table_column=Column(no_wrap=True, min_width=14))]
        if self._progress_out.width >= _ROOM_FOR_A_BAR:
            columns.append(BarColumn(bar_width=20))
        columns.append(TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True, overflow="ellipsis")))
        self._bar = Progress(*columns, console=self._progress_out, transient=True)
        self._task: Any = None
        self._last_line = 0.0
        self._step_seconds = _Average()
        self._prints = redirect_stdout(sys.stderr)

    def __enter__(self) -> Console:
        self._prints.__enter__()
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._bar.stop()
        self._prints.__exit__(kind, error, trace)

    def hear(self, event: str, facts: dict[str, Any]) -> None:
        """Prints an event of a run, if a person should know."""
        match event:
            case "started":
                self._line(f"{_VERBS.get(facts['stage'], facts['stage'])} ...", style="bold")
            case "reused":
                self._line(f"{facts['stage']}: unchanged, using {facts['what']}")
            case "note":
                self._line(f"  {facts['words']}")
            case "resumed":
                self._line(f"  continuing from the checkpoint of step {facts['step']} of {facts['steps']}")
            case "saved":
                self._line(f"  saved step {facts['step']} in {format_seconds(facts['seconds'])}")
            case "validation":
                best = ", the lowest so far" if facts["best"] and facts["step"] else ""
                who = "the base model" if facts["step"] == 0 else f"step {facts['step']}"
                self._line(f"  validation loss {facts['loss']:.4f} ({who}{best})")
            case "plan":
                self._line(plan_text(facts["plan"]))
            case "preparing":
                self._preparing(facts)
            case "audited":
                self._audited(facts["findings"])
            case "rehearsing":
                self._show_task("trying the largest batch, a validation and a save", 0, None, "")
            case "rehearsed":
                self._rehearsed(**facts)
            case "step":
                self._step(facts["row"], facts["steps"])
            case "validating":
                self._show_task("validating", 0, None, "")
            case "exporting":
                self._show_task("exporting and checking the export in a fresh process", 0, None, "")
            case "answered" | "measuring":
                self._answered(facts)
            case "finished":
                self._finished(facts)

    # ---- lines ------------------------------------------------------------------------------------------------------

    def _line(self, text: str, style: str = "") -> None:
        self._hide_task()
        self._progress_out.print(text, style=style, markup=False, soft_wrap=True)

    def _show_task(self, description: str, done: float, total: float | None, facts: str) -> None:
        if not self._live:
            return
        if self._task is None:
            self._task = self._bar.add_task(description, total=total, facts=facts)
        self._bar.update(self._task, description=description, completed=done, total=total, facts=facts)

    def _hide_task(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _step(self, row: StepRow, steps: int) -> None:
        left = self._step_seconds.add(row.seconds) * (steps - row.step)
        facts = (
            f"loss {row.loss:.4f}  {format_seconds(left)} left  {row.tokens / row.seconds:,.0f} tok/s  "
            f"lr {row.learning_rate:.2e}  grad norm {row.grad_norm:.3g}  changed {row.changed_ratio:.2f}  "
            f"{format_bytes(row.memory_bytes)}"
        )
        if self._live:
            self._show_task(f"step {row.step}/{steps}", row.step, steps, facts)
        elif row.step in (1, steps) or time.monotonic() - self._last_line >= _QUIET_SECONDS:
            self._last_line = time.monotonic()
            self._line(f"  step {row.step}/{steps}  {facts}")

    def _rehearsed(self, peak_bytes: int, planned_bytes: int, amendments: list[str]) -> None:
        planned = f"{format_bytes(planned_bytes)} planned"
        self._line(f"  the largest batch, a validation and a save fit: {format_bytes(peak_bytes)} at the peak, {planned}")
        for words in amendments:
            self._line(f"  laid out anew, for this did not fit: {words}")

    def _preparing(self, facts: dict[str, Any]) -> None:
        left = f"  {format_seconds(facts['seconds_left'])} left" if facts["seconds_left"] is not None else ""
        rate = f"  {format_bytes(facts['bytes_per_second'])}/s" if facts["bytes_per_second"] else ""
        read = f"{format_bytes(facts['done'])} of {format_bytes(facts['total'])}{rate}{left}"
        if self._live:
            self._show_task("preparing data", facts["done"], facts["total"] or None, read)
        elif time.monotonic() - self._last_line >= _QUIET_SECONDS:
            self._last_line = time.monotonic()
            self._line(f"  {read}")

    def _audited(self, findings: dict[str, int]) -> None:
        by_severity = Counter[str]()
        for name, count in findings.items():
            by_severity[name.split()[0]] += count
        told = [plural(by_severity[severity], severity) for severity in ("error", "warning", "note") if by_severity[severity]]
        self._line(f"  audit: {', '.join(told) or 'nothing found'} (fullrank data shows them)")

    def _answered(self, facts: dict[str, Any]) -> None:
        done, total = facts.get("done", 0), facts.get("total")
        description = f"{facts['who']} model on {facts['test']}"
        if self._live:
            self._show_task(description, done, total, f"{done}/{total} answers" if total else "")
        elif total and done == total:
            self._line(f"  {description}: {plural(total, 'answer')}")

    def _finished(self, facts: dict[str, Any]) -> None:
        self._hide_task()
        words = {
            "data": lambda: f"  {plural(facts['examples'], 'training example')}, {format_count(facts['tokens'])} tokens",
            "train": lambda: f"  trained {plural(facts['steps'], 'step')}; lowest validation loss {facts['validation_loss']:.4f}",
        }.get(facts["stage"])
        if words:
            self._line(f"{words()} ({format_seconds(facts['seconds'])})")

    # ---- the end ----------------------------------------------------------------------------------------------------

    def conclude(self, run: Run) -> None:
        """Prints what the run came to, as far as it went."""
        if self._live:
            self._bar.stop()
        evaluated = read_record(run.evaluate / "card.json", EvaluationCard)
        trained = read_record(run.train / "card.json", TrainCard)
        out = self._results_out
        if evaluated is not None:
            for name, scores in evaluated.tests.items():
                table = Table(title=f"{name} ({plural(scores.examples, 'example')})", title_justify="left", box=None)
                for column in ("", "base", "tuned", "difference (95 % interval)", "p"):
                    table.add_column(column, justify="left" if not column else "right")
                for key, tuned in scores.tuned.items():
                    d = scores.difference[key]
                    table.add_row(
                        key,
                        f"{scores.base[key].value:.3f}",
                        f"{tuned.value:.3f}",
                        f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})",
                        "< 0.001" if scores.p_value[key] < 0.001 else f"{scores.p_value[key]:.3f}",
                    )
                out.print(table)
            if evaluated.forgotten is not None:
                kl, probe = evaluated.forgotten.own_text.kl, evaluated.forgotten.probe["all"]
                out.print(
                    f"forgotten: {kl.value:.3f} nats a token from the base on its own text ({kl.low:.3f} to {kl.high:.3f}); "
                    f"general probe {probe.base.value:.3f} -> {probe.tuned.value:.3f} ({probe.difference.low:+.3f} to "
                    f"{probe.difference.high:+.3f})",
                    soft_wrap=True,
                )
        if trained is not None:
            p = trained.proof
            out.print(
                f"{p.changed_tensors} of {p.trainable_tensors} tensors changed in training, "
                f"{p.export_changed_tensors} of {p.export_tensors} in the export ({p.export_dtype}); "
                + (
                    "a fresh process loads the very weights of the ranks"
                    if p.export_logits_identical is None
                    else "a fresh process reproduces the export's logits exactly"
                ),
                soft_wrap=True,
            )
        for words, path in (
            ("model", run.model / "config.json"),
            ("report", run.report / "index.html"),
            ("plan", run.plan_path),
        ):
            if path.exists() and not (words == "plan" and trained):
                shown = path.parent if words == "model" else path
                out.print(f"{words}: {shown}", soft_wrap=True)
        if trained is not None:
            out.print(f"talk to it: fullrank chat {run.root}", soft_wrap=True)


class _Average:
    """Exponential average of step seconds: recent steps tell the time left best."""

    def __init__(self) -> None:
        self._value: float | None = None

    def add(self, seconds: float) -> float:
        self._value = seconds if self._value is None else 0.9 * self._value + 0.1 * seconds
        return self._value


def _trained(plan: Plan) -> str:
    return "all" if plan.trained_parameters == plan.model.parameters else format_count(plan.trained_parameters)


def plan_text(plan: Plan) -> str:
    """The plan in a few lines."""
    train = f"about {format_seconds(plan.train_seconds_predicted)}" if plan.train_seconds_predicted else "for an unknown time"
    lines = [
        f"plan: {format_count(plan.model.parameters)} parameters, {_trained(plan)} trained, {plan.precision}, on {plan.where}",
        f"  {plan.examples:,} examples, {plan.steps:,} steps ({plan.steps_per_epoch:,} an epoch, {plan.warmup_steps} of warmup), "
        f"{format_count(plan.train_tokens)} tokens",
        f"  rows of {plan.micro_batch_tokens} tokens"
        + (f", ratio {plan.shared_ratio:.2f} of the tokens shared and computed once" if plan.shared_ratio >= 0.005 else "")
        + f", {plan.recomputed}"
        + (f", {plan.waiting}" if plan.waiting else ""),
        *(f"  {line.part:<12}{format_bytes(line.bytes):>9}   {line.formula}" for line in plan.ledger),
        f"  {'peak':<12}{format_bytes(plan.peak_bytes_predicted):>9}   "
        f"of {format_bytes(plan.machine.memory_available_bytes)} usable",
        f"  disk {format_bytes(plan.disk_bytes_predicted)} of {format_bytes(plan.machine.disk_free_bytes)} free; "
        f"training {train}",
    ]
    return "\n".join(lines)
