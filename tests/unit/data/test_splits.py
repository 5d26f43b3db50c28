"""Splits from shards: the same bytes however the work is shared out, every record accounted for, shares and sides as asked."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from staging import Staged, leftovers, staged, write_case
from tiny import CHATML, chat_rows, write_jsonl

from fullrank.data import pool, sources
from fullrank.data import stage as data_stage
from fullrank.errors import DataRefused, FullrankError
from fullrank.models.load import load_tokenizer
from fullrank.run import read_json_lines
from fullrank.sequences.chat import Tokens
from fullrank.sequences.store import Shard, ShardPlace, TokenStore, write_index, write_shard

#: Blocks of a few records, so that small files have many.
SMALL_BLOCKS = 600


@pytest.fixture(scope="module")
def model(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


def pair(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": question, "completion": answer}


def pairs(count: int, word: str) -> list[dict[str, Any]]:
    return [pair(f"what is the {word} of bank {n}", f"the {word} is {n * 7 % 11}" + " and more" * (n % 4)) for n in range(count)]


_blocks = sources.blocks


def small_blocks(monkeypatch: pytest.MonkeyPatch, block_bytes: int = SMALL_BLOCKS) -> None:
    monkeypatch.setattr(sources, "blocks", partial(_blocks, block_bytes=block_bytes))


# ---- a case of everything: several kinds of files, bad records in each ----------------------------------------------


class Written:
    """Files with bad records, and where those stand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: Counter[str] = Counter()
        self.bad: list[tuple[str, str, int, int | None, str]] = []
        """(split, file, line, byte, part of the reason)"""
        self.answers: dict[str, str] = {}
        """file:line of every good training record -> its last answer"""

    def jsonl(self, name: str, split: str, items: Iterable[dict[str, Any] | tuple[bytes, str]]) -> None:
        raw = b""
        for line, item in enumerate(items, start=1):
            if isinstance(item, tuple):
                self.bad.append((split, name, line, len(raw), item[1]))
            elif split == "train":
                self.answers[f"{name}:{line}"] = item["messages"][-1]["content"] if "messages" in item else item["completion"]
            raw += (json.dumps(item).encode() if isinstance(item, dict) else item[0]) + b"\n"
            self.read[split] += 1
        path = self.folder / name
        path.write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)

    def csv(self, name: str, split: str, rows: Iterable[tuple[str, str, str | None]]) -> None:
        raw = "prompt,completion\n"
        for prompt, completion, reason in rows:
            if reason:
                self.bad.append((split, name, raw.count("\n") + 1, len(raw.encode()), reason))
            elif split == "train":
                self.answers[f"{name}:{raw.count(chr(10)) + 1}"] = completion
            out = io.StringIO()
            csv.writer(out, lineterminator="\n").writerow([prompt, completion])
            raw += out.getvalue()
            self.read[split] += 1
        (self.folder / name).write_text(raw, encoding="utf-8")

    def json(self, name: str, split: str, items: Iterable[tuple[str, str | None]]) -> None:
        raw = "["
        for number, (text, reason) in enumerate(items):
            raw += ",\n  " if number else "\n  "
            if reason:
                self.bad.append((split, name, raw.count("\n") + 1, len(raw.encode()), reason))
            elif split == "train":
                self.answers[f"{name}:{raw.count(chr(10)) + 1}"] = json.loads(text)["text"]
            raw += text
            self.read[split] += 1
        (self.folder / name).write_text(raw + "\n]\n", encoding="utf-8")


