"""A profile as text: the step, its phases, its modules, its rows, its memory, and what to change."""

from __future__ import annotations

from fullrank.records import ModuleTime, Profile
from fullrank.units import format_bytes, format_count, format_seconds

#: Modules with a smaller share of the step are told together.
_LEAST_RATIO = 0.005


def profile_text(found: Profile) -> str:
    """Lines for a terminal."""
    whole = sum(found.phases.values())
    named = [module for module in found.modules if module.ratio >= _LEAST_RATIO]
    others = [module for module in found.modules if module.ratio < _LEAST_RATIO]
    spared = 1 - found.computed_tokens / found.padded_tokens
    shared = 1 - found.computed_tokens / found.separate_tokens
    lines = [
        f"a step: {_short(found.step_seconds)} (the first {_short(found.first_step_seconds)}; median of {found.steps}), "
        f"{found.examples_per_second:.3g} examples/s, {found.tokens_per_second:,.0f} tokens/s on {found.device_name}"
        + (f", {found.threads} threads" if found.threads else ""),
        f"  the run: {format_count(found.steps_planned)} steps, about {format_seconds(found.steps_planned * found.step_seconds)} "
        "without validation",
        f"  utilisation {found.utilisation:.2f}: {found.needed_flops / 1e9:,.0f} GFLOP of products that the step needs, of "
        f"{found.best_flops_per_second / 1e9:,.0f} GFLOP/s that the fastest square product reaches here",
        "",
        "  phase            seconds  ratio",
        *(f"  {name:<15}{seconds:9.3f}  {seconds / whole:5.2f}" for name, seconds in found.phases.items()),
        "",
        "  module, without those inside it     forward  backward  ratio  GFLOP/s",
        *(_module(module) for module in named),
        *([_module(_together(others))] if others else []),
        "",
        f"  rows: {found.rows_per_step:.3g} a step of {found.row_tokens:,} tokens; {format_count(found.computed_tokens)} tokens "
        f"computed of {format_count(found.separate_tokens)} (ratio {shared:.2f} shared), "
        f"{format_count(found.padded_tokens)} if padded (ratio {spared:.2f} avoided)",
        f"  logits: at {format_count(found.predictions)} of {format_count(found.computed_tokens)} positions",
        *_ranks(found),
        "",
        "  memory             planned  measured",
        *(_memory(part.part, part.planned_bytes, part.measured_bytes) for part in found.memory),
        _memory("peak", found.peak_bytes_planned, found.peak_bytes),
        "",
        "what to change",
        *(f"  - {words}" for words in found.advice),
    ]
    return "\n".join(lines)


def _ranks(found: Profile) -> list[str]:
    if found.balance is None:
        return []
    hidden_nowhere = min(rank.exposed_seconds for rank in found.ranks) / found.step_seconds
    return [
        "",
        "  rank    tokens  computing  communicating  not hidden   (seconds a step; waiting for other ranks is communicating)",
        *(
            f"  {rank.rank:4}{rank.computed_tokens:10,.0f}{rank.computing_seconds:11.3f}{rank.communicating_seconds:15.3f}"
            f"{rank.exposed_seconds:12.3f}"
            for rank in found.ranks
        ),
        f"  balance {found.balance:.2f}: mean tokens of a rank over those of the one with most; communication that no rank hides "
        f"is {hidden_nowhere:.2f} of a step",
    ]


def _short(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 10 else format_seconds(seconds)


def _module(module: ModuleTime) -> str:
    rate = "" if module.flops_per_second is None else f"{module.flops_per_second / 1e9:9,.0f}"
    return f"  {module.module:<34}{module.forward_seconds:9.3f} {module.backward_seconds:9.3f}  {module.ratio:5.2f}{rate}"


def _together(modules: list[ModuleTime]) -> ModuleTime:
    return ModuleTime(
        module=f"{len(modules)} others",
        calls=sum(module.calls for module in modules),
        forward_seconds=sum(module.forward_seconds for module in modules),
        backward_seconds=sum(module.backward_seconds for module in modules),
        ratio=sum(module.ratio for module in modules),
        flops_per_second=None,
    )


def _memory(part: str, planned: int, measured: int | None) -> str:
    return f"  {part:<15}{format_bytes(planned):>11}{'' if measured is None else format_bytes(measured):>10}"
