"""How much of what is wrong with a data set the audit finds, and how often it cries wolf: planted defects in real data.

    python benchmarks/data_planted.py                     all data sets
    python benchmarks/data_planted.py banking77 chats     some of them; the result is not written
    python benchmarks/data_planted.py --self-check        the measure itself, on audits whose score is known

`planting` puts 200 defects of each of thirteen classes into copies of real data sets; `oracle` says what was wrong with them
before, and what the planted records are to one another; `fullrank data RECIPE --json` runs as a process of its own and is held
against both.

    recall      of the planted records, those in a finding of their class (a planted copy in another case or with other spaces may
                be found as an exact or as a near duplicate)
    precision   of the records in findings of a class, those that have the defect: planted, or there already by the oracle. In
                findings about several records (duplicates, leaks, conflicts, spellings) a record is right when another record of
                the same finding is its partner. What lies in the oracle's grey zone counts neither as right nor as wrong, nor do
                rightly spelt labels that a finding names beside a misspelt one.

Every miss and every false alarm is written to `misses.jsonl` in the data set's folder, with the record's text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import oracle
import planting
from planting import sets
from record import ROOT, target, write

SEED = 7
RECALL = PRECISION = 0.95
KINDS = tuple(planting.QUOTAS)
RELATIONAL = ("exact_duplicate", "near_duplicate", "leak", "label_conflict", "label_spelling")
_RECIPE = """\
name: {name}
model: {{source: smollm2-135m-instruct}}
data:
  train: train.jsonl
  validation: validation.jsonl
  test: {test}
  max_length: 8192
  too_long: drop