@pytest.fixture
def everything(tmp_path: Path, model: Path) -> Iterator[tuple[Path, Written]]:
    case = write_case(
        tmp_path,
        model,
        data={
            "train": ["a.jsonl", "b.csv", "c.json", "d.jsonl.gz"],
            "validation": "v.jsonl",
            "test": {"seen": "t.csv", "other": "u.json"},
            "quarantine_budget": 100,
            "too_long": "drop",
            "audit": {"accept": ["leak"]},
        },
    )
    made = Written(tmp_path)
    good = chat_rows(40)
    torn = (b'{"prompt": "who", "compl', "not valid JSON")
    mojibake = (b'{"prompt": "\xe9t\xe9", "completion": "x"}', "not UTF-8")
    silent = (json.dumps({"messages": [{"role": "user", "content": "and?"}]}).encode(), "without an answer")
    made.jsonl("a.jsonl", "train", [*good[:9], torn, *good[9:22], silent, mojibake, *good[22:]])
    rows: list[tuple[str, str, str | None]] = [(f"line {n}\nand, {n}", f"it is {n}", None) for n in range(25)]
    made.csv("b.csv", "train", [*rows[:3], ("what", " ", "without an answer"), *rows[3:]])
    texts: list[tuple[str, str | None]] = [(json.dumps({"text": f"größer {n} " + "than " * (n % 5)}), None) for n in range(30)]
    made.json("c.json", "train", [("17", "expected a JSON object"), *texts[:20], ('{"text": 3}', "must be text"), *texts[20:]])
    made.jsonl("d.jsonl.gz", "train", [*pairs(20, "limit")[:7], torn, *pairs(20, "limit")[7:], silent])
    made.jsonl("v.jsonl", "validation", [*pairs(6, "colour"), (b"[]", "expected a JSON object")])
    made.csv("t.csv", "seen", [("what is the sky", "blue", None), ("", "x", "without a prompt"), ("the sea", "green", None)])
    unusable = ('{"text": "no question"}', "a test record needs")
    made.json("u.json", "other", [unusable, (json.dumps(pair("who", "they")), None)])
    yield case, made


def contents(run: Staged) -> dict[str, bytes]:
    """Every file of `data/` but for the times of the card."""
    found = {str(path.relative_to(run.run.data)): path.read_bytes() for path in run.run.data.rglob("*") if path.is_file()}
    card = json.loads(found["card.json"])
    found["card.json"] = json.dumps({**card, "seconds": 0, "peak_bytes": 0}).encode()
    return found


def cached(run: Staged) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.run.root.parent / ".shards").glob("*.safetensors")}


# ---- the same however it is done ------------------------------------------------------------------------------------


