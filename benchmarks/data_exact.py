"""How exact the data room is: masks of stock templates against golden files, hostile files against what was written into them.

    python benchmarks/data_exact.py

Runs the tests that compare them, counts what they compared, and writes `results/data-exact.json`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from record import ROOT, target, write

MASKS, HOSTILE = ROOT / "tests" / "golden" / "test_masks.py", ROOT / "tests" / "faults" / "test_hostile_data.py"
FAMILIES_WANTED, CASES_WANTED = 8, 5000


def main() -> None:
    """Runs both sets of comparisons and writes the result."""
    families = Counter[str]()
    wrong = set()
    for name, parameter, outcome in _outcomes(MASKS):
        if name == "test_masks_are_the_golden_ones":
            family = parameter.partition("-")[0]
            families[family] += outcome == "passed"
            wrong |= {family} if outcome == "failed" else set()
    classes = [outcome for name, _, outcome in _outcomes(HOSTILE) if name == "test_every_record_is_accounted_for"]
    per_class = int(re.findall(r"^PER_CLASS = (\d+)", HOSTILE.read_text(encoding="utf-8"), re.MULTILINE)[0])
    exact = sorted(family for family in families if family not in wrong and families[family])
    figures = {
        "masks": {"families": exact, "comparisons": sum(families.values()), "families_not_equal": sorted(wrong)},
        "hostile": {
            "classes": len(classes),
            "files": per_class * len(classes),
            "files_accounted_for": per_class * classes.count("passed"),
        },
    }
    share = classes.count("passed") / len(classes)
    targets = [
        target("stock chat templates whose masks equal the golden files", FAMILIES_WANTED, len(exact), "families", at_most=False),
        target("templates whose masks differ", 0, len(wrong), "families", at_most=True),
        target("hostile files", CASES_WANTED, per_class * len(classes), "files", at_most=False),
        target("hostile files accounted for", 1.0, share, "ratio", at_most=False),
    ]
    print(f"wrote {write('data-exact', figures, targets)}: {figures}")


def _outcomes(tests: Path) -> list[tuple[str, str, str]]:
    """(test, parameters, passed | failed | skipped) of every test of a file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(tests)]
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        found = []
        for case in cases:
            name, _, parameters = str(case.get("name")).partition("[")
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            found.append((name, parameters.removesuffix("]"), outcome))
        return found


if __name__ == "__main__":
    main()
