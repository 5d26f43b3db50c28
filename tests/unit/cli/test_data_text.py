"""data_text: what is supervised is told from the rest with colours and without, and hostile data stay letters."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fullrank.cli import data_text
from fullrank.records import (
    Audit,
    DataCard,
    Finding,
    LengthSummary,
    Place,
    ShownExample,
    ShownToken,
    ShownTurn,
    SourceCard,
    SplitCard,
    Term,
    TermsCard,
    TestCard,
)


def printed(thing: Any, width: int = 60, **console: Any) -> str:
    """As a pipe gets it, unless the console says otherwise."""
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, **console).print(thing)
    return out.getvalue()


def body(text: str) -> list[str]:
    """The lines below the first turn's heading, which long paths may push down."""
    lines = [line.rstrip() for line in text.splitlines()]
    return lines[next(n for n, line in enumerate(lines) if line.startswith("──")) + 1 :]


def tokens(*texts: str, supervised: bool = False, first_id: int = 100) -> list[ShownToken]:
    """Control tokens are written `<...>` here."""
    return [
        ShownToken(id=first_id + n, text=text, supervised=supervised, control=text.startswith("<") and text.endswith(">"))
        for n, text in enumerate(texts)
    ]


def example(*turns: tuple[str, list[ShownToken]], cut: str = "") -> ShownExample:
    every = [token for _, part in turns for token in part]
    return ShownExample(
        split="train",
        example=1234,
        origin="/data/case/train.jsonl:7",
        tokens=len(every),
        supervised_tokens=sum(token.supervised for token in every),
        turns=[ShownTurn(role=role, tokens=part) for role, part in turns],
        cut=cut,
    )


CHAT = example(
    ("user", tokens("<|im_start|>", "user", "\n", "What", " is", " it", "?", "<|im_end|>", "\n")),
    (
        "assistant",
        [
            *tokens("<|im_start|>", "assistant", "\n"),
            *tokens("Four", " words", ".", "<|im_end|>", supervised=True),
            *tokens("\n"),
        ],
    ),
)


# ---- examples ---------------------------------------------------------------------------------------------------------------


def test_without_colours_marks_stand_around_what_is_supervised() -> None:
    lines = [line.rstrip() for line in printed(data_text.example_text(CHAT, folder="/data/case/")).splitlines()]
    assert lines == [
        "train, example 1,234: train.jsonl:7, 17 tokens, 4 supervised",
        "── user: 9 tokens ──────────────────────────────────────────",
        "  ‹<|im_start|>›user↵",
        "  What·is·it?‹<|im_end|>›↵",
        "── assistant: 8 tokens, 4 supervised ───────────────────────",
        "  ‹<|im_start|>›assistant↵",
        "  ⟦Four·words.‹<|im_end|>›⟧↵",
    ]


def test_text_that_looks_like_a_control_token_has_no_marks() -> None:
    lookalike = [token.model_copy(update={"control": False}) for token in tokens("<|im_end|>")]
    text = printed(data_text.example_text(example(("user", [*lookalike, *tokens("<|im_end|>")]))))
    assert "  <|im_end|>‹<|im_end|>›" in text


def test_with_colours_every_token_has_its_own_and_no_marks_are_needed() -> None:
    text = printed(data_text.example_text(CHAT), force_terminal=True, color_system="truecolor")
    assert "⟦" not in text and "‹" not in text
    greens = ("\x1b[37;48;2;20;83;45m", "\x1b[37;48;2;29;107;60m")
    assert f"{greens[1]}Four\x1b[0m{greens[0]}·words\x1b[0m{greens[1]}.\x1b[0m" in text
    assert "\x1b[2mWhat\x1b[0m" in text and "\x1b[35m<|im_end|>\x1b[0m" in text


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(data_text.example_text(CHAT), force_terminal=True, color_system="truecolor")
    assert "⟦Four·words.‹<|im_end|>›⟧" in text and "48;2;" not in text


def test_lines_break_before_words_and_nothing_is_lost() -> None:
    words = [f" word{n}" if n % 3 else f"part{n}" for n in range(60)]
    shown = data_text.example_text(example(("user", tokens(*words))), most=None)
    for width in (20, 33, 80):
        lines = body(printed(shown, width))
        assert all(len(line) <= width for line in lines)
        assert "".join(line.strip() for line in lines) == "".join(words).replace(" ", "·")
        assert all(line.strip().startswith("·") for line in lines[1:])


def test_a_token_longer_than_a_line_is_folded() -> None:
    lines = body(printed(data_text.example_text(example(("user", tokens("漢" * 50, "x" * 70)))), 30))
    assert "".join(line.strip() for line in lines) == "漢" * 50 + "x" * 70


def test_ids_stand_below_their_tokens() -> None:
    mixed = [*tokens("a", " bb", "\n", first_id=9), *tokens("漢", "end", supervised=True, first_id=12345)]
    assert body(printed(data_text.example_text(example(("user", mixed)), ids=True))) == [
        "  a ·bb ↵",
        "  9 10  11",
        "  ⟦漢   end⟧",
        "  12345 12346",
    ]
    narrow = printed(data_text.example_text(example(("user", tokens(*["word"] * 40))), ids=True), 40)
    assert all(len(line) <= 40 for line in narrow.splitlines())
    assert narrow.count("word") == 40 and all(str(100 + n) in narrow for n in range(40))


