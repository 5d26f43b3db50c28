"""Secrets and personal data: published examples are found, look-alikes are not, and masking rewrites exactly the spans."""

from __future__ import annotations

import base64
import json
import pickle
import random
import string
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fullrank.data.audit.finding import Sighting
from fullrank.data.audit.personal import PersonalChecks, left_out, masked, masked_example, placeholder
from fullrank.data.convert import Conversation, Document, Pair
from fullrank.data.subject import Subject, subject_of

DATA = Path(__file__).resolve().parents[5] / "shared/data"
CHECKS = PersonalChecks()


def look(text: str) -> list[Sighting]:
    return CHECKS.look(subject_of(Document(text)))


def seen(text: str) -> list[tuple[str, str, str]]:
    return [(sighting.kind, sighting.what, text[sighting.start : sighting.end]) for sighting in look(text)]


# ---- secrets --------------------------------------------------------------------------------------------------------

DRAW = random.Random(5)
ALNUM = string.ascii_letters + string.digits
HEX = "0123456789abcdef"


def some(alphabet: str, length: int) -> str:
    """Random characters, put together here so that no file holds a thing that looks like somebody's key."""
    return "".join(DRAW.choice(alphabet) for _ in range(length))


def web_token() -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return ".".join((part({"alg": "HS256", "typ": "JWT"}), part({"sub": "1234567890"}), some(ALNUM + "-_", 43)))


ISSUED = {
    "AWS access key": lambda: "AKIA" + some(string.ascii_uppercase + "234567", 16),
    "AWS secret access key": lambda: some(ALNUM + "/+", 37) + "a1B",
    "GitHub token": lambda: DRAW.choice(("ghp_" + some(ALNUM, 36), "github_pat_" + some(ALNUM, 22) + "_" + some(ALNUM, 59))),
    "GitLab token": lambda: "glpat-" + some(ALNUM + "-_", 19) + "x",
    "Slack token": lambda: "xoxb-" + some(string.digits, 12) + "-" + some(string.digits, 12) + "-" + some(ALNUM, 24),
    "Stripe key": lambda: DRAW.choice(("sk_live_", "rk_test_", "sk_test_")) + some(ALNUM, 24),
    "Google API key": lambda: "AIza" + some(ALNUM + "-_", 34) + "Q",
    "OpenAI API key": lambda: DRAW.choice(("sk-" + some(ALNUM, 48), "sk-proj-" + some(ALNUM + "-_", 60) + "A")),
    "Anthropic API key": lambda: "sk-ant-api03-" + some(ALNUM + "-_", 93) + "AA",
    "Hugging Face token": lambda: "hf_" + some(string.ascii_letters, 34),
    "npm token": lambda: "npm_" + some(ALNUM, 36),
    "PyPI token": lambda: "pypi-AgEIcHlwaS5vcmc" + some(ALNUM + "-_", 120) + "A",
    "Twilio key": lambda: "SK" + some(HEX, 32),
    "SendGrid key": lambda: "SG." + some(ALNUM + "-_", 22) + "." + some(ALNUM + "-_", 42) + "k",
    "JSON Web Token": web_token,
    "Telegram bot token": lambda: some("123456789", 10) + ":AA" + some(ALNUM + "-_", 32) + "k",
    "private key": lambda: (
        "-----BEGIN RSA PRIVATE KEY-----\n"
        + "\n".join(some(ALNUM + "+/", 64) for _ in range(4))
        + "\n-----END RSA PRIVATE KEY-----"
    ),
}


@pytest.mark.parametrize("what", ISSUED)
@pytest.mark.parametrize("around", ["My key is {}, keep it safe.", 'x = "{}"', "{}", "Use `{}`\nand go on", "({})"])
def test_secrets_in_their_issuers_formats(what: str, around: str) -> None:
    for _ in range(20):
        secret = ISSUED[what]()
        assert seen(around.format(secret)) == [("secret", what, secret)]


