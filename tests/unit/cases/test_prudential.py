"""The language level of the prudential case: same bytes from the same seed, honest splits, answers that parse back."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fullrank.cases.prudential import (
    ASIDES,
    BANKS,
    BREACHED,
    CODE_PATTERN,
    CODES,
    DIRECTIVE_PATTERN,
    HELD_OUT_PREDICATES,
    HELD_OUT_SUBJECTS,
    INSTRUCTIONS,
    KEPT,
    LABELS_PATTERN,
    NO_ACTION,
    RATIOS,
    TASKS,
    generate,
    main,
    write_case,
)
from fullrank.errors import UsageError

FILES = {
    "train": "train.jsonl",
    "validation": "validation.jsonl",
    "test": "test.jsonl",
    "unseen_wordings": "unseen_wordings.jsonl",
}
#: SHA-256 of the four files of seed 0, one after the other; a change here changes every published score of the case.
GOLDEN = "45438f7681e27527b059a86ae59b974a3a15b4ed7df3d8dd1dfcdc9ce1e98d58"

#: Every statement about a ratio: sentence -> (code, state, whether it is held out).
STATEMENTS = {
    sentence: (ratio.code, state, wordings == "unseen")
    for ratio in RATIOS
    for state in ("breached", "kept")
    for wordings in ("seen", "unseen")
    for sentence in ratio.sentences(state, wordings)
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    paths = write_case(tmp_path_factory.mktemp("case"))
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}


def report(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


def answer(row: dict[str, Any]) -> str:
    return str(row["messages"][2]["content"])


def sentences(row: dict[str, Any]) -> list[str]:
    """The sentences of a report, without the name of the bank."""
    bank, text = report(row).split(": ", 1)
    assert bank in BANKS
    return [sentence + "." for sentence in text.removesuffix(".").split(". ")]


def test_the_files_of_a_seed_never_change(tmp_path: Path) -> None:
    paths = write_case(tmp_path / "new" / "folder")
    assert {name: path.name for name, path in paths.items()} == FILES
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(FILES.values())
    assert hashlib.sha256(b"".join(path.read_bytes() for path in paths.values())).hexdigest() == GOLDEN


def test_another_seed_gives_other_reports() -> None:
    first, second = (generate(50, seed=seed, wordings="seen") for seed in (1, 2))
    assert not {example.report for example in first} & {example.report for example in second}


def test_sizes_and_form_of_rows(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 400,
        "validation": 40,
        "test": 64,
        "unseen_wordings": 64,
    }
    for row in itertools.chain(*splits.values()):
        assert list(row) == ["messages", "labels"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


def test_splits_share_no_report(splits: dict[str, list[dict[str, Any]]]) -> None:
    reports = [report(row) for rows in splits.values() for row in rows]
    assert len(set(reports)) == len(reports)


def test_excluded_reports_do_not_come_up_again() -> None:
    first = generate(30, seed=5, wordings="seen")
    excluded = {example.report for example in first[::2]}
    again = generate(30, seed=5, wordings="seen", exclude=excluded)
    assert not excluded & {example.report for example in again}
    assert [example for example in first if example.report not in excluded] == again[:15]


def test_held_out_sentences_are_exactly_those_of_the_unseen_set(splits: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in splits.items():
        for row in rows:
            held_out = {STATEMENTS[sentence][2] for sentence in sentences(row) if sentence in STATEMENTS}
            assert held_out == {name == "unseen_wordings"}, (name, report(row))


def test_labels_follow_from_the_sentences(splits: dict[str, list[dict[str, Any]]]) -> None:
    for row in itertools.chain(*splits.values()):
        statements = [STATEMENTS[sentence] for sentence in sentences(row) if sentence not in ASIDES]
        mentioned = [code for code, _, _ in statements]
        assert len(set(mentioned)) == len(mentioned), "one statement a ratio"
        assert row["labels"] == [code for code, state, _ in statements if state == "breached"], "in the order of the report"
        assert 2 <= len(sentences(row)) <= 4


def test_answers_parse_back(splits: dict[str, list[dict[str, Any]]]) -> None:
    directives = {ratio.code: ratio.directive for ratio in RATIOS}
    for row in itertools.chain(*splits.values()):
        labels, directive = (re.search(pattern, answer(row)) for pattern in (LABELS_PATTERN, DIRECTIVE_PATTERN))
        assert labels and directive
        codes = re.findall(CODE_PATTERN, labels[1])
        assert codes == row["labels"]
        assert directive[1] == (" ".join(directives[code] for code in codes) or NO_ACTION)
        names = [ratio.label for code in codes for ratio in RATIOS if ratio.code == code]
        assert answer(row) == f"Violations: {', '.join(names) or 'none'}\n{directive[0]}"


def test_classes_are_balanced(splits: dict[str, list[dict[str, Any]]]) -> None:
    train = splits["train"]
    assert sum(not row["labels"] for row in train) == len(train) // 5
    assert max(len(row["labels"]) for row in train) == 3
    counts = {
        (code, state): sum(
            STATEMENTS[sentence][:2] == (code, state) for row in train for sentence in sentences(row) if sentence in STATEMENTS
        )
        for code in CODES
        for state in ("breached", "kept")
    }
    assert max(counts.values()) < 1.6 * min(counts.values()), counts


@pytest.mark.parametrize("name", FILES)
def test_every_code_is_breached_and_kept_in_every_split(name: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    found = {STATEMENTS[sentence][:2] for row in splits[name] for sentence in sentences(row) if sentence in STATEMENTS}
    assert found == {(code, state) for code in CODES for state in ("breached", "kept")}


def test_training_sees_every_sentence_that_it_may(splits: dict[str, list[dict[str, Any]]]) -> None:
    seen = {sentence for row in splits["train"] for sentence in sentences(row)}
    assert {sentence for sentence, (_, _, held_out) in STATEMENTS.items() if not held_out} <= seen


def test_phrases_are_many_and_distinct() -> None:
    assert len(set(BREACHED)) == len(set(KEPT)) == 20
    assert not set(BREACHED) & set(KEPT)
    subjects = [subject for ratio in RATIOS for subject in ratio.subjects]
    assert len(set(subjects)) == len(subjects) == 6 * len(RATIOS)
    assert all(re.fullmatch(r"[A-Z][A-Za-z0-9',\- ]+\.", text) for text in [*STATEMENTS, *ASIDES])


def test_held_out_phrases_never_occur_in_training(splits: dict[str, list[dict[str, Any]]]) -> None:
    held_out_predicates = [*BREACHED[-HELD_OUT_PREDICATES:], *KEPT[-HELD_OUT_PREDICATES:]]
    held_out_subjects = [subject for ratio in RATIOS for subject in ratio.subjects[-HELD_OUT_SUBJECTS:]]
    for name in ("train", "validation", "test"):
        text = "\n".join(report(row) for row in splits[name])
        assert not [subject for subject in held_out_subjects if f" {subject} " in text]
        # "satisfies the requirement" may not stand in "does not satisfy the requirement" either
        assert not [predicate for predicate in held_out_predicates if f" {predicate}." in text]


def test_instructions_are_fair_and_give_nothing_away() -> None:
    for ratio in RATIOS:
        assert f"{ratio.label}: {ratio.meaning}" in INSTRUCTIONS
        assert ratio.directive in INSTRUCTIONS
    assert "Violations: none\nDirective: No action is required." in INSTRUCTIONS
    assert "Violations: total capital (N1), related parties (N25)\nDirective: " in INSTRUCTIONS
    assert not [sentence for sentence in STATEMENTS if sentence in INSTRUCTIONS]


def test_tasks_are_tasks_of_a_recipe() -> None:
    from fullrank.recipe import Task

    assert [(Task(**task).key, Task(**task).pattern) for task in TASKS] == [  # type: ignore[arg-type]
        ("f1", LABELS_PATTERN),
        ("rouge_l", DIRECTIVE_PATTERN),
    ]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--seed", "3", "--train", "5", "--validation", "0", "--test", "2", "--unseen", "1"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in FILES.values()]
    assert [len((tmp_path / name).read_text().splitlines()) for name in FILES.values()] == [5, 0, 2, 1]


@pytest.mark.parametrize(("option", "value"), [("--train", "-1"), ("--seed", "-1")])
def test_negative_numbers_are_refused_before_anything_is_written(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "out"), option, value]) == UsageError.exit_code
    assert "-1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
