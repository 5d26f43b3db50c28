"""Prudential supervision, the language level: from a short bank report to the violated ratios and a directive.

A report names a bank and says in words, one sentence a ratio, whether a limit is kept or breached; an answer lists the
codes of the breached ratios and orders what the bank must do. There are no figures to compare (a small model does not
learn that in minutes; `prudential_numeric` is the level that asks for it).

Promises: the same arguments give the same bytes on every machine and Python version (all choices come from
`random.Random.random`); the splits of a case share no report; three in ten of the sentences, chosen by their position
in the lists below, are held out: they occur in the unseen-wordings test set, whose every statement about a ratio is one
of them, and nowhere else.

What it is not: a rendering of the law. Codes and the ratios they stand for follow the Bank of Russia's Instruction
199-I of 29 November 2019 (N1 is its N1.0); banks, reports and directives are invented, and any likeness of a name to
that of a real bank is chance.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from fullrank.errors import FullrankError, UsageError
from fullrank.run import write_text

Item = TypeVar("Item")
Wordings = Literal["seen", "unseen"]
WriteCase = Callable[..., dict[str, Path]]

SYSTEM = "You are a bank supervisor."
NO_ACTION = "No action is required."
LABELS_PATTERN = r"Violations:\s*(.*)"
DIRECTIVE_PATTERN = r"Directive:\s*(.*)"

#: The scores of the case, as entries of a recipe's `evaluate.tasks`.
TASKS: tuple[dict[str, str], ...] = (
    {"metric": "f1", "pattern": LABELS_PATTERN},
    {"metric": "rouge_l", "pattern": DIRECTIVE_PATTERN},
)

#: Positions within every ten sentences of a list that are held out for the unseen-wordings test set.
HELD_OUT_POSITIONS = (2, 5, 8)


@dataclass(frozen=True)
class Ratio:
    """A prudential ratio in language.

    Attributes:
        code: its short name in an answer.
        meaning: its name and what a breach of it is, for the instructions.
        directive: what a bank that breaches it is ordered to do.
        breached: sentences that say the limit is breached.
        kept: sentences that say the limit is kept.
    """

    code: str
    meaning: str
    directive: str
    breached: tuple[str, ...]
    kept: tuple[str, ...]

    def sentences(self, state: Literal["breached", "kept"], wordings: Wordings) -> tuple[str, ...]:
        """The sentences of one state that training may see, or those it must never see."""
        return tuple(
            sentence
            for position, sentence in enumerate(self.breached if state == "breached" else self.kept)
            if (position % 10 in HELD_OUT_POSITIONS) == (wordings == "unseen")
        )


#: Every ratio of the case, in the order in which answers name them.
RATIOS: tuple[Ratio, ...] = (
    Ratio(
        code="N1",
        meaning="total capital, own funds too low for the risks",
        directive="Raise own funds.",
        breached=(
            "Own funds no longer cover the required minimum.",
            "The total capital ratio has fallen below the minimum.",
            "Losses have pushed capital under the regulatory floor.",
            "Own funds fall short of the minimum requirement.",
            "Capital is too thin for the risks on the books.",
            "Regulatory capital sits below the required level.",
            "The bank no longer meets its total capital requirement.",
            "Write-offs left own funds short of the minimum.",
            "Risk-weighted assets are not sufficiently backed by own funds.",
            "The minimum for total capital is breached.",
            "Capital adequacy has slipped under the limit.",
            "There is a capital shortfall against the minimum.",
            "Own funds are insufficient for the risks taken.",
            "Total capital does not reach the prescribed minimum.",
            "The capital ratio missed its floor at quarter-end.",
            "A deficit of own funds has opened against the requirement.",
            "Own funds dropped beneath the regulatory minimum.",
            "The bank is undercapitalised for its risk-weighted assets.",
            "Too little capital stands behind the risk-weighted assets.",
            "The capital requirement was missed after heavy losses.",
        ),
        kept=(
            "Own funds stay comfortably above the minimum.",
            "The total capital ratio exceeds the minimum.",
            "Profits have lifted capital well above the regulatory floor.",
            "Own funds cover the minimum requirement in full.",
            "Capital is ample for the risks on the books.",
            "Regulatory capital remains above the required level.",
            "The bank meets its total capital requirement.",
            "Retained profit left own funds well over the minimum.",
            "Risk-weighted assets are fully backed by own funds.",
            "The minimum for total capital is respected.",
            "Capital adequacy is sound and above the limit.",
            "There is a capital surplus over the minimum.",
            "Own funds are sufficient for the risks taken.",
            "Total capital clears the prescribed minimum with ease.",
            "The capital ratio held above its floor at quarter-end.",
            "A surplus of own funds remains over the requirement.",
            "Own funds rose further above the regulatory minimum.",
            "The bank is well capitalised for its risk-weighted assets.",
            "Enough capital stands behind the risk-weighted assets.",
            "The capital requirement was met despite some losses.",
        ),
    ),
    Ratio(
        code="N2",
        meaning="instant liquidity, too little cash on demand or the same day",
        directive="Hold more cash.",
        breached=(
            "Cash no longer covers deposits payable on demand.",
            "Instant liquidity has fallen below its minimum.",
            "The bank cannot meet same-day withdrawals from its cash.",
            "Overnight obligations exceed the cash at hand.",
            "Too little cash is held against sight deposits.",
            "Same-day liquidity is below the required level.",
            "On-demand claims are larger than instantly available assets.",
            "The instant liquidity ratio breaches its floor.",
            "Cash at hand falls short of overnight obligations.",
            "Vault cash would not last through a day of withdrawals.",
            "Instant liquidity misses the minimum.",
            "Same-day outflows outstrip the cash available today.",
            "Sight deposits are not sufficiently backed by cash.",
            "The bank lacks cash for claims due today.",
            "Immediately available assets fall short of demand deposits.",
            "Instant liquidity has dropped under the floor.",
            "A same-day cash shortfall has opened.",
            "Overnight liquidity does not meet the requirement.",
            "Cash is insufficient for deposits repayable on demand.",
            "The bank could not settle same-day payments in full.",
        ),
        kept=(
            "Cash easily covers deposits payable on demand.",
            "Instant liquidity is well above its minimum.",
            "The bank can meet same-day withdrawals from its cash.",
            "Cash at hand exceeds overnight obligations.",
            "Ample cash is held against sight deposits.",
            "Same-day liquidity is above the required level.",
            "Instantly available assets outweigh on-demand claims.",
            "The instant liquidity ratio holds above its floor.",
            "Overnight obligations are fully covered by cash at hand.",
            "Vault cash would outlast several days of withdrawals.",
            "Instant liquidity meets the minimum with room to spare.",
            "Same-day outflows are small beside the cash available today.",
            "Sight deposits are amply backed by cash.",
            "The bank has cash to spare for claims due today.",
            "Immediately available assets exceed demand deposits.",
            "Instant liquidity remains safely over the floor.",
            "A same-day cash surplus was reported.",
            "Overnight liquidity meets the requirement.",
            "Cash is sufficient for deposits repayable on demand.",
            "All same-day payments were settled in full.",
        ),
    ),
    Ratio(
        code="N3",
        meaning="current liquidity, too few liquid assets within 30 days",
        directive="Hold more liquid assets.",
        breached=(
            "Liquid assets no longer cover outflows of the next 30 days.",
            "Current liquidity has fallen below its minimum.",
            "Obligations due within a month exceed liquid assets.",
            "The 30-day liquidity ratio breaches its floor.",
            "Payments due within thirty days cannot be met in full.",
            "Current liquidity does not meet the requirement.",
            "Too few liquid assets stand against one-month liabilities.",
            "Outflows of the coming month outstrip liquid assets.",
            "A liquidity shortfall has opened over the 30-day horizon.",
            "Liabilities maturing within a month are not sufficiently covered.",
            "The current liquidity ratio is under the limit.",
            "Liquid assets would run out before the month ends.",
            "Liquid assets fall short of thirty-day obligations.",
            "The bank lacks liquid assets for the coming month.",
            "One-month outflows are larger than liquid assets.",
            "The 30-day ratio is below the required level.",
            "Current liquidity misses the minimum.",
            "Claims due within 30 days exceed the assets maturing by then.",
            "Current liquidity has slipped under the floor.",
            "Next month's repayments are not backed by liquid assets.",
        ),
        kept=(
            "Liquid assets easily cover outflows of the next 30 days.",
            "Current liquidity is well above its minimum.",
            "Liquid assets exceed obligations due within a month.",
            "The 30-day liquidity ratio holds above its floor.",
            "Payments due within thirty days can be met in full.",
            "Current liquidity meets the requirement.",
            "Ample liquid assets stand against one-month liabilities.",
            "Liquid assets outweigh the outflows of the coming month.",
            "The 30-day horizon shows a comfortable liquidity surplus.",
            "Liabilities maturing within a month are amply covered.",
            "The current liquidity ratio is safely above the limit.",
            "Liquid assets would outlast a month of outflows.",
            "Thirty-day obligations are fully backed by liquid assets.",
            "The bank has liquid assets to spare for the coming month.",
            "One-month outflows are small beside liquid assets.",
            "The 30-day ratio exceeds the required level.",
            "Current liquidity clears the minimum with ease.",
            "Claims due within 30 days are matched by assets maturing by then.",
            "Current liquidity remains sound and over the floor.",
            "Next month's repayments are backed by liquid assets.",
        ),
    ),
    Ratio(
        code="N4",
        meaning="long-term liquidity, too many loans beyond one year",
        directive="Extend long-term funding.",
        breached=(
            "Loans beyond one year have outgrown long-term funding.",
            "The long-term liquidity ratio exceeds its cap.",
            "Long-term loans exceed the funding that supports them.",
            "Assets maturing beyond a year lack stable funding.",
            "Too many long-term loans rest on short-term deposits.",
            "Long-term liquidity is outside its limit.",
            "Too many multi-year loans are financed with short-term money.",
            "Long-dated assets have overtaken long-term funding.",
            "Funding beyond one year falls short of loans of that term.",
            "The limit on lending beyond a year is breached.",
            "Long-term liquidity has broken through its ceiling.",
            "Multi-year mortgages have outgrown long-term resources.",
            "The long-term liquidity limit is exceeded.",
            "Long-term funding no longer supports multi-year loans.",
            "The funding gap beyond one year is above the cap.",
            "Long-dated loans outstrip long-term funding.",
            "Lending for over a year is above the permitted ratio.",
            "Long-term resources do not cover long-term loans.",
            "Multi-year lending is too large for the long-term funding.",
            "The maturity mismatch beyond a year is over the maximum.",
        ),
        kept=(
            "Long-term funding keeps pace with loans beyond one year.",
            "The long-term liquidity ratio stays below its cap.",
            "Long-term loans are matched by the funding that supports them.",
            "Assets maturing beyond a year have stable funding.",
            "Long-term loans rest on long-term deposits.",
            "Long-term liquidity is well within its limit.",
            "Multi-year loans are financed with long-term money.",
            "Long-dated assets remain below long-term funding.",
            "Funding beyond one year exceeds loans of that term.",
            "The limit on lending beyond a year is respected.",
            "Long-term liquidity leaves ample room under its ceiling.",
            "Multi-year mortgages are covered by long-term resources.",
            "The long-term liquidity limit is kept.",
            "Long-term funding fully supports multi-year loans.",
            "The funding gap beyond one year is far below the cap.",
            "Long-dated loans are covered by long-term funding.",
            "Lending for over a year is below the permitted ratio.",
            "Long-term resources comfortably cover long-term loans.",
            "Multi-year lending is modest beside the long-term funding.",
            "The maturity mismatch beyond a year is under the maximum.",
        ),
    ),
    Ratio(
        code="N6",
        meaning="single borrower, too much lent to one client",
        directive="Reduce the largest exposure.",
        breached=(
            "One borrower alone exceeds the exposure cap.",
            "The largest borrower is above the single-name limit.",
            "Exposure to a single client exceeds the maximum.",
            "Lending to one group of connected clients breaches the limit.",
            "A single borrower takes up too large a share of capital.",
            "The single-borrower limit is exceeded.",
            "Loans to one client have outgrown the cap.",
            "The biggest debtor owes more than the rules allow.",
            "One borrower's debt is over the permitted share of capital.",
            "The cap on a single client is broken.",
            "Too much has been lent to one borrower.",
            "A single-name exposure went through its ceiling.",
            "The largest client owes more than the limit allows.",
            "The bank has lent a single debtor more than permitted.",
            "One connected group of borrowers is over the maximum.",
            "The exposure to one debtor is above the cap.",
            "The limit for one borrower has been overstepped.",
            "A new loan pushed one client past the single-name limit.",
            "A single borrower stands above the ceiling.",
            "The single-name maximum is breached by one debtor.",
        ),
        kept=(
            "No single borrower exceeds the exposure cap.",
            "The largest borrower is well below the single-name limit.",
            "Exposure to any single client is below the maximum.",
            "Lending to each group of connected clients respects the limit.",
            "The largest borrower takes up only a small share of capital.",
            "The single-borrower limit is respected.",
            "Loans to each client are well under the cap.",
            "The biggest debtor owes far less than the rules allow.",
            "Every borrower's debt is within the permitted share of capital.",
            "The cap on a single client holds.",
            "Lending to the biggest borrower stays moderate.",
            "Every single-name exposure stays under its ceiling.",
            "The largest client owes less than the limit allows.",
            "The bank has lent no single debtor more than permitted.",
            "Every connected group of borrowers is under the maximum.",
            "The exposure to the largest debtor is below the cap.",
            "The limit for one borrower is kept.",
            "A repayment brought the top client well under the single-name limit.",
            "The largest single borrower stands below the ceiling.",
            "The single-name maximum is observed for each debtor.",
        ),
    ),
    Ratio(
        code="N7",
        meaning="large exposures, their total too high",
        directive="Reduce total large exposures.",
        breached=(
            "Large exposures together exceed the aggregate limit.",
            "The sum of large exposures is above the cap.",
            "Total large exposures exceed the maximum.",
            "Large exposures, taken together, breach the limit.",
            "The combined volume of large exposures is too high.",
            "The aggregate of large exposures is over the limit.",
            "Large loans have piled up beyond the aggregate cap.",
            "All large exposures combined are more than the rules allow.",
            "The aggregate limit on large exposures is breached.",
            "Total large exposures broke through their ceiling.",
            "The large exposure ratio stands above its maximum.",
            "Large exposures in sum have outgrown what capital permits.",
            "Large exposures combined are above the cap.",
            "There are too many large exposures for the aggregate limit.",
            "The sum of large loans exceeds the permitted multiple of capital.",
            "Taken as a whole, large exposures exceed the ceiling.",
            "The concentration in large exposures is above the limit.",
            "New deals pushed total large exposures past the limit.",
            "The total of large loans is higher than allowed.",
            "The cap on all large exposures has been overstepped.",
        ),
        kept=(
            "Large exposures together stay below the aggregate limit.",
            "The sum of large exposures is well under the cap.",
            "Total large exposures are below the maximum.",
            "Large exposures, taken together, respect the limit.",
            "The combined volume of large exposures is moderate.",
            "The aggregate of large exposures is within the limit.",
            "Large loans remain few and well below the aggregate cap.",
            "All large exposures combined are less than the rules allow.",
            "The aggregate limit on large exposures is respected.",
            "Total large exposures leave ample room under their ceiling.",
            "The large exposure ratio stands below its maximum.",
            "Large exposures in sum are well within what capital permits.",
            "Large exposures combined are below the cap.",
            "There are few large exposures and the aggregate limit holds.",
            "The sum of large loans is below the permitted multiple of capital.",
            "Taken as a whole, large exposures stay under the ceiling.",
            "The concentration in large exposures is under the limit.",
            "Repayments brought total large exposures well under the limit.",
            "The total of large loans is lower than allowed.",
            "The cap on all large exposures is observed.",
        ),
    ),
    Ratio(
        code="N25",
        meaning="related parties, too much lent to insiders or owners",
        directive="Cut lending to related parties.",
        breached=(
            "Lending to related parties exceeds the limit.",
            "Insider loans are above the cap.",
            "Exposure to related parties is above the maximum.",
            "Loans to the bank's own shareholders breach the limit.",
            "Too much has been lent to insiders.",
            "The related-party limit is exceeded.",
            "Affiliated companies borrowed more than the rules allow.",
            "Loans to directors and their families are over the cap.",
            "Loans to insiders exceed the permitted share of capital.",
            "The cap on lending to owners is broken.",
            "Related-party exposure went through its ceiling.",
            "Credit to the owners' companies has outgrown the limit.",
            "Shareholders have borrowed more than the cap allows.",
            "Affiliates of the bank owe more than permitted.",
            "The limit for related persons has been overstepped.",
            "Lending to the bank's affiliates is above the limit.",
            "Insider lending is too high against capital.",
            "A new loan pushed related parties past their limit.",
            "Insiders owe more than the limit allows.",
            "The related-party maximum has been breached.",
        ),
        kept=(
            "Lending to related parties stays below the limit.",
            "Insider loans are well under the cap.",
            "Exposure to related parties is below the maximum.",
            "Loans to the bank's own shareholders respect the limit.",
            "Little has been lent to insiders.",
            "The related-party limit is respected.",
            "Affiliated companies borrowed less than the rules allow.",
            "Loans to directors and their families are under the cap.",
            "Loans to insiders are within the permitted share of capital.",
            "The cap on lending to owners holds.",
            "Related-party exposure leaves ample room under its ceiling.",
            "Credit to the owners' companies is well within the limit.",
            "Shareholders have borrowed less than the cap allows.",
            "Affiliates of the bank owe no more than permitted.",
            "The limit for related persons is kept.",
            "Lending to the bank's affiliates is below the limit.",
            "Insider lending is modest against capital.",
            "A repayment brought related parties well under their limit.",
            "Insiders owe less than the limit allows.",
            "The related-party maximum is observed.",
        ),
    ),
)

CODES: tuple[str, ...] = tuple(ratio.code for ratio in RATIOS)

# fmt: off
BANKS: tuple[str, ...] = (
    "Aurora Bank", "Harbour Bank", "Summit Bank", "Meridian Bank", "Castle Bank", "River Bank", "Forest Bank",
    "Lake Bank", "Valley Bank", "Bridge Bank", "Garden Bank", "Anchor Bank", "Arrow Bank", "Autumn Bank",
    "Copper Bank", "Coral Bank", "Crystal Bank", "Dawn Bank", "Alpine Bank", "Echo Bank", "Harvest Bank",
    "Beacon Bank", "Cedar Bank", "Delta Bank", "Falcon Bank", "Granite Bank", "Horizon Bank", "Island Bank",
    "Lantern Bank", "Maple Bank", "Mercury Bank", "Oak Bank", "Orion Bank", "Pearl Bank", "Quarry Bank",
    "Silver Bank", "Spring Bank", "Tower Bank", "Walnut Bank", "Willow Bank",
)
# fmt: on

#: Sentences that bear on no ratio.
ASIDES: tuple[str, ...] = (
    "A new branch opened in spring.",
    "The annual meeting took place in May.",
    "Staff numbers were unchanged.",
    "The head office moved to a new building.",
    "The mobile app was redesigned.",
    "The bank celebrated its anniversary.",
    "Two board members were re-elected.",
    "Card payments rose over the summer.",
    "The auditors will visit in June.",
    "A new logo was introduced.",
    "Tellers attended a training course.",
    "The website now has three languages.",
    "The system upgrade was completed.",
    "Customers were satisfied with the service.",
    "The bank sponsored a local theatre.",
    "Opening hours were extended.",
    "Fee income was stable.",
    "The date of the dividend was announced.",
    "The main branch is being renovated.",
    "A new chief economist was hired.",
)

#: Breaches per report: one report in five is clean, and a report has 1.4 breaches on average.
BREACH_COUNTS: tuple[int, ...] = (0,) * 4 + (1,) * 7 + (2,) * 6 + (3,) * 3

#: Fewest and most ratios reported as kept beside that many breaches; as many kept as breached overall, so that the mere
#: mention of a ratio tells nothing.
KEPT_COUNTS: Mapping[int, tuple[int, int]] = {0: (2, 3), 1: (1, 2), 2: (0, 2), 3: (0, 1)}

#: Share of reports of fewer than four sentences that get an irrelevant one.
ASIDE_RATIO = 0.2


def instructions(opening: str, definitions: Sequence[str], report: str, codes: Sequence[str]) -> str:
    """The text put before a report when a model that was not tuned is asked.

    Args:
        opening: what is to be done with what.
        definitions: the meaning of every code, in the order of `RATIOS`.
        report: the report of the worked example.
        codes: the violations of the worked example.
    """
    lines = [
        opening,
        "The codes, their meaning and the directive for each:",
        *(
            f"{ratio.code}: {definition}. Directive: {ratio.directive}"
            for ratio, definition in zip(RATIOS, definitions, strict=True)
        ),
        "Answer in two lines: the violated codes in this order, then their directives. If nothing is violated, write:",
        example_of("", ()).answer,
        "",
        "Example:",
        report,
        example_of("", codes).answer,
        "",
        "Now the report to check:",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Example:
    """A report with what a supervisor would answer.

    Attributes:
        report: the text of the report.
        codes: the violated codes, in the order of `CODES`; empty for a clean report.
        directive: what the bank must do.
    """

    report: str
    codes: tuple[str, ...]
    directive: str

    @property
    def prompt(self) -> str:
        """What the tuned model is given: the report alone."""
        return self.report

    @property
    def answer(self) -> str:
        """Two lines: the violations and the directive."""
        return f"Violations: {', '.join(self.codes) or 'none'}\nDirective: {self.directive}"

    @property
    def row(self) -> dict[str, Any]:
        """The record of the data file: a chat, with a short system turn because templates add a longer one."""
        return {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": self.prompt},
                {"role": "assistant", "content": self.answer},
            ],
            "labels": list(self.codes),
        }


def example_of(report: str, codes: Sequence[str]) -> Example:
    """The example of a report that violates these codes, with codes and directive in the fixed order."""
    violated = [ratio for ratio in RATIOS if ratio.code in codes]
    directive = " ".join(ratio.directive for ratio in violated) or NO_ACTION
    return Example(report, tuple(ratio.code for ratio in violated), directive)


#: How to ask a model that was not tuned: role, codes, form of the answer and one worked example; put before the report.
INSTRUCTIONS = instructions(
    "You check bank reports. Find every limit that the report says is violated.",
    [ratio.meaning for ratio in RATIOS],
    "Model Bank: The bank does not have the own funds it must hold. Cash for claims on demand is plentiful. "
    "Its owners were lent more than the limit.",
    ("N1", "N25"),
)


# ---- choices --------------------------------------------------------------------------------------------------------


def integer(rng: random.Random, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included; from `random()` alone, whose sequence Python guarantees."""
    return low + int(rng.random() * (high - low + 1))


