"""One block of a source -> one shard: the records in it as tokens, and what the audit must know of each.

A shard depends on the block's bytes and on the settings here, on nothing else: not on where the file lies, what stands before the
block, how many processes work, or when. That is what lets shards be kept and used again, and a stopped preparation continue. A
record that cannot be used is noted with its place and the reason; none is lost.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fullrank.data import convert, sources
from fullrank.data.audit.labels import ShortAnswers
from fullrank.data.audit.observe import Observer
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.examples import Fitted, Limit, fit
from fullrank.data.sources import Block, Origin, Reject
from fullrank.data.subject import Subject, subject_of
from fullrank.errors import DataError
from fullrank.records import TestItem
from fullrank.run import fingerprint
from fullrank.sequences.chat import ChatFormat, ChatRenderer, LossOn, Rendering, Tokens, as_conversation, special_texts
from fullrank.sequences.store import Example as StoredExample
from fullrank.sequences.store import write_shard

#: Raised whenever the same records would give another shard, so that shards written before are not taken for current.
PREPARATION_VERSION = 4

#: Records encoded together: enough to spread the cost of a call, little enough to hold.
_BATCH = 256

Example = Conversation | Pair | Document


@dataclass(frozen=True)
class Settings:
    """What a shard depends on besides its records."""

    chat: ChatFormat
    loss_on: LossOn
    limit: Limit
    is_test: bool
    """Test records are kept as they are, to generate from; nothing in them is trained on."""
    skip: tuple[str, ...]
    """Kinds of findings not to look for."""
    mask: tuple[str, ...]
    """Kinds of sightings to replace by placeholders."""
    checks: str
    """Versions of the checks and of the libraries they use."""
    encoder: str
    """What encodes batches of texts, with its version."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the settings."""
        return fingerprint(PREPARATION_VERSION, asdict(self))

    @property
    def tokens_fingerprint(self) -> str:
        """SHA-256 over the settings that tokens depend on: what the audit looks for changes none, except where it is masked, nor
        does what encodes them.
        """
        settings = asdict(self)
        del settings["skip"], settings["encoder"]
        if not self.mask:
            del settings["checks"]
        return fingerprint(PREPARATION_VERSION, settings)


@dataclass
class _Notes:
    """What a shard says about its records besides arrays; see `Shard.notes`."""

    read: int = 0
    rejects: list[tuple[int, int, str, bool, bool]] = field(default_factory=list)
    """(line, byte, reason, asked for by the recipe, stands for more) of every record that was not used."""
    truncated: int = 0
    dropped: int = 0
    chunked: int = 0
    tokens: int = 0
    supervised: int = 0
    stop_ids: list[int] = field(default_factory=list)
    sightings: list[tuple[int, str, str, str, int, int]] = field(default_factory=list)
    """(record, kind, what, place, start, end)."""
    masked: Counter[str] = field(default_factory=Counter)
    answers: ShortAnswers | None = None
    """The short answers, counted: labels, where they are few."""
    items: list[dict[str, Any]] = field(default_factory=list)
    """Test items, in the order of the records."""
    longest_prompt: int = 0


_renderers: list[ChatRenderer] = []


def _shared(chat: ChatFormat) -> ChatRenderer:
    """One renderer for all tasks with the same format: its tokenizers take some 100 MB."""
    if not _renderers or _renderers[0].format != chat:
        _renderers[:] = [ChatRenderer.from_format(chat)]
    return _renderers[0]


@dataclass
class _Pending:
    """A record on its way."""

    origin: Origin
    form: convert.Form
    example: Example
    subject: Subject
    renderings: list[Rendering]
    sightings: list[Any]
    masked: Counter[str]


