"""What `fullrank data` prints: examples as the model sees them, what the audit found, what the splits hold.

Pure functions from records to things rich can print. Promises: supervised tokens and control tokens are told from the others with
colours and without (where there are none, `⟦ ⟧` stand around the supervised and `‹ ›` around control tokens); nothing from the
data can steer the terminal, for what is not seen is shown by its number (`[U+001B]`); what a long list leaves out is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from rich.cells import cell_len, set_cell_size, split_graphemes
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fullrank.records import Audit, DataCard, ShownExample, ShownToken, SplitCard, TermsCard
from fullrank.report import data_page
from fullrank.report.data_page import visible, visible_token
from fullrank.units import format_count, plural

MOST_TOKENS = 400
"""Of one turn, its first three quarters from the beginning."""
MOST_LINES = 12
"""Of one kind of finding."""
MOST_PLACES = 6
"""Of one finding."""
MOST_TERMS = 15
_TOLD_REASONS = 3

_SUPERVISED_MARKS, _CONTROL_MARKS = ("⟦", "⟧"), ("‹", "›")
_SEVERITY_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
#: Two shades, so that neighbouring tokens can be told apart.
_SUPERVISED = ("white on #14532d", "white on #1d6b3c")
_CONTROL = "magenta"
_SUPERVISED_CONTROL = ("bold #f5d0fe on #14532d", "bold #f5d0fe on #1d6b3c")


# ---- examples -------------------------------------------------------------------------------------------------------


def example_text(example: ShownExample, *, ids: bool = False, folder: str = "", most: int | None = MOST_TOKENS) -> RenderableType:
    """An example, token by token, under a heading for every turn.

    Args:
        ids: the id of every token stands below it.
        folder: what is left out before the names of files.
        most: tokens of a turn that are shown, from both its ends; all of them where it is None.
    """
    return _Example(example, ids, folder, most)


@dataclass(frozen=True)
class _Example:
    example: ShownExample
    ids: bool
    folder: str
    most: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        is_plain = console.no_color or console.color_system is None
        example, width = self.example, max(20, options.max_width)
        origin = visible(example.origin.removeprefix(self.folder))
        yield Text(
            f"{visible(example.split)}, example {example.example:,}: {origin}, {plural(example.tokens, 'token')}, "
            f"{example.supervised_tokens:,} supervised",
            style="bold",
        )
        for turn in example.turns:
            yield _heading(turn.role, turn.tokens, width)
            for part, left_out in _ends(turn.tokens, self.most):
                cells = _cells(part, is_plain)
                yield from _with_ids(cells, width) if self.ids else _running(cells, width)
                if left_out:
                    supervised = sum(token.supervised for token in left_out)
                    yield Text(f"  … {plural(len(left_out), 'token')} not shown, {supervised:,} of them supervised …", "italic")
        if example.cut:
            yield Text(f"  ✂ {visible(example.cut)}", "bold red")


def _heading(role: str, tokens: Sequence[ShownToken], width: int) -> Text:
    supervised = sum(token.supervised for token in tokens)
    words = f"── {visible(role)}: {plural(len(tokens), 'token')}{f', {supervised:,} supervised' if supervised else ''} "
    return Text(words + "─" * max(2, min(width, 100) - cell_len(words)), "blue", no_wrap=True, overflow="crop")


def _ends(tokens: Sequence[ShownToken], most: int | None) -> Iterator[tuple[Sequence[ShownToken], Sequence[ShownToken]]]:
    """The tokens to show, each part with those that are left out behind it."""
    if most is None or len(tokens) <= most:
        yield tokens, ()
        return
    first = most * 3 // 4
    yield tokens[:first], tokens[first : len(tokens) - (most - first)]
    yield tokens[len(tokens) - (most - first) :], ()


@dataclass(frozen=True)
class _Cell:
    """One token as it is printed."""

    text: str
    id: int
    style: str
    begins_word: bool
    ends_line: bool


def _cells(tokens: Sequence[ShownToken], is_plain: bool) -> list[_Cell]:
    cells = []
    beside = [False, *(token.supervised for token in tokens), False]
    for number, token in enumerate(tokens):
        text = visible_token(token.text)
        if is_plain and token.control:
            text = text.join(_CONTROL_MARKS)
        if is_plain and token.supervised:
            before, after = _SUPERVISED_MARKS
            text = before * (not beside[number]) + text + after * (not beside[number + 2])
        shade = number % 2
        if token.supervised:
            style = (_SUPERVISED_CONTROL if token.control else _SUPERVISED)[shade]
        else:
            style = _CONTROL if token.control else "dim"
        begins_word = token.control or token.text[:1].isspace()
        cells.append(_Cell(text, token.id, "" if is_plain else style, begins_word, token.text.endswith("\n")))
    return cells


_INDENT = "  "


def _running(cells: Sequence[_Cell], width: int) -> Iterator[Text]:
    """The tokens as running text: lines end where the text's do, and otherwise before a word."""
    line, used = Text(_INDENT), len(_INDENT)
    for word in _words(cells):
        length = sum(cell_len(cell.text) for cell in word)
        if used + length > width and used > len(_INDENT):
            yield _line(line)
            line, used = Text(_INDENT), len(_INDENT)
        for cell in word:
            for piece in _pieces(cell.text, width - len(_INDENT)):
                if used + cell_len(piece) > width:
                    yield _line(line)
                    line, used = Text(_INDENT), len(_INDENT)
                line.append(piece, cell.style)
                used += cell_len(piece)
        if word[-1].ends_line:
            yield _line(line)
            line, used = Text(_INDENT), len(_INDENT)
    if used > len(_INDENT):
        yield _line(line)


