"""Examples to look at: which ones tell most about a split, and each as the model sees it, token by token.

An example's tokens come from its store, exactly as training reads them; the record behind it is read again from its source, for
the turns that the tokens belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fullrank.data import convert, hub, show, sources
from fullrank.data.audit import personal
from fullrank.data.audit.observe import Observer
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.sources import RawRecord
from fullrank.data.splits import all_sources
from fullrank.data.subject import subject_of
from fullrank.errors import DataError, UsageError
from fullrank.recipe import Data
from fullrank.records import Audit, ShownExample
from fullrank.sequences.chat import ChatFormat, ChatRenderer, Tokens, as_conversation, special_texts
from fullrank.sequences.store import Example, TokenStore


class Samples:
    """Shows examples of one split.

    Args:
        folder: the run's `data` folder.
        split: train or validation.
        data: the recipe's section.
        chat: of the model's tokenizer and template.
    """

    def __init__(self, folder: Path, split: str, data: Data, chat: ChatFormat) -> None:
        self.split, self.data = split, data
        self.store = TokenStore(folder / split)
        self._renderer = ChatRenderer.from_format(chat)
        self._tokenizer = self._renderer.backend
        control = self._renderer.format.control_tokens
        self._control_ids = {token.id for token in control}
        self._observer = Observer(special_texts(self._renderer.format), frozenset())

    # ---- which ------------------------------------------------------------------------------------------------------

    def telling(self, audit: Audit) -> list[int]:
        """The first example, those of median, least and most tokens, one that was cut, and one of each kind of finding.

        Records with secrets are shown on request only: what is chosen here goes onto a page that people hand on.
        """
        if not len(self.store):
            return []
        order = np.argsort(self.store.lengths, kind="stable")
        chosen = [0, int(order[len(order) // 2]), int(order[-1]), int(order[0])]
        chosen += self._cut()[:1]
        for kind in dict.fromkeys(finding.kind for finding in audit.findings):
            places = (place for f in audit.findings if f.kind == kind for place in f.records if place.split == self.split)
            place = next(places, None)
            chosen += self.at(place.path, place.line)[:1] if place else []
        secret = {(p.path, p.line) for f in audit.findings if f.kind == "secret" for p in f.records}
        return [number for number in dict.fromkeys(chosen) if self._place(number) not in secret]

    def _place(self, number: int) -> tuple[str, int]:
        """File and line of the record behind an example."""
        which, within = self.store.examples[number]
        place, facts = self.store.places[which], self.store.shard(int(which))
        return place.path, place.first + int(facts["line"][facts["record"][within]])

    def _cut(self) -> list[int]:
        for number in range(len(self.store.places)):
            shard = self.store.shard(number)
            found = self._examples(number, np.flatnonzero(shard["cut"]))
            if found:  # they may all be in another split
                return found
        return []

    def at(self, path: str, line: int) -> list[int]:
        """The examples made from the record at a line of a file; the file by any end of its path."""
        found: list[int] = []
        for number, place in enumerate(self.store.places):
            if not (place.path == path or place.path.endswith(f"/{path}")) or line < place.first:
                continue
            found += self._examples(number, np.flatnonzero(self.store.shard(number)["line"] == line - place.first))
        return found

    def on_line(self, line: int) -> list[int]:
        """The examples made from the records at this line, of whichever file."""
        return [n for path in dict.fromkeys(place.path for place in self.store.places) for n in self.at(path, line)]

    def _examples(self, shard: int, records: np.ndarray) -> list[int]:
        within = np.flatnonzero(np.isin(self.store.shard(shard)["record"], records))
        chosen = (self.store.examples[:, 0] == shard) & np.isin(self.store.examples[:, 1], within)
        numbers = np.flatnonzero(chosen)
        _, first = np.unique(self.store.examples[numbers, 1], return_index=True)  # a mix may have an example several times
        return [int(number) for number in np.sort(numbers[first])]

    # ---- how --------------------------------------------------------------------------------------------------------

    def shown(self, examples: Sequence[int]) -> list[ShownExample]:
        """Examples as the model sees them.

        Raises:
            UsageError: there is no such example.
            DataError: a source has changed since it was prepared.
        """
        for number in examples:
            if not 0 <= number < len(self.store):
                raise UsageError(f"{self.split} has no example {number}: there are {len(self.store):,}, counted from 0")
        records = self._read_again(examples)
        return [self._shown(number, records[number]) for number in examples]

    def _shown(self, number: int, raw: RawRecord) -> ShownExample:
        example = self.store[number]
        return show.shown(
            Tokens(example.ids.tolist(), example.supervised.tolist()),
            split=self.split,
            number=number,
            origin=self.store.origin(number),
            tokenizer=self._tokenizer,
            control_ids=self._control_ids,
            turns=self._turns(raw, example),
            cut=self._words(number),
        )

    def _turns(self, raw: RawRecord, example: Example) -> list[tuple[int, str]]:
        _, record = convert.normalise(raw)
        if self.data.audit.mask:
            sightings = self._observer.look(subject_of(record))
            record = personal.masked_example(record, sightings, frozenset(self.data.audit.mask))
        ids = example.ids.tolist()
        match record:
            case Document():
                return [(0, "document")]
            case Conversation(messages, tools):
                return show.turn_starts(self._renderer, messages, tools, ids, self._tokenizer)
            case Pair(prompt, completion) if self._renderer.has_template:
                return show.turn_starts(self._renderer, as_conversation(prompt, completion), None, ids, self._tokenizer)
        answer = int(np.argmax(example.supervised)) if example.supervised.any() else 0
        return [(0, "prompt"), (answer, "completion")] if answer else [(0, "completion")]

    def _words(self, number: int) -> str:
        """What was cut off, and where."""
        shard, within = (int(value) for value in self.store.examples[number])
        facts = self.store.shard(shard)
        record = facts["record"][within]
        if facts["cut"][record]:
            return f"the end of the record was cut off after {self.store.lengths[number]:,} tokens (data.too_long: truncate)"
        pieces = np.flatnonzero(facts["record"] == record)
        if len(pieces) > 1:
            return f"part {int(np.searchsorted(pieces, within)) + 1} of {len(pieces)} of its record"
        return ""

    def _read_again(self, examples: Iterable[int]) -> dict[int, RawRecord]:
        found: dict[int, RawRecord] = {}
        wanted: dict[tuple[str, int, int | None], list[int]] = {}  # one line of an array may hold several records
        for number in examples:
            shard, within = self.store.examples[number]
            place, facts = self.store.places[shard], self.store.shard(int(shard))
            record = facts["record"][within]
            line, byte = place.first + int(facts["line"][record]), int(facts["byte"][record])
            offset = None if place.byte is None or byte < 0 else place.byte + byte
            if offset is not None and sources.is_seekable(place.path):
                found[number] = sources.read_at(place.path, offset, line)
            else:
                wanted.setdefault((place.path, line, offset), []).append(number)
        for source in all_sources(self.data):
            named = {path for path, _, _ in wanted}
            if named & {*sources.files(source), *([hub.name(source)] if source.hub else [])}:
                for item in sources.read(source):
                    if isinstance(item, RawRecord):
                        for number in wanted.pop((item.origin.path, item.origin.line, item.origin.offset), []):
                            found[number] = item
                    if not wanted:
                        break
        if wanted:
            path, line, _ = next(iter(wanted))
            raise DataError(f"{path}:{line}: the record is no longer there", hint="the file has changed; run the command again")
        return found
