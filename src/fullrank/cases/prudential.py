"""Prudential supervision, the language level: from a short bank report to the violated ratios and a directive.

A report names a bank and says in words, one sentence a ratio, whether a limit is kept or breached; an answer lists the
codes of the breached ratios and orders what the bank must do. There are no figures to compare (a small model does not
learn that in minutes; `prudential_numeric` is the level that asks for it).

Promises: the same arguments give the same bytes on every machine and Python version (all choices come from
`random.Random.random`); the splits of a case share no report; about a third of the names of every ratio and of what may be
said of it are held out: they make up every statement of the unseen-wordings test set, and occur nowhere else as a whole.

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
State = Literal["breached", "kept"]
WriteCase = Callable[..., dict[str, Path]]

SYSTEM = "You are a bank supervisor."
NO_ACTION = "No action is required."
#: What of an answer may name codes: all before the directive, so that an answer in a form of its own is read kindly.
LABELS_PATTERN = r"(?s)^(.*?)(?:\n\s*Directive|\Z)"
#: A code, wherever it stands.
CODE_PATTERN = r"\bN\d+\b"
DIRECTIVE_PATTERN = r"Directive:\s*(.*)"

#: The scores of the case, as entries of a recipe's `evaluate.tasks`.
TASKS: tuple[dict[str, str], ...] = (
    {"metric": "f1", "pattern": LABELS_PATTERN, "label_pattern": CODE_PATTERN},
    {"metric": "rouge_l", "pattern": DIRECTIVE_PATTERN},
)

#: How many of each list below, counted from its end, are held out for the unseen-wordings test set.
HELD_OUT_SUBJECTS = 2
HELD_OUT_PREDICATES = 6


@dataclass(frozen=True)
class Ratio:
    """A prudential ratio in language.

    Attributes:
        code: its short name.
        name: its name in an answer.
        meaning: what a breach of it is, for the instructions.
        directive: what a bank that breaches it is ordered to do.
        subjects: ways to name it in a report; the last ones are held out.
    """

    code: str
    name: str
    meaning: str
    directive: str
    subjects: tuple[str, ...]

    @property
    def label(self) -> str:
        """As an answer names it: `total capital (N1)`. The words come before the code, as a model writes from left to right."""
        return f"{self.name} ({self.code})"

    def sentences(self, state: State, wordings: Wordings) -> tuple[str, ...]:
        """The sentences of one state that training may see, or those whose every part it must never see."""
        subjects = split_off(self.subjects, HELD_OUT_SUBJECTS, wordings)
        predicates = split_off(BREACHED if state == "breached" else KEPT, HELD_OUT_PREDICATES, wordings)
        return tuple(f"{subject} {predicate}." for predicate in predicates for subject in subjects)


def split_off(phrases: Sequence[str], held_out: int, wordings: Wordings) -> Sequence[str]:
    """The phrases that training may see, or the held-out ones at the end."""
    return phrases[:-held_out] if wordings == "seen" else phrases[-held_out:]


#: What a report says of a ratio whose limit is breached.
BREACHED: tuple[str, ...] = (
    "breaches the norm",
    "is in breach of its limit",
    "violates the norm",
    "violates its limit",
    "fails the norm",
    "does not meet the norm",
    "does not comply with the rules",
    "missed the requirement",
    "is not within its limit",
    "broke its limit",
    "is outside the permitted range",
    "failed the supervisory test",
    "is not in order",
    "does not keep to its limit",
    # held out
    "is in violation of the norm",
    "does not satisfy the requirement",
    "failed to meet the norm",
    "has breached its limit",
    "is not in line with the rules",
    "fails to comply with its limit",
)

#: What a report says of a ratio whose limit is kept.
KEPT: tuple[str, ...] = (
    "meets the norm",
    "is well within its limit",
    "respects the norm",
    "respects its limit",
    "passes the norm",
    "satisfies the norm",
    "complies with the rules",
    "met the requirement",
    "is within its limit",
    "stayed below its alarm level",
    "is inside the permitted range",
    "passed the supervisory test",
    "is in order",
    "keeps to its limit",
    # held out
    "is in full compliance with the norm",
    "satisfies the requirement",
    "comfortably meets the norm",
    "has kept to its limit",
    "is in line with the rules",
    "complies with its limit",
)

#: Every ratio of the case.
RATIOS: tuple[Ratio, ...] = (
    Ratio(
        code="N1",
        name="total capital",
        meaning="own funds too low for the risks",
        directive="Raise own funds.",
        subjects=(
            "Total capital",
            "The capital ratio",
            "Regulatory capital",
            "Capital adequacy",
            # held out
            "The bank's capital",
            "The total capital ratio",
        ),
    ),
    Ratio(
        code="N2",
        name="instant liquidity",
        meaning="too little cash on demand or the same day",
        directive="Hold more cash.",
        subjects=(
            "Instant liquidity",
            "Same-day liquidity",
            "The instant liquidity ratio",
            "Overnight liquidity",
            # held out
            "Liquidity on the same day",
            "Instant and overnight liquidity",
        ),
    ),
    Ratio(
        code="N3",
        name="current liquidity",
        meaning="too few liquid assets within 30 days",
        directive="Hold more liquid assets.",
        subjects=(
            "Current liquidity",
            "Thirty-day liquidity",
            "The current liquidity ratio",
            "Monthly liquidity",
            # held out
            "Liquidity over thirty days",
            "Current monthly liquidity",
        ),
    ),
    Ratio(
        code="N4",
        name="long-term liquidity",
        meaning="too many loans beyond one year",
        directive="Extend long-term funding.",
        subjects=(
            "Long-term liquidity",
            "Liquidity beyond one year",
            "The long-term ratio",
            "Long-term funding",
            # held out
            "The long-term liquidity ratio",
            "Funding beyond one year",
        ),
    ),
    Ratio(
        code="N6",
        name="single borrower",
        meaning="too much lent to one client",
        directive="Reduce the largest loan.",
        subjects=(
            "Lending to the largest borrower",
            "The single-borrower ratio",
            "Exposure to one borrower",
            "Credit to a single borrower",
            # held out
            "Exposure to the largest borrower",
            "Lending to a single borrower",
        ),
    ),
    Ratio(
        code="N7",
        name="large exposures",
        meaning="their total too high",
        directive="Cut total large exposures.",
        subjects=(
            "The total of large exposures",
            "The large-exposures ratio",
            "The sum of large exposures",
            "Large-exposure volume",
            # held out
            "The volume of large exposures",
            "The sum of all large exposures",
        ),
    ),
    Ratio(
        code="N25",
        name="related parties",
        meaning="too much lent to insiders or owners",
        directive="Cut lending to insiders.",
        subjects=(
            "Lending to related parties",
            "Insider lending",
            "Credit to the owners",
            "The related-party ratio",
            # held out
            "Credit to related parties",
            "Lending to insiders and owners",
        ),
    ),
)

CODES: tuple[str, ...] = tuple(ratio.code for ratio in RATIOS)
BY_CODE: Mapping[str, Ratio] = {ratio.code: ratio for ratio in RATIOS}

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
            f"{ratio.label}: {definition}. Directive: {ratio.directive}"
            for ratio, definition in zip(RATIOS, definitions, strict=True)
        ),
        "Answer in two lines: the violations in the order of the report, then their directives. If nothing is violated, write:",
        example_of("", ()).answer,
        "",
        "Example:",
        report,
        example_of("", codes).answer,
        "",
        "Report:",
        "{prompt}",
        "",
        "Which limits are violated? Answer in the two lines, as in the example.",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Example:
    """A report with what a supervisor would answer.

    Attributes:
        report: the text of the report.
        codes: the violated codes, in the order in which the report comes to them; empty for a clean report.
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
        labels = ", ".join(BY_CODE[code].label for code in self.codes)
        return f"Violations: {labels or 'none'}\nDirective: {self.directive}"

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
    """The example of a report that violates these codes, named in the order given, which is the report's."""
    violated = [BY_CODE[code] for code in codes]
    directive = " ".join(ratio.directive for ratio in violated) or NO_ACTION
    return Example(report, tuple(ratio.code for ratio in violated), directive)


#: How to ask a model that was not tuned: role, codes, form of the answer and one worked example; put before the report.
INSTRUCTIONS = instructions(
    "You check bank reports. Find every limit that the report says is violated.",
    [ratio.meaning for ratio in RATIOS],
    "Model Bank: Own funds are lower than they must be. There is enough cash. Its owners were lent more than the law allows.",
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
        statements = [(code, (breached if code in violated else kept)[code].draw()) for code in mentioned]
        if rng.random() < ASIDE_RATIO and len(statements) < 4:
            statements.append(("", asides.draw()))
        statements = shuffled(rng, statements)
        report = f"{banks.draw()}: {' '.join(sentence for _, sentence in statements)}"
        if report not in known:
            known.add(report)
            examples.append(example_of(report, [code for code, _ in statements if code in violated]))
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