def test_the_cut_is_marked_where_the_tokens_end() -> None:
    text = printed(data_text.example_text(example(("user", tokens("a")), cut="the last 5 tokens are cut off")))
    assert text.rstrip().splitlines()[-1] == "  ✂ the last 5 tokens are cut off"


def test_the_middle_of_a_long_turn_is_left_out_and_counted() -> None:
    many = [*tokens(*"x" * 500), *tokens(*"y" * 500, supervised=True)]
    text = "".join(body(printed(data_text.example_text(example(("user", many)), most=100))))
    assert text.count("x") == 75 and text.count("y") == 25
    assert "… 900 tokens not shown, 475 of them supervised …" in text
    whole = printed(data_text.example_text(example(("user", many)), most=None))
    assert whole.count("y") == 500


HOSTILE = "\x1b[31mred\x07 \u202eevil\u202c zero\u200bwidth \U000e0041 \r [bold]markup[/bold]"


def test_nothing_from_the_data_steers_the_terminal() -> None:
    place = Place(path=HOSTILE, line=1, split=HOSTILE)
    bad = Finding(kind=HOSTILE, severity="error", what=HOSTILE, records=[place], count=1, advice=HOSTILE)
    audit = Audit(findings=[bad], left_out={HOSTILE: HOSTILE}, sampled={HOSTILE: HOSTILE})
    shown = example((HOSTILE, tokens(HOSTILE)), cut=HOSTILE).model_copy(update={"origin": HOSTILE, "split": HOSTILE})
    everything = [
        data_text.example_text(shown),
        data_text.example_text(shown, ids=True),
        data_text.findings_text(audit),
        data_text.card_text(card(notes=[HOSTILE], masked={HOSTILE: 1}, name=HOSTILE)),
        data_text.terms_text(terms(HOSTILE)),
    ]
    for thing in everything:
        text = printed(thing, 400)
        assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) == {"\n"}
        assert "[U+001B][31mred[U+0007]" in text and "[U+202E]evil[U+202C]" in text and "zero[U+200B]width" in text
        assert "[bold]markup[/bold]" in text and "[U+E0041]" in text and "[U+000D]" in text


# ---- findings ---------------------------------------------------------------------------------------------------------------


def found(kind: str, severity: Any, number: int = 1, advice: str = "") -> Finding:
    places = [Place(path="/data/case/train.jsonl", line=number + n, split="train") for n in range(2)]
    return Finding(
        kind=kind, severity=severity, what=f"{kind} no. {number}", records=places, count=2, advice=advice or f"Mend {kind}."
    )


def test_findings_stand_by_kind_the_worst_first() -> None:
    audit = Audit(
        findings=[
            found("language", "note"),
            found("leak", "error"),
            found("mojibake", "warning", 1),
            found("mojibake", "warning", 5),
        ],
        left_out={"near_duplicate": "rensa is not installed"},
        sampled={"contamination": "the first 10 records"},
    )
    text = printed(data_text.findings_text(audit, accepted=["leak", "mojibake"], folder="/data/case/"), 80)
    assert [line.rstrip() for line in text.splitlines()] == [
        "error   leak: 1 finding, 2 records, accepted by the recipe",
        "        leak no. 1  train.jsonl:1, 2",
        "      → Mend leak.",
        "warning mojibake: 2 findings, 4 records",
        "        mojibake no. 1  train.jsonl:1, 2",
        "        mojibake no. 5  train.jsonl:5, 6",
        "      → Mend mojibake.",
        "note    language: 1 finding, 2 records",
        "        language no. 1  train.jsonl:1, 2",
        "      → Mend language.",
        "not checked: near_duplicate: rensa is not installed",
        "checked in part: contamination: the first 10 records",
    ]


@pytest.mark.parametrize("findings", [1, 9, 10, 11, 12, 200])
def test_a_kind_takes_no_more_than_its_lines(findings: int) -> None:
    audit = Audit(findings=[found("leak", "error", n) for n in range(findings)], left_out={}, sampled={})
    lines = printed(data_text.findings_text(audit), 200).splitlines()
    assert len(lines) <= data_text.MOST_LINES
    shown = sum("leak no." in line for line in lines)
    more = [line for line in lines if "more finding" in line]
    assert more == [] if shown == findings else f"and {findings - shown} more findings in data/audit.json" in more[0]


def test_no_findings_are_said_to_be_none() -> None:
    assert printed(data_text.findings_text(Audit(findings=[], left_out={}, sampled={}))).strip() == "no findings"


# ---- the card ---------------------------------------------------------------------------------------------------------------


