"""Examples to look at: those that tell most, each with its own record's turns whatever file it came from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from staging import Staged, staged, write_case
from tiny import chat_rows, write_jsonl

from fullrank.data.samples import Samples
from fullrank.errors import DataError, UsageError
from fullrank.models.load import load_chat_format, load_tokenizer
from fullrank.records import Audit, Finding, Place, ShownExample
from fullrank.run import read_json_lines

NOTHING = Audit(findings=[], left_out={}, sampled={})


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    return write_case(tmp_path, tiny_model_folder("llama"))


def samples(run: Staged, split: str = "train") -> Samples:
    data = run.recipe.data
    return Samples(run.run.data, split, data, load_chat_format(run.base.folder, data.chat_template, data.template_date, "tiny"))


def prepared(case: Path, *overrides: str) -> Staged:
    run = staged(case, ["data.audit.accept=[leak, secret]", *overrides])
    run.data()
    return run


def turns(example: ShownExample) -> list[tuple[str, str]]:
    """Role and text of every turn, without what the template puts around it."""
    found = []
    for turn in example.turns:
        text = "".join(token.text for token in turn.tokens)
        found.append((turn.role, text.removeprefix(f"<|im_start|>{turn.role}\n").removesuffix("\n").removesuffix("<|im_end|>")))
    return found


def spoken(messages: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


# ---- how ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json, indented", "json, on one line", "csv"])
def test_an_example_is_shown_with_the_turns_of_its_own_record(case: Path, kind: str) -> None:
    folder = case.parent
    rows = chat_rows(16)
    name = f"rows.{kind.partition(',')[0]}"
    if kind == "csv":
        rows = [{"prompt": f"line {n}\nand, {n}", "completion": f"it is {n}"} for n in range(16)]
        body = "".join(f'"{row["prompt"]}",{row["completion"]}\n' for row in rows)
        (folder / name).write_text("prompt,completion\n" + body, encoding="utf-8")
    elif kind.startswith("json,"):
        (folder / name).write_text(json.dumps(rows, indent=1 if kind.endswith("indented") else None), encoding="utf-8")
    else:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    found = samples(prepared(case, f"data.train={name}"))
    wanted = [11, 3, 3, 15, 0]
    for number, example in zip(wanted, found.shown(wanted), strict=True):
        row = rows[number]
        said = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        assert turns(example) == spoken(said)
        assert (example.example, example.split, example.cut) == (number, "train", "")
        assert example.origin == found.store.origin(number)


def test_tokens_are_those_of_the_store(case: Path) -> None:
    run = prepared(case)
    found = samples(run)
    tokenizer = load_tokenizer(run.base.folder)
    for example in found.shown(range(16)):
        stored = found.store[example.example]
        tokens = [token for turn in example.turns for token in turn.tokens]
        assert [token.id for token in tokens] == stored.ids.tolist()
        assert [token.supervised for token in tokens] == stored.supervised.tolist()
        assert "".join(token.text for token in tokens) == tokenizer.decode(stored.ids)
        assert {token.text for token in tokens if token.control} == {"<|im_start|>", "<|im_end|>"}
        assert (example.tokens, example.supervised_tokens) == (len(tokens), stored.supervised_targets)


def test_raw_text_is_one_turn_and_says_which_part_it_is(case: Path) -> None:
    text = "the bank holds less capital than the ratio asks for " * 20
    write_jsonl(case.parent / "train.jsonl", [{"text": "the sky"}, {"text": text}, {"text": "the sea"}])
    found = samples(prepared(case, "data.too_long=chunk"))
    first, *pieces, last = found.shown(range(len(found.store)))
    assert (first.cut, last.cut, len(pieces)) == ("", "", len(found.store) - 2)
    assert [piece.cut for piece in pieces] == [f"part {n + 1} of {len(pieces)} of its record" for n in range(len(pieces))]
    assert {turn.role for example in (first, *pieces, last) for turn in example.turns} == {"document"}
    assert {piece.origin for piece in pieces} == {f"{case.parent / 'train.jsonl'}:2"}


def test_a_cut_example_says_where(case: Path) -> None:
    long = {"prompt": "go on", "completion": "and so on " * 60}
    write_jsonl(case.parent / "train.jsonl", [*chat_rows(3), long])
    found = samples(prepared(case, "data.too_long=truncate"))
    *whole, cut = found.shown(range(4))
    assert [example.cut for example in whole] == [""] * 3
    assert "cut off after 128 tokens" in cut.cut and [role for role, _ in turns(cut)] == ["user", "assistant"]


def test_pairs_without_a_template_are_prompt_and_completion(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    case = write_case(tmp_path, tiny_model_folder("llama", chat_template=None))
    for name in ("train", "validation"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"one {name}", "completion": " two"}])
    run = prepared(case)
    (example,) = samples(run).shown([0])
    assert turns(example) == [("prompt", "one train"), ("completion", " two")]


def test_masked_texts_are_shown_masked_in_their_turns(case: Path) -> None:
    key = "AKIAIOSFODNN7EXAMPLX"
    row = {"prompt": f"my key is {key}", "completion": f"so {key} it is"}
    write_jsonl(case.parent / "train.jsonl", [*chat_rows(3), row])
    found = samples(prepared(case, "data.audit.mask=[secret]"))
    (example,) = found.shown([3])
    assert turns(example) == [("user", "my key is [AWS_ACCESS_KEY]"), ("assistant", "so [AWS_ACCESS_KEY] it is")]


def test_a_file_that_has_changed_is_named(case: Path) -> None:
    found = samples(prepared(case))
    path = case.parent / "train.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl:9"):
        found.shown([8])


@pytest.mark.parametrize("number", [-1, 16, 10**9])
def test_there_are_so_many_examples(case: Path, number: int) -> None:
    with pytest.raises(UsageError, match=f"train has no example {number}: there are 16, counted from 0"):
        samples(prepared(case)).shown([0, number])


# ---- which ----------------------------------------------------------------------------------------------------------


def test_records_are_found_by_line_and_by_any_end_of_their_path(case: Path) -> None:
    (case.parent / "more").mkdir()
    write_jsonl(case.parent / "more" / "train.jsonl", [{"prompt": f"the sky {n}", "completion": "blue"} for n in range(5)])
    found = samples(prepared(case, "data.train=[train.jsonl, more/train.jsonl]"))
    assert found.at(str(case.parent / "train.jsonl"), 4) == [3]
    assert found.at("more/train.jsonl", 4) == [19]
    assert found.at("train.jsonl", 4) == found.on_line(4) == [3, 19]
    assert found.on_line(9) == [8] and found.on_line(17) == [] == found.at("rain.jsonl", 4) == found.at("", 4)


def test_all_pieces_of_a_record_are_found(case: Path) -> None:
    text = {"text": "the bank holds less capital than the ratio asks for " * 20}
    write_jsonl(case.parent / "train.jsonl", [{"text": "a"}, text, {"text": "b"}])
    found = samples(prepared(case, "data.too_long=chunk"))
    assert found.on_line(2) == list(range(1, len(found.store) - 1))


def finding(kind: str, path: Path, line: int, split: str = "train") -> Finding:
    place = Place(path=str(path), line=line, split=split)
    return Finding(kind=kind, severity="note", what="", records=[place], count=1, advice="")


def test_telling_examples_are_the_extremes_and_one_of_each_kind_of_finding(case: Path) -> None:
    rows = [{"prompt": f"bank {n}", "completion": "and " * (3 + (n * 7) % 13)} for n in range(13)]
    rows[9] = {"prompt": "go on", "completion": "and so on " * 60}
    path = write_jsonl(case.parent / "train.jsonl", rows)
    found = samples(prepared(case, "data.too_long=truncate"))
    order = sorted(range(13), key=lambda n: (int(found.store.lengths[n]), n))
    audit = Audit(
        findings=[
            finding("leak", case.parent / "validation.jsonl", 2, "validation"),
            finding("secret", path, 5),
            finding("secret", path, 6),
            finding("mojibake", path, 8),
            finding("length", path, 99),
        ],
        left_out={},
        sampled={},
    )
    assert order[-1] == 9  # the one that was cut is the longest
    wanted = [0, order[6], 9, order[0], 7]
    # What was chosen stands on a page that people hand on: records with secrets (lines 5 and 6) are not.
    assert found.telling(audit) == [number for number in dict.fromkeys(wanted) if number not in (4, 5)]
    assert found.telling(NOTHING) == list(dict.fromkeys(wanted[:4]))


def test_a_cut_example_is_told_of_its_own_split(case: Path) -> None:
    """The first cut record may have been held out; then another one tells as much."""
    long = [{"prompt": f"go on {n}", "completion": "and so on " * 60} for n in range(7)]
    write_jsonl(case.parent / "train.jsonl", [long[0], *chat_rows(5)])
    write_jsonl(case.parent / "more.jsonl", long[1:])
    for seed in range(4):
        overrides = ["data.train=[train.jsonl, more.jsonl]", "data.validation.ratio=0.5", f"train.seed={seed}"]
        run = prepared(case, "data.too_long=truncate", f"name=seed-{seed}", *overrides)
        for split in ("train", "validation"):
            found = samples(run, split)
            cut = {example.example for example in found.shown(range(len(found.store))) if example.cut}
            assert found._cut() and set(found._cut()) <= cut


def test_a_run_keeps_what_tells_most(case: Path) -> None:
    run = prepared(case)
    kept = [ShownExample.model_validate(row) for row in read_json_lines(run.run.data / "shown.jsonl")]
    audit = Audit.model_validate_json((run.run.data / "audit.json").read_text(encoding="utf-8"))
    for split in ("train", "validation"):
        found = samples(run, split)
        assert [example for example in kept if example.split == split] == found.shown(found.telling(audit))
