"""Single texts: what is flagged, and above all what is not; and findings out of sightings."""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fullrank.data.audit.finding import Place, Sighting
from fullrank.data.audit.sightings import ADVICE, MOST_RECORDS, SEVERITY, Spans, conclude_sightings
from fullrank.data.audit.texts import KINDS, TextChecks, left_out
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.subject import Subject, subject_of

DATA = Path(__file__).resolve().parents[5] / "shared/data"

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def checks() -> TextChecks:
    return TextChecks(CHATML)


def look(checks: TextChecks, text: str) -> list[Sighting]:
    return checks.look(subject_of(Document(text)))


def seen(checks: TextChecks, text: str) -> list[tuple[str, str]]:
    """Kind and characters of everything seen."""
    return [(sighting.kind, text[sighting.start : sighting.end]) for sighting in look(checks, text)]


# ---- mojibake -------------------------------------------------------------------------------------------------------

WORDS = [
    "café",
    "jalapeño",
    "Müller’s",
    "don’t",
    "“quoted”",
    "a – b",
    "£20",
    "5 °C",
    "Łódź",
    "Škoda",
    "Привет всем",
    "日本語",
    "50 €",
    "😀",
]

#: Encodings that hold every byte, so that whatever is written can be read in them.
READ_AS = ["latin-1", "mac-roman", "cp437", "cp850", "iso8859-2", "cp1256"]


@pytest.mark.parametrize("encoding", ["latin-1", "mac-roman", "cp437"])
@pytest.mark.parametrize("word", WORDS)
def test_utf8_read_as_another_encoding(checks: TextChecks, word: str, encoding: str) -> None:
    broken = word.encode().decode(encoding)
    found = look(checks, f"She said {broken} and left.")
    assert {sighting.kind for sighting in found} == {"mojibake"}
    assert "mojibake" not in {kind for kind, _ in seen(checks, f"She said {word} and left.")}


@pytest.mark.parametrize("encoding", ["cp1252", "cp1251", "cp1250", "cp1254", "cp1253"])
def test_utf8_read_as_a_windows_code_page(checks: TextChecks, encoding: str) -> None:
    read = 0
    for word in WORDS:
        try:
            broken = word.encode().decode(encoding)
        except UnicodeDecodeError:
            continue  # a byte that the code page leaves undefined
        read += 1
        assert {kind for kind, _ in seen(checks, f"She said {broken} and left.")} == {"mojibake"}, (encoding, word, broken)
    assert read > 3


@pytest.mark.parametrize("word", ["café", "don’t", "“quoted”", "£20", "Škoda"])
def test_mojibake_twice_over(checks: TextChecks, word: str) -> None:
    twice = word.encode().decode("latin-1").encode().decode("latin-1")
    assert {kind for kind, _ in seen(checks, f"He wrote {twice} twice.")} == {"mojibake"}


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("The caf\ufffd is open", "\ufffd"),
        ("He\x92s here", "\x92"),
        ("business basis \x80\x93 but", "\x80\x93"),
        ("We don?t know", "?"),
        ("They?re here", "?"),
        ("It isnÕt so", "Õ"),
        ("caf=C3=A9 and it=E2=80=99s", "=C3=A9"),
        ("H\x00e\x00l\x00l\x00o\x00", "H\x00e\x00l\x00l\x00o\x00"),
        ("Hello there".encode("utf-16-be").decode("utf-16-le"), None),
        ("Ïðèâåò, êàê äåëà ñåãîäíÿ", "Ïðèâåò"),
        ("锟斤拷 is no word", "锟斤拷"),
        ("â€™", "â€™"),
    ],
)
def test_other_broken_encodings(checks: TextChecks, text: str, span: str | None) -> None:
    found = seen(checks, text)
    assert found and {kind for kind, _ in found} == {"mojibake"}
    assert span is None or found[0][1] == span