def test_processes_give_the_bytes_that_one_gives(everything: tuple[Path, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    case, _ = everything
    small_blocks(monkeypatch)
    alone = staged(case, runs=case.parent / "runs-0")
    alone.data()
    assert len(cached(alone)) > 20
    monkeypatch.setattr(data_stage, "_SMALL_BYTES", 0)
    for workers in (1, 3):  # two of them stand below, where one is killed
        shared = staged(case, [f"machine.workers={workers}"], runs=case.parent / f"runs-{workers}")
        shared.data()
        assert cached(shared) == cached(alone), workers
        assert contents(shared) == contents(alone), workers


def test_little_data_start_no_process(everything: tuple[Path, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_Worker", None)
    staged(everything[0], ["machine.workers=3"]).data()


def meaning(run: Staged) -> dict[str, Any]:
    """What `data/` says, but for how records are spread over shards."""
    found: dict[str, Any] = {}
    for split in ("train", "validation"):
        store = TokenStore(run.run.data / split)
        found[split] = [(store.origin(n), store[n].ids.tolist(), store[n].supervised.tolist()) for n in range(len(store))]
    for name in ("quarantine.jsonl", "tests/seen.jsonl", "tests/other.jsonl", "shown.jsonl"):
        found[name] = read_json_lines(run.run.data / name)
    for name in ("audit.json", "terms.json", "card.json"):
        found[name] = json.loads((run.run.data / name).read_text(encoding="utf-8"))
    found["card.json"] |= {"seconds": 0, "peak_bytes": 0}
    return found


def test_the_size_of_blocks_does_not_show(everything: tuple[Path, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    case, _ = everything
    whole = staged(case, runs=case.parent / "runs-whole")
    whole.data()
    wanted = meaning(whole)
    assert len(wanted["train"]) > 100 and wanted["quarantine.jsonl"]
    for block_bytes in (1, SMALL_BLOCKS):
        small_blocks(monkeypatch, block_bytes)
        cut = staged(case, runs=case.parent / f"runs-{block_bytes}")
        cut.data()
        assert meaning(cut) == wanted, block_bytes


# ---- none is lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [SMALL_BLOCKS, 4 << 20])
def test_read_is_used_and_quarantined(
    everything: tuple[Path, Written], monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    case, made = everything
    small_blocks(monkeypatch, block_bytes)
    run = staged(case)
    card = run.data()
    quarantine = read_json_lines(run.run.data / "quarantine.jsonl")
    expected = [(split, str(case.parent / name), line, byte) for split, name, line, byte, _ in made.bad]
    assert [(row["split"], row["path"], row["line"], row["offset"]) for row in quarantine] == expected
    for row, (*_, reason) in zip(quarantine, made.bad, strict=True):
        assert reason in row["reason"] and not row["asked_for"]
    rejected = Counter(split for split, *_ in made.bad)
    for name, split in (("train", card.train), ("validation", card.validation)):
        assert (split.read, split.used, split.quarantined) == (made.read[name], made.read[name] - rejected[name], rejected[name])
        assert (split.read, split.used) == (sum(s.read for s in split.sources), sum(s.used for s in split.sources))
        assert all(source.read == source.used + source.quarantined for source in split.sources)
        assert split.used == sum(split.formats.values()) == split.examples
    for name, test in card.tests.items():
        assert (test.read, test.quarantined) == (made.read[name], rejected[name])
        assert test.examples == test.read - test.quarantined == len(read_json_lines(run.run.data / "tests" / f"{name}.jsonl"))


def test_a_quarantined_record_is_found_by_its_byte(everything: tuple[Path, Written]) -> None:
    case, made = everything
    run = staged(case)
    run.data()
    for row, (*_, name, line, _, _) in zip(read_json_lines(run.run.data / "quarantine.jsonl"), made.bad, strict=True):
        raw = (case.parent / name).read_bytes()
        raw = gzip.decompress(raw) if name.endswith(".gz") else raw
        assert raw[: row["offset"]].count(b"\n") + 1 == line  # records begin where their line does, or inside it in an array
        if not name.endswith(".json"):
            assert raw[: row["offset"]].endswith(b"\n")


def test_every_example_is_traced_to_its_record(everything: tuple[Path, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = everything
    small_blocks(monkeypatch)
    run = staged(case)
    run.data()
    store = TokenStore(run.run.data / "train")
    found = {store.origin(n): learned for n, (_, learned) in enumerate(spoken(run))}
    assert {place.removeprefix(f"{case.parent}/") for place in found} == set(made.answers)
    for place, answer in made.answers.items():
        assert found[f"{case.parent}/{place}"].endswith(f"{answer}<|im_end|>"), place


def test_files_are_left_as_they_were(everything: tuple[Path, Written]) -> None:
    case, _ = everything
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in case.parent.iterdir() if path.is_file()}
    staged(case, ["data.audit.mask=[secret, personal_data]"]).data()
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}
    assert {path.name for path in case.parent.iterdir()} == {path.name for path in before} | {"runs"}


# ---- budget ---------------------------------------------------------------------------------------------------------


def test_the_budget_is_what_may_be_lost(everything: tuple[Path, Written]) -> None:
    case, made = everything
    bad = len(made.bad)
    staged(case, [f"data.quarantine_budget={bad}"]).data()
    run = staged(case, [f"data.quarantine_budget={bad - 1}"])
    with pytest.raises(DataRefused, match=f"data.quarantine_budget is {bad - 1}") as caught:
        run.data()
    assert run.reused("data")  # what is allowed changes nothing in the data
    assert f"{case.parent / 'a.jsonl'}:10: not valid JSON" in caught.value.message
    assert "data.quarantine_budget" in caught.value.hint


def test_what_was_asked_for_does_not_count(tmp_path: Path, model: Path) -> None:
    case = write_case(tmp_path, model)
    write_jsonl(tmp_path / "train.jsonl", [*pairs(5, "limit"), pair("go on", "and on " * 200), *pairs(3, "sky")])
    run = staged(case, ["data.too_long=drop"])
    card = run.data()
    assert (card.train.read, card.train.used, card.train.quarantined, card.train.examples) == (9, 8, 1, 8)
    (row,) = read_json_lines(run.run.data / "quarantine.jsonl")
    assert row["asked_for"] is True and row["line"] == 6 and "data.too_long is drop" in row["reason"]
    write_jsonl(tmp_path / "train.jsonl", [*pairs(5, "limit"), pair("go on", "and on " * 200), {"prompt": "who"}])
    with pytest.raises(DataRefused) as caught:
        staged(case, ["data.too_long=drop"]).data()
    assert caught.value.message == f"{tmp_path / 'train.jsonl'}:7: " + caught.value.message.partition(": ")[2]
    assert "max_length" not in caught.value.hint


@pytest.mark.parametrize("broken", ["array", "gzip"])
def test_no_budget_covers_the_rest_of_a_file_that_was_not_read(tmp_path: Path, model: Path, broken: str) -> None:
    """Nobody knows how many records that is."""
    case = write_case(tmp_path, model)
    rows = [json.dumps(row) for row in chat_rows(30)]
    if broken == "array":
        name = "train.json"
        (tmp_path / name).write_text("[" + ",\n".join(rows[:5]) + ",\n{'messages':\n" + ",\n".join(rows[5:]) + "]")
    else:
        name = "train.jsonl.gz"
        raw = gzip.compress("".join(row + "\n" for row in rows).encode(), compresslevel=0)
        (tmp_path / name).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataRefused, match="the rest of the file was not read") as caught:
        staged(case, [f"data.train={name}", "data.quarantine_budget=20"]).data()
    assert "allow as many" not in caught.value.hint  # it would not help


# ---- shares ---------------------------------------------------------------------------------------------------------


def counts(run: Staged, split: str = "train") -> dict[str, Counter[str]]:
    """How often each record stands in a split, by file."""
    store = TokenStore(run.run.data / split)
    found: dict[str, Counter[str]] = {}
    for n in range(len(store)):
        path, _, line = store.origin(n).rpartition(":")
        found.setdefault(Path(path).name, Counter())[line] += 1
    return found


@pytest.fixture
def three(tmp_path: Path, model: Path) -> Path:
    case = write_case(tmp_path, model)
    write_jsonl(tmp_path / "a.jsonl", pairs(40, "limit"))
    write_jsonl(tmp_path / "b.jsonl", pairs(6, "sky"))
    write_jsonl(tmp_path / "c.jsonl", [pair(f"go on {n}", "and on and on " * (2 + n)) for n in range(8)])
    return case


def test_examples_are_mixed_in_the_shares_asked_for(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    sources_ = "data.train=[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1, repeat: 3}, {path: c.jsonl, weight: 0.5}]"
    run = staged(three, [sources_])
    card = run.data()
    # c is used up at 8, and 0.5 of 3.5 shares: 56 in all; b gives 16 of its 6 up to three times, a 32 of its 40
    found = counts(run)
    assert {name: some.total() for name, some in found.items()} == {"a.jsonl": 32, "b.jsonl": 16, "c.jsonl": 8}
    assert set(found["a.jsonl"].values()) == {1} and set(found["c.jsonl"].values()) == {1}
    assert sorted(found["b.jsonl"].values()) == [2, 2, 3, 3, 3, 3]
    store = TokenStore(run.run.data / "train")
    by_file: Counter[str] = Counter()
    for n in range(len(store)):
        by_file[Path(store.origin(n).rpartition(":")[0]).name] += len(store[n].ids)
    assert card.train.examples == 56 and card.train.tokens == by_file.total()
    for source in card.train.sources:
        name = Path(source.name).name
        assert (source.examples, source.tokens) == (found[name].total(), by_file[name])
        assert source.examples_ratio == pytest.approx(found[name].total() / 56)
        assert source.tokens_ratio == pytest.approx(by_file[name] / by_file.total())
    assert [source.weight for source in card.train.sources] == [2, 1, 0.5]
    assert (card.train.read, card.train.used) == (54, 54)  # what the mix leaves out was read and could be used


def test_tokens_are_mixed_in_the_shares_asked_for(three: Path) -> None:
    run = staged(three, ["data.train=[{path: a.jsonl, weight: 1}, {path: c.jsonl, weight: 1}]", "data.mix_by=tokens"])
    card = run.data()
    a, c = card.train.sources
    assert a.tokens_ratio == pytest.approx(0.5, abs=0.02) and a.examples_ratio > 0.6
    longest = max(len(TokenStore(run.run.data / "train")[n].ids) for n in range(card.train.examples))
    assert abs(a.tokens - c.tokens) <= longest / 2 + 1


def test_the_seed_chooses_what_a_mix_leaves_out(three: Path) -> None:
    asked = "data.train=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 1}]"
    found = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        run = staged(three, [asked, f"name={name}", f"train.seed={seed}"])
        run.data()
        found[name] = counts(run)["a.jsonl"]
    assert found["one"] == found["again"] != found["two"]
    assert all(some.total() == 6 for some in found.values())


def test_without_weights_every_example_is_used_once_in_its_order(three: Path) -> None:
    for seed in (1, 2):
        run = staged(three, ["data.train=[a.jsonl, b.jsonl]", f"train.seed={seed}", f"name=seed-{seed}"])
        run.data()
        store = TokenStore(run.run.data / "train")
        wanted = [f"{three.parent / name}:{n + 1}" for name, count in (("a.jsonl", 40), ("b.jsonl", 6)) for n in range(count)]
        assert [store.origin(n) for n in range(len(store))] == wanted


def test_held_out_records_are_not_mixed_in(three: Path) -> None:
    asked = "data.train=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 1, repeat: 4}]"
    run = staged(three, [asked, "data.validation.ratio=0.25"])
    card = run.data()
    train, validation = counts(run), counts(run, "validation")
    assert all(set(validation[name].values()) == {1} for name in validation)
    assert not any(set(train[name]) & set(validation.get(name, ())) for name in train)
    # validation is a share of all records, whatever the mix makes of the rest
    assert card.validation.examples == round(46 * 0.25) == sum(len(some) for some in validation.values())
    left = {name: total - len(validation.get(name, ())) for name, total in (("a.jsonl", 40), ("b.jsonl", 6))}
    assert train["b.jsonl"].total() == train["a.jsonl"].total() == min(left["a.jsonl"], 4 * left["b.jsonl"])
    assert card.train.used + card.validation.used == card.train.read + card.validation.read == 46


# ---- sides ----------------------------------------------------------------------------------------------------------


def sides(run: Staged) -> list[set[int]]:
    """Lines in training and in validation."""
    return [
        {int(store.origin(n).rpartition(":")[2]) for n in range(len(store))}
        for store in (TokenStore(run.run.data / split) for split in ("train", "validation"))
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("skip", ["", "exact_duplicate, near_duplicate, leak, label_conflict"])
def test_records_that_ask_the_same_stay_on_one_side(tmp_path: Path, model: Path, seed: int, skip: str) -> None:
    case = write_case(tmp_path, model)
    rows = [pair(f"what is the limit of bank {n // 3}", f"it is {n}") for n in range(45)]
    rows += [{"text": f"the sky {n // 2}"} for n in range(20)]  # every text twice
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "and the sea"}]
    rows += [{"messages": [*chat, {"role": "assistant", "content": f"blue {n}"}]} for n in range(4)]
    order = np.random.default_rng(seed).permutation(len(rows))
    write_jsonl(tmp_path / "train.jsonl", [rows[n] for n in order])
    run = staged(case, ["data.validation.ratio=0.3", f"train.seed={seed}", f"data.audit.skip=[{skip}]"])
    run.data()
    groups = [
        {line for line, n in enumerate(order, start=1) if asked(rows[n]) == question} for question in {asked(row) for row in rows}
    ]
    train, validation = sides(run)
    assert train | validation == set(range(1, len(rows) + 1)) and not train & validation
    assert abs(len(validation) - 0.3 * len(rows)) <= 4
    for group in groups:
        assert group <= train or group <= validation


def asked(row: dict[str, Any]) -> str:
    if "messages" in row:
        return json.dumps(row["messages"][:-1])
    return str(row.get("prompt") or row["text"])


def test_an_instruction_that_all_records_have_is_no_question(tmp_path: Path, model: Path) -> None:
    case = write_case(tmp_path, model)
    answers = [f"the answer is {n // 2}" for n in range(60)]  # every record twice
    write_jsonl(tmp_path / "train.jsonl", [pair("say something", answer) for answer in answers])
    run = staged(case, ["data.validation.ratio=0.2"])
    run.data()
    train, validation = sides(run)
    assert len(validation) == 12
    assert not {answers[line - 1] for line in train} & {answers[line - 1] for line in validation}


def test_pieces_of_a_document_stay_on_one_side(tmp_path: Path, model: Path) -> None:
    case = write_case(tmp_path, model)
    texts = [{"text": f"the bank number {n} holds less capital than it may " * 12} for n in range(10)]
    write_jsonl(tmp_path / "train.jsonl", texts)
    run = staged(case, ["data.validation.ratio=0.2", "data.too_long=chunk", "data.max_length=64"])
    card = run.data()
    train, validation = sides(run)
    assert not train & validation and len(validation) == 2
    assert card.train.examples + card.validation.examples > 30


# ---- a process that dies --------------------------------------------------------------------------------------------


def test_a_killed_process_costs_only_what_it_was_doing(everything: tuple[Path, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    case, _ = everything
    small_blocks(monkeypatch)
    monkeypatch.setattr(data_stage, "_SMALL_BYTES", 0)
    do, count = pool._Worker.do, itertools.count()

    def killed_at_work(self: pool._Worker, *arguments: Any) -> Any:
        if next(count) == 6:
            os.killpg(self.family._process.pid, signal.SIGKILL)
        return do(self, *arguments)

    monkeypatch.setattr(pool._Worker, "do", killed_at_work)
    run = staged(case, ["machine.workers=2"])
    with pytest.raises(FullrankError, match="signal 9") as caught:
        run.data()
    assert "machine.workers=1" in caught.value.hint
    assert not run.run.data.exists() and leftovers(run.run.root) == []
    done = {path.name: path.stat().st_ino for path in (case.parent / "runs" / ".shards").glob("*.safetensors")}
    assert len(done) >= 3

    monkeypatch.setattr(pool._Worker, "do", do)
    again = staged(case, ["machine.workers=1"])
    again.data()
    after = {path.name: path.stat().st_ino for path in (case.parent / "runs" / ".shards").glob("*.safetensors")}
    assert done.items() <= after.items() and len(after) > len(done)  # what was there was not written again
    monkeypatch.setattr(data_stage, "_SMALL_BYTES", 8 << 20)
    untouched = staged(case, runs=case.parent / "untouched")
    untouched.data()
    assert contents(again) == contents(untouched) and cached(again) == cached(untouched)


# ---- forms and turns through the stage ------------------------------------------------------------------------------


def spoken(run: Staged) -> list[tuple[str, str]]:
    """Of every training example its text, and what of it is learned."""
    store, tokenizer = TokenStore(run.run.data / "train"), load_tokenizer(run.base.folder)
    found = []
    for n in range(len(store)):
        example = store[n]
        found.append(
            (
                tokenizer.decode(example.ids, skip_special_tokens=False),
                tokenizer.decode(example.ids[example.supervised], skip_special_tokens=False),
            )
        )
    return found


def test_preferences_teach_what_was_chosen(tmp_path: Path, model: Path) -> None:
    case = write_case(tmp_path, model)
    chat = [{"role": "user", "content": "and the sea"}, {"role": "assistant", "content": "green"}]
    rows = [
        {"prompt": "the sky", "chosen": "blue", "rejected": "plaid"},
        {"chosen": chat, "rejected": [chat[0], {"role": "assistant", "content": "plaid"}]},
        {"prompt": [chat[0]], "chosen": [chat[1]], "rejected": [{"role": "assistant", "content": "plaid"}]},
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    run = staged(case)
    card = run.data()
    assert card.train.formats == {"preference": 3}
    assert [learned for _, learned in spoken(run)] == ["blue<|im_end|>", "green<|im_end|>", "green<|im_end|>"]
    assert not any("plaid" in text for text, _ in spoken(run))
    assert spoken(run)[1][0] == spoken(run)[2][0]
    assert any("the chosen answer is learned" in note for note in card.notes)


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}])
def test_a_turn_that_is_marked_carries_no_loss(tmp_path: Path, model: Path, mark: dict[str, Any]) -> None:
    case = write_case(tmp_path, model)
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "wrong", **mark},
        {"role": "user", "content": "no, two"},
        {"role": "assistant", "content": "right"},
    ]
    write_jsonl(tmp_path / "train.jsonl", [{"messages": turns}])
    run = staged(case)
    run.data()
    ((text, learned),) = spoken(run)
    assert "wrong" in text and learned == "right<|im_end|>"
    run = staged(case, ["data.loss_on=all", "name=all"])
    run.data()
    ((_, learned),) = spoken(run)
    assert "wrong" not in learned and "no, two" in learned and "right" in learned


def test_other_weights_are_rejected_with_their_place(tmp_path: Path, model: Path) -> None:
    case = write_case(tmp_path, model)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}
    path = write_jsonl(tmp_path / "train.jsonl", [*chat_rows(2), row])
    with pytest.raises(DataRefused) as caught:
        staged(case).data()
    assert caught.value.message.startswith(f"{path}:3: turn 2: `weight` must be 0 or 1, found 0.5")


def test_tools_and_reasoning_reach_the_tokens(tmp_path: Path, model: Path) -> None:
    template = CHATML.replace(
        "message['content'] +",
        "('<think>' + message['reasoning_content'] + '</think>' if message['reasoning_content'] else '')"
        " + (message['content'] or '') + (message['tool_calls'] | tojson if message['tool_calls'] else '') +",
    )
    case = write_case(tmp_path, model, data={"max_length": 400})
    (tmp_path / "tools.jinja").write_text(template, encoding="utf-8")
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"of": "the bank"}}}
    turns = [
        {"role": "user", "content": "the limit?"},
        {"role": "assistant", "content": None, "reasoning_content": "it must be looked up", "tool_calls": [call]},
        {"role": "tool", "content": "seven"},
        {"role": "assistant", "content": "it is seven"},
    ]
    write_jsonl(tmp_path / "train.jsonl", [{"messages": turns, "tools": tools}])
    write_jsonl(tmp_path / "validation.jsonl", [{"messages": turns, "tools": tools}])
    run = staged(case, ["data.chat_template=tools.jinja", "data.audit.accept=[leak]"])
    run.data()
    ((text, learned),) = spoken(run)
    assert '"name": "look_up", "parameters"' in text and '"name": "look_up", "parameters"' not in learned
    assert "<think>it must be looked up</think>" in learned and '"of": "the bank"' in learned
    assert "seven<|im_end|>" in learned and "tool\nseven" in text and "tool\nseven" not in learned