@pytest.mark.parametrize(
    ("text", "what", "span"),
    [
        ("postgres://admin:hunter2@db.example.com:5432/app", "password in a URL", "admin:hunter2"),
        ("mongodb+srv://u:p%40ss@cluster0.mongodb.net/x", "password in a URL", "u:p%40ss"),
        ("redis://:s3cret@localhost:6379", "password in a URL", ":s3cret"),
        ("see https://bob:letmein@example.org/a?b=c.", "password in a URL", "bob:letmein"),
        ("password=hunter2", "password", "hunter2"),
        ("password: 'Tr0ub4dor&3'", "password", "Tr0ub4dor&3"),
        ('{"password": "s3cr3t!x"}', "password", "s3cr3t!x"),
        ("my password is P@ssw0rd1.", "password", "P@ssw0rd1"),
        ("DB_PASSWORD=correct-h0rse", "password", "correct-h0rse"),
        ("?user=bob&password=abc12345&x=1", "password", "abc12345"),
        ("Server=x;User Id=sa;Password=Adm1n!;", "password", "Adm1n!"),
        ("passcode: 918273", "password", "918273"),
        ("api_key = '9f8a7b6c5d4e3f2a1b0c9d8e'", "assigned key or token", "9f8a7b6c5d4e3f2a1b0c9d8e"),
        ("client_secret: Zx9_kLmN0pQrStUvWxYz", "assigned key or token", "Zx9_kLmN0pQrStUvWxYz"),
        ("Authorization: Bearer abcDEF123456ghiJKL789", "assigned key or token", "abcDEF123456ghiJKL789"),
        ("X-API-Key: 1234abcd5678efgh9012", "assigned key or token", "1234abcd5678efgh9012"),
    ],
)
def test_assigned_secrets_are_seen_without_their_names(text: str, what: str, span: str) -> None:
    assert seen(text) == [("secret", what, span)]


@pytest.mark.parametrize(
    "text",
    [
        "I forgot my password, how do I reset it?",
        "Your password is required. The password must have 8-20 characters!",
        "password: str = get_password1()",
        "password = os.environ['DB_PASSWORD1']",
        "password=${DB_PASS1} password=<your-password-1> password=******** password=[PASSWORD] passwd=%s",
        "token = user_token_1; self.token = token2; token: Optional[str]",
        "max_tokens=4096, tokenizer='meta-llama/Llama-3.1-8B-Instruct', pad_token='<pad_0123456789>'",
        "primary_key=users_table_id_12, foreign key: 2023-11-05-0001",
        "The key is under the mat at 12 Main Street since 2012.",
        "AKIAXXXXXXXXXXXXXXXX sk_test_xxxxxxxxxxxxxxxxxxxxxxxx ghp_" + "x" * 36,
        "commit 3f786850e387550fdab836ed7e6dc881de23001b in https://github.com/a/b",
        "https://example.com/a:b@c http://localhost:8080/@user git@github.com:owner/repo.git",
        "task-force risk-averse desk-based hf_hub_download_with_a_very_long_name_of_words",
        "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA\n-----END PUBLIC KEY-----",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "com/google/android/gms/internal/Abc12345",
        "eyJhbGciOiJub25lIn0",
        "secret: it is 42",
    ],
)
def test_no_secrets(text: str) -> None:
    assert seen(text) == []


# ---- personal data --------------------------------------------------------------------------------------------------

