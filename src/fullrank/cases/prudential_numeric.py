"""Prudential supervision, the numeric level: from a tagged form of figures and limits to the same two-line answer.

A form is a sheet of XBRL-like facts, one a line: for every ratio its figures and the limit set for this bank. Whoever
answers must pick the right figures, divide, and compare; limits differ from bank to bank, so that none can be learned
by heart. Labels are computed from the printed figures in whole numbers, never drawn.

Ratios, in percent, breached when strictly beyond the limit (limits themselves are kept):

    N1  = own funds / risk-weighted assets              minimum, usually 8
    N2  = highly liquid assets / liabilities on demand  minimum, usually 15
    N3  = liquid assets / liabilities within 30 days    minimum, usually 50
    N4  = loans beyond one year / long-term funding     maximum, usually 120
    N6  = largest exposure to one borrower / own funds  maximum, usually 25
    N7  = sum of large exposures / own funds            maximum, usually 800
    N25 = exposure to related parties / own funds       maximum, usually 20

They and their usual limits follow the Bank of Russia's Instruction 199-I of 29 November 2019, without its corrections
for stable balances, provisions and risk weights.

Promises: those of `prudential`. Wordings here are the names of the tags: a form uses one of four vocabularies, and the
fourth occurs in the unseen-wordings test set only.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from fullrank.cases.prudential import (
    BANKS,
    BREACH_COUNTS,
    CODES,
    DIRECTIVE_PATTERN,
    LABELS_PATTERN,
    TASKS,
    Deck,
    Example,
    Wordings,
    example_of,
    instructions,
    integer,
    run_command,
    shuffled,
    write_splits,
)

__all__ = ["DIRECTIVE_PATTERN", "INSTRUCTIONS", "LABELS_PATTERN", "TASKS", "generate", "main", "write_case"]

#: How far a ratio lies from its limit, in thousandths of the limit: clear of rounding, and often close.
MARGIN_PER_MILLE = (20, 400)
#: Vocabularies that training may see; the one after them is held out.
SEEN_VOCABULARIES = 3


@dataclass(frozen=True)
class FormRatio:
    """A prudential ratio on a form. A name is given in every vocabulary.

    Attributes:
        code: its short name in an answer; in lower case, the prefix of its tags.
        formula: the ratio in words, for the instructions.
        is_floor: the limit is a minimum (else a maximum).
        limits: limits that a bank may be set, in tenths of a percent.
        numerator: names of the figure above the line.
        denominator: names of the figure below the line; empty where it is the own funds of N1.
    """

    code: str
    formula: str
    is_floor: bool
    limits: tuple[int, ...]
    numerator: tuple[str, ...]
    denominator: tuple[str, ...] = ()

    def is_breached(self, numerator: int, denominator: int, limit: int) -> bool:
        """Whether numerator / denominator lies strictly beyond the limit.

        Args:
            numerator, denominator: amounts in one unit, here tenths of a million.
            limit: tenths of a percent, so that the ratio is compared with limit / 1000 without dividing.
        """
        excess = 1000 * numerator - limit * denominator
        return excess < 0 if self.is_floor else excess > 0


FORM_RATIOS: tuple[FormRatio, ...] = (
    FormRatio(
        "N1",
        "own funds / risk-weighted assets",
        True,
        (80, 90, 100, 105, 115),
        ("Capital", "OwnFunds", "RegulatoryCapital", "CapitalBase"),
        ("RiskWeightedAssets", "WeightedRisks", "RiskExposureAmount", "RiskAssets"),
    ),
    FormRatio(
        "N2",
        "highly liquid assets / liabilities on demand",
        True,
        (150, 175, 200),
        ("HighlyLiquidAssets", "InstantAssets", "CashAndEquivalents", "ImmediateAssets"),
        ("DemandLiabilities", "OnDemandClaims", "SightDeposits", "LiabilitiesOnDemand"),
    ),
    FormRatio(
        "N3",
        "liquid assets / liabilities within 30 days",
        True,
        (500, 550, 600),
        ("LiquidAssets", "CurrentAssets", "Assets30Days", "ShortTermAssets"),
        ("LiabilitiesWithin30Days", "CurrentLiabilities", "Liabilities30Days", "ShortTermLiabilities"),
    ),
    FormRatio(
        "N4",
        "loans beyond one year / long-term funding",
        False,
        (1000, 1100, 1200),
        ("LoansBeyondOneYear", "LongTermLoans", "LoansOverYear", "LongDatedLoans"),
        ("LongTermFunding", "FundingBeyondOneYear", "FundingOverYear", "LongDatedFunding"),
    ),
    FormRatio(
        "N6",
        "largest exposure to one borrower / own funds of N1",
        False,
        (200, 225, 250),
        ("LargestBorrower", "SingleBorrowerExposure", "TopBorrower", "LargestSingleExposure"),
    ),
    FormRatio(
        "N7",
        "sum of large exposures / own funds of N1",
        False,
        (6000, 7000, 8000),
        ("LargeExposures", "SumOfLargeExposures", "TotalLargeRisks", "LargeExposuresTotal"),
    ),
    FormRatio(
        "N25",
        "exposure to related parties / own funds of N1",
        False,
        (150, 175, 200),
        ("RelatedParties", "InsiderExposure", "RelatedPartyExposure", "ExposureToInsiders"),
    ),
)

#: Names of a limit in every vocabulary.
FLOOR_NAMES = ("Minimum", "RequiredMinimum", "MinimumRatio", "LowerLimit")
CAP_NAMES = ("Maximum", "PermittedMaximum", "MaximumRatio", "UpperLimit")

#: Facts that bear on no ratio, with the fewest and most they may count.
ASIDE_FACTS: tuple[tuple[str, int, int], ...] = (("Branches", 3, 180), ("Staff", 90, 4000), ("Customers", 5000, 900000))


def _line(prefix: str, name: str, value: str) -> str:
    return f"<{prefix}:{name}>{value}</{prefix}:{name}>"


def _tenths(value: int) -> str:
    return f"{value // 10}.{value % 10}"


#: How to ask a model that was not tuned; put before the form.
INSTRUCTIONS = instructions(
    "You check the figures of a bank. Amounts are in millions, ratios and limits in percent. Compute every ratio and "
    "compare it with the limit on the form; a ratio equal to its limit is no violation.",
    [f"{ratio.formula}, violated when {'below its minimum' if ratio.is_floor else 'above its maximum'}" for ratio in FORM_RATIOS],
    "\n".join(
        (
            "Model Bank",
            _line("n1", "Capital", "700.0"),
            _line("n1", "RiskWeightedAssets", "10000.0"),
            _line("n1", "Minimum", "8.0"),
            _line("n3", "LiquidAssets", "900.0"),
            _line("n3", "LiabilitiesWithin30Days", "1500.0"),
            _line("n3", "Minimum", "50.0"),
            _line("n25", "RelatedParties", "210.0"),
            _line("n25", "Maximum", "20.0"),
        )
    ),
    ("N1", "N25"),
)


def generate(count: int, *, seed: int, wordings: Wordings, exclude: Set[str] = frozenset()) -> list[Example]:
    """Distinct examples, the same ones for the same arguments; see `prudential.generate`."""
    rng = random.Random(seed)
    vocabulary_numbers = range(SEEN_VOCABULARIES) if wordings == "seen" else (SEEN_VOCABULARIES,)
    vocabularies, banks, breach_counts = Deck(rng, vocabulary_numbers), Deck(rng, BANKS), Deck(rng, BREACH_COUNTS)
    examples: list[Example] = []
    known = set(exclude)
    while len(examples) < count:
        aimed = shuffled(rng, CODES)[: breach_counts.draw()]
        report, codes = _form(rng, banks.draw(), vocabularies.draw(), aimed)
        if report not in known:
            known.add(report)
            examples.append(example_of(report, codes))
    return examples


def _form(rng: random.Random, bank: str, vocabulary: int, aimed: Sequence[str]) -> tuple[str, list[str]]:
    """A form whose figures lie beyond the limits of the codes aimed at, with the codes that its figures violate."""
    capital = integer(rng, 2_000, 30_000)
    lines = [bank]
    name, low, high = ASIDE_FACTS[integer(rng, 0, len(ASIDE_FACTS) - 1)]
    lines.append(_line("info", name, str(integer(rng, low, high))))
    violated: list[str] = []
    for ratio in FORM_RATIOS:
        limit = ratio.limits[integer(rng, 0, len(ratio.limits) - 1)]
        is_below = ratio.is_floor == (ratio.code in aimed)
        margin = integer(rng, *MARGIN_PER_MILLE)
        # The aimed ratio in millionths: limit / 1000 moved by margin / 1000 of itself.
        ratio_millionths = limit * (1000 - margin if is_below else 1000 + margin)
        if ratio.code == "N1":
            numerator, denominator = capital, capital * 1_000_000 // ratio_millionths
        else:
            denominator = capital * integer(rng, 100, 400) // 100 if ratio.denominator else capital
            numerator = denominator * ratio_millionths // 1_000_000
        if ratio.is_breached(numerator, denominator, limit):
            violated.append(ratio.code)
        prefix = ratio.code.lower()
        lines.append(_line(prefix, ratio.numerator[vocabulary], _tenths(numerator)))
        if ratio.denominator:
            lines.append(_line(prefix, ratio.denominator[vocabulary], _tenths(denominator)))
        lines.append(_line(prefix, (FLOOR_NAMES if ratio.is_floor else CAP_NAMES)[vocabulary], _tenths(limit)))
    return "\n".join(lines), violated


def write_case(
    folder: Path, *, train: int = 400, validation: int = 40, test: int = 64, unseen: int = 64, seed: int = 0
) -> dict[str, Path]:
    """Writes train, validation, test and unseen_wordings .jsonl; see `prudential.write_case`.

    Raises:
        UsageError: no permission to write, or a negative seed or number of examples.
        FitError: the disk is full.
    """
    return write_splits(folder, generate, train=train, validation=validation, test=test, unseen=unseen, seed=seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m fullrank.cases.prudential_numeric OUT [--seed N] [--train N] ...`."""
    return run_command(write_case, "Write the prudential supervision case, numeric level.", arguments)


if __name__ == "__main__":
    sys.exit(main())