class Prepare:
    """The task of making shards; it travels to other processes as its settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __reduce__(self) -> tuple[Any, ...]:
        return Prepare, (self.settings,)

    def warm(self) -> None:
        """Loads the tokenizer."""
        self._renderer.warm()

    @cached_property
    def _renderer(self) -> ChatRenderer:
        return _shared(self.settings.chat)

    @cached_property
    def _observer(self) -> Observer:
        return Observer(special_texts(self.settings.chat), frozenset(self.settings.skip))

    def run(self, block: Block, path: Path) -> None:
        """Writes the block's shard under its final name, complete or not at all."""
        notes = _Notes()
        self._renderer.forget_stop_ids()  # what ended answers in blocks before is not this one's
        # As arrays: a list of Python's numbers takes nine times the memory, and all of a block is held until it is written.
        examples: list[StoredExample] = []
        subjects: list[Subject] = []
        places: list[tuple[int, int]] = []
        owners: list[int] = []
        facts: dict[str, list[int]] = {"tokens": [], "cut": [], "form": []}

        def finish(pending: list[_Pending]) -> None:
            for record, outcome in zip(pending, self._encoded(pending), strict=True):
                if isinstance(outcome, str):
                    self._reject(notes, block, record.origin, outcome)
                    continue
                notes.truncated += outcome.truncated
                notes.dropped += outcome.dropped
                notes.chunked += outcome.chunked
                if not outcome.examples and not self.settings.is_test:
                    reason = f"longer than {self.settings.limit.tokens} tokens, and data.too_long is drop"
                    self._reject(notes, block, record.origin, reason, asked_for=True)
                    continue
                for example in outcome.examples:
                    examples.append(StoredExample(np.asarray(example.ids, np.int32), np.asarray(example.supervised, np.bool_)))
                    owners.append(len(subjects))
                    notes.tokens += len(example.ids)
                    notes.supervised += example.supervised_targets()
                notes.masked += record.masked
                facts["tokens"].append(sum(len(example.ids) for example in outcome.examples))
                facts["cut"].append(outcome.truncated)
                facts["form"].append(convert.FORMS.index(record.form))
                for s in record.sightings:
                    notes.sightings.append((len(subjects), s.kind, s.what, s.place, s.start, s.end))
                subjects.append(record.subject)
                places.append(sources.within(block, record.origin))

        pending: list[_Pending] = []
        for item in sources.records(block):
            notes.read += 1
            if isinstance(item, Reject):
                self._reject(notes, block, item.origin, item.reason, loses_more=item.loses_more)
                continue
            try:
                pending.append(self._begin(item, notes))
            except DataError as error:
                self._reject(notes, block, item.origin, _without_place(error, item.origin))
            if len(pending) == _BATCH:
                finish(pending)
                pending = []
        finish(pending)
        notes.stop_ids = self._renderer.stop_ids() if examples else []
        notes.answers = self._observer.answers(subjects)
        columns: dict[str, np.ndarray] = {
            "tokens": np.asarray(facts["tokens"], np.uint32),
            "cut": np.asarray(facts["cut"], np.uint8),
            "form": np.asarray(facts["form"], np.uint8),
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            write_shard(
                partial,
                examples,
                owners,
                places,
                {**columns, **self._observer.facts(subjects)},
                vars(notes),
            )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _reject(
        self, notes: _Notes, block: Block, origin: Origin, reason: str, *, asked_for: bool = False, loses_more: bool = False
    ) -> None:
        notes.rejects.append((*sources.within(block, origin), reason, asked_for, loses_more))

    # ---- a record before it is tokens -------------------------------------------------------------------------------

    def _begin(self, item: sources.RawRecord, notes: _Notes) -> _Pending:
        form, example = convert.normalise(item)
        subject = subject_of(example)
        sightings = self._observer.look(subject)
        masked: Counter[str] = Counter()
        to_mask = [s for s in sightings if s.kind in self.settings.mask]
        if to_mask:
            example = self._observer.masked(example, to_mask)
            subject = subject_of(example)
            masked.update(s.kind for s in to_mask)
            sightings = [s for s in self._observer.look(subject) if s.kind not in self.settings.mask]
        renderings: list[Rendering] = []
        if self.settings.is_test:
            test = self._test_item(example)
            notes.longest_prompt = max(notes.longest_prompt, self._prompt_tokens(test))
            notes.items.append(test.model_dump())
        else:
            renderings = self._renderings(example)
        return _Pending(item.origin, form, example, subject, renderings, sightings, masked)

    def _renderings(self, example: Example) -> list[Rendering]:
        match example:
            case Conversation(messages, tools):
                return self._renderer.renderings(messages, tools=tools, loss_on=self.settings.loss_on)
            case Pair(prompt, completion) if self._renderer.has_template:
                return self._renderer.renderings(as_conversation(prompt, completion), loss_on=self.settings.loss_on)
        return []

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def _encoded(self, pending: list[_Pending]) -> Iterable[Fitted | str]:
        """What became of each record: its examples, or why it cannot be used."""
        if self.settings.is_test:
            return [Fitted([], 0, 0, False)] * len(pending)
        try:
            return self._fitted(pending, self._tokens(pending))
        except DataError:  # one of them, so each by itself
            outcomes: list[Fitted | str] = []
            for record in pending:
                try:
                    outcomes += self._fitted([record], self._tokens([record]))
                except DataError as error:
                    outcomes.append(error.message)
            return outcomes

    def _tokens(self, pending: list[_Pending]) -> list[list[Tokens]]:
        conversations = iter(self._renderer.tokens([r for record in pending for r in record.renderings]))
        texts = [record.example.text for record in pending if isinstance(record.example, Document)]
        documents = iter(self._renderer.documents(texts))
        made: list[list[Tokens]] = []
        for record in pending:
            match record.example:
                case Document():
                    made.append([next(documents)])
                case Pair(prompt, completion) if not record.renderings:
                    made.append([self._renderer.pair(prompt, completion, loss_on=self.settings.loss_on)])
                case _:
                    made.append([next(conversations) for _ in record.renderings])
        return made

    def _fitted(self, pending: list[_Pending], tokens: list[list[Tokens]]) -> list[Fitted | str]:
        outcomes: list[Fitted | str] = []
        for record, examples in zip(pending, tokens, strict=True):
            try:
                outcomes.append(fit(examples, self.settings.limit, is_document=isinstance(record.example, Document)))
            except DataError as error:
                outcomes.append(error.message)
        return outcomes

    # ---- test records -----------------------------------------------------------------------------------------------

    def _prompt_tokens(self, item: TestItem) -> int:
        if item.messages is None:
            return len(self._renderer.text_ids(item.prompt or ""))
        return len(self._renderer.prompt_ids(item.messages, tools=item.tools))

    def _test_item(self, example: Example) -> TestItem:
        # Its id is where it stands, which a shard does not know.
        match example:
            case Conversation(messages, tools):
                last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
                reference = messages[last].get("content") or ""
                return TestItem(id="", messages=messages[:last], prompt=None, tools=tools, reference=reference)
            case Pair(prompt, completion, choices, right):
                texts = [*choices[:right], completion, *choices[right + 1 :]] if choices else None  # the right one may be masked
                turns = as_conversation(prompt, completion)[:1] if self._renderer.has_template else None
                asked = None if turns else prompt
                return TestItem(id="", messages=turns, prompt=asked, tools=None, reference=completion, choices=texts)
            case Document():
                raise DataError("a test record needs a prompt and an answer; raw text belongs into data.validation")


def _without_place(error: DataError, origin: Origin) -> str:
    """The error's words without the place, which is kept beside them."""
    return error.message.removeprefix(f"{origin}: ")
