"""The data stage: records -> token stores and test items, with a card of what is in them.

Reads what the recipe names, renders every record once with the model's own template, and writes `data/` in one piece. A record
that cannot be trained on (no answer, nothing supervised, too long) stops the stage with file and line before any model is loaded;
up to twenty such records are named at once. An unchanged stage is not run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
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
from fullrank.run import (
    Run,
    append_json_line,
    file_digest,
    fingerprint,
    new_folder,
    read_json_lines,
    read_record,
    write_record,
)
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
    card = read_record(run.data / "card.json", DataCard)
    begun = read_json_lines(run.train / "inputs.json")
    if card and begun and _missing_files(recipe.data) and _test_files(recipe.data) == {n: t.files for n, t in card.tests.items()}:
        run.tell("reused", stage="data", what="tokens as prepared before; the files they came from are no longer there")
        return card
    tokenizer = load_tokenizer(base.folder, recipe.data.chat_template)
    for_training = _training_fingerprint(recipe, base, tokenizer)
    current = fingerprint(for_training, {name: _digests(items) for name, items in recipe.data.test.items()})
    if card and card.fingerprint == current:
        run.tell("reused", stage="data", what=f"{plural(card.train.examples, 'training example')}, tokens as prepared before")
        return card
    if begun and begun[0]["data"] != for_training:
        raise UsageError(
            f"{run.root}: training was begun on data (or a template or tokenizer) that have changed since",
            hint=f"give this recipe another `name`, or delete {run.root} to start anew",
        )
    run.tell("started", stage="data")
    renderer = ChatRenderer(tokenizer, recipe.data.template_date, recipe.model.source)
    with Meter() as meter, new_folder(run.data) as folder:
        preparation = _Preparation(recipe.data, renderer, base.facts.context_tokens)
        train, validation = preparation.splits(folder, recipe.train.seed)
        tests = {name: preparation.test(name, items, folder) for name, items in recipe.data.test.items()}
        preparation.raise_problems()
        card = DataCard(
            fingerprint=current,
            seconds=meter.seconds,
            peak_bytes=meter.peak_bytes,
            chat_template="recipe" if recipe.data.chat_template else "model" if renderer.has_template else "none",
            training_fingerprint=for_training,
            stop_ids=renderer.stop_ids(),
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


def _missing_files(data: Data) -> list[str]:
    """Files that the recipe names and that are not there."""
    everything = [*_training_sources(data), *(source for items in data.test.values() for source in items)]
    return [path for path in [data.chat_template, *(s.path for s in everything)] if path and not Path(path).is_file()]


def _test_files(data: Data) -> dict[str, list[str]]:
    return {name: [_name(source) for source in items] for name, items in data.test.items()}


def _training_sources(data: Data) -> list[Source]:
    return [*data.train, *([] if isinstance(data.validation, ValidationSplit) else data.validation)]


def _training_fingerprint(recipe: Recipe, base: ResolvedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Over what training and validation examples depend on: content and settings, not where files are."""
    data = recipe.data
    ratio = data.validation.ratio if isinstance(data.validation, ValidationSplit) else None
    return fingerprint(
        PREPARATION_VERSION,
        [data.max_length, data.too_long, data.loss_on, data.template_date, ratio, recipe.train.seed],
        _digests(data.train),
        _digests(_training_sources(data)),
        tokenizer.chat_template,
        _tokenizer_fingerprint(base.folder),
        base.facts.context_tokens,
    )


def _digests(items: list[Source]) -> list[str]:
    return [sources.digest(source) for source in items]


def _tokenizer_fingerprint(folder: Path) -> str:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
    return fingerprint({name: file_digest(folder / name) for name in names if (folder / name).is_file()})


@dataclass(frozen=True)
class _Rendered:
    """A record (or a piece of one) as tokens, and where it came from."""

    tokens: Tokens
    origin: str
    form: str
    truncated: bool


