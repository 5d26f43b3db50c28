"""From sources to splits: shards made or found, records held out, sources mixed, and what came of it counted.

Everything that chooses (which records are held out, which examples a mix takes) is a function of the records' order and the seed.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fullrank.data import sources
from fullrank.data.audit.duplicates import COMMON_PROMPT
from fullrank.data.audit.observe import Observer, version
from fullrank.data.cache import ShardCache
from fullrank.data.examples import Limit
from fullrank.data.facts import Facts, PreparedSource
from fullrank.data.mix import mix
from fullrank.data.pool import Pool
from fullrank.data.prepare import Prepare, Settings
from fullrank.data.sources import Block
from fullrank.models.resolved import ResolvedModel
from fullrank.recipe import Data, Recipe, Source, ValidationSplit
from fullrank.records import LengthSummary, Quarantined, SourceCard, SplitCard, TestCard
from fullrank.run import Run
from fullrank.sequences import batch
from fullrank.sequences.chat import ChatFormat, special_texts
from fullrank.sequences.order import held_out
from fullrank.sequences.store import ShardPlace, is_whole, write_index
from fullrank.units import plural


def settings_for(recipe: Recipe, base: ResolvedModel, chat: ChatFormat, *, is_test: bool) -> Settings:
    """What the shards of a recipe depend on besides its records."""
    data, context = recipe.data, base.facts.context_tokens
    longest = min(data.max_length, context or data.max_length)
    reason = f"data.max_length is {longest}" if longest == data.max_length else f"the model's context is {longest}"
    return Settings(
        chat=chat,
        loss_on=data.loss_on,
        limit=Limit(longest, reason, data.too_long, data.chunk_overlap_ratio),
        is_test=is_test,
        skip=tuple(sorted(data.audit.skip)),
        mask=tuple(sorted(data.audit.mask)),
        checks=version(),
        encoder=batch.version(),
    )


def all_sources(data: Data) -> list[Source]:
    """Every source that a recipe names."""
    held_apart = [*data.test.values(), *data.general.values()]
    return [*training_sources(data), *(source for items in held_apart for source in items)]


def source_name(source: Source) -> str:
    """How cards name a source."""
    return source.path or f"hub:{source.hub}/{source.split}"


def training_sources(data: Data) -> list[Source]:
    """The sources of training and validation data."""
    return [*data.train, *([] if isinstance(data.validation, ValidationSplit) else data.validation)]


@dataclass
class _Split:
    """A split of the recipe on its way: its prepared sources, and what their shards say."""

    name: str
    items: list[Source]
    is_test: bool
    prepared: list[PreparedSource] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    """Of each source, the sums over its shards."""


_SUMS = ("read", "truncated", "dropped", "chunked", "tokens", "supervised")


class Splits:
    """The splits of a recipe on their way from sources to a folder.

    Args:
        recipe: names the sources.
        base: the model whose context limits examples.
        chat: renders them.
        cache: where shards are kept.
        pool: makes them.
        run: is told of progress.
        folder: what is written to, empty.
    """

    def __init__(
        self, recipe: Recipe, base: ResolvedModel, chat: ChatFormat, cache: ShardCache, pool: Pool, run: Run, folder: Path
    ) -> None:
        self.recipe, self.data, self.run, self.folder = recipe, recipe.data, run, folder
        self.base, self.chat, self.cache, self.pool = base, chat, cache, pool
        self.observer = Observer(special_texts(chat), frozenset(self.data.audit.skip))
        data = self.data
        self.tests = [_Split(name, items, True) for name, items in data.test.items()]
        self.train = _Split("train", data.train, False)
        own = [] if isinstance(data.validation, ValidationSplit) else data.validation
        self.validation = _Split("validation", own, False)
        self.general = {name: _Split(f"general-{name}", items, False) for name, items in data.general.items()}
        self.splits = [self.train, self.validation, *self.tests, *self.general.values()]
        self.facts: list[Facts] = []

    # ---- shards -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes every shard that is not there yet, and links them into the run."""
        progress = _Progress(self.run, sum(sources.size(source) or 0 for source in all_sources(self.data)))
        for split in self.splits:
            settings = settings_for(self.recipe, self.base, self.chat, is_test=split.is_test)
            for source in split.items:
                shards = self._shards(Prepare(settings), source, progress)
                split.prepared.append(PreparedSource(source, shards))
                split.notes.append(_summed(split.prepared[-1]))

    def _shards(self, task: Prepare, source: Source, progress: _Progress) -> list[tuple[ShardPlace, Path]]:
        found: list[tuple[ShardPlace, Path]] = []
        under_way: list[int] = []
        before = 0

        def jobs() -> Iterator[tuple[Any, ...]]:
            for block in sources.blocks(source):
                path = self.cache.path(block, task.settings.fingerprint)
                found.append((ShardPlace(path.name, block.path, block.first, block.offset, _unit(block)), path))
                nonlocal before
                count, before = block.source_bytes - before, block.source_bytes
                if is_whole(path):
                    os.utime(path)  # in use: not to be pruned
                    progress.add(count, reused=True)
                else:
                    under_way.append(count)
                    yield block, path

        for _ in self.pool.each(task, jobs()):
            progress.add(under_way.pop(0))
        return found

    # ---- splits -----------------------------------------------------------------------------------------------------

    def write(self) -> dict[str, SplitCard]:
        """Writes shards, indexes, test items and the quarantine."""
        links: dict[Path, str] = {}
        (self.folder / "shards").mkdir()
        for split in self.splits:
            for source in split.prepared:
                for _, path in source.shards:
                    if path not in links:
                        links[path] = f"{len(links):05d}.safetensors"
                        self.cache.give(path, self.folder / "shards" / links[path])
        self._write_quarantine()
        self._write_tests()
        examples, records = _examples_of(self.train)
        held = self._held_out(examples, records)
        shares = self._mixed(examples, ~held)
        if isinstance(self.data.validation, ValidationSplit):
            inside = [np.flatnonzero(held & (examples["source"] == n)) for n in range(len(self.train.prepared))]
            chosen = [np.unique(records[side]) for side in (~held, held)]
            train = self._facts(self.train, chosen[0])
            validation = self._facts(self.train, chosen[1], name="validation")
            # A document in pieces is read and used once, in training, whichever of its pieces are held out.
            held_out = self._write_split(self.train, validation, examples, inside, links, is_counted=not train.shares(validation))
        else:
            train, validation = self._facts(self.train, None), self._facts(self.validation, None)
            held_out = self._write_whole(self.validation, validation, links)
        self.facts = [train, validation, *(self._facts(test, None) for test in self.tests)]
        general = {split.name: self._write_whole(split, self._facts(split, None), links) for split in self.general.values()}
        return {"train": self._write_split(self.train, train, examples, shares, links), "validation": held_out, **general}

    def _write_whole(self, split: _Split, facts: Facts, links: dict[Path, str]) -> SplitCard:
        """As `_write_split`, all examples of a split."""
        examples, _ = _examples_of(split)
        everything = [np.flatnonzero(examples["source"] == n) for n in range(len(split.prepared))]
        return self._write_split(split, facts, examples, everything, links)

    def _facts(self, split: _Split, chosen: np.ndarray | None, name: str | None = None) -> Facts:
        return Facts(
            name or split.name,
            is_test=split.is_test,
            prepared=split.prepared,
            chosen=chosen,
            observer=self.observer,
            masked=self.data.audit.mask,
        )

    def _held_out(self, examples: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Whether each training example goes to validation: whole records do, so that no document is on both sides.

        A single document in pieces is held out from its end.
        """
        held = np.zeros(len(examples), bool)
        if not isinstance(self.data.validation, ValidationSplit):
            return held
        ratio = self.data.validation.ratio
        numbers = np.unique(records)
        if len(numbers) > 1:
            chosen = np.zeros(len(numbers), bool)
            chosen[self._drawn(numbers, ratio)] = True
            held = chosen[np.searchsorted(numbers, records)]
        elif len(examples) > 1:
            held[len(examples) - min(len(examples) - 1, max(1, round(ratio * len(examples)))) :] = True
        return held

    def _drawn(self, numbers: np.ndarray, ratio: float) -> np.ndarray:
        """Positions, in `numbers`, of the records held out; records that ask the same stay on one side."""
        everything = self._facts(self.train, None)
        groups = np.arange(len(numbers))
        if everything.has("exact"):
            prompt, exact = everything.column("prompt")[numbers], everything.column("exact")[numbers]
            _, which, counts = np.unique(prompt, return_inverse=True, return_counts=True)
            # A prompt that very many records have is an instruction: they are told apart by the rest.
            is_question = (prompt != 0) & (counts[which] <= COMMON_PROMPT)
            _, groups = np.unique(np.where(is_question, prompt, exact), return_inverse=True)
        return np.flatnonzero(held_out(groups, ratio, self.recipe.train.seed))

    def _mixed(self, examples: np.ndarray, usable: np.ndarray) -> list[np.ndarray]:
        """Positions of the training examples that each source gives to an epoch."""
        positions = [np.flatnonzero(usable & (examples["source"] == n)) for n in range(len(self.train.prepared))]
        taken = mix(
            [examples["tokens"][mine] for mine in positions],
            [source.weight for source in self.train.items],
            [source.repeat for source in self.train.items],
            self.data.mix_by,
            self.recipe.train.seed,
        )
        return [mine[chosen] for mine, chosen in zip(positions, taken, strict=True)]

    def _write_split(
        self,
        split: _Split,
        facts: Facts,
        examples: np.ndarray,
        by_source: list[np.ndarray],
        links: dict[Path, str],
        *,
        is_counted: bool = True,
    ) -> SplitCard:
        """Writes the index of a split's examples, given as positions in `examples` for each source, and counts them."""
        chosen = np.concatenate(by_source) if by_source else np.empty(0, np.int64)
        places = [
            ShardPlace(links[path], place.path, place.first, place.byte, place.unit)
            for source in split.prepared
            for place, path in source.shards
        ]
        folder = self.folder / facts.name
        folder.mkdir()
        mine = examples[chosen]
        write_index(folder, places, np.stack([mine["shard"], mine["example"]], axis=1))
        lengths, tokens = mine["tokens"], int(mine["tokens"].sum())
        supervised = int(mine["supervised"].sum())
        is_share = facts.name != split.name
        used_of_source = facts.used() if is_counted else [0] * len(by_source)
        cards = [
            SourceCard(
                name=source_name(split.items[number]),
                read=used + (0 if is_share else split.notes[number]["rejects"]),
                used=used,
                quarantined=0 if is_share else split.notes[number]["rejects"],
                examples=len(positions),
                tokens=(carried := int(examples["tokens"][positions].sum())),
                weight=split.items[number].weight,
                examples_ratio=len(positions) / len(mine) if len(mine) else 0.0,
                tokens_ratio=carried / tokens if tokens else 0.0,
            )
            for number, (positions, used) in enumerate(zip(by_source, used_of_source, strict=True))
        ]
        some = len(lengths) > 0
        masked: Counter[str] = Counter()
        for notes in [] if is_share else split.notes:
            masked.update(notes["masked"])
        return SplitCard(
            files=[] if is_share else [source_name(source) for source in split.items],
            sources=cards,
            read=sum(card.read for card in cards),
            used=sum(card.used for card in cards),
            quarantined=sum(card.quarantined for card in cards),
            examples=len(mine),
            tokens=tokens,
            supervised_tokens=supervised,
            supervised_ratio=supervised / tokens if tokens else 0.0,
            lengths=LengthSummary(
                shortest=int(lengths.min()) if some else 0,
                median=int(np.median(lengths)) if some else 0,
                p95=int(np.percentile(lengths, 95)) if some else 0,
                longest=int(lengths.max()) if some else 0,
            ),
            formats=facts.forms(),
            dropped_too_long=0 if is_share else sum(notes["dropped"] for notes in split.notes),
            truncated=int(facts.column("cut").sum()),
            masked=dict(masked),
        )

    def _write_quarantine(self) -> None:
        with (self.folder / "quarantine.jsonl").open("w", encoding="utf-8") as file:
            for split in self.splits:
                for source in split.prepared:
                    for place, shard in source.opened():
                        for line, byte, reason, asked_for, loses_more in sorted(shard.notes["rejects"]):
                            offset = None if place.byte is None or byte < 0 else place.byte + byte
                            entry = Quarantined(
                                path=place.path,
                                line=place.first + line,
                                offset=offset,
                                split=split.name,
                                reason=reason,
                                asked_for=asked_for,
                                loses_more=loses_more,
                            )
                            file.write(entry.model_dump_json() + "\n")

    def _write_tests(self) -> None:
        for split in self.tests:
            path = self.folder / "tests" / f"{split.name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                for source in split.prepared:
                    for place, shard in source.opened():
                        for item, line in zip(shard.notes["items"], shard["line"], strict=True):
                            file.write(json.dumps({**item, "id": place.origin(int(line))}, ensure_ascii=False) + "\n")

    # ---- what is said of it -----------------------------------------------------------------------------------------

    def test_cards(self) -> dict[str, TestCard]:
        """A card of each test set."""
        return {
            split.name: TestCard(
                files=[source_name(source) for source in split.items],
                read=sum(notes["read"] for notes in split.notes),
                quarantined=sum(notes["rejects"] for notes in split.notes),
                examples=sum(len(source) for source in split.prepared),
                longest_prompt_tokens=max((notes["longest_prompt"] for notes in split.notes), default=0),
            )
            for split in self.tests
        }

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the end-of-sequence token, and what ended the answers that were rendered."""
        ends = {number for split in self.splits for notes in split.notes for number in notes["stop_ids"]}
        return sorted(ends | ({self.chat.eos_id} if self.chat.eos_id is not None else set()))

    def notes(self) -> list[str]:
        """What the user should know and need not mend."""
        notes = []
        words = {
            "alpaca": "Alpaca: instruction and input became the user's turn, output the assistant's",
            "sharegpt": "ShareGPT: from/value became role/content",
            "preference": "preferences: the chosen answer is learned, the rejected one is left alone",
        }
        longest = settings_for(self.recipe, self.base, self.chat, is_test=False).limit.tokens
        plain = False
        for split in self.splits[:2]:
            forms: Counter[str] = Counter()
            for facts in self.facts:
                forms.update(facts.forms() if facts.of(split.prepared) else {})
            plain = plain or bool(forms["prompt_completion"] + forms["alpaca"])
            notes += [
                f"data.{split.name}: {plural(forms[form], 'record')} converted from {word}"
                for form, word in words.items()
                if forms[form]
            ]
            if chunked := sum(found["chunked"] for found in split.notes):
                notes.append(f"data.{split.name}: {plural(chunked, 'record')} longer than {longest} tokens cut into pieces")
        for split in self.tests:
            masked: Counter[str] = Counter()
            for found in split.notes:
                masked.update(found["masked"])
            notes += [
                f"test {split.name}: {plural(count, 'passage')} masked ({kind}), in prompts and in reference answers"
                for kind, count in masked.items()
            ]
        if plain and not self.chat.template:
            notes.append("the model has no chat template: prompt and completion are joined exactly as they are given")
        return notes


_EXAMPLE = np.dtype([("source", "i2"), ("shard", "i4"), ("example", "i4"), ("tokens", "i4"), ("supervised", "i4")])


def _examples_of(split: _Split) -> tuple[np.ndarray, np.ndarray]:
    """(examples_N, records_N): where every example of a split's sources is, and the number of its record among all of them."""
    parts, records = [np.empty(0, _EXAMPLE)], [np.empty(0, np.int64)]
    number = first_record = 0
    for which, source in enumerate(split.prepared):
        for _, shard in source.opened():
            offsets = shard["offsets"]
            part = np.zeros(len(offsets) - 1, _EXAMPLE)
            part["source"], part["shard"], part["example"] = which, number, np.arange(len(part))
            part["tokens"] = np.diff(offsets)
            carried = np.zeros(int(offsets[-1]) + 1, np.int64)
            np.cumsum(shard["supervised"], out=carried[1:])
            first = shard["supervised"][np.minimum(offsets[:-1], max(int(offsets[-1]) - 1, 0))] if len(part) else 0
            part["supervised"] = np.diff(carried[offsets]) - first  # nothing predicts the first token of an example
            parts.append(part)
            records.append(first_record + shard["record"].astype(np.int64))
            number, first_record = number + 1, first_record + shard.records
    return np.concatenate(parts), np.concatenate(records)


def _summed(source: PreparedSource) -> dict[str, Any]:
    """The sums of what a source's shards say."""
    total: dict[str, Any] = dict.fromkeys(_SUMS, 0)
    total |= {"rejects": 0, "masked": Counter(), "stop_ids": set(), "longest_prompt": 0}
    for _, shard in source.opened():
        notes = shard.notes
        for key in _SUMS:
            total[key] += notes[key]
        total["rejects"] += len(notes["rejects"])
        total["masked"].update(notes["masked"])
        total["stop_ids"].update(notes["stop_ids"])
        total["longest_prompt"] = max(total["longest_prompt"], notes["longest_prompt"])
    return total


def _unit(block: Block) -> Literal["line", "record"]:
    return "line" if block.kind == "lines" or block.offset is not None else "record"


class _Progress:
    """Tells how much has been read, how fast, and how long the rest will take."""

    def __init__(self, run: Run, total_bytes: int) -> None:
        self._run, self._total = run, total_bytes
        self._done = self._worked = 0
        self._started = self._told = time.monotonic()

    def add(self, count: int, *, reused: bool = False) -> None:
        """Counts bytes as done; those of shards that were there say nothing about the speed."""
        self._done += count
        self._worked += 0 if reused else count
        now = time.monotonic()
        if now - self._told >= 0.5:
            self._told = now
            rate = self._worked / (now - self._started)
            left = (self._total - self._done) / rate if rate and self._total > self._done else None
            self._run.show("preparing", done=self._done, total=self._total, bytes_per_second=rate, seconds_left=left)