def test_masked_secrets_are_not_in_any_file_of_the_run(tmp_path: Path, model: Path) -> None:
    key = "AKIAIOSFODNN7EXAMPLX"
    case = write_case(tmp_path, model)
    path = write_jsonl(tmp_path / "train.jsonl", [*pairs(8, "sky"), pair(f"my key is {key}", f"so {key} it is")])
    before = path.read_bytes()
    with pytest.raises(DataRefused, match="secret"):
        staged(case, ["name=open"]).data()
    run = staged(case, ["data.audit.mask=[secret]"])
    card = run.data()
    assert "my key is [AWS_ACCESS_KEY]" in spoken(run)[8][0] and "so [AWS_ACCESS_KEY] it is" in spoken(run)[8][1]
    assert path.read_bytes() == before
    assert card.train.masked == {"secret": 2}
    for file in run.run.root.rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes(), file


def test_what_is_not_looked_for_cannot_be_masked(tmp_path: Path, model: Path) -> None:
    """The two settings at odds must not end with the secret in the weights."""
    key = "AKIAIOSFODNN7EXAMPLX"
    case = write_case(tmp_path, model)
    write_jsonl(tmp_path / "train.jsonl", [*pairs(8, "sky"), pair(f"my key is {key}", "so it is")])
    try:
        run = staged(case, ["data.audit.mask=[secret]", "data.audit.skip=[secret]"])
    except FullrankError as refused:
        assert "mask" in refused.message and "skip" in refused.message
        return
    run.data()
    assert key not in spoken(run)[8][0]


