"""What the data stage left in a run folder -> `report/data.html`: what the model is trained on, token by token.

One page that stands alone, like the report beside it: no network, no script. Promises: everything on it stands in a record of the
run's `data/`; every text from the data is escaped, and characters that are not seen or that turn the direction of writing are
shown by number (`[U+202E]`) instead of taking effect. Where a list is cut, the page says what it leaves out and where it stands.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import BaseModel, ValidationError

from fullrank.errors import UsageError
from fullrank.records import (
    Audit,
    DataCard,
    Finding,
    LengthSummary,
    Quarantined,
    Severity,
    ShownExample,
    ShownToken,
    TermsCard,
)
from fullrank.run import Run, need_record, read_record, write_text
from fullrank.units import format_bytes, format_count, format_seconds, plural

RowType = TypeVar("RowType", bound=BaseModel)

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first."""

# What the page shows of long lists; all of it stands in the run's `data/`.
MOST_QUARANTINED = 200
MOST_FINDINGS = 40
"""Of one kind."""
MOST_PLACES = 8
"""Of one finding."""
MOST_TERMS = 50
FIRST_TOKENS, LAST_TOKENS = 700, 200
"""Of one turn; both ends are kept, since that is where masks and cuts go wrong."""


@dataclass(frozen=True)
class Group:
    """The findings of one kind."""

    kind: str
    severity: Severity
    """The worst of them."""
    findings: tuple[Finding, ...]
    records: int
    """Records concerned, over all of the findings."""
    advice: tuple[str, ...]
    """What to do, each thing said once."""
    accepted: bool
    """The recipe accepts errors of this kind."""


@dataclass(frozen=True)
class DataPage:
    """The records that the page prints."""

    card: DataCard
    audit: Audit | None
    shown: tuple[ShownExample, ...]
    quarantined: int
    quarantine: tuple[Quarantined, ...]
    """The first `MOST_QUARANTINED`."""
    terms: TermsCard | None
    accepted: frozenset[str] = field(default_factory=frozenset)
    """Kinds of findings whose errors the recipe accepts."""

    @property
    def groups(self) -> list[Group]:
        """The findings by kind, the worst first."""
        return by_kind(self.audit.findings if self.audit else (), self.accepted)

    @property
    def severities(self) -> dict[Severity, int]:
        """Findings of each severity."""
        found = [finding.severity for finding in self.audit.findings] if self.audit else []
        return {severity: found.count(severity) for severity in SEVERITIES}

    @property
    def folder(self) -> str:
        """The folder that all files of the page lie in, which is left out before their names."""
        audit = [place.path for finding in self.audit.findings for place in finding.records] if self.audit else []
        trained = [file for split in (self.card.train, self.card.validation) for file in split.files]
        tested = [file for test in self.card.tests.values() for file in test.files]
        return common_folder([*audit, *trained, *tested, *(row.path for row in self.quarantine)])


def read(run: Run, accepted: Collection[str] = ()) -> DataPage | None:
    """The records of a run's `data/`; None where there is no data card.

    Raises:
        UsageError: a line of a record file cannot be read.
    """
    card = read_record(run.data / "card.json", DataCard)
    return None if card is None else _read(run, card, accepted)


def write(run: Run, accepted: Collection[str] = ()) -> Path:
    """Writes `report/data.html` from the run's `data/`, whether or not the run has been trained.

    Returns:
        the page.

    Raises:
        UsageError: the run's data have not been prepared, a line of a record file cannot be read, or `report/` cannot be written.
        FitError: the disk is full.
    """
    page = _read(run, need_record(run.data / "card.json", DataCard, "data"), accepted)
    write_text(run.report / "data.html", render(page, run.name))
    return run.report / "data.html"


def _read(run: Run, card: DataCard, accepted: Collection[str]) -> DataPage:
    quarantined, quarantine = _rows(run.data / "quarantine.jsonl", Quarantined, MOST_QUARANTINED)
    _, shown = _rows(run.data / "shown.jsonl", ShownExample)
    return DataPage(
        card=card,
        audit=read_record(run.data / "audit.json", Audit),
        shown=tuple(shown),
        quarantined=quarantined,
        quarantine=tuple(quarantine),
        terms=read_record(run.data / "terms.json", TermsCard),
        accepted=frozenset(accepted),
    )


def _rows(path: Path, row_type: type[RowType], most: int | None = None) -> tuple[int, list[RowType]]:
    """How many rows a record file has, and the first of them; a file that is not there has none."""
    if not path.exists():
        return 0, []
    count, rows = 0, []
    with path.open("rb") as file:
        for count, line in enumerate(file, start=1):
            if most is not None and count > most:
                continue
            try:
                rows.append(row_type.model_validate_json(line))
            except ValidationError as error:
                raise UsageError(
                    f"{path}: row {count} is not a {row_type.__name__}: {error.errors()[0]['msg']}",
                    hint="another version of fullrank wrote it; prepare the data again",
                ) from error
    return count, rows


# ---- what the records say together ----------------------------------------------------------------------------------


