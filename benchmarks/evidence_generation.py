"""How fast greedy answers are written, beside transformers' `generate` in batches, and whether they are the same answers.

    python benchmarks/evidence_generation.py --text FOLDER
    python benchmarks/evidence_generation.py --text FOLDER --data gsm8k --items 4 --most 4 --rounds 1 --dry       a trial

Each way is a process of its own, one after the other, round after round, with the same threads, fp32, prompts, stop token and
limit. `generate` gets its prompts longest first, padded on the left, in batches of 32 and of 64; ours is `greedy` as the evaluate
stage calls it, the trial of the model included. Seconds begin when the model is loaded. Tokens a second are those of the answers,
stop tokens included; what is computed for texts that have ended counts for nothing. Told are medians over the rounds, and the
median of the ratios within a round.

Where two answers differ, the text up to there is given to the model once more, alone, and the gap between the logits of the two
tokens is told: below 1e-4 either is the likeliest up to rounding.

    gsm8k     questions of the test set, through the chat template
    few-shot  the same behind four worked examples: a long common beginning
    rasbt     short instructions
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import measure, must
from record import ROOT, target, write

from fullrank.models.embedded import folder_of

MODEL = "smollm2-135m-instruct"
#: data -> (prompts, most new tokens)
CASES = {"gsm8k": (96, 256), "few-shot": (96, 128), "rasbt": (128, 256)}
#: way -> texts a batch; ours has a batch of its own choice
WAYS = {"fullrank": 0, "generate, batches of 32": 32, "generate, batches of 64": 64}
SHOTS = 4
TIE = 1e-4


def main() -> None:
    """Measures and writes the results; with `--as`, is one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="the folder of the data sets")
    parser.add_argument("--data", nargs="*", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--items", type=int, help="prompts of each data set")
    parser.add_argument("--most", type=int, help="new tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print the figures, write nothing")
    parser.add_argument("--as", dest="way", help=argparse.SUPPRESS)
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(_process(options.way, json.loads(options.request.read_text(encoding="utf-8")))))
        return
    if options.text is None:
        parser.error("--text is needed")
    figures: dict[str, Any] = {"model": MODEL, "rounds": options.rounds, "threads": os.cpu_count()}
    targets = []
    for name in options.data:
        figures[name] = found = compared(name, options)
        targets += [
            target(f"{name}: tokens a second, beside the faster of generate's", 2.0, found["faster_by"], "times", at_most=False),
            target(f"{name}: answers that differ by more than a tie", 0, found["different"], "answers", at_most=True),
        ]
    print(json.dumps(figures, indent=2), *map(json.dumps, targets), sep="\n")
    if not options.dry:
        print(f"wrote {write('evidence-generation', figures, targets)}")


def compared(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All ways on one data set."""
    items, most = options.items or CASES[name][0], options.most or CASES[name][1]
    folder = str(folder_of(MODEL))
    prompts, stop = _prompts(name, options.text, items, folder)
    asked = {"model": folder, "prompts": prompts, "stop": stop, "most": most}
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way in WAYS:
            runs[way].append(_run(way, asked))
            rate = runs[way][-1]["tokens"] / runs[way][-1]["seconds"]
            print(f"{name}, round {number + 1}, {way}: {rate:.1f} tokens a second", flush=True)
    rates = {way: [run["tokens"] / run["seconds"] for run in found] for way, found in runs.items()}
    medians = {way: statistics.median(found) for way, found in rates.items()}
    ours, *theirs = WAYS
    ratios = {way: statistics.median(a / b for a, b in zip(rates[ours], rates[way], strict=True)) for way in theirs}
    gaps = {way: _gaps(asked, runs[ours][0]["answers"], runs[way][0]["answers"]) for way in theirs}
    lengths = [len(answer) for answer in runs[ours][0]["answers"]]
    return {
        "prompts": items,
        "prompt_tokens": {"median": statistics.median(map(len, prompts)), "most": max(map(len, prompts))},
        "answer_tokens": {"median": statistics.median(lengths), "most": max(lengths)},
        "max_new_tokens": most,
        "tokens_per_second": medians,
        "seconds": {way: statistics.median(run["seconds"] for run in found) for way, found in runs.items()},
        "peak_bytes": {way: max(run["peak_bytes"] for run in found) for way, found in runs.items()},
        "faster_by_way": ratios,
        "faster_by": min(ratios.values()),
        "same_in_every_round": all(run["answers"] == found[0]["answers"] for found in runs.values() for run in found),
        "gaps_where_answers_differ": gaps,
        "ties": sum(gap < TIE for found in gaps.values() for gap in found),
        "different": sum(gap >= TIE for found in gaps.values() for gap in found),
    }


def _prompts(name: str, text: Path, items: int, folder: str) -> tuple[list[list[int]], int]:
    """Ids of each prompt, and of the stop token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats: list[list[dict[str, str]]] = []
    if name == "rasbt":
        rows = _lines(text / "rasbt_instruction" / "alpaca.jsonl")
        asked = [row["instruction"] + (f"\n{row['input']}" if row["input"] else "") for row in rows]
        chats = [[{"role": "user", "content": question}] for question in asked]
    else:
        shots = [m for row in _lines(text / "gsm8k" / "train.jsonl")[:SHOTS] for m in row["messages"]]
        rows = _lines(text / "gsm8k" / "test.jsonl")
        chats = [[*(shots if name == "few-shot" else []), *row["messages"][:-1]] for row in rows]
    ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=True)["input_ids"] for c in chats[:items]]
    return ids, int(tokenizer.eos_token_id)


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # its lines end in new lines only, whatever their texts hold
        return [json.loads(line) for line in file]


