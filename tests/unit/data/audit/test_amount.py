"""Amount of data: each rule at its border, with the numbers worked out here."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from fullrank.data.audit.amount import conclude, half_width
from fullrank.records import Finding

ENOUGH: dict[str, Any] = {
    "train_records": 20_000,
    "supervised_tokens": 5_000_000,
    "validation_records": 1_000,
    "tests": {"test": 1_000},
    "parameters": 7_240_000_000,
    "labels": None,
}


def severities(**changes: Any) -> list[str]:
    findings = conclude(**{**ENOUGH, **changes})
    assert all(finding.kind == "too_little_data" and finding.records == [] for finding in findings)
    return [finding.severity for finding in findings]


def only(**changes: Any) -> Finding:
    (finding,) = conclude(**{**ENOUGH, **changes})
    return finding


def test_enough_is_enough() -> None:
    assert severities() == []


@pytest.mark.parametrize(
    ("records", "parameters", "severity"),
    [
        (10_000, 7_240_000_000, []),
        (9_999, 7_240_000_000, ["note"]),
        (9_999, 6_740_000_000, ["note"]),  # Llama 2 7B
        (9_999, 3_000_000_000, []),
        (1_000, 70_000_000_000, ["note"]),
        (999, 70_000_000_000, ["warning"]),
        (1_000, 135_000_000, []),
        (999, 135_000_000, ["note"]),
        (99, 135_000_000, ["warning"]),
    ],
)
def test_records_for_the_size_of_the_model(records: int, parameters: int, severity: list[str]) -> None:
    assert severities(train_records=records, parameters=parameters) == severity


def test_the_finding_gives_its_numbers() -> None:
    finding = only(train_records=6_800)
    assert finding.count == 6_800
    assert "6,800 training records" in finding.what and "7.2B" in finding.what and "10,000" in finding.what


@pytest.mark.parametrize(("tokens", "short"), [(750_000, False), (749_999, True)])
def test_supervised_tokens_at_the_size_of_lima(tokens: int, short: bool) -> None:
    assert severities(supervised_tokens=tokens, parameters=65_000_000_000) == (["note"] if short else [])


def test_of_labels_tokens_are_not_counted() -> None:
    assert severities(supervised_tokens=10, parameters=65_000_000_000, labels=77) == []


@pytest.mark.parametrize(
    ("records", "severity"), [(2_310, []), (2_309, ["note"]), (770, ["note", "note"]), (769, ["note", "warning"])]
)
def test_records_for_each_label(records: int, severity: list[str]) -> None:
    """77 labels: 30 and 10 records each; below 1,000 records the seed matters as well."""
    assert severities(train_records=records, labels=77, parameters=135_000_000) == severity


@pytest.mark.parametrize(("records", "severity"), [(385, []), (384, ["note"]), (97, ["note"]), (96, ["warning"]), (0, [])])
@pytest.mark.parametrize("which", ["validation_records", "tests"])
def test_records_to_measure_with(which: str, records: int, severity: list[str]) -> None:
    assert severities(**{which: records if which == "validation_records" else {"a": records}}) == severity


def test_each_test_set_is_named() -> None:
    findings = conclude(**{**ENOUGH, "tests": {"seen": 50, "unseen": 5_000, "other": 200}})
    assert [finding.what.split(":")[0] for finding in findings] == ["50 records in seen", "200 records in other"]


@pytest.mark.parametrize("records", [100, 385, 3_080])
def test_the_half_width_holds_95_in_100_draws(records: int) -> None:
    draw = random.Random(0)
    trials = 2_000
    inside = sum(
        abs(sum(draw.random() < 0.5 for _ in range(records)) / records - 0.5) * 100 <= half_width(records) for _ in range(trials)
    )
    assert inside / trials == pytest.approx(0.95, abs=0.02)
    assert half_width(records) == pytest.approx(98 / math.sqrt(records))