def _words(cells: Sequence[_Cell]) -> Iterator[Sequence[_Cell]]:
    """Runs of tokens that lines are not broken in."""
    starts = [n for n, cell in enumerate(cells) if n == 0 or cell.begins_word or cells[n - 1].ends_line]
    for start, end in pairwise([*starts, len(cells)]):
        yield cells[start:end]


def _pieces(text: str, width: int) -> Iterator[str]:
    """A text in pieces that fit a line."""
    piece = ""
    for start, end, _ in split_graphemes(text)[0]:
        if cell_len(piece + text[start:end]) > width:
            yield piece
            piece = ""
        piece += text[start:end]
    yield piece


def _with_ids(cells: Sequence[_Cell], width: int) -> Iterator[Text]:
    """The tokens in rows, each over its id."""
    row: list[_Cell] = []
    used = len(_INDENT)
    for cell in cells:
        cell = replace(cell, text=cell.text if cell_len(cell.text) < width - 4 else set_cell_size(cell.text, width - 5) + "…")
        length = max(cell_len(cell.text), len(str(cell.id))) + 1
        if row and used + length > width:
            yield from _row(row)
            row, used = [], len(_INDENT)
        row.append(cell)
        used += length
        if cell.ends_line:
            yield from _row(row)
            row, used = [], len(_INDENT)
    if row:
        yield from _row(row)


def _row(cells: Sequence[_Cell]) -> Iterator[Text]:
    texts, ids = Text(_INDENT), Text(_INDENT)
    for cell in cells:
        length = max(cell_len(cell.text), len(str(cell.id)))
        texts.append(cell.text, cell.style)
        texts.append(" " * (length - cell_len(cell.text) + 1))
        ids.append(f"{cell.id:<{length}} ", "dim")
    texts.rstrip()
    ids.rstrip()
    yield _line(texts)
    yield _line(ids)


def _line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "crop"
    return text


# ---- findings -------------------------------------------------------------------------------------------------------


def findings_text(audit: Audit, *, accepted: Collection[str] = (), folder: str = "", lines: int = MOST_LINES) -> RenderableType:
    """What the audit found, by kind, the worst first; then what it did not look at.

    Args:
        accepted: kinds of findings whose errors the recipe accepts.
        folder: what is left out before the names of files.
        lines: most lines of a kind, wrapped ones counted once.
    """
    parts: list[RenderableType] = []
    for group in data_page.by_kind(audit.findings, accepted):
        heading = Text()
        heading.append(f"{group.severity:<8}", _SEVERITY_STYLES[group.severity])
        heading.append(visible(group.kind), "bold")
        heading.append(f": {plural(len(group.findings), 'finding')}")
        heading.append(f", {plural(group.records, 'record')}" if group.records else "")
        heading.append(", accepted by the recipe" if group.accepted else "")
        parts.append(heading)
        advice = group.advice[:2]
        room = max(1, lines - 1 - len(advice))
        shown = group.findings if len(group.findings) <= room else group.findings[: max(1, room - 1)]
        for finding in shown:
            line = Text(visible(finding.what))
            where = data_page.places(finding, MOST_PLACES, folder)
            line.append(f"  {where}" if where else "", "dim")
            parts.append(_indented(line))
        if len(shown) < len(group.findings):
            more = plural(len(group.findings) - len(shown), "more finding")
            parts.append(_indented(Text(f"and {more} in data/audit.json", "dim")))
        parts += [_indented(Text(visible(words), "green"), "→ ") for words in advice]
    if not audit.findings:
        parts.append(Text("no findings"))
    for check, why in audit.left_out.items():
        parts.append(Text(f"not checked: {visible(check)}: {visible(why)}", "dim"))
    for check, which in audit.sampled.items():
        parts.append(Text(f"checked in part: {visible(check)}: {visible(which)}", "dim"))
    return Group(*parts)


