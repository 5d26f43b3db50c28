"""Tiny random models, a tokenizer and rows of data: everything a test needs in place of a download.

Plain functions, so that a script started by a test can import them as well (`PYTHONPATH=tests`). Same arguments, same bytes:
weights come from a seed, the tokenizer is trained on the lines below, rows are counted out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: ChatML for any role, tool turns included; nothing earlier is ever rewritten.
CHATML = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: Control tokens, in the order of their ids after the byte-level alphabet and merges.
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]

#: Width of the sliding window of the families that have one; examples of more tokens reach beyond it.
WINDOW = 8

#: Families whose packed rows, losses and gradients are compared with transformers.
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2", "mistral", "phi", "qwen3_moe")

_LINES = [
    "the bank holds less capital than the ratio asks for",
    "liquidity of the bank fell below the limit this month",
    "what is the colour of the sky and of the sea",
    "a single borrower owes the bank more than it may owe",
    "answer with the number that follows, one two three four five six seven eight nine ten",
    "system user assistant tool",
    "one\n\n\ntwo\n\n\nthree\n\n\nfour\n\n\nfive",  # so that new lines merge, across the border of prompt and answer too
]


def tokenizer(*, pad_token: str = "<pad>", chat_template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of about 320 tokens that round-trips any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_LINES, trainer)
    backend.add_special_tokens(CONTROL_TOKENS)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token=pad_token,
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = chat_template
    return wrapped


def config(family: str, vocabulary: int, **changes: Any) -> Any:
    """The configuration of a tiny model; `changes` are fields of the family's own configuration class.

    The initial weights are larger than usual, so that attention is far from uniform and a leak or a lost window is no rounding.
    """
    import transformers

    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    builders: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaConfig(**{**common, **changes}),
        "qwen3": lambda: transformers.Qwen3Config(**{**common, "tie_word_embeddings": True, **changes}),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **{
                **common,
                "tie_word_embeddings": True,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"],
                "query_pre_attn_scalar": 8,
                **changes,
            }
        ),
        # capped scores and logits, and caps low enough that they bend
        "gemma2": lambda: transformers.Gemma2Config(
            **{
                **common,
                "tie_word_embeddings": True,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"],
                "query_pre_attn_scalar": 8,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
                **changes,
            }
        ),
        # biases everywhere, the head's included; norms with means; a part of each head rotated
        "phi": lambda: transformers.PhiConfig(
            **{
                **{key: value for key, value in common.items() if key != "head_dim"},
                "partial_rotary_factor": 0.5,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attention_dropout": 0.0,
                **changes,
            }
        ),
        "mistral": lambda: transformers.MistralConfig(**{**common, "sliding_window": WINDOW, **changes}),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **{**common, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, **changes}
        ),
        "gpt2": lambda: transformers.GPT2Config(
            **{
                "vocab_size": vocabulary,
                "bos_token_id": vocabulary - 4,
                "eos_token_id": vocabulary - 2,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 512,
                "initializer_range": 0.15,
                # dropout draws depend on the shape of a row, which a comparison between layouts must not
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
                **changes,
            }
        ),
    }
    made = builders[family]()
    # as in CONTROL_TOKENS
    made.bos_token_id, made.eos_token_id, made.pad_token_id = vocabulary - 4, vocabulary - 2, vocabulary - 1
    return made


def model(family: str, *, seed: int = 0, vocabulary: int | None = None, **changes: Any) -> Any:
    """A tiny model with random fp32 weights, vectors (norms, biases) drawn as well so that none is at a neutral value."""
    import torch
    from transformers import AutoModelForCausalLM

    size = len(tokenizer()) if vocabulary is None else vocabulary
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(
        config(family, size, **changes), attn_implementation="eager" if family == "gemma2" else "sdpa"
    )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


def write_model_folder(
    folder: Path, family: str, *, seed: int = 0, chat_template: str | None = CHATML, dtype: str = "float32", **changes: Any
) -> Path:
    """Writes a Hugging Face folder: config.json, model.safetensors, tokenizer.json, chat template.

    Args:
        folder: made if need be.
        family: one of FAMILIES.
        seed: of the weights.
        chat_template: None leaves the tokenizer without one.
        dtype: of the stored weights.
        changes: fields of the family's configuration.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    spoken = tokenizer(chat_template=chat_template)
    model(family, seed=seed, vocabulary=len(spoken), **changes).to(getattr(torch, dtype)).save_pretrained(folder)
    spoken.save_pretrained(folder)
    return folder


def chat_rows(n: int) -> list[dict[str, Any]]:
    """Small conversations of differing length, no two alike; every fourth has a system turn, every fifth a second exchange."""
    rows = []
    for number in range(n):
        word = ("capital", "liquidity", "borrower", "limit")[number % 4]
        messages = [
            {"role": "user", "content": f"what is the {word} of bank {number}" + " and so on" * (number % 3)},
            {"role": "assistant", "content": f"the {word} of bank {number} is {number * 7 % 11}"},
        ]
        if number % 4 == 0:
            messages.insert(0, {"role": "system", "content": "answer with the number"})
        if number % 5 == 0:
            messages += [{"role": "user", "content": "and the sky"}, {"role": "assistant", "content": f"colour {number % 3}"}]
        rows.append({"messages": messages})
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_store(folder: Path, examples: Sequence[Any]) -> Any:
    """A token store of `fullrank.sequences.chat.Tokens`, opened; example n comes from `rows.jsonl:<n + 1>`."""
    import numpy as np

    from fullrank.sequences.store import ShardPlace, TokenStore, write_index, write_shard

    split = folder / "train"
    for new in (split, folder / "shards"):
        new.mkdir(parents=True, exist_ok=True)
    numbers = range(len(examples))
    write_shard(folder / "shards" / "0.safetensors", examples, numbers, [(number, -1) for number in numbers])
    write_index(split, [ShardPlace("0.safetensors", "rows.jsonl", 1, None, "line")], np.array([[0, n] for n in numbers]))
    return TokenStore(split)


def random_tokens(n: int, *, vocabulary: int = 300, seed: int = 0, shortest: int = 3, longest: int = 40) -> list[Any]:
    """Random examples of `shortest` to `longest` tokens: a prompt without loss, an answer with it, sometimes a tail without."""
    import numpy as np

    from fullrank.sequences.chat import Tokens

    draw = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        length = int(draw.integers(shortest, longest + 1))
        prompt = int(draw.integers(1, length))
        tail = int(draw.integers(0, max(1, (length - prompt) // 2)))
        mask = [False] * prompt + [True] * (length - prompt - tail) + [False] * tail
        examples.append(Tokens(draw.integers(0, vocabulary, length).tolist(), mask))
    return examples
