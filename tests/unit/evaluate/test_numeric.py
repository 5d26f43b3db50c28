"""Numbers in text against values read by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from fullrank.errors import DataError
from fullrank.evaluate.metrics import score
from fullrank.evaluate.numeric import Number, is_same, last_number
from fullrank.recipe import Task

NUMERIC = Task(metric="numeric")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("She makes 9 * 2 = $18 every day.\n#### 18", 18),
        ("about 1,234,567 people", 1234567),
        ("1,2,3", 3),
        ("12,34", 34),
        ("1,2345", 2345),
        ("It is 18.", 18),
        ("It is 18...", 18),
        ("so it is...5", 5),
        ("3.50", Fraction(7, 2)),
        ("$1,000.25", Fraction(100025, 100)),
        (".5", Fraction(1, 2)),
        ("-5", -5),
        ("\u22125", -5),
        ("+5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("10-5", 5),
        ("(3)-2", 2),
        ("5 - 3", 3),
        ("COVID-19", 19),
        ("€20 and £30", 30),
        ("18 km", 18),
        ("18km", 18),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("on 1/2/2024", 2024),
        ("2e-5", Fraction(2, 100000)),
        ("1e3", 1000),
        ("7 and N1", 7),
        ("7 and x_2", 7),
        ("1.2.3", 3),
    ],
)
def test_the_last_number_of_a_text(text: str, value: int | Fraction) -> None:
    assert last_number(text) == Number(Fraction(value), False)


@pytest.mark.parametrize("text", ["", "none", "N1", "1/0", "9" * 5000])
def test_a_text_without_a_number(text: str) -> None:
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,000", "1000.0", True),
        ("1/2", "0.50", True),
        ("1/3", "0.333", False),
        ("50%", "50", True),
        ("50 %", "0.5", True),
        ("50%", "1/2", True),
        ("50%", "0.5%", False),
        ("0.5", "50", False),
        ("5", "-5", False),
    ],
)
def test_when_two_numbers_are_the_same(one: str, other: str, same: bool) -> None:
    first, second = last_number(one), last_number(other)
    assert first and second
    assert is_same(first, second) is is_same(second, first) is same


def test_the_share_of_right_numbers() -> None:
    references = ["9 * 2 = 18\n#### 18", "#### 1,080", "#### 5", "#### 3"]
    answers = ["The answer is $18.00.", "1080 eggs", "no idea", "#### 3 or 4"]
    assert score(NUMERIC, references, answers)["numeric"].per_item == [1.0, 1.0, 0.0, 0.0]
    marked = Task(metric="numeric", pattern="#### (.*)")  # the first match, and then the last number in its group
    assert score(marked, references, answers)["numeric"].per_item == [0.0, 0.0, 0.0, 0.0]
    assert score(marked, references, ["#### 18.\nAnd 2 more"] * 4)["numeric"].value == 0.25


def test_a_reference_without_a_number_is_an_error() -> None:
    with pytest.raises(DataError, match=r"^t\.jsonl:2: task numeric: there is no number in the reference 'eighteen'"):
        score(NUMERIC, ["18", "eighteen"], ["18", "18"], places=["t.jsonl:1", "t.jsonl:2"])