#: Correct texts that resemble broken ones. The messages are from no list of the library's own.
CLEAN = [
    "He’s “here” – it’s 5 °C, costs £20 or €30… (½ price), 3 × 4 ÷ 2 ≤ 6 ≠ 7, √2 ≈ 1.41, α + β → γ, n√π",
    "Le théâtre «L’Été» à Orléans; «CAFÉ» dit-il, l’œuvre… À bientôt, où ça? NOËL«, DÉJÀ»",
    "Mañana ¿cómo estás? ¡Olé! señor Núñez, pingüino",
    "Größe, Straße, Übung, „Äpfel“, ÄÖÜäöüß, [äöüÄÖÜß], DÅ” sa hon",
    "Æbleskiver på Ærø, smørrebrød; BLÅ” och RÖD”; Þórður Ægisson; ÐÞÆ",
    "Zażółć gęślą jaźń; Příliš žluťoučký kůň úpěl ďábelské ódy; Árvíztűrő tükörfúrógép; șțăîâ, hotărâ”…",
    "Привет, как дела? «План В»… Я»; НІ, ДІМ, РІК, Її, ВІ; вклад»…; Ёлка — №5",
    "Γειά σου Κόσμε, «Γ», Ά» Έ” ώ…; η τιμή είναι 5€",
    "مرحبا بالعالم، كيف الحال؟ — שלום עולם — می‌خواهم — नमस्ते दुनिया, क्‍ष — สวัสดี​ชาวโลก — ភាសា​ខ្មែរ",
    "你好，世界！今天天气怎么样？一一一一 — こんにちは、「世界」。 — 안녕하세요 세계",
    "TIẾNG VIỆT: Nguyễn Văn Ấ, Đặng Thị Ổ, tôi không biết",
    "ΔH = −5.2 kJ/mol, TNFα 5 μg, 10²³, x̄ ± σ, ∂f/∂x, ⟨ψ|φ⟩, πr²h, 2πε₀",
    "😀👍🏽 👩‍💻 👨‍👩‍👧‍👦 🏳️‍🌈 ❤️ 1️⃣ #️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ☎️ ℹ️ ™ © ® ✓ ★ ♥",
    "┌──┬──┐\n│╔╗│╚╝│\n├──┼──┤\n└──┴──┘ ▒▓█ ├┤ ╠╣",
    "Is that so? I'm not sure. What?ever https://x.org/?s=1&t=2 a?d=3 [a-z]?s? printk?s\\b",
    "x=C3=4 y=E2+A0, AB=CD=EF, =A1=B2",
    "àáâãäå èéêë ìíîï are the letters of Latin-1; ÀÁÂÃÄÅ too",
    '# éèê ñ ü — “IPA”: [œ] "œ", ə, ʃ, ˈkæt',
    "ﬁrst eﬀort; ‚low quote‘; naïve coöperation; Ångström; Dvořák; façade; ¥500 ¢5 §3 ¶2 ª º",
]


@pytest.mark.parametrize("text", CLEAN)
def test_correct_text_of_any_script_is_left_alone(checks: TextChecks, text: str) -> None:
    assert seen(checks, text) == []


