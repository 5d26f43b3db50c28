"""Stock chat templates and, for each, a small tokenizer that has the family's control tokens: what tests of masks need offline.

The templates are read from the installed `trl` wheel (Mistral's, which it lacks, is written below after the published format;
SmolLM2's comes with the embedded model). The vocabularies are trained in memory on a few lines, but the kind of tokenizer, the
control tokens and their flags are those of the published ones: which tokens are special (Qwen 3's `<think>` and DeepSeek's
`<｜User｜>` are not), which swallow the white space after them (Phi 3), where runs of new lines are tokens of their own (Gemma),
where every piece of text gets a space in front (Phi 3). No test needs a network.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

_LINES = [
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. Answer with the number that follows, one two three four.",
    "system user assistant tool developer model function name arguments parameters",
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}',
    "say <|im_start|> <|im_end|> <|eot_id|> <|end|> [INST] [/INST] <think> </think> </s> <bos> now",
    "one\n\ntwo\n\nthree\n\n\nfour\n\n\nfive\n\n\nsix\n\nseven\n\n\n",
    "the weather in Paris is sunny and 24 degrees, the weather in Zürich is cloudy",
]

#: How Llama 3 and Qwen cut text before merging (their published pattern); new lines of a run stay together.
_CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_VISION = ("<|object_ref_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
_QWEN_MARKUP = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_sep|>")
_THINK = ("<think>", "</think>")
_LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
)
_PHI3 = ("<unk>", "<s>", "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
_DEEPSEEK_MARKUP = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
_LFM2 = (
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool_list_start|>",
    "<|tool_list_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_response_start|>",
    "<|tool_response_end|>",
)
_GPTOSS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
    "<|endofprompt|>",
)
_GLM4 = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
_GLM4_MARKUP = (*_THINK, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>")
_MISTRAL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
_COHERE = ("<PAD>", "<UNK>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>", "<|END_OF_TURN_TOKEN|>")
_COHERE_MARKUP = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")

#: The format of Mistral 7B Instruct v0.3: the tools stand before the last question, the system's words only in a question that
#: ends the conversation.
_MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- set told = namespace(system="", last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == "system" %}{% set told.system = message.content + "\\n\\n" %}{% endif %}
    {%- if message.role == "user" %}{% set told.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if tools and loop.index0 == told.last_user %}
            {{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + (told.system if loop.last else "") + message.content + "[/INST]" }}
    {%- elif message.role == "assistant" and message.tool_calls %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
            {{- ', "id": "' + call.id + '"}' + ("" if loop.last else ", ") }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message.role == "assistant" %}
        {{- " " + (message.content | trim) + eos_token }}
    {%- elif message.role == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""


@dataclass(frozen=True)
class Family:
    """A family of models, as far as masks are concerned.

    Attributes:
        template: the file in TRL's `chat_templates`, or None where it comes from elsewhere.
        special: control tokens flagged special.
        markup: added tokens that are not.
        bos, eos: None where the family has none.
        adds_bos: whether the tokenizer puts `bos` before any text when asked for special tokens.
        kind: `bytes`: byte-level merges; `spaces`: SentencePiece with byte fallback; `spaces_before`: the same, with a space
            put before every piece of text.
        swallow: control tokens that take the white space after them.
    """

    template: str | None
    special: tuple[str, ...]
    markup: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    adds_bos: bool = False
    kind: Literal["bytes", "spaces", "spaces_before"] = "bytes"
    swallow: tuple[str, ...] = ()


def _qwen(template: str, *markup: str) -> Family:
    return Family(template, (*_CHATML, *_QWEN_VISION), (*_QWEN_MARKUP, *markup), eos="<|im_end|>")


def _llama3(template: str, *more: str) -> Family:
    return Family(template, (*_LLAMA3, *more), bos="<|begin_of_text|>", eos="<|eot_id|>", adds_bos=True)


def _gemma(template: str, *more: str) -> Family:
    runs = tuple("\n" * length for length in range(1, 5))
    return Family(template, (*_GEMMA, *more), (*runs, "<unused0>"), "<bos>", "<eos>", adds_bos=True, kind="spaces")


def _phi3(template: str) -> Family:
    swallow = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "</s>")
    return Family(template, _PHI3, ("</s>",), "<s>", "<|endoftext|>", kind="spaces_before", swallow=swallow)


FAMILIES: dict[str, Family] = {
    "llama3": _llama3("llama3"),
    "llama3_2": _llama3("llama3_2", "<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>"),
    "qwen2_5": _qwen("qwen2_5"),
    "qwen3": _qwen("qwen3", "<tool_response>", "</tool_response>", *_THINK),
    "qwen3_instruct_2507": _qwen("qwen3_instruct_2507", "<tool_response>", "</tool_response>", *_THINK),
    "qwen3_5_think": _qwen("qwen3_5_think", "<tool_response>", "</tool_response>", *_THINK),
    "gemma": _gemma("gemma"),
    "gemma3": _gemma("gemma3", "<start_of_image>", "<end_of_image>"),
    "phi3": _phi3("phi3"),
    "phi3_5": _phi3("phi3_5"),
    "smollm2": Family(
        None, (*_CHATML, "<repo_name>", "<file_sep>", "<filename>", "<empty_output>"), bos="<|im_start|>", eos="<|im_end|>"
    ),
    "gptoss": Family("gptoss", _GPTOSS, bos="<|startoftext|>", eos="<|return|>"),
    "mistral": Family(None, _MISTRAL, bos="<s>", eos="</s>", adds_bos=True),
    "deepseekv3": Family("deepseekv3", _DEEPSEEK, (*_DEEPSEEK_MARKUP, *_THINK), _DEEPSEEK[0], _DEEPSEEK[1], adds_bos=True),
    "deepseek_r1_distill": Family(
        "deepseek_r1_distill", _DEEPSEEK, (*_DEEPSEEK_MARKUP, *_THINK), _DEEPSEEK[0], _DEEPSEEK[1], adds_bos=True
    ),
    "glm4moe": Family("glm4moe", _GLM4, _GLM4_MARKUP, eos="<|endoftext|>"),
    "cohere": Family("cohere", _COHERE, _COHERE_MARKUP, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", adds_bos=True),
    "lfm2": Family("lfm2", _LFM2, bos="<|startoftext|>", eos="<|im_end|>", adds_bos=True),
    "lfm2_v2": Family("lfm2_v2", _LFM2, bos="<|startoftext|>", eos="<|im_end|>", adds_bos=True),
    "lfm2_2_5": Family("lfm2_2_5_v2", _LFM2, _THINK, bos="<|startoftext|>", eos="<|im_end|>", adds_bos=True),
}


def missing(name: str) -> str | None:
    """Why the family cannot be tested here, or None."""
    if name == "smollm2":
        return None if _smollm2() else "the embedded SmolLM2 model is not in ~/.cache/fullrank/models"
    if FAMILIES[name].template and _trl_templates() is None:
        return "trl, whose wheel has the stock chat templates, is not installed"
    return None


def template(name: str) -> str:
    """The family's chat template."""
    if name == "mistral":
        return _MISTRAL_TEMPLATE
    if name == "smollm2":
        folder = _smollm2()
        assert folder is not None
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    folder = _trl_templates()
    assert folder is not None
    return (folder / f"{FAMILIES[name].template}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer(name: str) -> Any:
    """The family's tokenizer with its chat template (SmolLM2's is the model's own); the same object at every call."""
    from tokenizers import AddedToken, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name == "smollm2":
        return AutoTokenizer.from_pretrained(_smollm2())
    family = FAMILIES[name]
    backend = {"bytes": _bytes, "spaces": _spaces, "spaces_before": lambda: _spaces(before=True)}[family.kind]()
    for texts, special in ((family.special, True), (family.markup, False)):
        tokens = [AddedToken(text, special=special, normalized=False, rstrip=text in family.swallow) for text in texts]
        backend.add_special_tokens(tokens) if special else backend.add_tokens(tokens)
    if family.adds_bos:
        begins = [(family.bos, backend.token_to_id(family.bos))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A {family.bos} $B", special_tokens=begins
        )
    named = {"bos_token": family.bos, "eos_token": family.eos, "unk_token": "<unk>" if "<unk>" in family.special else None}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{key: text for key, text in named.items() if text},
    )
    made.chat_template = template(name)
    return made


# ---- where things are and how they are made ---------------------------------------------------------------------------------


def _trl_templates() -> Path | None:
    found = importlib.util.find_spec("trl")  # does not import it
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "chat_templates"
    return folder if folder.is_dir() else None


def _smollm2() -> Path | None:
    for folder in sorted((Path.home() / ".cache/fullrank/models").glob("smollm2-*")):
        if (folder / "chat_template.jinja").is_file() and (folder / "tokenizer.json").is_file():
            return folder
    return None


def _bytes() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(_LINES, trainer)
    return backend


def _spaces(*, before: bool = False) -> Any:
    """SentencePiece's BPE as tokenizer.json writes it: spaces are ▁, characters without a token fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    words = [word for line in _LINES for word in line.replace("\n", " ").replace(" ", " ▁").split(" ") if word]
    learner.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if before else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if before else [])])
    return backend