def by_kind(findings: Iterable[Finding], accepted: Collection[str] = ()) -> list[Group]:
    """Findings by kind: kinds with the worst severity first, then those that concern the most records; so inside a kind."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    groups = []
    for kind, found in kinds.items():
        ordered = sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), -finding.count))
        groups.append(
            Group(
                kind=kind,
                severity=ordered[0].severity,
                findings=tuple(ordered),
                records=sum(finding.count for finding in ordered),
                advice=tuple(dict.fromkeys(finding.advice for finding in ordered)),
                accepted=kind in accepted and ordered[0].severity == "error",
            )
        )
    return sorted(groups, key=lambda group: (SEVERITIES.index(group.severity), -group.records, group.kind))


def common_folder(paths: Iterable[str]) -> str:
    """The folder that holds every absolute path, with a slash behind it; empty where it would be the root or there is none."""
    folders = [path.split("/")[:-1] for path in paths if path.startswith("/")]
    if not folders:
        return ""
    low, high = min(folders), max(folders)  # what these two share, all between them share
    same = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return "/".join(low[:same]) + "/" if same > 1 else ""


def places(finding: Finding, most: int, folder: str = "") -> str:
    """Where a finding's records stand: `test.jsonl:3, 8 (test), train.jsonl:12 and 41 more`; a few of every file.

    Args:
        most: places named, or two of every file where that is more.
        folder: what is left out before the names of files.
    """
    lines: dict[tuple[str, str], list[int]] = {}
    for record in finding.records:
        lines.setdefault((record.path, record.split), []).append(record.line)
    each = max(2, most // max(1, len(lines)))
    named = [
        f"{visible(path.removeprefix(folder))}:{', '.join(map(str, found[:each]))}"
        + (f" ({visible(split)})" if split != "train" else "")
        for (path, split), found in lines.items()
    ]
    more = max(finding.count, len(finding.records)) - sum(min(each, len(found)) for found in lines.values())
    return ", ".join(named) + (f" and {more:,} more" if named and more > 0 else "")


class _Visible(dict[int, str]):
    """Code points -> how they are shown, filled as they come; those shown as they are stand for themselves."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        hidden = unicodedata.category(letter) in _UNSEEN or (letter != " " and unicodedata.category(letter) == "Zs")
        self[code] = f"[U+{code:04X}]" if hidden or code in _BLANK else letter
        return self[code]


#: Control and format characters, surrogates, private use, unassigned, line and paragraph separators.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
#: Characters of other categories that show nothing: fillers, the grapheme joiner, the blank of Braille, variation selectors.
_BLANK = frozenset(
    {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
)
_LINE = _Visible({ord("\n"): "↵", ord("\t"): "⇥"})
_TOKEN = _Visible({ord("\n"): "↵", ord("\t"): "⇥", ord(" "): "·"})
#: Bytes of a part of a character, as the record writes them: the spaces between them are none of the token's.
_BYTES = re.compile(r"⟨[0-9A-F]{2}(?:·[0-9A-F]{2})+(?=[=⟩])")


def visible(text: str) -> str:
    """A text on one line with nothing in it that is unseen or takes effect: `[U+202E]`, `↵` for a line break, `⇥` for a tab."""
    return text.translate(_LINE)


def visible_token(text: str) -> str:
    """A token's text, spaces shown as `·` too; `⟨⟩` where it has none."""
    return _BYTES.sub(lambda some: some[0].replace("·", " "), text.translate(_TOKEN)) or "⟨⟩"


# ---- the page -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Strip:
    """Lengths of a split on a line from 0 to the longest of all splits, as shares of it in percent."""

    low: float
    width: float
    median: float
    p95: float


def render(page: DataPage, name: str) -> str:
    """The page.

    Args:
        name: of the run.
    """
    folder = page.folder

    def short(path: str) -> str:
        return visible(path.removeprefix(folder))

    def where(finding: Finding) -> str:
        return places(finding, MOST_PLACES, folder)

    environment = Environment(
        loader=PackageLoader("fullrank.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=format_bytes,
        seconds=format_seconds,
        count=format_count,
        visible=visible,
        short=short,
        where=where,
        tokens=_tokens,
        piece=visible_token,
    )
    splits = page.card.stored
    longest = max(split.lengths.longest for split in splits.values())
    text = environment.get_template("data.html.jinja").render(
        page=page,
        card=page.card,
        name=name,
        folder=folder,
        splits=splits,
        strips={split: _strip(card.lengths, longest) for split, card in splits.items()},
        most_findings=MOST_FINDINGS,
        most_terms=MOST_TERMS,
        plural=plural,
    )
    return text.rstrip() + "\n"


def _strip(lengths: LengthSummary, longest: int) -> _Strip:
    def share(length: int) -> float:
        return 100 * length / max(1, longest)

    return _Strip(
        share(lengths.shortest), share(lengths.longest) - share(lengths.shortest), share(lengths.median), share(lengths.p95)
    )


def _tokens(tokens: Sequence[ShownToken]) -> Markup:
    """A turn's tokens, the middle of a long one left out."""
    if len(tokens) <= FIRST_TOKENS + LAST_TOKENS:
        return Markup("").join(map(_token, tokens))
    left_out = tokens[FIRST_TOKENS:-LAST_TOKENS]
    supervised = sum(token.supervised for token in left_out)
    words = f" … {plural(len(left_out), 'token')} not shown, {supervised:,} of them supervised … "
    return Markup("").join(
        [
            *map(_token, tokens[:FIRST_TOKENS]),
            Markup('<span class="cut">{}</span>').format(words),
            *map(_token, tokens[-LAST_TOKENS:]),
        ]
    )


def _token(token: ShownToken) -> Markup:
    kinds = "t" + " s" * token.supervised + " c" * token.control
    words = ", ".join(
        [f"id {token.id}", *(["control token"] if token.control else []), "supervised" if token.supervised else "not supervised"]
    )
    text = escape(visible_token(token.text))
    # A line of the page ends where the text's does, and may end before any word.
    before = Markup("<wbr>") if token.text[:1].isspace() else Markup("")
    after = Markup("<br>") if token.text.endswith("\n") else Markup("")
    return Markup('{}<span class="{}" title="{}" data-id="{}">{}</span>{}').format(before, kinds, words, token.id, text, after)
