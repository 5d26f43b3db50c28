"""The data stage: records -> token stores and test items, with a card of what is in them.

Reads what the recipe names, renders every record once with the model's own template, and writes `data/` in one piece. A record
that cannot be trained on (no answer, nothing supervised, too long) stops the stage with file and line before any model is loaded;
up to twenty such records are named at once. An unchanged stage is not run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from fullrank.data import convert, sources
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.errors import DataError, UsageError
from fullrank.meter import Meter
from fullrank.models.load import load_tokenizer
from fullrank.models.source import ResolvedModel
from fullrank.recipe import Data, Recipe, Source, ValidationSplit
from fullrank.records import DataCard, LengthSummary, SplitCard, TestCard, TestItem
from fullrank.run import Run, append_json_line, file_digest, fingerprint, new_folder, read_record, write_record
from fullrank.sequences.chat import ChatRenderer, Tokens
from fullrank.sequences.order import held_out
from fullrank.sequences.store import StoreWriter
from fullrank.units import plural

#: Raised whenever the same records would give other tokens, so that stores written before are not taken for current.
PREPARATION_VERSION = 1

_MOST_PROBLEMS = 20


def stage(recipe: Recipe, run: Run, base: ResolvedModel) -> DataCard:
    """Prepares the data of a recipe, or finds it prepared.

    Raises:
        DataError: naming file and line of what cannot be used.
        UsageError: a source needs an extra that is not installed.
    """
    tokenizer = load_tokenizer(base.folder, recipe.data.chat_template)
    current = _fingerprint(recipe, base, tokenizer)
    card = read_record(run.data / "card.json", DataCard)
    if card and card.fingerprint == current:
        run.tell("reused", stage="data", what=f"{plural(card.train.examples, 'training example')}, tokens as prepared before")
        return card
    if (run.train / "inputs.json").exists():
        raise UsageError(
            f"{run.root}: training was begun on data (or a template or tokenizer) that have changed since",
            hint=f"give this recipe another `name`, or delete {run.root} to start anew",
        )
    run.tell("started", stage="data")
    renderer = ChatRenderer(tokenizer, recipe.data.template_date, recipe.model.source)
    with Meter() as meter, new_folder(run.data) as folder:
        preparation = _Preparation(recipe.data, renderer)
        train, validation = preparation.splits(folder, recipe.train.seed)
        tests = {name: preparation.test(name, items, folder) for name, items in recipe.data.test.items()}
        preparation.raise_problems()
        card = DataCard(
            fingerprint=current,
            seconds=meter.seconds,
            peak_bytes=meter.peak_bytes,
            chat_template="recipe" if recipe.data.chat_template else "model" if renderer.has_template else "none",
            chat_template_fingerprint=fingerprint(tokenizer.chat_template),
            tokenizer_fingerprint=_tokenizer_fingerprint(base.folder),
            train=train,
            validation=validation,
            tests=tests,
            notes=preparation.notes(),
        )
        write_record(folder / "card.json", card)
    for note in card.notes:
        run.tell("note", stage="data", words=note)
    run.tell("finished", stage="data", seconds=card.seconds, examples=card.train.examples, tokens=card.train.tokens)
    return card


def _fingerprint(recipe: Recipe, base: ResolvedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    everything = [*recipe.data.train, *(s for items in recipe.data.test.values() for s in items)]
    if not isinstance(recipe.data.validation, ValidationSplit):
        everything += recipe.data.validation
    return fingerprint(
        PREPARATION_VERSION,
        recipe.data.model_dump(mode="json"),
        recipe.train.seed,
        [sources.digest(source) for source in everything],
        tokenizer.chat_template,
        _tokenizer_fingerprint(base.folder),
    )


def _tokenizer_fingerprint(folder: Path) -> str:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
    return fingerprint({name: file_digest(folder / name) for name in names if (folder / name).is_file()})


@dataclass(frozen=True)
class _Rendered:
    """A record as tokens, and where it came from."""

    tokens: Tokens
    origin: str


@dataclass
class _Counts:
    """What happened to the records of a split."""

    formats: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    truncated: int = 0
    chunked: int = 0


class _Preparation:
    """One pass over the sources of a recipe; problems are gathered and raised together."""

    def __init__(self, data: Data, renderer: ChatRenderer) -> None:
        self.data = data
        self.renderer = renderer
        self.problems: list[str] = []
        self.hint = "mend or remove these records"
        self.counts: dict[str, _Counts] = {}

    # ---- splits -----------------------------------------------------------------------------------------------------

    def splits(self, folder: Path, seed: int) -> tuple[SplitCard, SplitCard]:
        """Writes `train/` and `validation/` token stores."""
        train = list(self._rendered("train", self.data.train))
        validation_sources: list[Source] = self.data.train
        if isinstance(self.data.validation, ValidationSplit):
            if len(train) < 2 and not self.problems:
                raise DataError(
                    f"data.validation: a share of {plural(len(train), 'example')} cannot be held out",
                    hint="give more training records, or a validation file",
                )
            taken = held_out(len(train), self.data.validation.ratio, seed) if len(train) > 1 else set()
            validation = [example for number, example in enumerate(train) if number in taken]
            train = [example for number, example in enumerate(train) if number not in taken]
            self.counts["validation"] = _Counts()
        else:
            validation_sources = self.data.validation
            validation = list(self._rendered("validation", validation_sources))
        self.raise_problems()
        for name, examples in (("train", train), ("validation", validation)):
            if not examples:
                raise DataError(f"data.{name}: no example is left to use", hint="see data.max_length and data.too_long")
        return (
            self._write("train", train, self.data.train, folder / "train"),
            self._write("validation", validation, validation_sources, folder / "validation"),
        )

    def _write(self, split: str, examples: list[_Rendered], items: list[Source], folder: Path) -> SplitCard:
        folder.mkdir()
        writer = StoreWriter(folder)
        for example in examples:
            writer.append(example.tokens, example.origin)
        writer.close()
        lengths = np.asarray([len(example.tokens.ids) for example in examples])
        supervised = sum(example.tokens.supervised_targets() for example in examples)
        return SplitCard(
            files=[_name(source) for source in items],
            examples=len(examples),
            tokens=int(lengths.sum()),
            supervised_tokens=supervised,
            supervised_ratio=supervised / int(lengths.sum()),
            lengths=LengthSummary(
                shortest=int(lengths.min()),
                median=int(np.median(lengths)),
                p95=int(np.percentile(lengths, 95)),
                longest=int(lengths.max()),
            ),
            formats=dict(self.counts[split].formats),
            dropped_too_long=self.counts[split].dropped,
            truncated=self.counts[split].truncated,
        )

    def _rendered(self, split: str, items: list[Source]) -> Iterator[_Rendered]:
        counts = self.counts.setdefault(split, _Counts())
        for source in items:
            for record in self._records(source):
                if len(self.problems) >= _MOST_PROBLEMS:
                    return
                try:
                    form, example = convert.normalise(record)
                    tokens = self._tokens(example)
                except DataError as error:
                    self.problems.append(_placed(record.origin, error))
                    continue
                counts.formats[form] += 1
                for piece in self._fitted(tokens, isinstance(example, Document), counts, str(record.origin)):
                    if piece.supervised_targets() == 0:
                        self.problems.append(
                            f"{record.origin}: no supervised token is left"
                            + (
                                f": the answer begins after token {self.data.max_length}"
                                if len(tokens.ids) > self.data.max_length
                                else ""
                            )
                        )
                    else:
                        yield _Rendered(piece, str(record.origin))

    def _records(self, source: Source) -> Iterator[sources.RawRecord]:
        """The records of a source; what cannot be read in it joins the problems found so far."""
        try:
            yield from sources.read(source)
        except DataError as error:
            self.problems += error.message.splitlines()
            self.hint = error.hint or self.hint

    def _tokens(self, example: Conversation | Pair | Document) -> Tokens:
        match example:
            case Conversation(messages, tools):
                return self.renderer.conversation(messages, tools=tools, loss_on=self.data.loss_on)
            case Pair(prompt, completion):
                return self.renderer.pair(prompt, completion, loss_on=self.data.loss_on)
            case Document(text):
                return self.renderer.document(text)

    def _fitted(self, tokens: Tokens, is_document: bool, counts: _Counts, origin: str) -> list[Tokens]:
        """The example within `max_length`, as `too_long` says."""
        length, most = len(tokens.ids), self.data.max_length
        if length <= most:
            return [tokens]
        match self.data.too_long:
            case "drop":
                counts.dropped += 1
                return []
            case "truncate":
                counts.truncated += 1
                return [Tokens(tokens.ids[:most], tokens.supervised[:most])]
            case "chunk" if is_document:
                counts.chunked += 1
                starts = range(0, length - 1, most)  # a last piece of one token predicts nothing
                return [Tokens(tokens.ids[s : s + most], tokens.supervised[s : s + most]) for s in starts]
        reason = "only raw text can be chunked" if self.data.too_long == "chunk" else "data.too_long is error"
        self.problems.append(f"{origin}: {length} tokens, data.max_length is {most} and {reason}")
        return []

    # ---- tests ------------------------------------------------------------------------------------------------------

    def test(self, name: str, items: list[Source], folder: Path) -> TestCard:
        """Writes `tests/<name>.jsonl`."""
        path = folder / "tests" / f"{name}.jsonl"
        count = longest = 0
        for source in items:
            for record in self._records(source):
                if len(self.problems) >= _MOST_PROBLEMS:
                    break
                try:
                    _, example = convert.normalise(record)
                    item = self._test_item(str(record.origin), example)
                    prompt = item.prompt if item.messages is None else self.renderer.prompt(item.messages, tools=item.tools)
                    longest = max(longest, len(self.renderer.ids(prompt or "")))
                except DataError as error:
                    self.problems.append(_placed(record.origin, error))
                    continue
                append_json_line(path, item.model_dump())
                count += 1
        return TestCard(files=[_name(source) for source in items], examples=count, longest_prompt_tokens=longest)

    def _test_item(self, origin: str, example: Conversation | Pair | Document) -> TestItem:
        match example:
            case Conversation(messages, tools):
                last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
                reference = messages[last].get("content") or ""
                return TestItem(id=origin, messages=messages[:last], prompt=None, tools=tools, reference=reference)
            case Pair(prompt, completion) if self.renderer.has_template:
                messages = [{"role": "user", "content": prompt}]
                return TestItem(id=origin, messages=messages, prompt=None, tools=None, reference=completion)
            case Pair(prompt, completion):
                return TestItem(id=origin, messages=None, prompt=prompt, tools=None, reference=completion)
            case Document():
                raise DataError("a test record needs a prompt and an answer; raw text belongs into data.validation")

    # ---- words ------------------------------------------------------------------------------------------------------

    def raise_problems(self) -> None:
        """Raises everything found so far, or nothing."""
        if self.problems:
            more = f"\n(stopped looking after {_MOST_PROBLEMS})" if len(self.problems) >= _MOST_PROBLEMS else ""
            too_long = any("data.max_length" in problem or "after token" in problem for problem in self.problems)
            raise DataError(
                "\n".join(self.problems[:_MOST_PROBLEMS]) + more,
                hint="raise data.max_length, or say data.too_long: drop" if too_long else self.hint,
            )

    def notes(self) -> list[str]:
        """What the user should know and need not mend."""
        notes = []
        words = {
            "alpaca": "Alpaca records: instruction and input became the user's turn, output the assistant's",
            "sharegpt": "ShareGPT records: from/value became role/content",
        }
        for split, counts in self.counts.items():
            notes += [f"{split}: {counts.formats[form]:,} {word}" for form, word in words.items() if counts.formats[form]]
            for count, happened in ((counts.dropped, "dropped"), (counts.truncated, "truncated"), (counts.chunked, "chunked")):
                if count:
                    notes.append(f"{split}: {plural(count, 'record')} longer than {self.data.max_length} tokens {happened}")
        if not self.renderer.has_template and any(
            c.formats["prompt_completion"] + c.formats["alpaca"] for c in self.counts.values()
        ):
            notes.append("the model has no chat template: prompt and completion are joined exactly as they are given")
        return notes


def _name(source: Source) -> str:
    return source.path or f"hub:{source.hub}/{source.split}"


def _placed(origin: sources.Origin, error: DataError) -> str:
    """The error's words with the record's place before them, once."""
    return error.message if error.message.startswith(str(origin)) else f"{origin}: {error.message}"
