"""Preparing data: what is written, what is refused with file and line, and what makes it be done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from staging import Staged, leftovers, staged, write_case, write_lines
from tiny import CHATML, chat_rows, write_jsonl

from fullrank import records
from fullrank.errors import DataError, UsageError
from fullrank.models.load import load_tokenizer
from fullrank.run import read_json_lines
from fullrank.sequences.order import held_out
from fullrank.sequences.store import TokenStore

LONG = "the bank holds less capital than the ratio asks for " * 20


@pytest.fixture
def model(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture
def case(tmp_path: Path, model: Path) -> Path:
    return write_case(tmp_path, model)


def refusal(case: Path, *overrides: str) -> DataError:
    run = staged(case, overrides)
    with pytest.raises(DataError) as caught:
        run.data()
    assert leftovers(case.parent) == []  # nothing half-written
    return caught.value


def texts(run: Staged, split: str = "train") -> list[str]:
    store, tokenizer = TokenStore(run.run.data / split), load_tokenizer(run.base.folder)
    return [tokenizer.decode(store[n].ids, skip_special_tokens=False) for n in range(len(store))]


def learned(run: Staged, store: TokenStore, example: int) -> list[str]:
    tokenizer = load_tokenizer(run.base.folder)
    return [tokenizer.decode(store[example].ids[store[example].supervised], skip_special_tokens=False)]


def turn(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# ---- what is written ------------------------------------------------------------------------------------------------


def test_the_store_holds_what_the_template_writes(case: Path, model: Path) -> None:
    run = staged(case)
    card = run.data()
    rows = chat_rows(16)
    tokenizer = load_tokenizer(model)
    expected = [tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"] for row in rows]
    store = TokenStore(run.run.data / "train")
    assert [store[n].ids.tolist() for n in range(16)] == expected
    assert store.origin(6) == f"{case.parent / 'train.jsonl'}:7"
    assert card.train.tokens == sum(map(len, expected)) and card.train.lengths.longest == max(map(len, expected))
    assert card.train.supervised_ratio == pytest.approx(card.train.supervised_tokens / card.train.tokens)
    assert (card.train.examples, card.validation.examples, card.train.formats) == (16, 4, {"messages": 16})
    assert card.chat_template == "model"


def test_a_validation_ratio_takes_examples_out_of_training(case: Path) -> None:
    run = staged(case, ["data.validation.ratio=0.25", "train.seed=5"])
    card = run.data()
    taken = set(np.flatnonzero(held_out(np.arange(16), 0.25, 5)).tolist())
    assert (card.train.examples, card.validation.examples) == (12, 4)
    where = {split: TokenStore(run.run.data / split) for split in ("train", "validation")}
    lines = {split: {int(s.origin(n).rpartition(":")[2]) - 1 for n in range(len(s))} for split, s in where.items()}
    assert lines["validation"] == taken and lines["train"] == set(range(16)) - taken


def test_one_example_cannot_be_shared_out(case: Path) -> None:
    write_jsonl(case.parent / "train.jsonl", chat_rows(1))
    assert "a share of 1 example cannot be held out" in refusal(case, "data.validation.ratio=0.1").message


def test_test_sets_keep_the_conversation_before_the_answer(case: Path) -> None:
    folder = case.parent
    write_jsonl(folder / "seen.jsonl", chat_rows(3))
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "what is it", "completion": "four"}])
    run = staged(case, ["data.test={seen: seen.jsonl, pairs: pairs.jsonl}"])
    card = run.data()
    assert {name: test.examples for name, test in card.tests.items()} == {"seen": 3, "pairs": 1}
    items = [records.TestItem.model_validate(line) for line in read_json_lines(run.run.data / "tests" / "seen.jsonl")]
    assert [item.id for item in items] == [f"{folder / 'seen.jsonl'}:{line}" for line in (1, 2, 3)]
    messages = chat_rows(3)[0]["messages"]  # two exchanges: the last answer is the one to compare with
    assert items[0].messages == messages[:-1] and items[0].reference == messages[-1]["content"]
    (pair,) = read_json_lines(run.run.data / "tests" / "pairs.jsonl")
    assert (pair["messages"], pair["reference"]) == ([{"role": "user", "content": "what is it"}], "four")


def test_raw_text_cannot_be_a_test(case: Path) -> None:
    write_jsonl(case.parent / "test.jsonl", [{"text": "the sky"}])
    message = refusal(case, "data.test=test.jsonl").message
    assert "test.jsonl:1: a test record needs a prompt and an answer" in message


def test_raw_text_is_learned_whole_and_ended(case: Path) -> None:
    write_jsonl(case.parent / "train.jsonl", [{"text": "the sky"}, {"text": "the sea"}])
    run = staged(case)
    card = run.data()
    assert texts(run) == ["the sky<|im_end|>", "the sea<|im_end|>"]
    assert card.train.supervised_tokens == card.train.tokens - 2  # the first token of each has nothing before it
    assert card.train.formats == {"text": 2}


def test_other_forms_are_converted_aloud(case: Path) -> None:
    alpaca = {"instruction": "name it", "input": "the sea", "output": "blue"}
    sharegpt = {"conversations": [{"from": "human", "value": "and the sky"}, {"from": "gpt", "value": "grey"}]}
    write_jsonl(case.parent / "train.jsonl", [alpaca, sharegpt, *chat_rows(2)])
    run = staged(case)
    card = run.data()
    assert texts(run)[0] == "<|im_start|>user\nname it\n\nthe sea<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>\n"
    assert texts(run)[1] == "<|im_start|>user\nand the sky<|im_end|>\n<|im_start|>assistant\ngrey<|im_end|>\n"
    assert card.train.formats == {"alpaca": 1, "sharegpt": 1, "messages": 2}
    assert [note.partition(":")[0:3:2] for note in card.notes] == [
        ("data.train", " 1 record converted from Alpaca: instruction and input became the user's turn, output the assistant's"),
        ("data.train", " 1 record converted from ShareGPT: from/value became role/content"),
    ]
    assert [facts["words"] for facts in run.events("note")] == card.notes


# ---- problems -------------------------------------------------------------------------------------------------------


def test_every_bad_record_is_named_by_file_and_line(case: Path) -> None:
    no_answer = {"messages": [{"role": "user", "content": "and?"}]}
    rows = [*chat_rows(2), no_answer, {"prompt": "who"}, chat_rows(1)[0], {"messages": "text"}]
    path = write_jsonl(case.parent / "train.jsonl", rows)
    other = write_jsonl(case.parent / "validation.jsonl", [no_answer])
    problems = refusal(case).message.splitlines()
    assert [problem.split(": ")[0] for problem in problems] == [f"{path}:3", f"{path}:4", f"{path}:6", f"{other}:1"]
    assert all("without an answer" in problem for problem in problems[:2])


def test_no_more_than_twenty_are_listed(case: Path) -> None:
    write_jsonl(case.parent / "train.jsonl", [{"prompt": "who"}] * 50)
    problems = refusal(case).message.splitlines()
    assert len(problems) == 21 and problems[-1].startswith("(30 more records in ") and "quarantine.jsonl" in problems[-1]
    assert problems[19].startswith(f"{case.parent / 'train.jsonl'}:20: ")


def test_bad_json_does_not_hide_the_bad_records_before_it(case: Path) -> None:
    path = write_lines(case.parent / "train.jsonl", ['{"prompt": "who"}', json.dumps(chat_rows(1)[0]), '{"messages": ['])
    message = refusal(case).message
    assert f"{path}:1: " in message and f"{path}:3: not valid JSON" in message


def test_a_model_without_a_template_names_the_key_that_gives_one(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    case = write_case(tmp_path, tiny_model_folder("llama", chat_template=None))
    assert "train.jsonl:1: " in refusal(case).message and "data.chat_template" in refusal(case).message
    (tmp_path / "chatml.jinja").write_text(CHATML, encoding="utf-8")
    card = staged(case, ["data.chat_template=chatml.jinja"]).data()
    assert (card.chat_template, card.train.examples) == ("recipe", 16)


def test_pairs_without_a_template_are_joined_as_given(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    case = write_case(tmp_path, tiny_model_folder("llama", chat_template=None))
    for name in ("train", "validation"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "one two", "completion": " three"}])
    run = staged(case)
    card = run.data()
    assert texts(run) == ["one two three<|im_end|>"]
    assert card.chat_template == "none" and "joined exactly as they are given" in card.notes[0]


# ---- too long -------------------------------------------------------------------------------------------------------


@pytest.fixture
def long_case(case: Path) -> Path:
    write_jsonl(case.parent / "train.jsonl", [*chat_rows(3), turn("go on", LONG), turn(LONG, "yes")])
    return case


def test_too_long_is_an_error_by_default(long_case: Path) -> None:
    problem = refusal(long_case)
    assert [line.split(": ")[0].rpartition(":")[2] for line in problem.message.splitlines()] == ["4", "5"]
    assert "data.max_length is 128 and data.too_long is error" in problem.message
    assert "data.max_length" in problem.hint and problem.exit_code == 3


def test_too_long_may_be_dropped(long_case: Path) -> None:
    card = staged(long_case, ["data.too_long=drop"]).data()
    assert (card.train.examples, card.train.dropped_too_long) == (3, 2)


def test_dropping_everything_is_refused(long_case: Path) -> None:
    assert "data.train: no example is left" in refusal(long_case, "data.too_long=drop", "data.max_length=4").message


def test_a_cut_answer_is_learned_and_a_cut_away_one_refused(long_case: Path) -> None:
    message = refusal(long_case, "data.too_long=truncate").message
    assert message == f"{long_case.parent / 'train.jsonl'}:5: no supervised token is left: the answer begins after token 128"
    write_jsonl(long_case.parent / "train.jsonl", [turn("go on", LONG)])
    run = staged(long_case, ["data.too_long=truncate"])
    card = run.data()
    assert (card.train.examples, card.train.truncated, card.train.lengths.longest) == (1, 1, 128)
    assert texts(run)[0].startswith("<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\nthe bank holds")


def test_only_raw_text_is_chunked(long_case: Path) -> None:
    assert "train.jsonl:4: " in (message := refusal(long_case, "data.too_long=chunk").message)
    assert "only raw text can be chunked" in message
    write_jsonl(long_case.parent / "train.jsonl", [{"text": LONG}])
    run = staged(long_case, ["data.too_long=chunk"])
    card = run.data()
    store = TokenStore(run.run.data / "train")
    pieces = [text for example in range(len(store)) for text in learned(run, store, example)]
    assert "".join(pieces) == LONG + "<|im_end|>"  # every token is learned once
    first, second = store[0], store[1]
    assert second.ids[:16].tolist() == first.ids[-16:].tolist() and not second.supervised[:16].any()
    assert store.lengths[:-1].tolist() == [128] * (len(store) - 1) and 2 <= store.lengths[-1] <= 128
    assert {store.origin(n) for n in range(len(store))} == {f"{long_case.parent / 'train.jsonl'}:1"}
    assert card.notes == ["data.train: 1 record longer than 128 tokens cut into pieces"]


# ---- doing it again -------------------------------------------------------------------------------------------------


def test_unchanged_data_are_used_as_prepared(case: Path) -> None:
    card = staged(case).data()
    marker = Path(staged(case).run.data / "marker")
    marker.touch()  # a folder written anew would not have it
    again = staged(case, ["train.epochs=9", "evaluate.max_new_tokens=3"])
    assert again.data() == card
    assert again.reused("data") and marker.exists()


def test_one_byte_of_data_makes_it_anew(case: Path) -> None:
    card = staged(case).data()
    path = case.parent / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"bank 1 ", b"bank 2 ", 1))
    again = staged(case)
    assert again.data().fingerprint != card.fingerprint and not again.reused("data")
    assert "bank 2 " in texts(again)[1]


@pytest.mark.parametrize("change", ["data.max_length=200", "data.loss_on=all", "data.train={path: train.jsonl, limit: 5}"])
def test_a_changed_recipe_makes_it_anew(case: Path, change: str) -> None:
    card = staged(case).data()
    again = staged(case, [change])
    assert again.data().fingerprint != card.fingerprint and not again.reused("data")


def test_a_changed_template_makes_it_anew(case: Path) -> None:
    card = staged(case).data()
    (case.parent / "other.jinja").write_text(CHATML.replace("tools\\n", "tools:\\n"), encoding="utf-8")
    again = staged(case, ["data.chat_template=other.jinja"])
    assert again.data().training_fingerprint != card.training_fingerprint and not again.reused("data")
    renewed = again.run.data / "card.json"
    (case.parent / "other.jinja").write_text(CHATML.replace("tools\\n", "tools;\\n"), encoding="utf-8")
    before = renewed.read_bytes()
    assert staged(case, ["data.chat_template=other.jinja"]).data() is not None and renewed.read_bytes() != before


def test_a_changed_tokenizer_makes_it_anew(tmp_path: Path, model: Path) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    case = write_case(tmp_path, own)
    card = staged(case).data()
    path = own / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["model"]["merges"][-1]
    path.write_text(json.dumps(document), encoding="utf-8")
    again = staged(case).data()
    assert again.training_fingerprint != card.training_fingerprint and again.fingerprint != card.fingerprint


def test_data_prepared_before_stay_when_preparing_anew_fails(case: Path) -> None:
    run = staged(case)
    card = run.data()
    (case.parent / "validation.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError):
        staged(case).data()
    assert leftovers(run.run.root) == []
    assert json.loads((run.run.data / "card.json").read_text(encoding="utf-8"))["fingerprint"] == card.fingerprint


def test_data_under_a_run_that_trains_are_not_replaced(case: Path) -> None:
    run = staged(case)
    run.data()
    (run.run.train).mkdir()
    (run.run.train / "inputs.json").write_text(json.dumps({"data": "other"}) + "\n", encoding="utf-8")
    write_jsonl(case.parent / "train.jsonl", chat_rows(5))
    with pytest.raises(UsageError, match="training was begun on data") as caught:
        staged(case).data()
    assert "`name`" in caught.value.hint
    assert len(TokenStore(run.run.data / "train")) == 16


def test_a_document_in_pieces_is_one_record(case: Path) -> None:
    """Held out from its end: read once, no leak of itself, and no share of right answers to be known."""
    (case.parent / "one.txt").write_text(" ".join(f"sentence {n} of the only document." for n in range(400)), encoding="utf-8")
    run = staged(case, ["data.train=one.txt", "data.too_long=chunk", "data.validation.ratio=0.2", "data.test={}"])
    card = run.data()
    assert (card.train.read, card.train.used, card.validation.read, card.validation.used) == (1, 1, 0, 0)
    assert card.validation.examples >= 1
    audit = records.Audit.model_validate_json((run.run.data / "audit.json").read_text(encoding="utf-8"))
    assert not [f for f in audit.findings if f.kind in ("leak", "exact_duplicate", "near_duplicate")]
    assert not [f.what for f in audit.findings if "right answers" in f.what]


def test_what_is_masked_in_tests_is_said(case: Path) -> None:
    rows = [{"prompt": f"where to {n}", "completion": "Write to bob.miller@gmail.com"} for n in range(2)]
    write_jsonl(case.parent / "mailed.jsonl", rows)
    card = staged(case, ["data.test={mailed: mailed.jsonl}", "data.audit={mask: [personal_data]}"]).data()
    assert "test mailed: 2 passages masked (personal_data), in prompts and in reference answers" in card.notes


def test_conflicting_answers_with_secrets_are_not_quoted(case: Path) -> None:
    key = "AKIA" + "4XQ7M2KD9RT6WZ3B"
    rows = [{"prompt": f"the key of {n % 20}", "completion": (key, "none")[n // 20]} for n in range(40)]
    write_jsonl(case.parent / "train.jsonl", rows)
    run = staged(case, ["data.audit={accept: [secret]}"])
    run.data()
    text = (run.run.data / "audit.json").read_text(encoding="utf-8")
    assert "different answers" in text and key not in text