# ---- the store ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 9), min_size=1, max_size=5),  # lengths of a shard's examples
            st.integers(1, 1000),  # its first line
            st.booleans(),  # whether its records are lines
        ),
        min_size=1,
        max_size=5,
    ),
    st.data(),
)
def test_a_store_over_several_shards(shards: list[tuple[list[int], int, bool]], data: st.DataObject) -> None:
    """Any order of examples, some of them several times, against lists of what was written."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for new in ("train", "shards"):
            (folder / new).mkdir()
        places, written = [], {}
        for number, (lengths, first, is_lines) in enumerate(shards):
            examples = [
                Tokens([1000 * number + 10 * n + k for k in range(length)], [k > 0 for k in range(length)])
                for n, length in enumerate(lengths)
            ]
            records = [n // 2 for n in range(len(lengths))]  # two examples of each record
            write_shard(folder / "shards" / f"{number}", examples, records, [(3 * n, -1) for n in range(records[-1] + 1)])
            places.append(ShardPlace(f"{number}", f"f{number}", first, None, "line" if is_lines else "record"))
            for n, example in enumerate(examples):
                origin = f"f{number}:" + ("" if is_lines else "record ") + str(first + 3 * records[n])
                written[number, n] = example, origin
        chosen = data.draw(st.lists(st.sampled_from(sorted(written)), max_size=20))
        write_index(folder / "train", places, np.array(chosen, np.int32))
        store = TokenStore(folder / "train")
        assert len(store) == len(chosen)
        assert store.lengths.tolist() == [len(written[one][0].ids) for one in chosen]
        for n, one in enumerate(chosen):
            example, origin = written[one]
            assert store[n].ids.tolist() == example.ids and store[n].supervised.tolist() == example.supervised
            assert store.origin(n) == origin


def test_shards_open_as_safetensors(everything: tuple[Path, Written]) -> None:
    """Anyone's reader can read them."""
    case, _ = everything
    run = staged(case)
    run.data()
    for path in (run.run.data / "shards").glob("*.safetensors"):
        ours = Shard(path)
        for name, array in load_file(path).items():
            assert np.array_equal(ours[name], array) and ours[name].dtype == array.dtype
