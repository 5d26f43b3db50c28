"""How fast and in how much memory text becomes tokens, beside `datasets.map` with the same tokenizer; and how soon unchanged data
are ready again.

    python benchmarks/data_speed.py --text FOLDER            all of it: 200 MB of chats, 200 MB of documents, three rounds
    python benchmarks/data_speed.py --megabytes 20 --rounds 1 --dry       a trial; the result is printed and not written

Ours is `fullrank data` (`data_stage.py`) with two workers, with every check of the audit skipped, and once more with all of them
made; theirs is `datasets.map` with two processes and the function that TRL maps (`data_peer.py`). All are processes of their own,
in turn, round after round, each with empty caches; medians are told. Seconds count from when the libraries are imported (and, of
ours, the model is described, by a process that ends)

    ready    to when the tokens lie on the disk, ready to be trained on: theirs ends there
    whole    to the end: ours goes on to write examples for people to look at and how the tokenizer splits terms

and memory is the peak of the process tree from its very start (`measure.py`). That all made the same tokens of the same file and
supervise the same of them is checked token for token; otherwise nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import corpus
from measure import Measured, measure, must
from record import ROOT, target, write

from fullrank.models.embedded import folder_of
from fullrank.recipe import AuditKind

MODEL = "smollm2-135m-instruct"
SEED = 20261122
_RECIPE = """\
name: speed
model: {{source: {model}}}
data:
  train: {file}
  validation: {{ratio: 0.01}}
  max_length: 8192
  audit: {{skip: [{skip}]}}
machine: {{workers: {processes}, device: cpu}}
"""
#: Who prepares what: the first is ours, the second with the audit, the others are theirs.
WAYS = {"messages": ("ours", "audited", "map", "trl"), "text": ("ours", "audited", "map", "batched")}
_IMPORTS = "import fullrank.models.load, fullrank.models.source, fullrank.parallel.device; from transformers import AutoTokenizer"
#: A file's digest is remembered once the file has been left alone for two seconds.
_SETTLE_SECONDS = 2.5


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--forms", nargs="*", choices=tuple(WAYS), default=tuple(WAYS))
    parser.add_argument("--text", type=Path, help="a folder whose .jsonl files lend their words")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder, removed afterwards)")
    parser.add_argument("--dry", action="store_true", help="print the figures, write nothing")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fullrank-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {
        "megabytes": options.megabytes,
        "rounds": options.rounds,
        "processes": options.processes,
        "words_from": "the files of a folder" if options.text else "the manual of Python",
        "peer_versions": {name: importlib.metadata.version(name) for name in ("datasets", "trl", "transformers", "pyarrow")},
    }
    try:
        model = folder_of(MODEL, print)
        for form in options.forms:
            file = folder / f"{form}.jsonl"
            made = corpus.write(file, round(options.megabytes * 1e6), form=form, seed=SEED, text=options.text)
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS[form]}
            for number in range(options.rounds):
                for way in WAYS[form]:
                    found = one(way, file, folder, model, options.processes)
                    print(form, f"round {number + 1}", way, json.dumps(found), flush=True)
                    runs[way].append(found)
            again = repeated(folder, options.rounds) if form == "messages" else None
            file.unlink()
            figures[form] = {
                "records": made.records,
                "bytes": made.bytes,
                "text_bytes": made.text_bytes,
                **agreement(runs),
                **{way: median(found, made.bytes) for way, found in runs.items()},
            }
            if again:
                figures["again"] = again
        results = targets(figures)
        print(json.dumps(figures, indent=2))
        for line in results:
            print(json.dumps(line))
        if not options.dry:
            print(f"wrote {write('data-speed', figures, results)}")
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


# ---- one preparation ------------------------------------------------------------------------------------------------


def one(way: str, file: Path, folder: Path, model: Path, processes: int) -> dict[str, Any]:
    """Prepares a file in one way, with nothing cached."""
    if way in ("ours", "audited"):
        shutil.rmtree(folder / "runs", ignore_errors=True)
        skip = "" if way == "audited" else ", ".join(get_args(AuditKind))
        recipe = _RECIPE.format(model=MODEL, file=file.name, skip=skip, processes=processes)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        done = must(prepared(folder), allowed=(0, 3))  # 3: the audit found something, which is written down all the same
        return timed(done, "start", "audit") | {"audit_seconds": done.between("audit", "show")} | made_by_us(folder)
    caches = folder / "hf"
    shutil.rmtree(caches, ignore_errors=True)
    program = [sys.executable, str(ROOT / "benchmarks" / "data_peer.py"), str(file), str(model), "--as", way]
    env = {"HF_HOME": str(caches), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = must(measure([*program, "--processes", str(processes)], folder, env))
    shutil.rmtree(caches)
    counted: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    return timed(done, "start", "end") | counted


def prepared(folder: Path) -> Measured:
    """`fullrank data` on the folder's recipe."""
    program = [sys.executable, str(ROOT / "benchmarks" / "data_stage.py"), "recipe.yaml", "--runs-dir", "runs", "--json"]
    return measure(program, folder, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})