def shuffled(rng: random.Random, items: Sequence[Item]) -> list[Item]:
    """The items in random order (Fisher-Yates)."""
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = integer(rng, 0, last)
        result[last], result[other] = result[other], result[last]
    return result


class Deck(Generic[Item]):
    """Cards drawn in random order, all of them once before any comes again: small data sets stay balanced."""

    def __init__(self, rng: random.Random, cards: Sequence[Item]) -> None:
        self._rng = rng
        self._cards = cards
        self._left: list[Item] = []

    def draw(self) -> Item:
        """The next card."""
        if not self._left:
            self._left = shuffled(self._rng, self._cards)
        return self._left.pop()


def generate(count: int, *, seed: int, wordings: Wordings, exclude: Set[str] = frozenset()) -> list[Example]:
    """Distinct examples, the same ones for the same arguments.

    Args:
        count: how many.
        seed: selects the sequence of reports.
        wordings: "seen" takes the sentences that training may see, "unseen" the held-out ones only.
        exclude: reports that must not come up again.
    """
    rng = random.Random(seed)
    banks, asides, breach_counts = Deck(rng, BANKS), Deck(rng, ASIDES), Deck(rng, BREACH_COUNTS)
    breached = {ratio.code: Deck(rng, ratio.sentences("breached", wordings)) for ratio in RATIOS}
    kept = {ratio.code: Deck(rng, ratio.sentences("kept", wordings)) for ratio in RATIOS}

    examples: list[Example] = []
    known = set(exclude)
    while len(examples) < count:
        breaches = breach_counts.draw()
        mentioned = shuffled(rng, CODES)[: breaches + integer(rng, *KEPT_COUNTS[breaches])]
        violated = mentioned[:breaches]
        sentences = [(breached if code in violated else kept)[code].draw() for code in mentioned]
        if rng.random() < ASIDE_RATIO and len(sentences) < 4:
            sentences.append(asides.draw())
        report = f"{banks.draw()}: {' '.join(shuffled(rng, sentences))}"
        if report not in known:
            known.add(report)
            examples.append(example_of(report, violated))
    return examples


