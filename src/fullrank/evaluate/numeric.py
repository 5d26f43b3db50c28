r"""Numbers in text: which one is the answer, and when two are the same.

The last number of a text is its answer, as in GSM8K, whose solutions end in it (Cobbe et al. 2021, "Training Verifiers to Solve
Math Word Problems"; the filter `flexible-extract` of EleutherAI's lm-evaluation-harness takes the last number, too). The rules:

* A number is digits, with commas between groups of three (1,234,567) or none, and a decimal point (3.5, .5) or none; an exponent
  of up to three digits may follow (2e-5). Points that no digit follows end a sentence (18. is 18). Other commas separate numbers.
* A sign counts where no word, digit or closing bracket stands before it: -5 is negative, 10-5 ends in 5. The sign and one of $ €
  £ ¥ ₹ may come in either order; currencies are not compared, nor is any word behind a number (18 km is 18).
* a/b is a fraction and `c a/b` a mixed number (1 1/2 is 3/2); a date such as 1/2/2024 is none.
* Digits that a letter or underscore precedes are part of a name (N1, x2), not a number.
* A percent sign is a unit that may be left out: 50% is 50, and it is 0.5; where both sides have one, the numbers before it must
  be equal.

Numbers are exact fractions: nothing is rounded, so 0.1 is 1/10 and 0.333 is not 1/3.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_SIGN = "[-+\u2212]"
_CURRENCY = "[$€£¥₹]"
_TOKEN = re.compile(
    rf"""
    (?: (?<![\w)]) (?P<before>{_SIGN}) {_CURRENCY}?   # -5, -$5
      | (?<!\w) {_CURRENCY} (?P<behind>{_SIGN})?      # $5, $-5
      | (?<!\w)
    )
    (?: (?<!/) (?: (?P<whole>\d+)[ ] )? (?P<above>\d+) / (?P<below>\d+) (?![\d/])
      | (?P<decimal> (?: \d{{1,3}} (?:,\d{{3}})+ (?!\d) | \d+ ) (?:\.\d+)? (?: [eE][-+]?\d{{1,3}} (?!\w) )?
                   | (?<![\w.]) \.\d+ )
    )
    (?P<percent>[ ]?%)?
    """,
    re.VERBOSE,
)


class Number(NamedTuple):
    """A number of a text."""

    value: Fraction
    """Of what stands before a percent sign."""
    is_percent: bool


def last_number(text: str) -> Number | None:
    """The last number of a text; None where it holds none, or where it is too long to be read or divides by zero."""
    found = None
    for found in _TOKEN.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    if found is None:
        return None
    try:
        if found["decimal"] is not None:
            value = Fraction(found["decimal"].replace(",", ""))
        else:
            value = int(found["whole"] or 0) + Fraction(int(found["above"]), int(found["below"]))
    except (ValueError, ZeroDivisionError):  # ValueError: thousands of digits
        return None
    negative = (found["before"] or found["behind"] or "+") in "-\u2212"
    return Number(-value if negative else value, found["percent"] is not None)


def is_same(one: Number, other: Number) -> bool:
    """Whether two numbers are equal, a percent sign being a unit that may be left out."""
    if one.value == other.value:
        return True
    if one.is_percent == other.is_percent:
        return False
    percent, plain = (one, other) if one.is_percent else (other, one)
    return percent.value / 100 == plain.value
