"""The numeric level of the prudential case: labels recomputed by a reader that shares no code with the writer."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from fullrank.cases import prudential
from fullrank.cases.prudential_numeric import (
    DIRECTIVE_PATTERN,
    FORM_RATIOS,
    INSTRUCTIONS,
    LABELS_PATTERN,
    generate,
    main,
    write_case,
)

#: SHA-256 of the four files of seed 0, one after the other.
GOLDEN = "16287bfe63969716d3465c5389a5734f8f8cab390b73e5111deeee8b364c9425"
#: The rules, written out a second time: code, is its limit a minimum, do the own funds of N1 stand below the line.
RULES = [
    ("N1", True, False),
    ("N2", True, False),
    ("N3", True, False),
    ("N4", False, False),
    ("N6", False, True),
    ("N7", False, True),
    ("N25", False, True),
]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    paths = write_case(tmp_path_factory.mktemp("case"))
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}


def facts(form: str) -> dict[str, list[tuple[str, Fraction]]]:
    """Names and exact values of the facts by the prefix of their tags, in the order of the form."""
    found: dict[str, list[tuple[str, Fraction]]] = {}
    for line in form.splitlines()[1:]:
        match = re.fullmatch(r"<(\w+):(\w+)>(\d+(?:\.\d)?)</\1:\2>", line)
        assert match, line
        found.setdefault(match[1], []).append((match[2], Fraction(match[3])))
    return found


def percent_and_limit(form: str) -> dict[str, tuple[Fraction, Fraction]]:
    """Every ratio of a form and its limit, in percent."""
    read = facts(form)
    own_funds = read["n1"][0][1]
    result = {}
    for code, _, is_over_own_funds in RULES:
        values = [value for _, value in read.get(code.lower(), [])]
        if values:
            denominator = own_funds if is_over_own_funds else values[1]
            assert len(values) == (2 if is_over_own_funds else 3)
            result[code] = (100 * values[0] / denominator, values[-1])
    return result


def violated(form: str) -> list[str]:
    read = percent_and_limit(form)
    return [
        code
        for code, is_minimum, _ in RULES
        if code in read and (read[code][0] < read[code][1] if is_minimum else read[code][0] > read[code][1])
    ]


def form_of(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


def test_the_files_of_a_seed_never_change(tmp_path: Path) -> None:
    paths = write_case(tmp_path)
    assert list(paths) == ["train", "validation", "test", "unseen_wordings"]
    assert hashlib.sha256(b"".join(path.read_bytes() for path in paths.values())).hexdigest() == GOLDEN


def test_labels_follow_from_the_figures(splits: dict[str, list[dict[str, Any]]]) -> None:
    for row in itertools.chain(*splits.values()):
        assert len(percent_and_limit(form_of(row))) == len(RULES)
        assert row["labels"] == violated(form_of(row)), form_of(row)


def test_answers_parse_back(splits: dict[str, list[dict[str, Any]]]) -> None:
    for row in itertools.chain(*splits.values()):
        answer = row["messages"][2]["content"]
        labels, directive = (re.search(pattern, answer) for pattern in (LABELS_PATTERN, DIRECTIVE_PATTERN))
        assert labels and directive
        assert re.findall(prudential.CODE_PATTERN, labels[1]) == row["labels"]
        expected = [ratio.directive for ratio in prudential.RATIOS if ratio.code in row["labels"]]
        assert directive[1] == (" ".join(expected) or "No action is required.")


def test_splits_share_no_form(splits: dict[str, list[dict[str, Any]]]) -> None:
    forms = [form_of(row) for rows in splits.values() for row in rows]
    assert len(set(forms)) == len(forms)


def test_figures_lie_near_their_limits_on_both_sides(splits: dict[str, list[dict[str, Any]]]) -> None:
    counts: Counter[tuple[str, bool]] = Counter()
    for row in splits["train"]:
        for code, (percent, limit) in percent_and_limit(form_of(row)).items():
            distance = abs(percent / limit - 1)
            assert Fraction(1, 100) < distance < Fraction(1, 2)
            counts[code, code in row["labels"]] += 1
    assert set(counts) == {(code, is_violated) for code, _, _ in RULES for is_violated in (True, False)}
    breaches = [count for (_, is_violated), count in counts.items() if is_violated]
    assert max(breaches) < 1.6 * min(breaches), counts


def test_one_form_in_five_is_clean(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert sum(not row["labels"] for row in splits["train"]) == len(splits["train"]) // 5


def test_limits_differ_between_forms(splits: dict[str, list[dict[str, Any]]]) -> None:
    limits = {(code, limit) for row in splits["train"] for code, (_, limit) in percent_and_limit(form_of(row)).items()}
    assert min(Counter(code for code, _ in limits).values()) >= 3


def test_the_held_out_vocabulary_stays_out_of_training(splits: dict[str, list[dict[str, Any]]]) -> None:
    names = {
        split: {
            (prefix, name) for row in rows for prefix, read in facts(form_of(row)).items() if prefix != "info" for name, _ in read
        }
        for split, rows in splits.items()
    }
    assert names["test"] <= names["train"]
    assert not names["unseen_wordings"] & (names["train"] | names["validation"] | names["test"])


def test_a_ratio_equal_to_its_limit_is_kept() -> None:
    by_code = {ratio.code: ratio for ratio in FORM_RATIOS}
    minimum, maximum = by_code["N1"], by_code["N6"]
    assert [minimum.is_breached(amount, 10_000, 80) for amount in (799, 800, 801)] == [True, False, False]
    assert [maximum.is_breached(amount, 10_000, 250) for amount in (2_499, 2_500, 2_501)] == [False, False, True]


def test_the_worked_example_is_right() -> None:
    form = "Model Bank\n" + "\n".join(re.findall(r"^<.*>$", INSTRUCTIONS, re.MULTILINE))
    none, worked = re.findall(r"^Violations: (.*)$", INSTRUCTIONS, re.MULTILINE)
    assert none == "none"
    assert re.findall(prudential.CODE_PATTERN, worked) == violated(form)


def test_same_arguments_same_examples() -> None:
    assert generate(20, seed=7, wordings="unseen") == generate(20, seed=7, wordings="unseen")
    first = generate(4, seed=7, wordings="seen")
    assert first[0] not in generate(4, seed=7, wordings="seen", exclude={first[0].report})


def test_command_line(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--train", "3", "--validation", "1", "--test", "1", "--unseen", "1"]) == 0
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 3
