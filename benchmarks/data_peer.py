"""What `fullrank data` is compared with: the same file tokenized by `datasets.map`, as TRL's `SFTTrainer` prepares it.

    python benchmarks/data_peer.py FILE MODEL_FOLDER --as map|batched|trl --processes 2

    map      `Dataset.map` of TRL's tokenizing function, one example a call, and nothing else that TRL does: chats through
             `apply_chat_template` with a template that marks what the assistant writes, documents through the tokenizer
    batched  the same for documents, `batched=True`: what a careful user of `datasets` writes by hand
    trl      `SFTTrainer._prepare_dataset` itself: the same function, then labels from masks (a second map)

Marks (`measure.mark`): import, start once every library is imported, end. Prints examples, tokens and supervised tokens, counted
after the end. Caches are wherever the environment says (`HF_HOME`): a new folder each time, or nothing is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measure import mark

#: SmolLM2's template with what the assistant writes marked: its text and the token that ends the turn. TRL has none for it.
_TEMPLATE_FROM = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
_TEMPLATE_TO = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
)


def training_template(template: str) -> str:
    """The template with its generation marked.

    Raises:
        ValueError: it is another one than SmolLM2's.
    """
    if template.count(_TEMPLATE_FROM) != 1:
        raise ValueError("no training template is known for this model")
    return template.replace(_TEMPLATE_FROM, _TEMPLATE_TO)


def tokenized(example: dict[str, Any], tokenizer: Any, template: str) -> dict[str, Any]:
    """TRL 1.16, `sft_trainer.tokenize_fn` and `data_utils._tokenize`, with `assistant_only_loss` for chats; no checks."""
    if "messages" in example:
        found = tokenizer.apply_chat_template(
            example["messages"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            chat_template=template,
            tools=None,
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}
    return {"input_ids": tokenizer(text=example["text"])["input_ids"]}


def tokenized_batch(batch: dict[str, list[Any]], tokenizer: Any) -> dict[str, Any]:
    """Documents a thousand at a time."""
    return {"input_ids": tokenizer(batch["text"], return_attention_mask=False)["input_ids"]}


def with_end(example: dict[str, Any], eos: str) -> dict[str, Any]:
    """TRL's `add_eos`: a map of its own over documents."""
    return {"text": example["text"] + eos}


def with_ends(batch: dict[str, list[Any]], tokenizer: Any) -> dict[str, Any]:
    """Documents a thousand at a time, the end-of-sequence token added."""
    ids = tokenized_batch(batch, tokenizer)["input_ids"]
    return {"input_ids": [[*own, tokenizer.eos_token_id] for own in ids]}


def main() -> None:
    """Prepares the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--as", dest="way", choices=("map", "batched", "trl"), default="map")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    mark("import")
    import datasets
    from transformers import AutoTokenizer

    trl: Any = None
    if options.way == "trl":
        import trl

        trl.SFTTrainer  # noqa: B018 # it is imported when it is first touched
    mark("start")
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    template = training_template(tokenizer.chat_template)
    dataset = datasets.load_dataset("json", data_files=str(options.file), split="train")
    processes = options.processes
    if options.way == "trl":
        # No trainer is made, since that needs a model: the method reads these three attributes.
        trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=False)
        is_chat = "messages" in dataset.column_names
        config = trl.SFTConfig(
            dataset_num_proc=processes,
            assistant_only_loss=is_chat,
            max_length=None,
            shuffle_dataset=False,
            report_to=[],
            use_cpu=True,
        )
        prepared = trl.SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, config, False, None, "train")
    elif options.way == "batched":
        prepared = dataset.map(
            with_ends, batched=True, num_proc=processes, fn_kwargs={"tokenizer": tokenizer}, remove_columns=dataset.column_names
        )
    else:
        if "text" in dataset.column_names:
            dataset = dataset.map(with_end, num_proc=processes, fn_kwargs={"eos": tokenizer.eos_token})
        prepared = dataset.map(tokenized, num_proc=processes, fn_kwargs={"tokenizer": tokenizer, "template": template})
    mark("end")
    print(json.dumps(_counted(prepared)))


def _counted(prepared: Any) -> dict[str, Any]:
    """Examples, tokens, supervised tokens, and digests over all ids and all masks in order."""
    tokens = supervised = 0
    ids_digest, mask_digest = hashlib.sha256(), hashlib.sha256()
    for batch in prepared.with_format("arrow").iter(1000):
        ids = batch["input_ids"].combine_chunks().flatten().to_numpy()
        if "assistant_masks" in batch.column_names:
            mask = batch["assistant_masks"].combine_chunks().flatten().to_numpy() == 1
        elif "labels" in batch.column_names:
            mask = batch["labels"].combine_chunks().flatten().to_numpy() != -100
        else:
            mask = ids >= 0  # every token of a document is learned
        tokens += len(ids)
        supervised += int(mask.sum())
        ids_digest.update(ids.astype("<i4").tobytes())
        mask_digest.update(mask.tobytes())
    return {
        "examples": len(prepared),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "ids_sha256": ids_digest.hexdigest(),
        "mask_sha256": mask_digest.hexdigest(),
    }


if __name__ == "__main__":
    main()
