"""The memory of the data stage on a file far larger than it: 5 GB of chats, prepared and audited in full.

    python benchmarks/data_scale.py --folder FOLDER [--text FOLDER]                  needs some 15 GB there
    python benchmarks/data_scale.py --folder FOLDER --gigabytes 0.05 --dry           a trial; nothing is written

The file is generated (`corpus.py`), with duplicates, near duplicates, secrets and broken encodings in a small share of its
records, and with passages of a test set. `fullrank data` (`data_stage.py`) runs once with every check on. Memory is that of the
whole process tree (`measure.py`), in all and in each phase; shared pages count once (PSS).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import corpus
from measure import measure, must
from record import ROOT, target, write

MOST_BYTES = 1.5e9
SEED = 20261123
_RECIPE = """\
name: scale
model: {{source: smollm2-135m-instruct}}
data:
  train: train.jsonl
  validation: {{ratio: 0.001}}
  test: {{held: held.jsonl}}
  max_length: 8192
machine: {{workers: {workers}, device: cpu}}
"""


def main() -> None:
    """Generates, measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; what is made there is removed afterwards")
    parser.add_argument("--text", type=Path, help="a folder whose .jsonl files lend their words")
    parser.add_argument("--keep", action="store_true", help="keep the files, and take what a run before has kept")
    parser.add_argument("--dry", action="store_true", help="print the figures, write nothing")
    options = parser.parse_args()
    folder = options.folder / f"scale-{options.gigabytes:g}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        figures = scaled(folder, options.gigabytes, options.workers, options.text)
        words = f"peak memory of the data stage on {options.gigabytes:g} GB of JSON Lines, audit included"
        results = [target(words, MOST_BYTES, figures["memory"]["peak_pss"], "bytes", at_most=True)]
        print(json.dumps(figures, indent=2))
        print(json.dumps(results))
        if not options.dry:
            print(f"wrote {write('data-scale', figures, results)}")
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def scaled(folder: Path, gigabytes: float, workers: int, text: Path | None) -> dict[str, Any]:
    """The figures."""
    note = folder / "made.json"
    if not note.exists():
        train, test = folder / "train.jsonl", folder / "held.jsonl"
        made = corpus.write(train, round(gigabytes * 1e9), seed=SEED, text=text, planted=True, test=test)
        note.write_text(json.dumps(vars(made)), encoding="utf-8")
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "recipe.yaml").write_text(_RECIPE.format(workers=workers), encoding="utf-8")
    program = [sys.executable, str(ROOT / "benchmarks" / "data_stage.py"), "recipe.yaml", "--runs-dir", "runs", "--json"]
    done = must(measure(program, folder), allowed=(0, 3))  # 3: what the audit found stands between these data and a run
    said = json.loads(done.output.splitlines()[-1])
    found: Counter[str] = Counter()
    records: Counter[str] = Counter()
    for finding in said["findings"]:
        found[finding["kind"]] += 1
        records[finding["kind"]] += finding["count"]
    data = folder / "runs" / "scale" / "data"
    return {
        "gigabytes": gigabytes,
        "workers": workers,
        **json.loads(note.read_text(encoding="utf-8")),
        "seconds": done.between("start", "end"),
        "process_seconds": done.seconds,
        "read": said["read"],
        "used": said["used"],
        "quarantined": said["quarantined"],
        "findings": dict(found),
        "records_in_findings": dict(records),
        "sampled": said["sampled"],
        "left_out": said["left_out"],
        "shards": sum(1 for _ in (data / "shards").iterdir()),
        "shard_bytes": sum(path.stat().st_size for path in (data / "shards").iterdir()),
        "audit_json_bytes": (data / "audit.json").stat().st_size,
        "memory": done.memory(),
        "phases": done.phases(),
    }


if __name__ == "__main__":
    main()
