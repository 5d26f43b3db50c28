"""data_page: one page that stands alone, shows every token for what it is, and lets no text from the data take effect."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fullrank.errors import UsageError
from fullrank.records import (
    Audit,
    Finding,
    Place,
    Quarantined,
    ShownExample,
    ShownToken,
    ShownTurn,
    SourceCard,
    Term,
    TermsCard,
)
from fullrank.report import data_page, html
from fullrank.report.gather import gather
from fullrank.report.stage import stage
from fullrank.run import Run, append_json_line, read_record, write_record, write_text

MakeRun = Callable[..., Run]
VOID = {"meta", "br", "wbr", "input"}
HOSTILE = "</span><script>alert(1)</script> & \u202eevil\u202c zero\u200bwidth \U000e0041 \x1b[31m <img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Collects what a reader sees, and fails on tags that do not nest, scripts, and links that leave the report."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tokens: list[tuple[str, str, str]] = []
        """Class, title and text of every token of an example."""
        self.rows: list[list[str]] = []
        self.text = ""
        self.is_token = False
        self.feed(text)
        self.close()
        assert self.open == []
        assert all(link[1:] in self.ids for link in self.links if link.startswith("#"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = {name: value or "" for name, value in attrs}
        assert tag not in ("script", "link", "iframe", "img", "object"), tag
        assert not any(name == "src" or name.startswith("on") for name in facts), facts
        if "href" in facts:
            assert facts["href"].startswith("#") or facts["href"] == "data.html", facts
            self.links.append(facts["href"])
        if "id" in facts:
            self.ids.append(facts["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if "data-id" in facts:
            self.tokens.append((facts["class"], facts["title"], ""))
        self.is_token = "data-id" in facts

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"
        self.is_token = False

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.is_token:
            kind, title, text = self.tokens[-1]
            self.tokens[-1] = kind, title, text + data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def token(text: str, *, id: int = 5, supervised: bool = False, control: bool = False) -> ShownToken:
    return ShownToken(id=id, text=text, supervised=supervised, control=control)


def example(*tokens: ShownToken, **changes: Any) -> ShownExample:
    facts = {
        "split": "train",
        "example": 41,
        "origin": "/home/someone/case/train.jsonl:7",
        "tokens": len(tokens),
        "supervised_tokens": sum(t.supervised for t in tokens),
        "turns": [ShownTurn(role="assistant", tokens=list(tokens))],
        "cut": "",
    }
    return ShownExample.model_validate(facts | changes)


def finding(kind: str, severity: Any, *places: tuple[str, int, str], **changes: Any) -> Finding:
    records = [Place(path=f"/home/someone/case/{path}", line=line, split=split) for path, line, split in places]
    facts = {"what": f"{kind} found", "count": len(records), "advice": f"Mend {kind}."}
    return Finding(kind=kind, severity=severity, records=records, **{**facts, **changes})


AUDIT = Audit(
    findings=[
        finding("near_duplicate", "warning", ("train.jsonl", 1, "train"), ("train.jsonl", 9, "train"), what="twins"),
        finding("near_duplicate", "note", ("train.jsonl", 2, "train"), count=50, advice="Leave it."),
        finding("leak", "error", ("test.jsonl", 3, "test"), ("train.jsonl", 4, "train")),
        finding("secret", "error", ("train.jsonl", 5, "train")),
    ],
    left_out={"language": "py3langid is not installed"},
    sampled={"contamination": "the first 10 records"},
)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and no chart stands here."""
    monkeypatch.setitem(sys.modules, "altair", None)


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    """A finished run whose data stage left all of its records."""
    made = make_run()
    write_record(made.data / "audit.json", AUDIT)
    append_json_line(
        made.data / "shown.jsonl",
        example(
            token("<|im_start|>", id=1, control=True),
            token("user\n", id=2),
            token(" Four", id=3, supervised=True),
            token("<|im_end|>", id=4, supervised=True, control=True),
            cut="5 tokens are cut off",
        ).model_dump(),
    )
    for line in range(1, 4):
        append_json_line(made.data / "quarantine.jsonl", quarantined(line).model_dump())
    return made


