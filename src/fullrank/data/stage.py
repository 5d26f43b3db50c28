"""The data stage: sources -> shards -> splits, with a card, an audit and a quarantine of what could not be used.

Every record is rendered once with the model's own template, in parallel and in bounded memory. What is found is written down
first and judged after: `data/` is there to look at even when the run is refused, because a record cannot be trained on or
because the audit found an error that the recipe does not accept. An unchanged stage is not run again, and a stopped one
continues.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fullrank.data import sources
from fullrank.data.audit.conclude import conclude
from fullrank.data.audit.observe import version
from fullrank.data.cache import ShardCache
from fullrank.data.facts import Facts
from fullrank.data.pool import Pool
from fullrank.data.samples import Samples
from fullrank.data.sources import DigestMemory
from fullrank.data.splits import Splits, all_sources, settings_for, source_name, training_sources
from fullrank.data.terms import audit_terms
from fullrank.errors import DataError, DataRefused, UsageError
from fullrank.loading import matching_files
from fullrank.meter import Meter
from fullrank.models.resolved import ResolvedModel
from fullrank.recipe import Data, Recipe, Source, ValidationSplit
from fullrank.records import Audit, DataCard, Quarantined
from fullrank.run import Run, file_digest, fingerprint, new_folder, read_json_lines, read_record, write_record
from fullrank.sequences.chat import ChatFormat
from fullrank.units import plural

#: Rejected records that a refusal names; all of them are in the quarantine.
_MOST_NAMED = 20

#: Records read again to find terms; what is looked at is a sample of their characters.
_MOST_READ_FOR_TERMS = 20_000

#: Below this much data, starting processes takes longer than the work.
_SMALL_BYTES = 8 << 20


def stage(recipe: Recipe, run: Run, base: ResolvedModel, chat: ChatFormat) -> DataCard:
    """Prepares the data of a recipe, or finds it prepared.

    Args:
        recipe: names the sources.
        run: holds what is prepared.
        base: the model it is prepared for.
        chat: of the model's tokenizer and template (`fullrank.models.load.load_chat_format`).

    Raises:
        DataError: a source or the chat template cannot be used at all.
        DataRefused: naming file and line of records that cannot be used, or what the audit found; `data/` is written.
        UsageError: a source needs an extra that is not installed.
    """
    recipe = _pinned(recipe)
    card = read_record(run.data / "card.json", DataCard)
    begun = read_json_lines(run.train / "inputs.json")
    if card and begun and _missing_files(recipe.data) and _test_files(recipe.data) == {n: t.files for n, t in card.tests.items()}:
        run.tell("reused", stage="data", what="tokens as prepared before; the files they came from are no longer there")
        return card
    cache = ShardCache(run.root.parent / ".shards")
    memory = DigestMemory.load(cache.digests)
    for_training = _training_fingerprint(recipe, base, chat, memory)
    tests = {name: _digests(items, memory) for name, items in recipe.data.test.items()}
    tests |= {f"general-{name}": _digests(items, memory) for name, items in recipe.data.general.items()}
    for_records = fingerprint(for_training, tests)
    current = fingerprint(for_records, _audit_settings(recipe.data, base))
    memory.save()
    places = fingerprint([sources.files(source) for source in all_sources(recipe.data)])
    if card and card.fingerprint == current and card.places == places:
        run.tell("reused", stage="data", what=f"{plural(card.train.examples, 'training example')}, tokens as prepared before")
        refuse(card, recipe.data, run)
        return card
    if begun and begun[0]["data"] != for_training:
        raise UsageError(
            f"{run.root}: training was begun on data (or a template or tokenizer) that have changed since",
            hint=f"give this recipe another `name`, or delete {run.root} to start anew",
        )
    run.tell("started", stage="data")
    seen = _digests(all_sources(recipe.data), memory)
    with Meter() as meter, new_folder(run.data) as folder:
        with Pool(_processes(recipe)) as pool:
            splits = Splits(recipe, base, chat, cache, pool, run, folder)
            splits.prepare()
            pool.rest()
            written = splits.write()
            audit = conclude(
                splits.facts,
                skip=frozenset(recipe.data.audit.skip),
                held_out=isinstance(recipe.data.validation, ValidationSplit),
                supervised_tokens=written["train"].supervised_tokens,
                parameters=base.facts.parameters,
                pool=pool,
                scratch=folder,
            )
        card = DataCard(
            fingerprint=current,
            seconds=meter.seconds,
            peak_bytes=meter.peak_bytes,
            chat_template="recipe" if recipe.data.chat_template else "model" if chat.template else "none",
            training_fingerprint=for_training,
            records_fingerprint=for_records,
            places=places,
            stop_ids=splits.stop_ids(),
            train=written["train"],
            validation=written["validation"],
            general={name: written[split.name] for name, split in splits.general.items()},
            tests=splits.test_cards(),
            notes=splits.notes(),
        )
        write_record(folder / "audit.json", audit)
        _write_samples(folder, recipe, chat, audit)
        _write_terms(folder, recipe, chat, splits.facts[0])
        changed = [
            source_name(source)
            for source, before, now in zip(
                all_sources(recipe.data), seen, _digests(all_sources(recipe.data), memory), strict=True
            )
            if before != now
        ]
        if changed:  # the fingerprint would say of the new content that it is the old
            raise DataError(
                f"{', '.join(changed)}: changed while being prepared", hint="run the command again when nothing writes there"
            )
        write_record(folder / "card.json", card)
    cache.prune()
    for note in card.notes:
        run.tell("note", stage="data", words=note)
    run.tell("audited", findings=Counter(f"{finding.severity} {finding.kind}" for finding in audit.findings))
    run.tell("finished", stage="data", seconds=card.seconds, examples=card.train.examples, tokens=card.train.tokens)
    refuse(card, recipe.data, run)
    return card


def _write_samples(folder: Path, recipe: Recipe, chat: ChatFormat, audit: Audit) -> None:
    """Writes `shown.jsonl`: examples that tell most about each split."""
    with (folder / "shown.jsonl").open("w", encoding="utf-8") as file:
        for split in ("train", "validation"):
            samples = Samples(folder, split, recipe.data, chat)
            for example in samples.shown(samples.telling(audit)):
                file.write(example.model_dump_json() + "\n")


def _write_terms(folder: Path, recipe: Recipe, chat: ChatFormat, train: Facts) -> None:
    """Writes `terms.json`: how the tokenizer splits the words of the training data."""
    step = max(1, len(train) // _MOST_READ_FOR_TERMS)
    subjects = train.subjects(range(0, len(train), step))
    glossary = Path(recipe.data.glossary) if recipe.data.glossary else None
    write_record(
        folder / "terms.json", audit_terms(subjects, Tokenizer.from_str(chat.tokenizer_json), glossary, records=len(train))
    )


# ---- what a run is refused for --------------------------------------------------------------------------------------


def refuse(card: DataCard, data: Data, run: Run) -> None:
    """Raises what stands between the prepared data and a run, or nothing.

    Raises:
        DataRefused: rejected records beyond the budget, an empty split, or errors of the audit that the recipe does not accept.
    """
    rejected = [line for line in _lines(run.data / "quarantine.jsonl", Quarantined) if not line.asked_for]
    if len(rejected) > data.quarantine_budget or any(line.loses_more for line in rejected):
        named = "\n".join(f"{_place(line)}: {line.reason}" for line in rejected[:_MOST_NAMED])
        more = len(rejected) - _MOST_NAMED
        rest = f"\n({plural(more, 'more record')} in {run.data / 'quarantine.jsonl'})" if more > 0 else ""
        budget = f"\ndata.quarantine_budget is {data.quarantine_budget}" if data.quarantine_budget else ""
        too_long = all(re.search(r"^\d+ tokens, |after token", line.reason) for line in rejected)
        hint = "mend or remove these records, or allow as many as there are with data.quarantine_budget"
        if too_long:
            hint = "raise data.max_length (up to the model's context), or say data.too_long: drop"
        elif any(line.loses_more for line in rejected):
            hint = "mend the file: nobody knows how many records were not read, so no budget covers them"
        raise DataRefused(named + rest + budget, hint=hint)
    for name, split in card.stored.items():
        if not split.examples:
            if name == "validation" and isinstance(data.validation, ValidationSplit):
                raise DataRefused(
                    f"data.validation: a share of {plural(card.train.examples, 'example')} cannot be held out",
                    hint="give more training records, or a validation file",
                )
            key = name.replace(": ", ".")
            raise DataRefused(f"data.{key}: no example is left to use", hint="see data.max_length and data.too_long")
    audit = read_record(run.data / "audit.json", Audit)
    errors = [f for f in (audit.findings if audit else []) if f.severity == "error" and f.kind not in data.audit.accept]
    if errors:
        kinds = list(dict.fromkeys([*data.audit.accept, *(finding.kind for finding in errors)]))  # to type as it stands
        lines = [f"{finding.kind}: {finding.what}: {_places(finding.records)}" for finding in errors[:_MOST_NAMED]]
        more = len(errors) - _MOST_NAMED
        rest = f"\n({plural(more, 'more finding')} in {run.data / 'audit.json'})" if more > 0 else ""
        raise DataRefused(
            "the audit of the data found errors:\n" + "\n".join(lines) + rest,
            hint=f"mend the data ({errors[0].advice}), or accept them by name: data.audit.accept=[{','.join(kinds)}]",
        )


def _place(line: Quarantined) -> str:
    return f"{line.path}:{line.line}" if line.offset is not None else f"{line.path}:record {line.line}"


def _places(records: Sequence[Any]) -> str:
    named = ", ".join(f"{place.path}:{place.line}" for place in records[:3])
    return named + (f" and {len(records) - 3} more" if len(records) > 3 else "")


def _lines(path: Path, kind: type[Quarantined]) -> Iterator[Quarantined]:
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield kind.model_validate_json(line)


# ---- what the stage depends on --------------------------------------------------------------------------------------


def _pinned(recipe: Recipe) -> Recipe:
    """The recipe with every streamed dataset held at the commit it is at now, so that all reading sees the same one."""
    data = recipe.data
    update: dict[str, Any] = {"train": [sources.pinned(source) for source in data.train]}
    if not isinstance(data.validation, ValidationSplit):
        update["validation"] = [sources.pinned(source) for source in data.validation]
    for key, named in (("test", data.test), ("general", data.general)):
        update[key] = {name: [sources.pinned(source) for source in items] for name, items in named.items()}
    return recipe.model_copy(update={"data": data.model_copy(update=update)})


def _missing_files(data: Data) -> list[str]:
    """Files that the recipe names and that are not there."""
    missing = [s.path for s in all_sources(data) if s.path and not matching_files(s.path)]
    return [*missing, *(path for path in (data.chat_template, data.glossary) if path and not Path(path).is_file())]


def _test_files(data: Data) -> dict[str, list[str]]:
    return {name: [source_name(source) for source in items] for name, items in data.test.items()}


def _training_fingerprint(recipe: Recipe, base: ResolvedModel, chat: ChatFormat, memory: DigestMemory) -> str:
    """Over what training and validation examples depend on: content and settings, not where files are."""
    data = recipe.data
    ratio = data.validation.ratio if isinstance(data.validation, ValidationSplit) else None
    return fingerprint(
        settings_for(recipe, base, replace(chat, name=""), is_test=False).tokens_fingerprint,
        [data.mix_by, ratio, recipe.train.seed],
        [[source.weight, source.repeat] for source in data.train],
        _digests(data.train, memory),
        _digests(training_sources(data), memory),
        _tokenizer_fingerprint(base.folder),
    )


def _audit_settings(data: Data, base: ResolvedModel) -> list[Any]:
    glossary = file_digest(Path(data.glossary)) if data.glossary else None
    return [sorted(data.audit.skip), version(), glossary, base.facts.parameters]


def _digests(items: list[Source], memory: DigestMemory) -> list[str]:
    return [sources.digest(source, memory) for source in items]


def _tokenizer_fingerprint(folder: Path) -> str:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
    return fingerprint({name: file_digest(folder / name) for name in names if (folder / name).is_file()})


def _processes(recipe: Recipe) -> int:
    """Processes that work beside this one; 0 where the data are little or one process is all there may be."""
    sizes = [sources.size(source) for source in all_sources(recipe.data)]
    if all(size is not None for size in sizes) and sum(size or 0 for size in sizes) < _SMALL_BYTES:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return recipe.machine.workers or cores