PERSONAL = {
    "e-mail address": [
        "john.doe@example.com", "j+tag@sub.domain.co.uk", "o'neill_99@mail.example.org", "müller@bücher.de", "JOHN@EXAMPLE.COM",
        "name [at] example [dot] com", "first.last@university.museum", "x@xn--bcher-kva.example",
    ],
    # Ofcom and the North American plan set numbers aside for fiction; the others are written as their countries write them.
    "phone number": [
        "555-123-4567", "(555) 123-4567", "212-555-0123", "212.555.0123", "+1-202-555-0143", "+1 (202) 555-0143", "555-0123",
        "1-800-555-0199", "+12025550143", "202-555-0143 x123", "123-456-7890", "+1.7035550123", "+44 20 7946 0958",
        "+44 (0)20 7946 0958", "+44 7700 900123", "+49 30 901820", "+33 1 23 45 67 89", "+91 98765 43210", "+86 138 0013 8000",
        "0049 30 901820", "020 7946 0958", "07700 900123", "06 12 34 56 78",
    ],
    "social security number": ["078-05-1120", "123-45-6789", "219-09-9999", "912-70-1234"],
    # The networks' published test numbers.
    "payment card number": [
        "4111111111111111", "4111 1111 1111 1111", "4012-8888-8888-1881", "5555 5555 5555 4444", "5105105105105100",
        "2223003122003222", "378282246310005", "3782 822463 10005", "6011111111111117", "30569309025904", "3530111333300000",
        "6200000000000005",
    ],
    # Examples of the IBAN registry.
    "IBAN": [
        "GB29 NWBK 6016 1331 9268 19", "GB29NWBK60161331926819", "DE89 3704 0044 0532 0130 00", "FR1420041010050500013M02606",
        "NL91 ABNA 0417 1643 00", "NO9386011117947", "MT84MALT011000012345MTLCAST001S", "CH93 0076 2011 6238 5295 7",
        "ES91 2100 0418 4502 0005 1332", "BR1800360305000010009795493C1",
    ],
    "IP address": [
        "203.0.113.42", "198.51.100.7", "93.184.216.34", "2001:db8::8a2e:370:7334", "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
    ],
    "UK National Insurance number": ["QQ 12 34 56 C".replace("QQ", "AB"), "JG103759A"],
    "Spanish identity number": ["12345678Z", "X1234567L"],
    "Brazilian CPF": ["111.444.777-35", "529.982.247-25"],
    "French social security number": ["2 55 08 14 168 025 38", "255081416802538"],
    "Chinese identity number": ["11010519491231002X"],
}  # fmt: skip


@pytest.mark.parametrize(("what", "value"), [(what, value) for what, values in PERSONAL.items() for value in values])
@pytest.mark.parametrize(
    "around", ["Write to {} today.", "{}", "<b>{}</b>, please", "it is {}.", "one\n{}\ntwo", "x: {}; 5 more"]
)
def test_personal_data(what: str, value: str, around: str) -> None:
    assert seen(around.format(value)) == [("personal_data", what, value)]


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("Call me at 5551234567 tomorrow", "5551234567"),
        ("my number is 2025550143", "2025550143"),
        ("Tel.: 030/901820", "030/901820"),
        ("mobile: 0171 1234567", "0171 1234567"),
        ("phone 555-1234", "555-1234"),
        ("text me on 07700900123", "07700900123"),
        ("her social security number is 219 09 9999", "219 09 9999"),
        ("SSN: 219099999", "219099999"),
    ],
)
def test_bare_numbers_count_when_words_announce_them(text: str, span: str) -> None:
    assert [found[2] for found in seen(text)] == [span]