def quarantined(line: int, **changes: Any) -> Quarantined:
    facts = {
        "path": "/home/someone/case/train.jsonl",
        "line": line,
        "offset": line * 1000,
        "split": "train",
        "reason": f"reason {line}",
        "asked_for": line == 2,
    }
    return Quarantined.model_validate(facts | changes)


def page_of(run: Run, accepted: tuple[str, ...] = ()) -> Page:
    return Page(data_page.write(run, accepted).read_text(encoding="utf-8"))


# ---- tokens -----------------------------------------------------------------------------------------------------------------


def test_every_token_says_what_it_is(run: Run) -> None:
    page = page_of(run)
    assert page.tokens == [
        ("t c", "id 1, control token, not supervised", "<|im_start|>"),
        ("t", "id 2, not supervised", "user↵"),
        ("t s", "id 3, supervised", "·Four"),
        ("t s c", "id 4, control token, supervised", "<|im_end|>"),
    ]
    for words in ("train.jsonl:7", "4 tokens, 2 supervised", "✂ 5 tokens are cut off", "example 41"):
        assert words in page.text


def test_bytes_of_a_character_keep_their_spaces(run: Run) -> None:
    write_text(
        run.data / "shown.jsonl", example(token("⟨E2 82⟩"), token(" ⟨F0 9F=x⟩"), token(""), token("a b")).model_dump_json()
    )
    assert [text for _, _, text in page_of(run).tokens] == ["⟨E2 82⟩", "·⟨F0 9F=x⟩", "⟨⟩", "a·b"]


def test_the_middle_of_a_long_turn_is_left_out_and_counted(run: Run) -> None:
    shown, hidden = data_page.FIRST_TOKENS + data_page.LAST_TOKENS, 300
    many = [token(f" {n}", id=n, supervised=n > 850) for n in range(shown + hidden)]
    write_text(run.data / "shown.jsonl", example(*many).model_dump_json())
    page = page_of(run)
    ids = [int(title.split(",")[0].removeprefix("id ")) for _, title, _ in page.tokens]
    assert ids == [*range(data_page.FIRST_TOKENS), *range(shown + hidden - data_page.LAST_TOKENS, shown + hidden)]
    not_shown = [t for t in many if t.id not in ids]
    supervised = sum(t.supervised for t in not_shown)
    assert len(not_shown) == hidden and 0 < supervised < hidden
    assert f"{hidden} tokens not shown, {supervised} of them supervised" in page.text


