"""What a fresh process makes of an export: `python -m fullrank.models.fresh probe.json logits.safetensors`.

Loads the folder as any user would, writes its logits on the probe, and prints its ties, tokens, template,
stop tokens and digests of its weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fullrank.models.export import digest, probe_logits, tied_names
from fullrank.models.load import load_model, load_tokenizer


def main(request_path: str, logits_path: str) -> None:
    """Reads the request, writes the logits, prints one JSON line."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])  # sums are split by threads; other splits round differently
    model = load_model(Path(request["folder"]), device=torch.device(request["device"]), dtype=None)
    logits = probe_logits(model, torch.tensor([request["ids"]]))
    save_file({"logits": logits.contiguous()}, logits_path)
    tokenizer = load_tokenizer(Path(request["folder"]))
    stops = model.generation_config.eos_token_id if model.generation_config else None
    facts = {
        "tied": sorted(tied_names(model)),
        "text_ids": tokenizer(request["text"], add_special_tokens=False)["input_ids"],
        "chat_template": tokenizer.chat_template,
        "stop_ids": stops if isinstance(stops, list) else [stops],
        "digests": {name: digest(p) for name, p in model.named_parameters()},
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
