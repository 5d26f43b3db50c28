"""What goes to standard output and what to standard error."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: What a library does that logs to whatever standard output is when it is imported, as DeepSpeed's logger.
LIBRARY = """
import json, logging, sys
from fullrank.cli.console import Console
with Console(quiet_results={quiet}) as console:
    logging.getLogger("library").addHandler(logging.StreamHandler(sys.stdout))
    logging.getLogger("library").warning("a warning")
    print("a word")
    console._results_out.print("a result")
print(json.dumps({{"one": "object"}}))
logging.getLogger("library").warning("a late warning")
"""


@pytest.mark.parametrize("quiet", [True, False])
def test_what_libraries_print_is_no_result(quiet: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY.format(quiet=quiet)], capture_output=True, text=True, check=True, timeout=120
    )
    results = ["a result"] * (not quiet) + ['{"one": "object"}']
    assert done.stdout.splitlines() == results
    said = ["a warning", "a word"] + ["a result"] * quiet + ["a late warning"]
    assert done.stderr.splitlines() == said