def timed(done: Measured, begin: str, ready: str) -> dict[str, Any]:
    """What is told of every way."""
    return {
        "process_seconds": done.seconds,
        "import_seconds": done.between("import", "start"),
        "ready_seconds": done.between(begin, ready),
        "whole_seconds": done.between(begin, "end"),
        **done.memory(),
    }


def made_by_us(folder: Path) -> dict[str, Any]:
    """As `data_peer` counts: over the shards, which hold the examples in the order of the file."""
    from safetensors.numpy import load_file

    examples = tokens = supervised = 0
    ids_digest, mask_digest = hashlib.sha256(), hashlib.sha256()
    for path in sorted((folder / "runs" / "speed" / "data" / "shards").iterdir()):
        shard = load_file(path)
        ids, mask = shard["ids"].astype("<i4"), shard["supervised"] == 1
        examples += len(shard["offsets"]) - 1
        tokens += len(ids)
        supervised += int(mask.sum())
        ids_digest.update(ids.tobytes())
        mask_digest.update(mask.tobytes())
    return {
        "examples": examples,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "ids_sha256": ids_digest.hexdigest(),
        "mask_sha256": mask_digest.hexdigest(),
    }


def repeated(folder: Path, rounds: int) -> dict[str, Any]:
    """The last of our preparations again, with nothing changed."""
    time.sleep(_SETTLE_SECONDS)
    must(prepared(folder), allowed=(0, 3))  # the first to find the file settled
    runs = [must(prepared(folder), allowed=(0, 3)) for _ in range(rounds)]
    if any(name == "prepare" for run in runs for _, name in run.marks):
        sys.exit("unchanged data were prepared again")
    # What describes the model imports torch and transformers in a process of its own: what a process takes that does nothing else
    # is left out.
    bare = [must(measure([sys.executable, "-c", _IMPORTS], folder)).seconds for _ in runs]
    described = [run.between("describe", "start") - imports for run, imports in zip(runs, bare, strict=True)]
    return {
        "seconds": statistics.median(
            run.between("start", "end") + max(0.0, extra) for run, extra in zip(runs, described, strict=True)
        ),
        "describe_seconds": statistics.median(run.between("describe", "start") for run in runs),
        "describe_import_seconds": statistics.median(bare),
        "import_seconds": statistics.median(run.between("import", "start") for run in runs),
        "process_seconds": statistics.median(run.seconds for run in runs),
    }


# ---- what came of it ------------------------------------------------------------------------------------------------

_SAME = ("examples", "tokens", "supervised_tokens", "ids_sha256", "mask_sha256")


def agreement(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What all ways made; an exit where they did not make the same."""
    made = {tuple(found[key] for key in _SAME) for ways in runs.values() for found in ways}
    if len(made) > 1:
        told = {way: {key: found[0][key] for key in _SAME} for way, found in runs.items()}
        sys.exit(f"the ways do not agree on the tokens:\n{json.dumps(told, indent=2)}")
    examples, tokens, supervised, *_ = made.pop()
    return {"examples": examples, "tokens": tokens, "supervised_tokens": supervised, "tokens_and_masks_equal": True}


def median(found: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """Medians over the rounds, and the rate."""
    keys = [key for key in found[0] if key not in _SAME]
    medians = {key: statistics.median(run[key] for run in found) for key in keys}
    return {"megabytes_per_second": size / 1e6 / medians["ready_seconds"], **medians}


def targets(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours against each of theirs."""
    found = []
    names = {
        "map": "datasets.map, one example a call as TRL does",
        "batched": "datasets.map, batched",
        "trl": "TRL's own preparation",
    }
    for form in WAYS:
        if form not in figures:
            continue
        own = figures[form]["ours"]
        for way, words in names.items():
            if way not in figures[form]:
                continue
            other = figures[form][way]
            times = other["ready_seconds"] / own["ready_seconds"]
            found.append(target(f"{form}: tokenization throughput against {words}", 1.5, times, "times", at_most=False))
            memory = own["peak_pss"] / other["peak_pss"]
            found.append(target(f"{form}: peak memory against {words}", 0.5, memory, "times", at_most=True))
    if "again" in figures:
        words = "preparing again with nothing changed, beyond the import of libraries"
        found.append(target(words, 2, figures["again"]["seconds"], "seconds", at_most=True))
    return found


if __name__ == "__main__":
    main()