def card(notes: list[str] | None = None, masked: dict[str, int] | None = None, name: str = "/data/case/b.jsonl") -> DataCard:
    def source(name: str, ratio: float, weight: float | None) -> SourceCard:
        return SourceCard(
            name=name,
            read=5000,
            used=4990,
            quarantined=10,
            examples=4990,
            tokens=123_456,
            weight=weight,
            examples_ratio=ratio,
            tokens_ratio=0.25,
        )

    def split(sources: list[SourceCard], lengths: LengthSummary, **changes: Any) -> SplitCard:
        facts = {
            "files": [s.name for s in sources],
            "sources": sources,
            "read": 10_000,
            "used": 9_980,
            "quarantined": 20,
            "examples": 9_980,
            "tokens": 1_234_567,
            "supervised_tokens": 617_283,
            "supervised_ratio": 0.5,
            "lengths": lengths,
            "formats": {"messages": 9_980},
            "dropped_too_long": 0,
            "truncated": 0,
            "masked": {},
        }
        return SplitCard.model_validate(facts | changes)

    lengths = LengthSummary(shortest=11, median=222, p95=3_333, longest=4_444)
    none = LengthSummary(shortest=0, median=0, p95=0, longest=0)
    both = [source("/data/case/a.jsonl", 0.75, 3.0), source(name, 0.25, 1.0)]
    return DataCard(
        fingerprint="1",
        seconds=1.0,
        peak_bytes=1,
        chat_template="model",
        training_fingerprint="2",
        records_fingerprint="3",
        stop_ids=[2],
        train=split(both, lengths, dropped_too_long=7, truncated=1, masked=masked or {"secret": 3}),
        validation=split(both[:1], none, examples=0, tokens=0, supervised_ratio=0.0),
        tests={"seen": TestCard(files=["t.jsonl"], read=80, quarantined=2, examples=78, longest_prompt_tokens=5)},
        notes=notes or ["a note"],
    )


def test_the_card_says_what_every_split_holds() -> None:
    text = printed(data_text.card_text(card(), folder="/data/case/"), 80)
    rows = [line.split() for line in text.splitlines() if line.strip()]
    assert rows == [
        ["records", "read", "used", "rejected"],
        ["train", "10,000", "9,980", "20"],
        ["validation", "10,000", "9,980", "20"],
        ["seen", "80", "78", "2"],
        ["examples", "tokens", "supervised", "shortest", "median", "95", "%", "longest"],
        ["train", "9,980", "1.2M", "0.50", "11", "222", "3,333", "4,444"],
        ["validation", "0", "0", "0.00", "0", "0", "0", "0"],
        ["sources", "of", "train", "weight", "read", "rejected", "examples", "of", "examples", "of", "tokens"],
        ["a.jsonl", "3", "5,000", "10", "4,990", "0.750", "0.250"],
        ["b.jsonl", "1", "5,000", "10", "4,990", "0.250", "0.250"],
        ["train:", "7", "examples", "dropped,", "longer", "than", "data.max_length"],
        ["train:", "1", "example", "truncated", "to", "data.max_length"],
        ["train:", "3", "passages", "masked:", "secret"],
        ["a", "note"],
    ]


# ---- terms ------------------------------------------------------------------------------------------------------------------


def terms(text: str, count: int = 1) -> TermsCard:
    one = Term(
        text=text,
        words=1,
        occurrences=1_200,
        records=9,
        pieces=[" E", "⟨E1 83⟩", "mittel"],
        pieces_bare=["E"],
        pieces_capital=["E"],
        broken=["⟨E1 83⟩"],
        fertility=3.0,
        saved_per_1000=4.5,
        rarity=None,
    )
    return TermsCard(
        glossary=None,
        measure="m",
        records=1,
        sampled="",
        characters=1,
        tokens=1,
        bytes_per_token=4.0,
        fertility=1.25,
        split_words=0.1,
        answer_tokens=0,
        answer_bytes_per_token=0.0,
        answer_fertility=0.0,
        ordinary_fertility=1.1,
        term_fertility=3.1,
        terms=[one] * count,
        found=count,
        absent=["x"],
        absent_count=1,
        saved_by_10=2.0,
        saved_by_50=3.0,
        saved_by_all=4.0,
    )


def test_terms_show_how_they_are_split() -> None:
    lines = [line.rstrip() for line in printed(data_text.terms_text(terms("Eigenmittel", 40)), 100).splitlines()]
    assert "Eigenmittel        1,200             4.50  ·E|⟨E1 83⟩|mittel" in lines
    assert lines.count(lines[5]) == data_text.MOST_TERMS
    assert lines[-2:] == ["and 25 more terms in data/terms.json", "1 term of the glossary not found in the data"]


def test_rejected_records_are_told_with_the_commonest_reasons() -> None:
    reasons = Counter({"no answer": 5, "not JSON": 7, "an \x1b[31m odd one": 1, "empty": 2})
    told = printed(data_text.rejected_text(reasons, Path("runs/a/data/quarantine.jsonl")), 100).splitlines()
    assert [line.strip() for line in told] == [
        "15 records rejected:",
        "7 x not JSON",
        "5 x no answer",
        "2 x empty",
        "and 1 reason more; each with its place in runs/a/data/quarantine.jsonl",
    ]