@pytest.mark.parametrize(
    "text",
    [
        "16 - 3 - 4 = <<16-3-4=9>>9, 48/2 = <<48/2=24>>24, $<<2400-800=1600>>1600, 28980 - 18480 = 10500",
        "450-200-1000=<<450-200-1000=-750>>750; 100 200 3000 4000; 100-200-3000, 112-355-0123; 3.14159265358979; 5 +1234567 = x",
        "SELECT Notes FROM 1-1000181-1 WHERE Year = '1998-99' AND Score = '4-6, 7-6 7-5, 6-4'; 2-12345678-9",
        "On 2023-11-05, 11/05/2023, 05.11.2023 at 12:30:45, 1939-1945, pp. 123-4567, 2020-01-01 00:00:00.123456",
        "Order 123456789, account number 12345678, invoice 2025550143, case no. 9274036185, part 6878461314",
        "Sort: 9274036185, 1203456789. Numbers: 1000\n250\n5000",
        "Python 3.11.7.1, version 10.2.30.4, v1.22.333.44, section 12.3.45.6, EC 3.1.1.11, 1.2.3.4",
        "127.0.0.1, 192.168.1.10, 10.0.0.1, 0.0.0.0, 255.255.255.0, 8.8.8.8, ::1, fe80::1, 300.1.2.3",
        "std::vector<int>, a::b::c, 12:34:56, 1:18:01::, C::D3::E4",
        "@media, user@localhost, icon@2x.png, git@github.com:a/b.git, a@b, @property.setter, x = A@B.T, ssh://git@host.org/x",
        "4111 1111 1111 1112, 4111111111111112, 1234567890123456, ISBN 978-3-16-148410-0, 9783161484100, 1700000000000",
        "GB29 NWBK 6016 1331 9268 18, DE89 3704 0044 0532 0130 01, AB12 CDEF 3456",
        "000-12-3456, 666-12-3456, 123-00-6789, 123-45-0000, 12-345-6789, 1123-45-67890",
        "12345678A, X1234567A, 111.444.777-36, 111.111.111-11, 110105194912310021, BG123456A",
        "call 1000000 people, reach 25000000 dollars, text 12345, contact 5 of 1000000",
        "+5 -3 +12, +1.4142135623731*I, +1980-02-29 01:02:03, 0020-01-01 01:00, 00 01 02 03 04 05 06 07",
        "lat 52.520008, lon 13.404954; 37.7749 -122.4194; #1234567; 10.1016/0020-0190(76)90049-1",
        "123456,   555-01234567; 1,234,567.89",
        "UUID 123e4567-e89b-12d3-a456-426614174000; sha 1234567890; 0x1234567890",
    ],
)
def test_numbers_that_are_nothing_personal(text: str) -> None:
    assert seen(text) == []