# ---- hostile data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["token", "role", "origin", "cut", "what", "path", "reason", "note", "source", "term", "left_out"]
)
def test_no_text_from_the_data_takes_effect(run: Run, where: str) -> None:
    def here(name: str, otherwise: str) -> str:
        return HOSTILE if name == where else otherwise

    shown = example(token(here("token", "x")), origin=here("origin", "o"), cut=here("cut", "c"), split=here("role", "train"))
    role = [ShownTurn(role=here("role", "user"), tokens=[token(here("token", "x"))])]
    write_text(run.data / "shown.jsonl", shown.model_copy(update={"turns": role}).model_dump_json())
    bad = finding(
        here("what", "k"),
        "error",
        (here("path", "p"), 1, here("path", "train")),
        what=here("what", "w"),
        advice=here("what", "a"),
    )
    write_record(
        run.data / "audit.json", Audit(findings=[bad], left_out={here("left_out", "l"): here("left_out", "l")}, sampled={})
    )
    row = quarantined(1, path=here("path", "p"), reason=here("reason", "r"), split=here("reason", "train"))
    write_text(run.data / "quarantine.jsonl", row.model_dump_json())
    write_record(run.data / "terms.json", terms(here("term", "t")))
    card = gather(run).data
    assert card is not None
    source = SourceCard(
        name=here("source", "s"),
        read=1,
        used=1,
        quarantined=0,
        examples=1,
        tokens=1,
        weight=1.0,
        examples_ratio=0.5,
        tokens_ratio=0.5,
    )
    train = card.train.model_copy(update={"sources": [source, source], "masked": {here("source", "m"): 1}})
    write_record(run.data / "card.json", card.model_copy(update={"train": train, "notes": [here("note", "n")]}))
    data, index = data_page.write(run).read_text(encoding="utf-8"), html.render(gather(run), [])
    for text in (data, index):
        Page(text)
        assert {c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"} == set()
    seen = Page(data).text.replace("·", " ")
    assert "[U+202E]evil[U+202C]" in seen and "[U+200B]" in seen and "<script>" in seen and "<img" in seen


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本 😀", "plain é 日本 😀"),
        ("a\nb\tc", "a↵b⇥c"),
        ("\u202a\u2066\u200d\ufeff\u00ad", "[U+202A][U+2066][U+200D][U+FEFF][U+00AD]"),
        ("\u00a0\u3000\u2028", "[U+00A0][U+3000][U+2028]"),
        ("\ue000\U000f0000\udc80\ufffe", "[U+E000][U+F0000][U+DC80][U+FFFE]"),
        ("\u3164\u115f\u2800\ufe0f\U000e0100\u034f", "[U+3164][U+115F][U+2800][U+FE0F][U+E0100][U+034F]"),
        ("\r\x00\x7f\x9b", "[U+000D][U+0000][U+007F][U+009B]"),
    ],
)
def test_what_is_not_seen_is_shown_by_its_number(text: str, shown: str) -> None:
    assert data_page.visible(text) == shown


# ---- findings ---------------------------------------------------------------------------------------------------------------


def test_findings_stand_by_kind_the_worst_first() -> None:
    groups = data_page.by_kind(AUDIT.findings, accepted=["secret", "near_duplicate"])
    assert [(g.kind, g.severity, len(g.findings), g.records, g.accepted) for g in groups] == [
        ("leak", "error", 1, 2, False),
        ("secret", "error", 1, 1, True),
        ("near_duplicate", "warning", 2, 52, False),
    ]
    assert groups[2].advice == ("Mend near_duplicate.", "Leave it.")
    assert [f.severity for f in groups[2].findings] == ["warning", "note"]


def test_the_page_names_records_and_says_what_to_do(run: Run) -> None:
    page = page_of(run, accepted=("secret",))
    text = re.sub(r"\s+", " ", page.text)
    assert "2 errors, 1 warning, 1 note" in text
    assert "error · leak 1 finding, 2 records Mend leak." in text.replace("leak1", "leak 1")
    assert "error, accepted · secret" in text
    assert ["leak found", "2", "test.jsonl:3 (test), train.jsonl:4"] in page.rows
    assert ["near_duplicate foundnote", "50", "train.jsonl:2 and 49 more"] in page.rows
    assert ["languageleft out", "py3langid is not installed"] in page.rows
    assert ["contaminationa part only", "the first 10 records"] in page.rows


def test_long_lists_of_findings_are_cut_and_say_so(run: Run) -> None:
    many = [finding("leak", "error", *[("train.jsonl", n, "train")] * 30, what=f"no. {n}") for n in range(100)]
    write_record(run.data / "audit.json", Audit(findings=many, left_out={}, sampled={}))
    page = page_of(run)
    assert sum(row[0].startswith("no. ") for row in page.rows) == data_page.MOST_FINDINGS
    assert f"and {100 - data_page.MOST_FINDINGS} more findings of this kind in data/audit.json" in page.text


