"""The data of a recipe by themselves: prepared and audited, looked at, handed to labelling and taken back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullrank.data import labelstudio, sources
from fullrank.data.labelstudio import Applied
from fullrank.data.samples import Samples
from fullrank.data.splits import all_sources
from fullrank.errors import DataError, DataRefused, UsageError
from fullrank.loading import LoadedRecipe
from fullrank.recipe import Recipe, Source
from fullrank.records import Audit, DataCard, Finding, Place, ShownExample, SplitCard, TestCard
from fullrank.run import Listener, Run, need_record, write_text
from fullrank.workflows.described import Described, describe_elsewhere
from fullrank.workflows.stages import prepare_data


@dataclass(frozen=True)
class Prepared:
    """What came of preparing the data of a recipe."""

    run: Run
    told: Described
    card: DataCard
    audit: Audit
    refusal: DataRefused | None
    """Why a run on these data is refused; None where it is not."""

    def as_json(self) -> dict[str, Any]:
        """What `fullrank data --json` prints."""
        splits: list[SplitCard | TestCard] = [self.card.train, self.card.validation, *self.card.tests.values()]
        read, quarantined = sum(split.read for split in splits), sum(split.quarantined for split in splits)
        return {
            "run": str(self.run.root),
            "read": read,
            "used": read - quarantined,
            "quarantined": quarantined,
            "findings": [finding.model_dump() for finding in self.audit.findings],
            "left_out": self.audit.left_out,
            "sampled": self.audit.sampled,
            "refused": self.refusal.message if self.refusal else None,
        }


def prepare(loaded: LoadedRecipe, runs_dir: Path, listener: Listener | None = None) -> Prepared:
    """Prepares and audits; what a run would be refused for is returned, not raised."""
    told = describe_elsewhere(loaded.recipe, lambda words: listener("note", {"words": words}) if listener else None)
    refusal: DataRefused | None = None
    try:
        run = prepare_data(loaded, told, runs_dir, listener)
    except DataRefused as error:
        refusal = error
        run = Run(loaded.run_root or runs_dir / loaded.recipe.name)
    card = need_record(run.data / "card.json", DataCard, "data")
    return Prepared(run, told, card, need_record(run.data / "audit.json", Audit, "data"), refusal)


# ---- looking --------------------------------------------------------------------------------------------------------


def show(
    loaded: LoadedRecipe,
    runs_dir: Path,
    listener: Listener | None,
    *,
    split: str,
    examples: Sequence[int],
    record: str | None,
    count: int,
) -> list[ShownExample]:
    """Examples as the model sees them: those asked for, those made from a record (`file:line` or a line), or telling ones.

    Raises:
        UsageError: there is no such split, example or record.
    """
    if split not in ("train", "validation"):
        raise UsageError(f"there is no split {split!r} to show; allowed: train, validation")
    prepared = prepare(loaded, runs_dir, listener)
    samples = Samples(prepared.run.data, split, loaded.recipe.data, prepared.told.chat)
    if record is not None:
        path, _, line = record.rpartition(":")
        line = line.removeprefix("record ")  # as origins have it where a file has no lines
        if not line.isdigit():
            raise UsageError(f"--record {record!r}: a record is named by its line, or by file:line")
        chosen = samples.at(path, int(line)) if path else samples.on_line(int(line))
        if not chosen:
            raise UsageError(f"--record {record!r}: no example of {split} was made from it", hint="see data/quarantine.jsonl")
    else:
        chosen = list(examples) or samples.telling(prepared.audit)[:count]
    return samples.shown(chosen)


# ---- labelling ------------------------------------------------------------------------------------------------------


def flag(loaded: LoadedRecipe, runs_dir: Path, listener: Listener | None, *, kinds: Sequence[str], out: Path) -> int:
    """Writes the records that findings name as Label Studio tasks, and the labelling configuration beside them.

    Returns:
        how many tasks there are.
    """
    prepared = prepare(loaded, runs_dir, listener)
    known = {finding.kind for finding in prepared.audit.findings}
    unknown = sorted(set(kinds) - known)
    if unknown:
        raise UsageError(f"no finding is of kind {unknown[0]!r}; found: {', '.join(sorted(known)) or 'none'}")
    findings = [finding for finding in prepared.audit.findings if not kinds or finding.kind in kinds]
    tasks = labelstudio.to_tasks(_flagged(loaded.recipe, labelstudio.by_record(findings)))
    write_text(out, json.dumps(tasks, ensure_ascii=False, indent=1) + "\n")
    write_text(out.with_suffix(".xml"), labelstudio.LABELING_CONFIG)
    return len(tasks)


def _flagged(recipe: Recipe, findings: dict[Place, list[Finding]]) -> Iterator[tuple[Place, dict[str, Any], list[Finding]]]:
    # One file may serve two splits, and one line of an array hold several records: all that was said of the line goes with each.
    by_place: dict[tuple[str, int], tuple[Place, list[Finding]]] = {}
    for place, found in findings.items():
        by_place.setdefault((place.path, place.line), (place, []))[1].extend(found)
    done: set[tuple[str, int, int | None]] = set()
    for source in all_sources(recipe.data):
        for item in sources.read(source):
            where = (item.origin.path, item.origin.line, item.origin.offset)
            said = by_place.get(where[:2])
            if said and where not in done and isinstance(item, sources.RawRecord):
                done.add(where)
                yield said[0], item.fields, said[1]


def relabel(source: Path, exported: Path, out: Path) -> Applied:
    """Writes a new file from one that was labelled: decisions about it carried out, everything else as it was.

    Raises:
        DataError: no decision is about the file.
    """
    named = Source(path=str(source))
    files = {os.path.realpath(name) for name in sources.files(named)}
    decisions = list(labelstudio.from_tasks(exported))
    mine = [decision for decision in decisions if os.path.realpath(decision.path) in files]
    if decisions and not mine:
        others = ", ".join(dict.fromkeys(decision.path for decision in decisions))
        raise DataError(f"{exported}: no decision is about {source}", hint=f"the tasks were made from {others}")
    return labelstudio.apply(labelstudio.rows_of(named), mine, out)
