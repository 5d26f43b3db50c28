"""What fastokens makes of text is what `tokenizers` makes of it, however a tokenizer cuts text into words: every code point."""

from __future__ import annotations

import copy
import json
import random
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

import families
import pytest
from tokenizers import Tokenizer

from fullrank.errors import FullrankError
from fullrank.sequences import batch
from fullrank.sequences.batch import BatchEncoder

needs_fastokens = pytest.mark.skipif(batch.version() == "tokenizers", reason="fastokens, of the data extra, is not installed")

_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
#: How families cut text into words before merging: (pre-tokenizer, normalizer).
CUTS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "llama3": (None, None),  # the tokenizer's own
    "qwen": (None, {"type": "NFC"}),
    "gpt2": ({**_BYTE_LEVEL, "use_regex": True}, None),
    "smollm2": (
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**_BYTE_LEVEL, "use_regex": True}],
        },
        None,
    ),
    "gptoss": (
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _GPT4O}, "behavior": "Isolated", "invert": False},
                {**_BYTE_LEVEL, "use_regex": False},
            ],
        },
        None,
    ),
}


def encoder(description: str) -> tuple[BatchEncoder, Tokenizer]:
    reference = Tokenizer.from_str(description)
    control = [token["content"] for token in json.loads(description)["added_tokens"]]
    return BatchEncoder(reference, description, control, "tiny"), reference


@pytest.fixture(scope="module")
def description() -> str:
    if why := families.missing("llama3"):
        pytest.skip(why)
    return str(families.tokenizer("llama3").backend_tokenizer.to_str())


def texts() -> Iterator[str]:
    """Every assigned code point (of the ideographs and syllables, which are of one class, and of what is not assigned: some)
    beside letters, digits, quotes and white space; and mixtures.
    """
    points = [n for n in range(0x110000) if not 0xD800 <= n < 0xE000]
    plenty = {"Cn": 97, "Co": 97, "Lo": 13}
    points = [n for n in points if n < 0x3000 or n % plenty.get(unicodedata.category(chr(n)), 1) == 0]
    for n in points:
        yield "a{0}b {0}1{0} 's{0}S\n{0}{0}\n\n  {0}.".format(chr(n))
    chance = random.Random(11)
    near = [" ", " ", "\n", "\r", "\t", "a", "B", "1", "'s", "'LL", "<|eot_id|>", "é", "e\u0301", "\u3000", "\x85", "ſ", "漢"]
    for _ in range(4000):
        yield "".join(chance.choice(near) if chance.random() < 0.8 else chr(chance.choice(points)) for _ in range(40))


@needs_fastokens
@pytest.mark.parametrize("name", CUTS)
def test_every_code_point_is_encoded_as_tokenizers_does(name: str, description: str) -> None:
    changed = json.loads(description)
    cuts, normalizer = CUTS[name]
    changed["pre_tokenizer"] = cuts or changed["pre_tokenizer"]
    changed["normalizer"] = normalizer
    batches, reference = encoder(json.dumps(changed))
    assert batches.is_fast
    pieces = list(texts())
    found = batches.ids(pieces, add_special_tokens=False)
    wanted = [encoding.ids for encoding in reference.encode_batch_fast(pieces, add_special_tokens=False)]
    different = [text for text, ids, want in zip(pieces, found, wanted, strict=True) if ids != want]
    assert not different, f"{len(different)} of {len(pieces)}: {different[:3]!r}"


@needs_fastokens
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_encoded_as_tokenizers_does(name: str, add: bool) -> None:
    if why := families.missing(name):
        pytest.skip(why)
    batches, reference = encoder(families.tokenizer(name).backend_tokenizer.to_str())
    own = [token.content for token in families.tokenizer(name).added_tokens_decoder.values()]
    chance = random.Random(5)
    words = [*own, "the weather", " in", "\n\n", "  ", "Zürich", "24", "x", "▁", "é漢"]
    pieces = ["".join(chance.choices(words, k=12)) for _ in range(400)]
    assert batches.ids(pieces, add_special_tokens=add) == [reference.encode(text, add_special_tokens=add).ids for text in pieces]


@needs_fastokens
def test_a_byte_without_a_token_is_left_out_as_tokenizers_does(description: str) -> None:
    changed = json.loads(description)
    new_line = "Ċ"  # byte-level BPE's letter for byte 0x0A
    changed["model"]["merges"] = [merge for merge in changed["model"]["merges"] if new_line not in "".join(merge)]
    changed["model"]["vocab"] = {text: n for text, n in changed["model"]["vocab"].items() if new_line not in text}
    batches, reference = encoder(json.dumps(changed))
    pieces = ["one", "a\nb"]
    wanted = [reference.encode(text, add_special_tokens=False).ids for text in pieces]
    assert batches.ids(pieces, add_special_tokens=False) == wanted


@needs_fastokens
def test_a_difference_before_the_first_use_is_avoided(description: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that fastokens would be otherwise is used without it."""
    other = copy.deepcopy(json.loads(description))
    other["pre_tokenizer"] = CUTS["gpt2"][0]
    wrong = batch._fastokens(json.dumps(other))
    monkeypatch.setattr(batch, "_fastokens", lambda _: wrong)
    batches, reference = encoder(description)
    assert not batches.is_fast
    assert batches.ids(["I'll say 1234"], add_special_tokens=False) == [reference.encode("I'll say 1234").ids[1:]]


@needs_fastokens
def test_a_difference_later_stops_the_work(description: str) -> None:
    batches, _ = encoder(description)
    assert batches.is_fast  # the two have been tried
    exactly = batches._exactly
    batches._exactly = lambda text, add: exactly(text + "!", add)  # type: ignore[method-assign]
    with pytest.raises(FullrankError, match="encode a text differently with the tokenizer of tiny: 'text 0'") as raised:
        batches.ids([f"text {n}" for n in range(40)], add_special_tokens=False)
    assert "pip uninstall fastokens" in str(raised.value.hint)


def test_without_fastokens(description: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    batches, reference = encoder(description)
    assert not batches.is_fast
    assert batches.ids(["a b", ""], add_special_tokens=True) == [reference.encode("a b").ids, reference.encode("").ids]


@needs_fastokens
def test_a_kind_that_fastokens_refuses() -> None:
    description = json.dumps(
        {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}}
    )
    batches, _ = encoder(description)
    assert not batches.is_fast
    assert batches.ids(["a", "b"], add_special_tokens=False) == [[0], [1]]