class _Preparation:
    """One pass over the sources of a recipe; problems are gathered and raised together."""

    def __init__(self, data: Data, renderer: ChatRenderer, context_tokens: int | None) -> None:
        self.data = data
        self.renderer = renderer
        self.longest = min(data.max_length, context_tokens or data.max_length)
        by_recipe = self.longest == data.max_length
        self.limit = f"data.max_length is {data.max_length}" if by_recipe else f"the model's context is {context_tokens}"
        self.problems: list[str] = []
        self.hint = "mend or remove these records"
        self.dropped: Counter[str] = Counter()
        """Records too long to use, by split."""
        self.examples: dict[str, list[_Rendered]] = {}

    # ---- splits -----------------------------------------------------------------------------------------------------

    def splits(self, folder: Path, seed: int) -> tuple[SplitCard, SplitCard]:
        """Writes `train/` and `validation/` token stores."""
        train = list(self._rendered("train", self.data.train))
        validation_sources: list[Source] = self.data.train
        if isinstance(self.data.validation, ValidationSplit):
            train, validation = self._hold_out(train, self.data.validation.ratio, seed)
        else:
            validation_sources = self.data.validation
            validation = list(self._rendered("validation", validation_sources))
        self.raise_problems()
        for name, examples in (("train", train), ("validation", validation)):
            if not examples:
                raise DataError(f"data.{name}: no example is left to use", hint="see data.max_length and data.too_long")
        self.examples = {"train": train, "validation": validation}
        return (
            self._write("train", train, self.data.train, folder / "train"),
            self._write("validation", validation, validation_sources, folder / "validation"),
        )

    def _hold_out(self, examples: list[_Rendered], ratio: float, seed: int) -> tuple[list[_Rendered], list[_Rendered]]:
        """(training, validation) examples: whole records are held out, so that no document is on both sides.

        A single document in pieces is held out from its end.
        """
        records = list(dict.fromkeys(example.origin for example in examples))
        if len(records) > 1:
            taken = {records[number] for number in held_out(len(records), ratio, seed)}
            return [e for e in examples if e.origin not in taken], [e for e in examples if e.origin in taken]
        if len(examples) > 1:
            first = len(examples) - min(len(examples) - 1, max(1, round(ratio * len(examples))))
            return examples[:first], examples[first:]
        if not self.problems:
            raise DataError(
                f"data.validation: a share of {plural(len(examples), 'example')} cannot be held out",
                hint="give more training records, or a validation file",
            )
        return examples, []

    def _write(self, split: str, examples: list[_Rendered], items: list[Source], folder: Path) -> SplitCard:
        folder.mkdir()
        writer = StoreWriter(folder)
        for example in examples:
            writer.append(example.tokens, example.origin)
        writer.close()
        lengths = np.asarray([len(example.tokens.ids) for example in examples])
        supervised = sum(example.tokens.supervised_targets() for example in examples)
        forms = {example.origin: example.form for example in examples}
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
            formats=dict(Counter(forms.values())),
            dropped_too_long=self.dropped[split],
            truncated=sum(example.truncated for example in examples),
        )

    def _rendered(self, split: str, items: list[Source]) -> Iterator[_Rendered]:
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
                is_cut = len(tokens.ids) > self.longest
                pieces = self._fitted(tokens, isinstance(example, Document), str(record.origin))
                self.dropped[split] += not pieces
                for piece in pieces:
                    if piece.supervised_targets() == 0:
                        self.problems.append(
                            f"{record.origin}: no supervised token is left"
                            + (f": the answer begins after token {self.longest}" if is_cut else "")
                        )
                    else:
                        yield _Rendered(piece, str(record.origin), form, is_cut and len(pieces) == 1)

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

    def _fitted(self, tokens: Tokens, is_document: bool, origin: str) -> list[Tokens]:
        """The example within the limit, as `too_long` says: itself, a part, several parts, or none."""
        length, most = len(tokens.ids), self.longest
        if length <= most:
            return [tokens]
        match self.data.too_long:
            case "drop":
                return []
            case "truncate":
                return [Tokens(tokens.ids[:most], tokens.supervised[:most])]
            case "chunk" if is_document:
                starts = range(0, length - 1, most)  # a last piece of one token predicts nothing
                return [Tokens(tokens.ids[s : s + most], tokens.supervised[s : s + most]) for s in starts]
        reason = "only raw text can be chunked" if self.data.too_long == "chunk" else "data.too_long is error"
        self.problems.append(f"{origin}: {length} tokens, {self.limit} and {reason}")
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
            too_long = any(self.limit in problem or "after token" in problem for problem in self.problems)
            raise DataError(
                "\n".join(self.problems[:_MOST_PROBLEMS]) + more,
                hint="raise data.max_length (up to the model's context), or say data.too_long: drop" if too_long else self.hint,
            )

    def notes(self) -> list[str]:
        """What the user should know and need not mend."""
        notes = []
        words = {
            "alpaca": "Alpaca: instruction and input became the user's turn, output the assistant's",
            "sharegpt": "ShareGPT: from/value became role/content",
        }
        plain = False
        for split, examples in self.examples.items():
            forms = Counter({e.origin: e.form for e in examples}.values())
            plain = plain or bool(forms["prompt_completion"] + forms["alpaca"])
            for form, word in words.items():
                if forms[form]:
                    notes.append(f"{split}: {plural(forms[form], 'record')} converted from {word}")
            pieces = Counter(e.origin for e in examples)
            for count, happened in (
                (self.dropped[split], "dropped"),
                (sum(e.truncated for e in examples), "truncated"),
                (sum(count > 1 for count in pieces.values()), "cut into pieces"),
            ):
                if count:
                    notes.append(f"{split}: {plural(count, 'record')} longer than {self.longest} tokens {happened}")
        if plain and not self.renderer.has_template:
            notes.append("the model has no chat template: prompt and completion are joined exactly as they are given")
        return notes


def _name(source: Source) -> str:
    return source.path or f"hub:{source.hub}/{source.split}"


def _placed(origin: sources.Origin, error: DataError) -> str:
    """The error's words with the record's place before them, once."""
    return error.message if error.message.startswith(str(origin)) else f"{origin}: {error.message}"