@pytest.mark.parametrize(
    ("lines", "most", "expected"),
    [
        ({"a": 3}, 8, "a:1, 2, 3"),
        ({"a": 20}, 4, "a:1, 2, 3, 4 and 16 more"),
        ({"a": 20, "b": 1}, 4, "a:1, 2, b:1 and 18 more"),
        ({"a": 9, "b": 9, "c": 9}, 3, "a:1, 2, b:1, 2, c:1, 2 and 21 more"),
    ],
)
def test_places_name_some_of_every_file(lines: dict[str, int], most: int, expected: str) -> None:
    places = [(name, n + 1, "train") for name, count in lines.items() for n in range(count)]
    assert data_page.places(finding("k", "note", *places), most, "/home/someone/case/") == expected


def test_an_audit_that_found_nothing_says_so(run: Run) -> None:
    write_record(run.data / "audit.json", Audit(findings=[], left_out={}, sampled={}))
    assert "Nothing was found." in page_of(run).text
    assert "Nothing was found." in Page(html.render(gather(run), [])).text


# ---- what was read ----------------------------------------------------------------------------------------------------------


def test_rejected_records_are_counted_and_the_first_shown(run: Run) -> None:
    page = page_of(run)
    rows = [row for row in page.rows if row[-1].startswith("reason")]
    assert rows[0] == ["train.jsonl:1", "1,000", "train", "reason 1"]
    assert rows[1] == ["train.jsonl:2", "2,000", "train", "reason 2as the recipe says"]
    for line in range(4, 500):
        append_json_line(run.data / "quarantine.jsonl", quarantined(line, offset=None).model_dump())
    page = page_of(run)
    assert sum(row[-1].startswith("reason") for row in page.rows) == data_page.MOST_QUARANTINED
    assert "The first 200 of 499" in page.text


def test_the_splits_and_the_mix_of_their_sources(run: Run) -> None:
    card = data_page.read(run).card  # type: ignore[union-attr]
    one = SourceCard(
        name="",
        read=1,
        used=1,
        quarantined=0,
        examples=1,
        tokens=1,
        weight=1.0,
        examples_ratio=0.5,
        tokens_ratio=0.5,
    )
    both = [
        one.model_copy(update={"name": f"/home/someone/case/{name}.jsonl", "weight": w, "examples_ratio": w / 4})
        for name, w in (("a", 3.0), ("b", 1.0))
    ]
    train = card.train.model_copy(
        update={"sources": both, "dropped_too_long": 2, "truncated": 1, "masked": {"secret": 4}, "quarantined": 3}
    )
    write_record(run.data / "card.json", card.model_copy(update={"train": train}))
    page = page_of(run)
    row = next(row for row in page.rows if row[0].startswith("train2 examples dropped"))
    assert row[0] == "train2 examples dropped, too long1 example truncated4 passages masked: secret"
    assert row[1:5] == [f"{n:,}" for n in (train.read, train.used, 3, train.examples)]
    assert [row[:2] + row[6:7] for row in page.rows if row[0] in ("a.jsonl", "b.jsonl")] == [
        ["a.jsonl", "3", "0.750"],
        ["b.jsonl", "1", "0.250"],
    ]


@pytest.mark.parametrize(
    ("paths", "folder"),
    [
        (["/a/b/c.jsonl", "/a/b/d/e.jsonl"], "/a/b/"),
        (["/a/b/c.jsonl", "/a/bc/e.jsonl"], "/a/"),
        (["/a/b/c/1.jsonl", "/a/b/2.jsonl", "/a/b/c/3.jsonl"], "/a/b/"),
        (["/a/b/c.jsonl"], "/a/b/"),
        (["/a/b/c.jsonl", "/x/e.jsonl"], ""),
        (["/c.jsonl"], ""),
        (["org/name[train]", "/a/b/c.jsonl"], "/a/b/"),
        (["relative.jsonl"], ""),
        ([], ""),
    ],
)
def test_the_folder_that_all_files_lie_in(paths: list[str], folder: str) -> None:
    assert data_page.common_folder(paths) == folder


# ---- words of the domain ----------------------------------------------------------------------------------------------------


