"""What a fullrank step is compared with: the same examples, batch and learning rate trained by TRL or by transformers.

    python benchmarks/speed_peer.py FILE MODEL_FOLDER --as WAY --batch 8

    defaults     TRL's `SFTTrainer` as it is (blocks recomputed), in fp32
    plain        without recomputation
    padding-free without recomputation, `padding_free=True`
    packed       without recomputation, `packing=True`: other examples make up an update, so it is reported apart
    newcomer     TRL's `SFTTrainer` with every default, its type included (bf16)
    transformers `Trainer` of transformers, without recomputation

Every way learns what assistants wrote, from chats rendered by the model's template. Prints one JSON line: seconds of each step,
its loss, the threads, and the peak of the process's memory. Marks (`measure.mark`): import, start, first (the first step is
done), end.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from data_peer import training_template
from measure import mark


def main() -> None:
    """Trains one epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("model", type=Path)
    ways = ("defaults", "plain", "padding-free", "packed", "newcomer", "transformers")
    parser.add_argument("--as", dest="way", choices=ways, default="defaults")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--max-length", type=int, default=2048)
    options = parser.parse_args()
    mark("import")
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    mark("start")
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dataset = datasets.load_dataset("json", data_files=str(options.file), split="train")

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Notes when steps begin and end, and their losses."""

        def __init__(self) -> None:
            self.began = 0.0
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)
            if len(self.seconds) == 1:
                mark("first")

        def on_log(self, *arguments: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": options.batch,
            "num_train_epochs": 1,
            "learning_rate": options.learning_rate,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        if options.way != "newcomer":
            common |= {"bf16": False}
        if options.way in ("plain", "padding-free", "packed", "transformers"):
            common |= {"gradient_checkpointing": False}
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        trainer: Any
        if options.way == "transformers":
            template = training_template(tokenizer.chat_template)
            trainer = Trainer(
                model=model,
                args=TrainingArguments(**common),
                train_dataset=dataset.map(_tokenized, fn_kwargs={"tokenizer": tokenizer, "template": template}),
                data_collator=_Padded(tokenizer.pad_token_id),
                callbacks=[clock],
            )
        else:
            tokenizer.chat_template = training_template(tokenizer.chat_template)
            settings = SFTConfig(
                **common,
                max_length=None if options.way == "padding-free" else options.max_length,  # it refuses one
                assistant_only_loss=True,
                padding_free=options.way == "padding-free",
                packing=options.way == "packed",
            )
            trainer = SFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock])
        trainer.train()
    mark("end")
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = {"seconds": clock.seconds, "losses": clock.losses, "threads": torch.get_num_threads(), "peak_rss": peak}
    print(json.dumps(said))


def _tokenized(example: dict[str, Any], tokenizer: Any, template: str) -> dict[str, Any]:
    found = tokenizer.apply_chat_template(
        example["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=template
    )
    pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
    return {"input_ids": found["input_ids"], "labels": [token if inside else -100 for token, inside in pairs]}


class _Padded:
    """Pads a batch at its end."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        width = max(len(example["input_ids"]) for example in examples)

        def rows(name: str, fill: int) -> Any:
            return torch.tensor([[*example[name], *[fill] * (width - len(example[name]))] for example in examples])

        mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
        return {"input_ids": rows("input_ids", self.pad), "labels": rows("labels", -100), "attention_mask": mask}


if __name__ == "__main__":
    main()
