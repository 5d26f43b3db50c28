"""All checks -> the audit: what their facts come to over every split, errors first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fullrank.data.audit import amount, contamination, duplicates, labels, languages, lengths, observe, passages, sightings
from fullrank.data.audit.finding import Finding, Place, Sighting
from fullrank.data.audit.labels import ShortAnswers
from fullrank.data.facts import Facts
from fullrank.data.pool import Pool
from fullrank.records import Audit, Severity

_ORDER: tuple[Severity, ...] = ("error", "warning", "note")


def conclude(
    splits: Sequence[Facts],
    *,
    skip: frozenset[str],
    held_out: bool,
    supervised_tokens: int,
    parameters: int,
    pool: Pool,
    scratch: Path,
) -> Audit:
    """The audit of prepared splits.

    Args:
        splits: train, validation, then the test sets.
        skip: kinds that are not looked for.
        held_out: validation was taken out of the training sources.
        supervised_tokens: of the training examples.
        parameters: of the model.
        pool: reads training texts once more where there is something to look for in them.
        scratch: a folder for what does not fit into memory.
    """
    train, validation, *tests = splits
    findings: list[Finding] = []
    sampled: dict[str, str] = {}
    filled = [split for split in splits if len(split)]
    if filled and filled[0].has("exact"):
        # One document in pieces is one record, whichever of its pieces are held out.
        apart = [split for split in filled if split is not validation or not train.shares(validation)]
        related = duplicates.conclude(apart, skip=skip, scratch=scratch)
        findings += [_of_a_share(finding) if held_out else finding for finding in related.findings]
        sampled |= related.sampled
        if "contamination" not in skip and tests and len(train):
            grams = contamination.grams(subject for test in tests for subject in test.subjects(range(len(test))))
            hits = passages.find(train, grams, pool)
            findings += contamination.conclude(train, tests, grams, hits, related.leaks)
            sampled |= {"contamination": grams.note} if grams.note else {}
    answers = {split.name: labels.gather(_answers(split), split.column("label")) for split in filled}
    if len(train):
        findings += labels.conclude(filled, answers)
    known = labels.label_set(answers["train"]) if "train" in answers else None
    for split in filled:
        findings += lengths.conclude(split, known)
        if not split.is_test:
            findings += lengths.conclude_cut(split)
    if "language" not in skip and filled:
        findings += languages.conclude(filled)
        sampled |= languages.sampled()
    findings += sightings.conclude_sightings(_sightings(filled), sum(len(split) for split in filled))
    findings += amount.conclude(
        len(train),
        supervised_tokens,
        0 if set(validation.forms()) == {"text"} else len(validation),  # of raw text no answer is right or wrong
        {split.name: len(split) for split in tests},
        parameters,
        len(known.counts) if known else None,
    )
    kept = [finding for finding in findings if finding.kind not in skip]
    return Audit(
        findings=sorted(kept, key=lambda finding: _ORDER.index(finding.severity)),
        left_out=observe.left_out(skip),
        sampled={kind: words for kind, words in sampled.items() if kind not in skip},
    )


def _of_a_share(finding: Finding) -> Finding:
    """A leak into validation records that were taken out of the training data is nobody's mistake in two files."""
    if finding.kind == "leak" and all(place.split in ("train", "validation") for place in finding.records):
        return finding.model_copy(
            update={
                "severity": "warning",
                "advice": "remove all but one: the validation loss is too low by what was learned of it",
            }
        )
    return finding


def _answers(split: Facts) -> Iterator[ShortAnswers]:
    for _, shard, _ in split.numbers():
        yield shard.notes["answers"]


def _sightings(splits: Sequence[Facts]) -> Iterator[tuple[Place, Sighting]]:
    for split in splits:
        for place, shard, numbers in split.numbers():
            for record, kind, what, part, start, end in shard.notes["sightings"]:
                if numbers[record] >= 0:
                    line = place.first + int(shard["line"][record])
                    yield Place(path=place.path, line=line, split=split.name), Sighting(kind, what, part, start, end)