def test_german_identifiers_by_datafog(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Steuer-ID: 12345678901, Rentenversicherungsnummer 65 170839 J 008, Reisepass C01234567."
    assert left_out() == {}
    assert [found[2] for found in seen(text)] == ["12345678901", "65 170839 J 008", "C01234567"]
    monkeypatch.setitem(sys.modules, "datafog", None)
    assert "datafog" in left_out()["personal_data"]
    bare = PersonalChecks()
    assert bare.look(subject_of(Document(text))) == []
    assert len(bare.look(subject_of(Document("john@example.com, 212-555-0123")))) == 2


def test_a_password_in_a_url_is_no_mail_address() -> None:
    assert [found[:2] for found in seen("ftp://joe:pass12@example.com/x and joe@example.com")] == [
        ("secret", "password in a URL"),
        ("personal_data", "e-mail address"),
    ]


@pytest.mark.parametrize("kind", ["secret", "personal_data"])
def test_skipped_kinds_are_not_looked_for(kind: str) -> None:
    text = "password=hunter2 john@example.com"
    assert {found[0] for found in seen(text)} == {"secret", "personal_data"}
    checks = pickle.loads(pickle.dumps(PersonalChecks(frozenset([kind]))))
    assert {sighting.kind for sighting in checks.look(subject_of(Document(text)))} == {"secret", "personal_data"} - {kind}


@pytest.mark.parametrize(
    "text",
    [
        "a", "7", "1 ", "1.", "a@", "a.", "=", "A", "ab:", "+1", "-", "(", "1-", "a://b:", "eyJ", "token: ", "bearer ", "GB82",
        "password=a ", "-----BEGIN PRIVATE KEY-----", "555-123-4567 ", "bob@example.com ", "4111 1111 ",
    ],
)  # fmt: skip
def test_long_texts_take_linear_time(text: str) -> None:
    def seconds(characters: int) -> float:
        subject = subject_of(Document(text * (characters // len(text))))
        before = time.process_time()
        CHECKS.look(subject)
        return time.process_time() - before

    short, long = seconds(20_000), seconds(200_000)
    assert long < 40 * short + 0.5


# ---- masking --------------------------------------------------------------------------------------------------------


def test_masking_rewrites_the_spans_and_nothing_else() -> None:
    key = ISSUED["AWS access key"]()
    text = f"Mail john@example.com or call 212-555-0123; {key}; password='hunter2' https://a:b1c2@x.org/p. 4111 1111 1111 1111"
    assert masked(text, look(text)) == (
        "Mail [EMAIL] or call [PHONE]; [AWS_ACCESS_KEY]; password='[PASSWORD]' https://[URL_CREDENTIALS]@x.org/p. [PAYMENT_CARD]"
    )
    assert look(masked(text, look(text))) == []


def test_overlapping_spans_become_one() -> None:
    def sighting(what: str, start: int, end: int) -> Sighting:
        return Sighting("secret", what, "text", start, end)

    assert masked("0123456789", [sighting("b", 4, 8), sighting("a key", 2, 5), sighting("c", 8, 9)]) == "01[B][C]9"
    assert masked("0123456789", [sighting("inner", 3, 4), sighting("outer", 2, 6)]) == "01[OUTER]6789"
    assert masked("0123456789", []) == "0123456789"
    assert masked("0123", [sighting("all", 0, 4)]) == "[ALL]"
    with pytest.raises(ValueError, match="outside a text of 4"):
        masked("0123", [sighting("x", 2, 5)])


@pytest.mark.parametrize(("what", "values"), PERSONAL.items())
def test_what_is_masked_is_seen_no_more(what: str, values: list[str]) -> None:
    for value in values:
        text = f"a {value} b"
        assert masked(text, look(text)) == f"a {placeholder(what)} b"
        assert look(f"a {placeholder(what)} b") == []


def test_records_of_every_form_are_masked_in_place() -> None:
    mail = "to bob@example.com"
    for example, expected in [
        (Document(mail), Document("to [EMAIL]")),
        (Pair(mail, "no"), Pair("to [EMAIL]", "no")),
        (Pair("no", mail), Pair("no", "to [EMAIL]")),
    ]:
        assert masked_example(example, CHECKS.look(subject_of(example))) == expected
    tools = [{"type": "function", "function": {"name": "send", "description": mail}}]
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "send", "arguments": {"to": ["bob@example.com", 5, None], "n": 1.5}},
    }
    chat = Conversation(
        [
            {"role": "user", "content": mail, "weight": 1},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "ok", "tool_call_id": "1"},
            {"role": "assistant", "content": "done", "train": False},
        ],
        tools,
    )
    before = json.dumps(chat.messages)
    hidden = masked_example(chat, CHECKS.look(subject_of(chat)))
    assert isinstance(hidden, Conversation)
    assert json.loads(before.replace("bob@example.com", "[EMAIL]")) == hidden.messages
    assert json.loads(json.dumps(tools).replace("bob@example.com", "[EMAIL]")) == hidden.tools != tools
    assert json.dumps(chat.messages) == before, "the record itself stays as it is"


def test_only_the_kinds_asked_for_are_masked() -> None:
    pair = Pair("password=hunter2", "bob@example.com \u200b")
    sightings = [*CHECKS.look(subject_of(pair)), Sighting("hidden_unicode", "zero-width space", "completion", 16, 17)]
    assert masked_example(pair, sightings) == Pair("password=[PASSWORD]", "[EMAIL] \u200b")
    assert masked_example(pair, sightings, frozenset(["secret"])) == Pair("password=[PASSWORD]", "bob@example.com \u200b")
    clean = Pair("a", "b")
    assert masked_example(clean, []) is clean


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


@pytest.mark.parametrize(
    "name",
    [
        "banking77/train.jsonl",
        "commonsense_mc/piqa.jsonl",
        "commonsense_mc/arc_easy.jsonl",
        "fastchat_multiturn/conversations.jsonl",
        "gsm8k/test.jsonl",
        "gsm8k/train.jsonl",
        "mmlu/test.jsonl",
        "pubmedqa/train.jsonl",
        "pubmedqa/test.jsonl",
        "rasbt_instruction/alpaca.jsonl",
        "wikisql_text2sql/train.jsonl",
        "wikisql_text2sql/validation.jsonl",
        "wikitext2/test.jsonl",
    ],
)
def test_real_data_without_personal_data_has_none(name: str) -> None:
    # Read through with a detector of its own (datafog's patterns): these files hold numbers, dates and tables, nobody's data.
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    assert [(line, sighting.what) for line, subject in subjects(path) for sighting in CHECKS.look(subject)] == []