"""

Spot = tuple[str, int]
"""File, without its ending, and line."""
Verdict = Literal["right", "grey", "wrong"]
_VERDICTS: dict[str, Verdict] = {"defect": "right", "grey": "grey", "clean": "wrong"}


# ---- what is true ---------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """What is wrong with every record of a planted data set."""

    planted: planting.Planted
    spots: list[Spot]
    number: dict[Spot, int]
    partners: oracle.Partners
    single: dict[str, list[oracle.Verdict]]
    """Class of a record's own defects -> the oracle's verdict on each record."""
    plants: dict[str, dict[Spot, planting.Plant]]
    bands: dict[str, Counter[str]]
    """Class -> how many planted pairs the oracle alone calls surely so, grey, or different."""
    untouched: set[int]
    """Records that nothing was planted into."""
    quoted: set[Spot]
    """Untouched records whose passages stand in untouched records of the other side."""

    def verdict(self, kind: str, spot: Spot, mates: set[int]) -> Verdict:
        """Whether a record is rightly in a finding of a class together with its mates (none: with any record)."""
        n = self.number[spot]
        if kind in RELATIONAL:
            is_misspelt = spot in self.plants["label_spelling"]
            surely: Verdict = "grey" if kind == "label_spelling" and not is_misspelt else "right"
            for side, verdict in ((self.partners.defect, surely), (self.partners.grey, "grey")):
                related = side[kind].get(n, set())
                if related and (len(mates) < 2 or not related.isdisjoint(mates)):
                    return verdict
            return "wrong"
        if spot in self.plants[kind]:
            return "right"
        if self.planted.decoys.get(spot) == kind:
            return "wrong"
        if kind == "personal_data" and spot in self.plants["secret"]:
            return "grey"  # user:password@host reads like an address
        if kind in ("secret", "personal_data"):
            return "wrong"  # the published data hold none: see `oracle.confidential`
        return _VERDICTS[self.single[kind][n]]


def find_truth(planted: planting.Planted) -> Truth:
    """Looks at everything: every record, and every pair of records."""
    seen = [
        oracle.see(file, line, json.loads(text), labelled=planted.answers_are_labels)
        for file, lines in planted.files.items()
        for line, text in enumerate(lines, start=1)
    ]
    spots = [(record.file, record.line) for record in seen]
    number = {spot: n for n, spot in enumerate(spots)}
    partners = oracle.relate(seen)
    oracle.relate_spellings(seen, partners, planted.spellings)
    plants: dict[str, dict[Spot, planting.Plant]] = {kind: {} for kind in KINDS}
    bands: dict[str, Counter[str]] = {kind: Counter() for kind in RELATIONAL if kind != "label_spelling"}
    for plant in planted.plants:
        plants[plant.kind][plant.file, plant.line] = plant
    for kind, counted in bands.items():
        for spot, plant in plants[kind].items():
            assert plant.partner is not None
            copy, source = number[spot], number[plant.partner]
            sides = (("surely", partners.defect), ("grey", partners.grey))
            counted[next((band for band, side in sides if source in side[kind].get(copy, ())), "different")] += 1
            # A copy is what it was made to be, wherever the oracle's thresholds lie.
            for related in (kind,) if kind == "label_conflict" else (kind, "near_duplicate"):
                partners.add(related, copy, source)
    runs = oracle.passages(seen)
    contamination: list[oracle.Verdict] = [
        "defect" if run >= oracle.SURE_PASSAGE_WORDS else "grey" if run else "clean" for run in runs
    ]
    for plant in plants["contamination"].values():
        assert plant.partner is not None
        contamination[number[plant.partner]] = "defect"
    single = {
        "contamination": contamination,
        "mojibake": [oracle.mojibake(record) for record in seen],
        "hidden_unicode": [oracle.hidden_unicode(record) for record in seen],
        "control_token_text": [oracle.control_token_text(record) for record in seen],
        "language": [oracle.language(record) for record in seen],
        "length": oracle.lengths(seen),
    }
    touched = {spot for found in plants.values() for spot in found} | set(planted.decoys)
    untouched = {n for n, spot in enumerate(spots) if spot not in touched}
    published = [seen[n] for n in sorted(untouched)]
    quoted = {
        (record.file, record.line)
        for record, run in zip(published, oracle.passages(published), strict=True)
        if run >= oracle.SURE_PASSAGE_WORDS
    }
    return Truth(planted, spots, number, partners, single, plants, bands, untouched, quoted)


def natural(truth: Truth, kind: str) -> set[Spot]:
    """The published records, untouched, that surely have a defect by the oracle alone."""
    if kind in RELATIONAL:
        related = truth.partners.defect[kind].items()
        return {truth.spots[n] for n, partners in related if n in truth.untouched and partners & truth.untouched}
    if kind == "contamination":
        return truth.quoted
    return {truth.spots[n] for n in truth.untouched if kind in truth.single and truth.single[kind][n] == "defect"}


# ---- what was found -------------------------------------------------------------------------------------------------


@dataclass
class Held:
    """An audit's findings held against the truth, by class."""

    found: dict[str, dict[Spot, bool]]
    """Planted records, and whether they were found."""
    flagged: dict[str, dict[Spot, Verdict]]
    natural: dict[str, dict[Spot, bool]]
    others: Counter[str]
    """Records in findings of classes that this benchmark does not plant."""


def hold(truth: Truth, findings: list[dict[str, Any]]) -> Held:
    """Holds findings, as `fullrank data --json` prints them, against the truth."""
    flagged: dict[str, dict[Spot, Verdict]] = {kind: {} for kind in KINDS}
    others: Counter[str] = Counter()
    rank = {"right": 2, "grey": 1, "wrong": 0}
    for finding in findings:
        kind = finding["kind"]
        spots = [(Path(place["path"]).stem, place["line"]) for place in finding["records"]]
        if kind not in flagged:
            others[kind] += len(spots)
            continue
        mates = {truth.number[spot] for spot in spots}
        for spot in spots:
            verdict = truth.verdict(kind, spot, mates)
            # In several findings of a class a record is as right as in the best of them.
            if spot not in flagged[kind] or rank[verdict] > rank[flagged[kind][spot]]:
                flagged[kind][spot] = verdict

    def is_found(plant: planting.Plant) -> bool:
        spot = (plant.file, plant.line)
        return spot in flagged[plant.kind] or (plant.kind == "exact_duplicate" and spot in flagged["near_duplicate"])

    return Held(
        {kind: {spot: is_found(plant) for spot, plant in truth.plants[kind].items()} for kind in KINDS},
        flagged,
        {kind: {spot: spot in flagged[kind] for spot in sorted(natural(truth, kind))} for kind in KINDS},
        others,
    )