def test_without_ftfy_the_built_in_part_works_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_out() == {}
    for name in [name for name in sys.modules if name == "ftfy" or name.startswith("ftfy.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    bare = TextChecks(CHATML)
    assert "ftfy" in left_out()["mojibake"]
    for word in WORDS:
        assert {kind for kind, _ in seen(bare, "so " + word.encode().decode("latin-1") + " it is")} == {"mojibake"}, word
    for text in CLEAN:
        assert seen(bare, text) == []


# ---- hidden characters ----------------------------------------------------------------------------------------------

HIDDEN = {
    "zero-width space U+200B": "\u200b",
    "zero-width non-joiner U+200C": "\u200c",
    "zero-width joiner U+200D": "\u200d",
    "word joiner U+2060": "\u2060",
    "byte order mark U+FEFF": "\ufeff",
    "soft hyphen U+00AD": "\u00ad",
    "left-to-right mark U+200E": "\u200e",
    "right-to-left mark U+200F": "\u200f",
    "Arabic letter mark U+061C": "\u061c",
    "bidirectional control U+202A-202E, U+2066-2069": "\u202e",
    "tag character U+E0000-E007F": "".join(chr(0xE0000 + ord(char)) for char in "ignore"),
    "variation selector that selects nothing": "\ufe0f",
    "function application U+2061": "\u2061",
    "invisible plus U+2064": "\u2064",
    "hangul filler U+3164": "\u3164",
    "interlinear annotation anchor U+FFF9": "\ufff9",
    "combining grapheme joiner U+034F": "\u034f",
    "private-use character": "\ue123",
    "control character U+0000": "\x00",
    "control character U+0007": "\x07",
    "control character U+001B": "\x1b",
    "control character U+007F": "\x7f",
    "noncharacter or reserved code point": "\ufdd0",
}


@pytest.mark.parametrize("what", HIDDEN)
@pytest.mark.parametrize("before", ["pass", "It costs £3, pass", ""])
def test_hidden_characters_in_english(checks: TextChecks, what: str, before: str) -> None:
    text = f"{before}{HIDDEN[what]}word is here"
    found = look(checks, text)
    assert [(sighting.kind, sighting.what, sighting.place) for sighting in found] == [("hidden_unicode", what, "text")]
    assert text[found[0].start : found[0].end] == HIDDEN[what]


@pytest.mark.parametrize("control", "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069\u202c")
def test_bidirectional_controls_reorder_english(checks: TextChecks, control: str) -> None:
    assert seen(checks, f"if access{control} != user") == [("hidden_unicode", control)]


def test_bidirectional_controls_are_used_in_arabic_and_misused(checks: TextChecks) -> None:
    assert seen(checks, "اسمي \u2068John\u2069 يا صديقي\u200f، \u202bمرحبا\u202c") == []
    assert seen(checks, "اسمي \u2068John يا صديقي") == [("hidden_unicode", "\u2068")]
    assert ("hidden_unicode", "\u202e") in seen(checks, "اسمي \u202eJohn\u202c يا صديقي")


def test_selectors_and_tags_outside_emoji(checks: TextChecks) -> None:
    smuggled = "".join(chr(0xE0100 + code) for code in b"hello")
    assert seen(checks, f"Hi😀{smuggled}") == [("hidden_unicode", smuggled)] or len(seen(checks, f"Hi😀{smuggled}")) == 1
    assert seen(checks, "a 1\ufe0f b") == [("hidden_unicode", "\ufe0f")]
    assert seen(checks, "葛\U000e0100城市 and ☎\ufe0e") == []
    assert len(seen(checks, "🏴\U000e0068\U000e0069 no flag")) == 1


def test_tab_and_line_breaks_are_seen_by_everyone(checks: TextChecks) -> None:
    assert seen(checks, "a\tb\nc\r\nd") == []


def test_a_soft_hyphen_that_is_a_byte_of_mojibake_is_no_hidden_character(checks: TextChecks) -> None:
    text = "Mart" + "í".encode().decode("latin-1") + "nez"
    assert "\u00ad" in text
    assert seen(checks, text) == [("mojibake", "Ã\u00ad")]


# ---- letters of another alphabet ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["p\u0430ypal is here", "\u0410 Senior Center", "\u0441\u043ede for it", "Αpple pie".replace("Α", "\u0391")]
)
def test_look_alike_letters(checks: TextChecks, text: str) -> None:
    assert [kind for kind, _ in seen(checks, text)] == ["homoglyph"]


@pytest.mark.parametrize(
    "text",
    ["TNFα and ΔH, μg, πr²h, PΔV", "Это код и MS-DOS, IT-отдел, DIYшник", "а о с: русские буквы", "β-blocker, Χ² test, Ω"],
)
def test_formulas_and_two_languages_have_no_look_alikes(checks: TextChecks, text: str) -> None:
    assert seen(checks, text) == []


# ---- control tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", CHATML)
def test_every_control_token_of_the_tokenizer(checks: TextChecks, token: str) -> None:
    found = look(checks, f"before{token}after")
    assert [(sighting.kind, sighting.what) for sighting in found] == [("control_token_text", f"control token {token}")]


def test_control_tokens_of_any_shape() -> None:
    checks = TextChecks(["<s>", "</s>", "<unk>", "[PAD]", "<|reserved_special_token_7|>", "user", "\n", "▁"])
    for token in ("<unk>", "[PAD]", "<|reserved_special_token_7|>", "<s>", "</s>"):
        assert seen(checks, f"a {token} b") == [("control_token_text", token)]
    assert seen(checks, "the user said\nso") == []


@pytest.mark.parametrize(
    "text",
    [
        "<|start_header_id|>user<|end_header_id|>",
        "<|eot_id|>",
        "[INST] hello [/INST]",
        "<<SYS>> be kind <</SYS>>",
        "<start_of_turn>user",
        "<end_of_turn>",
        "<|channel|>analysis",
        "<｜User｜>hi",
        "<｜begin▁of▁sentence｜>",
        "[TOOL_CALLS]",
        "end of it</s>",
        "<s>[INST] hi",
        "### Instruction:\nWrite.\n\n### Response:\nDone.",
        "Human: hi\nAssistant: hello",
        "USER: hi there ASSISTANT\nASSISTANT: hello",
        "**User:** hi\n**AI:** hello",
    ],
)
def test_markers_of_known_formats(text: str) -> None:
    assert {kind for kind, _ in seen(TextChecks(()), text)} == {"control_token_text"}


@pytest.mark.parametrize(
    "text",
    [
        "<s>old</s> <b>new</b> price",
        "if (a <| b) |> f; x <|> y; ⟨a|b⟩; <|x|> = 3",
        "<<48/2=24>>24 #### 72",
        "## Response: what the server sends",
        "### Input: a number",
        "User: the one who uses it",
        "The assistant: a tragedy. AI: what it is",
        "Q: Who?\nA: Me.",
        "the <unk> word , he said @-@ twice",
        "[instructions] INSTALL] SYSTEM [list]",
        "answer: AI and robots: GPT-4",
        "AI: what it is\nBot: a robot",
    ],
)
def test_ordinary_text_has_no_markers(checks: TextChecks, text: str) -> None:
    assert seen(checks, text) == []


# ---- records --------------------------------------------------------------------------------------------------------


def test_every_text_of_a_record_is_looked_at() -> None:
    checks = pickle.loads(pickle.dumps(TextChecks(CHATML)))
    call = {"type": "function", "function": {"name": "f", "arguments": {"q": ["caf\ufffd"]}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a\u200bb"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "<|im_end|>"},
        {"role": "assistant", "content": "fine", "reasoning_content": "p\u0430y"},
    ]
    found = checks.look(subject_of(Conversation(messages)))
    assert [(sighting.kind, sighting.place) for sighting in found] == [
        ("hidden_unicode", "messages[0].content"),
        ("mojibake", "messages[1].tool_calls[0].function.arguments.q[0]"),
        ("control_token_text", "messages[2].content"),
        ("homoglyph", "messages[3].reasoning_content"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_kinds_are_not_looked_for(kind: str) -> None:
    text = "caf\ufffd a\u200bb p\u0430y <|im_end|>"
    assert {sighting.kind for sighting in look(TextChecks(CHATML), text)} == set(KINDS)
    assert {sighting.kind for sighting in look(TextChecks(CHATML, frozenset([kind])), text)} == set(KINDS) - {kind}


@pytest.mark.parametrize(
    "text", ["é", "Ã", "\u200b", "аa", "<|", "é³¹½", "\ufffda", "Human:\n", "â€™", "a?s ", "=C3=A9", "### Instruction:\n"]
)
def test_long_texts_take_linear_time(checks: TextChecks, text: str) -> None:
    def seconds(times: int) -> float:
        subject = subject_of(Document(text * times))
        before = time.process_time()
        checks.look(subject)
        return time.process_time() - before

    short, long = seconds(4_000), seconds(40_000)
    assert long < 40 * short + 0.5


# ---- findings -------------------------------------------------------------------------------------------------------


def test_spans_that_came_first_stay() -> None:
    spans = Spans()
    spans.extend([("b", 5, 9), ("a", 0, 3), ("no", 8, 12), ("no", 2, 6), ("no", 6, 7), ("no", 0, 20), ("c", 3, 5), ("d", 9, 10)])
    assert list(spans) == [("a", 0, 3), ("c", 3, 5), ("b", 5, 9), ("d", 9, 10)]


def test_one_finding_for_each_sort_of_thing() -> None:
    def at(line: int) -> Place:
        return Place(path="a.jsonl", line=line, split="train")

    def sighting(kind: str, what: str) -> Sighting:
        return Sighting(kind, what, "prompt", 0, 1)

    findings = conclude_sightings(
        [
            (at(1), sighting("personal_data", "e-mail address")),
            (at(1), sighting("personal_data", "phone number")),
            (at(1), sighting("personal_data", "e-mail address")),
            (at(2), sighting("personal_data", "phone number")),
            (at(7), sighting("secret", "AWS access key")),
        ],
        1000,
    )
    assert [(f.kind, f.severity, f.what, [p.line for p in f.records], f.count) for f in findings] == [
        ("secret", "error", "AWS access key: in 1 record of 1,000", [7], 1),
        ("personal_data", "warning", "phone number: in 2 records of 1,000", [1, 2], 2),
        ("personal_data", "warning", "e-mail address: in 1 record of 1,000", [1], 1),
    ]
    assert set(ADVICE) == set(SEVERITY)


def test_the_count_is_true_where_the_list_ends() -> None:
    many = (
        (Place(path="a", line=n, split="train"), Sighting("mojibake", "C1 controls", "text", 0, 1))
        for n in range(1, MOST_RECORDS + 8)
    )
    (finding,) = conclude_sightings(many, 20_000)
    assert finding.count == MOST_RECORDS + 7
    assert len(finding.records) == MOST_RECORDS


# ---- real data ------------------------------------------------------------------------------------------------------


def subjects(path: Path) -> Iterator[tuple[int, Subject]]:
    for line, text in enumerate(path.open(encoding="utf-8"), 1):
        row = json.loads(text)
        if "messages" in row:
            yield line, subject_of(Conversation(row["messages"]))
        elif "conversations" in row:
            turns = [
                {"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]} for t in row["conversations"]
            ]
            yield line, subject_of(Conversation(turns))
        elif "text" in row:
            yield line, subject_of(Document(row["text"]))
        elif "question" in row:
            yield line, subject_of(Pair(row["question"], "\n".join(row["choices"])))
        elif "instruction" in row:
            yield line, subject_of(Pair(row["instruction"] + "\n\n" + row["input"], row["output"]))
        elif "completion" in row:
            yield line, subject_of(Pair(row["prompt"], row["completion"]))


#: Every defect that these files have by nature: read through, each of them genuine.
NATURAL = {
    "commonsense_mc/boolq.jsonl": {(820, "hidden_unicode")},
    "gsm8k/test.jsonl": {(394, "hidden_unicode")},
    "gsm8k/train.jsonl": {(7389, "hidden_unicode"), (7422, "homoglyph")},
    "mmlu/test.jsonl": {(958, "mojibake"), (974, "mojibake"), (979, "mojibake")},
}


@pytest.mark.parametrize(
    "name",
    [
        "banking77/train.jsonl",
        "banking77/test.jsonl",
        "commonsense_mc/arc_challenge.jsonl",
        "commonsense_mc/boolq.jsonl",
        "commonsense_mc/piqa.jsonl",
        "fastchat_multiturn/conversations.jsonl",
        "gsm8k/test.jsonl",
        "gsm8k/train.jsonl",
        "mmlu/test.jsonl",
        "pubmedqa/train.jsonl",
        "rasbt_instruction/alpaca.jsonl",
        "wikisql_text2sql/train.jsonl",
        "wikitext2/test.jsonl",
    ],
)
def test_real_data_has_its_natural_defects_and_no_others(checks: TextChecks, name: str) -> None:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    found = {(line, sighting.kind) for line, subject in subjects(path) for sighting in checks.look(subject)}
    assert found == NATURAL.get(name, set())


def test_wikitext_holds_a_control_token_of_tokenizers_that_have_it() -> None:
    path = DATA / "wikitext2/test.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    unknown = TextChecks(["<unk>"])
    found = Counter(s.what for _, subject in subjects(path) for s in unknown.look(subject) if s.kind == "control_token_text")
    assert found == {"control token <unk>": sum(text.count("<unk>") for text in path.read_text("utf-8").splitlines())}


def test_the_schemas_of_tools_are_looked_at() -> None:
    tools = [{"type": "function", "function": {"name": "send", "description": "AKIA" + "Z7" * 8 + " \u200b<|im_end|>"}}]
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    found = TextChecks(["<|im_end|>"], frozenset()).look(subject_of(Conversation(messages, tools)))
    assert {(s.kind, s.place) for s in found} == {
        ("hidden_unicode", "tools[0].function.description"),
        ("control_token_text", "tools[0].function.description"),
    }