def terms(text: str, count: int = 1) -> TermsCard:
    one = Term(
        text=text,
        words=1,
        occurrences=1_200,
        records=9,
        pieces=[" E", "⟨E1 83⟩", text],
        pieces_bare=["E"],
        pieces_capital=["E"],
        broken=["⟨E1 83⟩"],
        fertility=3.0,
        saved_per_1000=4.5,
        rarity=77.0,
    )
    return TermsCard(
        glossary=None,
        measure=f"chosen so {text}",
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
        absent=[text],
        absent_count=3,
        saved_by_10=2.0,
        saved_by_50=3.0,
        saved_by_all=4.0,
    )


def test_terms_show_how_they_are_split(run: Run) -> None:
    write_record(run.data / "terms.json", terms("Mittel", 80))
    page = page_of(run)
    assert page.rows.count(["Mittel", "·E⟨E1 83⟩Mittel", "3.0", "1,2009 records", "4.50", "× 77"]) == data_page.MOST_TERMS
    assert '<span class="t broken">⟨E1 83⟩</span>' in (run.report / "data.html").read_text(encoding="utf-8")
    assert "3 terms of the glossary do not occur: Mittel, …" in page.text


# ---- the report -------------------------------------------------------------------------------------------------------------


def test_the_report_tells_of_the_data_and_links_the_page(run: Run) -> None:
    stage(run)
    page = Page((run.report / "index.html").read_text(encoding="utf-8"))
    assert page.links == ["data.html"] and "Data" in page.headings
    found = [row for row in page.rows if row[-1].startswith("Mend")]
    assert found == [
        ["errorleak", "1", "2", "Mend leak."],
        ["errorsecret", "1", "1", "Mend secret."],
        ["warningnear_duplicate", "2", "52", "Mend near_duplicate."],
    ]
    assert (run.report / "data.html").read_bytes() == data_page.write(run).read_bytes()


def test_the_recipe_s_word_on_findings_is_heeded(run: Run) -> None:
    text = run.recipe_path.read_text(encoding="utf-8")
    assert "accept: []" in text
    write_text(run.recipe_path, text.replace("accept: []", "accept: [secret]"))
    stage(run)
    for name in ("index.html", "data.html"):
        assert "error, accepted" in Page((run.report / name).read_text(encoding="utf-8")).text


def test_without_an_audit_nothing_is_said_of_findings(make_run: MakeRun) -> None:
    run = make_run()
    stage(run)
    page = Page((run.report / "data.html").read_text(encoding="utf-8"))
    assert page.headings == ["What was read"]
    assert "Data" not in Page((run.report / "index.html").read_text(encoding="utf-8")).headings


def test_without_a_data_card_there_is_no_page(make_run: MakeRun) -> None:
    run = make_run(only_training=True)
    stage(run)
    assert not (run.report / "data.html").exists()
    assert data_page.read(run) is None
    with pytest.raises(UsageError, match="fullrank data"):
        data_page.write(run)


def test_the_page_needs_no_training(run: Run, tmp_path: Path) -> None:
    bare = Run(tmp_path / "bare")
    run.data.rename(bare.root.mkdir() or bare.data)
    page = page_of(bare)
    assert page.headings == ["What was read", "Findings", "Examples, token by token", "Rejected records"]
    assert sorted(path.name for path in bare.report.iterdir()) == ["data.html"]


def test_a_row_of_another_version_is_named(run: Run) -> None:
    append_json_line(run.data / "shown.jsonl", {"split": "train"})
    with pytest.raises(UsageError, match=r"shown\.jsonl: row 2 is not a ShownExample"):
        data_page.read(run)


def test_an_audit_of_another_version_is_no_audit(run: Run) -> None:
    write_text(run.data / "audit.json", "{}")
    assert read_record(run.data / "audit.json", Audit) is None
    assert data_page.read(run).audit is None  # type: ignore[union-attr]


def test_the_same_records_give_the_same_page(run: Run) -> None:
    assert data_page.write(run).read_bytes() == data_page.write(run).read_bytes()