def count(kind: str, helds: list[tuple[Truth, Held]]) -> dict[str, Any]:
    """The figures of a class over some data sets."""
    found = [hit for _, held in helds for hit in held.found[kind].values()]
    verdicts = Counter(verdict for _, held in helds for verdict in held.flagged[kind].values())
    decoys = [
        spot in held.flagged[kind] for truth, held in helds for spot, tempts in truth.planted.decoys.items() if tempts == kind
    ]
    there = [hit for _, held in helds for hit in held.natural[kind].values()]
    judged = verdicts["right"] + verdicts["wrong"]
    return {
        "planted": len(found),
        "found": sum(found),
        "recall": sum(found) / len(found) if found else None,
        "flagged": verdicts.total(),
        "right": verdicts["right"],
        "grey": verdicts["grey"],
        "wrong": verdicts["wrong"],
        "precision": verdicts["right"] / judged if judged else None,
        "natural": len(there),
        "natural_found": sum(there),
        "decoys": len(decoys),
        "decoys_flagged": sum(decoys),
    }


def variants(helds: list[tuple[Truth, Held]]) -> dict[str, dict[str, str]]:
    """How many of each sort of defect were found: class -> what was done -> found/planted."""
    tally: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for truth, held in helds:
        for kind, plants in truth.plants.items():
            for spot, plant in plants.items():
                sort = plant.variant.removesuffix(" in the answer")
                if kind == "near_duplicate":  # question: typo + omission; answer: synonym
                    sort = " and ".join(part.partition(":")[0] for part in plant.variant.split("; ")) + " reworded"
                tally[kind][sort].append(held.found[kind][spot])
    return {kind: {sort: f"{sum(hits)}/{len(hits)}" for sort, hits in sorted(sorts.items())} for kind, sorts in tally.items()}


# ---- running --------------------------------------------------------------------------------------------------------