def _indented(text: Text, mark: str = "") -> Table:
    """A line that stays indented where it wraps."""
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_row(" " * (8 - len(mark)) + mark, text)
    return grid


# ---- the card -------------------------------------------------------------------------------------------------------


def card_text(card: DataCard, *, folder: str = "") -> RenderableType:
    """What every split holds: records read, used and rejected, examples, tokens, lengths; sources where there are several."""
    records = _table("records", "read", "used", "rejected")
    examples = _table("examples", "", "tokens", "supervised", "shortest", "median", "95 %", "longest")
    mixes: list[RenderableType] = []
    for name, split in card.stored.items():
        lengths = split.lengths
        records.add_row(Text(name, "bold"), *(f"{count:,}" for count in (split.read, split.used, split.quarantined)))
        examples.add_row(
            Text(name, "bold"),
            f"{split.examples:,}",
            format_count(split.tokens),
            f"{split.supervised_ratio:.2f}",
            *(f"{length:,}" for length in (lengths.shortest, lengths.median, lengths.p95, lengths.longest)),
        )
        if len(split.sources) > 1:
            mixes += [Text(), _mix(name, split, folder)]
    for name, test in card.tests.items():
        used = test.read - test.quarantined
        records.add_row(Text(visible(name), "bold"), *(f"{count:,}" for count in (test.read, used, test.quarantined)))
    lines = [Text(words) for name in ("train", "validation") for words in _losses(name, getattr(card, name))]
    return Group(records, Text(), examples, *mixes, *lines, *(Text(visible(note), "dim") for note in card.notes))


def rejected_text(reasons: Counter[str], path: Path) -> RenderableType:
    """Why records were rejected, the commonest reasons first, and where they are listed."""
    most = [Text(f"  {count:,} x {visible(reason)}") for reason, count in reasons.most_common(_TOLD_REASONS)]
    others = len(reasons) - len(most)
    more = f"and {plural(others, 'reason')} more; " if others else ""
    where = Text(f"  {more}each with its place in {path}")
    return Group(Text(f"{plural(sum(reasons.values()), 'record')} rejected:"), *most, where)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _mix(name: str, split: SplitCard, folder: str) -> Table:
    """Where a split's examples come from, and in what shares."""
    table = _table(f"sources of {name}", "weight", "read", "rejected", "examples", "of examples", "of tokens")
    for source in split.sources:
        table.add_row(
            Text(visible(source.name.removeprefix(folder))),
            "" if source.weight is None else f"{source.weight:g}",
            *(f"{count:,}" for count in (source.read, source.quarantined, source.examples)),
            f"{source.examples_ratio:.3f}",
            f"{source.tokens_ratio:.3f}",
        )
    return table


def _losses(name: str, split: SplitCard) -> Iterator[str]:
    """What a user must not overlook in a split."""
    if split.dropped_too_long:
        yield f"{name}: {plural(split.dropped_too_long, 'example')} dropped, longer than data.max_length"
    if split.truncated:
        yield f"{name}: {plural(split.truncated, 'example')} truncated to data.max_length"
    for kind, count in split.masked.items():
        yield f"{name}: {plural(count, 'passage')} masked: {visible(kind)}"


# ---- words of the domain --------------------------------------------------------------------------------------------


def terms_text(terms: TermsCard) -> RenderableType:
    """What the tokenizer makes of the words of the domain: the terms that would gain most from a place in the vocabulary."""
    inside = f"{terms.term_fertility:.2f} in {plural(terms.found, 'term')}, " if terms.found else ""
    said = Text(
        f"{terms.fertility:.2f} tokens a word ({inside}{terms.ordinary_fertility:.2f} in other words of letters), "
        f"{terms.bytes_per_token:.2f} bytes a token; one token for each of the 10 best terms would save "
        f"{terms.saved_by_10:.1f} tokens of 1,000, for all of them {terms.saved_by_all:.1f}"
    )
    table = _table("term", "occurrences", "saved per 1,000", "split as")
    table.columns[-1].justify = "left"
    for term in terms.terms[:MOST_TERMS]:
        pieces = Text()
        for number, piece in enumerate(term.pieces):
            pieces.append("|" if number else "", "dim")
            pieces.append(visible_token(piece), "red" if piece in term.broken else "")
        table.add_row(Text(visible(term.text)), f"{term.occurrences:,}", f"{term.saved_per_1000:.2f}", pieces)
    parts: list[RenderableType] = [said, *([table] if terms.terms else [])]
    if terms.found > MOST_TERMS:
        parts.append(Text(f"and {plural(terms.found - MOST_TERMS, 'more term')} in data/terms.json", "dim"))
    if terms.absent_count:
        parts.append(Text(f"{plural(terms.absent_count, 'term')} of the glossary not found in the data", "dim"))
    return Group(*parts)