def _run(way: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What a process of that way answers."""
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch) / "request.json"
        request.write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, str(ROOT / "benchmarks" / "evidence_generation.py"), "--as", way, "--request", str(request)]
        measured = must(measure(command, Path(scratch), looks_on=False))
    found: dict[str, Any] = json.loads(measured.output.splitlines()[-1])
    return found


def _gaps(asked: dict[str, Any], ours: list[list[int]], theirs: list[list[int]]) -> list[float]:
    """For each pair of answers that differ, the gap between the logits of the two tokens where they do."""
    places = []
    for prompt, pair in zip(asked["prompts"], zip(ours, theirs, strict=True), strict=True):
        if pair[0] != pair[1]:
            # an answer that ended before the other wrote the stop token there
            one, other = ([*answer, asked["stop"]] for answer in pair)
            at = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            places.append([[*prompt, *one[:at]], one[at], other[at]])
    return list(_run("gaps", asked | {"places": places})["gaps"]) if places else []


# ---- a process ---------------------------------------------------------------------------------------------------------------


def _process(way: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Answers without their stop tokens, in the order of the prompts, and what they took."""
    import torch

    from fullrank.models.load import load_model

    model: Any = load_model(Path(asked["model"]), device=torch.device("cpu"), dtype=torch.float32).eval()
    if way == "gaps":
        return {"gaps": [_gap(model, *place) for place in asked["places"]]}
    prompts, stop, most = asked["prompts"], asked["stop"], asked["most"]
    started = time.perf_counter()
    answers, stopped = _ours(model, prompts, stop, most) if way == "fullrank" else _theirs(model, prompts, stop, most, WAYS[way])
    return {
        "seconds": time.perf_counter() - started,
        "tokens": sum(map(len, answers)) + stopped,
        "answers": answers,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _ours(model: Any, prompts: list[list[int]], stop: int, most: int) -> tuple[list[list[int]], int]:
    from fullrank.generation.decode import greedy

    found = {a.prompt: a for a in greedy(model, prompts, stop_ids=[stop], max_new_tokens=most, tell=sys.exit)}
    return [found[n].ids for n in range(len(prompts))], sum(answer.stopped for answer in found.values())


def _theirs(model: Any, prompts: list[list[int]], stop: int, most: int, batch: int) -> tuple[list[list[int]], int]:
    import torch

    answers: list[list[int]] = [[] for _ in prompts]
    stopped = 0
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        width = len(prompts[numbers[0]])
        ids_BT = torch.tensor([[stop] * (width - len(prompts[n])) + prompts[n] for n in numbers])
        mask_BT = torch.tensor([[0] * (width - len(prompts[n])) + [1] * len(prompts[n]) for n in numbers])
        arguments = {"do_sample": False, "max_new_tokens": most, "eos_token_id": stop, "pad_token_id": stop}
        written_BN = model.generate(input_ids=ids_BT, attention_mask=mask_BT, **arguments)[:, width:]
        for n, row in zip(numbers, written_BN.tolist(), strict=True):
            end = row.index(stop) if stop in row else None
            answers[n] = row[:end]
            stopped += end is not None
    return answers, stopped


def _gap(model: Any, ids: list[int], one: int, other: int) -> float:
    import torch

    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
    return float((logits_V[one] - logits_V[other]).abs())


if __name__ == "__main__":
    main()