def audit(planted: planting.Planted, folder: Path) -> tuple[dict[str, Any], float]:
    """Writes the planted data and a recipe, runs the audit on them as a user would, and reads its last line."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, lines in planted.files.items():
        (folder / f"{file}.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode())
    tests = [file for file in planted.files if file not in ("train", "validation")]
    named = "test.jsonl" if tests == ["test"] else json.dumps({file: f"{file}.jsonl" for file in tests})
    (folder / "recipe.yaml").write_text(_RECIPE.format(name=planted.name, test=named), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("fullrank")), "data", "recipe.yaml", "--json"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    try:
        summary: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        summary = {}
    if "findings" not in summary:
        sys.exit(f"{' '.join(command)} in {folder} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    (folder / "findings.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary, seconds


def list_misses(truth: Truth, held: Held, path: Path) -> None:
    """Writes what was missed and what was flagged wrongly, a record a line."""
    with path.open("w", encoding="utf-8") as file:

        def tell(what: str, kind: str, spot: Spot, **more: Any) -> None:
            text = truth.planted.files[spot[0]][spot[1] - 1]
            also = [other for other in KINDS if other != kind and spot in held.flagged[other]]
            row = {"what": what, "kind": kind, "file": spot[0], "line": spot[1], **more, "found_as": also, "record": text[:2000]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        for kind in KINDS:
            for spot, hit in held.found[kind].items():
                if not hit:
                    plant = truth.plants[kind][spot]
                    tell("missed", kind, spot, variant=plant.variant, partner=plant.partner)
            for spot, verdict in held.flagged[kind].items():
                if verdict == "wrong":
                    tell("false alarm", kind, spot, decoy=truth.planted.decoys.get(spot, ""))


def show(title: str, helds: list[tuple[Truth, Held]]) -> None:
    """Prints the table of a data set, or of all."""
    print(f"\n{title}")
    print(f"  {'class':20} planted  found recall | flagged  right   grey  wrong precision | natural found | decoys flagged")
    for kind in KINDS:
        c = count(kind, helds)
        recall, precision = ("     -" if share is None else f"{share:6.3f}" for share in (c["recall"], c["precision"]))
        print(
            f"  {kind:20} {c['planted']:7} {c['found']:6} {recall} | {c['flagged']:7} {c['right']:6} {c['grey']:6} {c['wrong']:6}"
            f"    {precision} | {c['natural']:7} {c['natural_found']:5} | {c['decoys']:6} {c['decoys_flagged']:7}"
        )
    others = sum((held.others for _, held in helds), Counter())
    if others:
        print(f"  records in findings of other classes: {dict(others)}")


def self_check(name: str) -> None:
    """Scores audits whose score is known: one that says the truth, one that says nothing, one that flags everything."""
    planted = planting.plant(name, SEED)
    truth = find_truth(planted)

    def finding(kind: str, spots: Iterable[Spot]) -> dict[str, Any]:
        return {"kind": kind, "records": [{"path": f"{file}.jsonl", "line": line} for file, line in spots]}

    honest = [
        finding(kind, [spot, *([plant.partner] if plant.partner else [])])
        for kind in KINDS
        for spot, plant in truth.plants[kind].items()
    ]
    loud = [finding(kind, truth.spots) for kind in KINDS]
    for title, findings in (("the truth", honest), ("nothing", []), ("everything, in one finding a class", loud)):
        held = hold(truth, findings)
        show(f"{name}: an audit that says {title}", [(truth, held)])
        for kind in KINDS:
            figures = count(kind, [(truth, held)])
            expected = None if not figures["planted"] else 0.0 if title == "nothing" else 1.0
            assert figures["recall"] == expected, (title, kind, figures)
            assert title != "the truth" or figures["precision"] in (1.0, None), (title, kind, figures)
            assert figures["flagged"] == figures["right"] + figures["grey"] + figures["wrong"], (title, kind, figures)
    print(f"  planted pairs as the oracle alone sees them: { {kind: dict(counted) for kind, counted in truth.bands.items()} }")


def main() -> None:
    """Plants, audits, compares, prints; writes the results where all data sets were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(sets.NAMES)} (default: all)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "data-planted", help="where to work; kept")
    parser.add_argument("--self-check", action="store_true", help="score audits whose score is known, and run none")
    options = parser.parse_args()
    names = tuple(options.sets) or sets.NAMES
    if unknown := set(names) - set(sets.NAMES):
        parser.error(f"unknown data set {', '.join(sorted(unknown))}; there are {', '.join(sets.NAMES)}")
    if not sets.DATA.is_dir():
        sys.exit(f"skipped: the data are not here ({sets.DATA})")
    if options.self_check:
        for name in names:
            self_check(name)
        return
    helds: list[tuple[Truth, Held]] = []
    by_set: dict[str, Any] = {}
    for name in names:
        planted = planting.plant(name, SEED)
        summary, seconds = audit(planted, options.folder / name)
        started = time.monotonic()
        truth = find_truth(planted)
        oracle_seconds = time.monotonic() - started
        held = hold(truth, summary["findings"])
        list_misses(truth, held, options.folder / name / "misses.jsonl")
        helds.append((truth, held))
        records = sum(map(len, planted.files.values()))
        show(
            f"{name}: {records} records, audited in {seconds:.1f} s, misses in {options.folder / name / 'misses.jsonl'}",
            helds[-1:],
        )
        by_set[name] = {
            "records": records,
            "used": summary["used"],
            "quarantined": summary["quarantined"],
            "audit_seconds": seconds,
            "oracle_seconds": oracle_seconds,
            "pairs": pairs(truth),
            "planted_pairs_by_oracle": truth.bands,
            "classes": {kind: figures for kind in KINDS if any((figures := count(kind, helds[-1:])).values())},
        }
    show("all data sets", helds)
    classes = {kind: count(kind, helds) for kind in KINDS}
    if set(names) == set(sets.NAMES):
        figures = {"seed": SEED, "classes": classes, "variants": variants(helds), "data_sets": by_set}
        print(f"wrote {write('data-planted', figures, targets(classes))}")


def pairs(truth: Truth) -> dict[str, dict[str, int]]:
    """Pairs of untouched records that are surely in a relation, and pairs in the grey zone."""
    found = {kind: truth.partners.pairs(kind, truth.untouched) for kind in RELATIONAL}
    return {kind: {"surely": surely, "grey": grey} for kind, (surely, grey) in found.items()} | {
        "compared": {"all": len(truth.untouched) * (len(truth.untouched) - 1) // 2}
    }


def targets(classes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Recall and precision of each class."""
    return [
        target(f"{share} of {kind}", wanted, figures[share], "ratio", at_most=False)
        for kind, figures in classes.items()
        for share, wanted in (("recall", RECALL), ("precision", PRECISION))
    ]


if __name__ == "__main__":
    main()
