"""The plain trainer of transformers on one long example: two steps, and the peak memory of the process.

python benchmarks/memory_peer.py FOLDER TOKENS [checkpointing]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def main() -> None:
    """Trains and prints the peak."""
    folder, tokens = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(model.config.vocab_size, (tokens,)).tolist()
    examples: Any = [{"input_ids": ids, "labels": ids}] * 2
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=1,
            max_steps=2,
            gradient_checkpointing=sys.argv[3:] == ["checkpointing"],
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=examples).train()
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"tokens": tokens, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