# ---- files ----------------------------------------------------------------------------------------------------------


def write_case(
    folder: Path, *, train: int = 400, validation: int = 40, test: int = 64, unseen: int = 64, seed: int = 0
) -> dict[str, Path]:
    """Writes train, validation, test and unseen_wordings .jsonl, each file whole or not at all.

    Args:
        folder: made where missing.
        train, validation, test, unseen: examples in each file.
        seed: selects all four; 0 or more.

    Returns:
        The path of each file by the name of its split.

    Raises:
        UsageError: no permission to write, or a negative seed or number of examples.
        FitError: the disk is full.
    """
    return write_splits(folder, generate, train=train, validation=validation, test=test, unseen=unseen, seed=seed)


def write_splits(
    folder: Path,
    generate: Callable[..., list[Example]],
    *,
    train: int,
    validation: int,
    test: int,
    unseen: int,
    seed: int,
) -> dict[str, Path]:
    """Generates the four splits of a case, each without the reports of those before it, and writes them.

    Raises:
        UsageError: no permission to write, or a negative seed or number of examples.
        FitError: the disk is full.
    """
    splits: tuple[tuple[str, int, Wordings], ...] = (
        ("train", train, "seen"),
        ("validation", validation, "seen"),
        ("test", test, "seen"),
        ("unseen_wordings", unseen, "unseen"),
    )
    if seed < 0:
        raise UsageError(f"seed {seed} is negative", hint="choose 0 or more")
    for name, count, _ in splits:
        if count < 0:
            raise UsageError(f"{name}: {count} examples cannot be written", hint="ask for 0 or more")
    paths: dict[str, Path] = {}
    known: set[str] = set()
    for index, (name, count, wordings) in enumerate(splits):
        # Every split of every seed draws from a sequence of its own.
        examples = generate(count, seed=len(splits) * seed + index, wordings=wordings, exclude=known)
        known.update(example.report for example in examples)
        paths[name] = Path(folder) / f"{name}.jsonl"
        write_text(paths[name], "".join(json.dumps(example.row, ensure_ascii=False) + "\n" for example in examples))
    return paths


def run_command(write_case: WriteCase, description: str, arguments: Sequence[str] | None = None) -> int:
    """The command line of a case module; returns its exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the .jsonl files")
    parser.add_argument("--seed", type=int, default=0, help="selects the reports (default: %(default)s)")
    for name, count in (("train", 400), ("validation", 40), ("test", 64), ("unseen", 64)):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help="examples (default: %(default)s)")
    options = vars(parser.parse_args(arguments))
    try:
        paths = write_case(options.pop("out"), **options)
    except FullrankError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for path in paths.values():
        print(path)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m fullrank.cases.prudential OUT [--seed N] [--train N] ...`."""
    return run_command(write_case, "Write the prudential supervision case, language level.", arguments)


if __name__ == "__main__":
    sys.exit(main())
