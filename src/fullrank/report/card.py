"""Report -> model card: the README.md that travels with the exported weights.

Promises: every sentence follows from a record, and a section without one is left out; nothing names a path of the
machine that trained. The front matter follows the Hugging Face hub's model card metadata
(https://huggingface.co/docs/hub/model-cards); language and licence are left out, since no record tells them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fullrank.models.embedded import EMBEDDED
from fullrank.recipe import AdamW, Muon, Train
from fullrank.records import TestScores
from fullrank.report.gather import Report, interval_text, metric_name, p_text, score_text
from fullrank.units import format_bytes, format_count, format_seconds, plural


def write(report: Report) -> str:
    """The text of the model card: YAML front matter, then Markdown."""
    sections = [_introduction(report), _scores(report), _training(report), _use(report), _limitations(report)]
    return f"---\n{_front_matter(report)}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def usage(report: Report, folder: str) -> str:
    """Python that loads the exported model from `folder` with transformers and asks it one thing."""
    tokens = report.recipe.evaluate.max_new_tokens
    chats = report.data is None or report.data.chat_template != "none"
    if chats:
        ask = (
            'messages = [{"role": "user", "content": "your text here"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    else:
        ask = 'inputs = tokenizer("your text here", return_tensors="pt")'
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
{ask}
output = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


# ---- sections -------------------------------------------------------------------------------------------------------


def _base_id(report: Report) -> str | None:
    """Hub id of the base model, where there is one."""
    model = report.train.model
    if model.kind == "embedded":
        return EMBEDDED[model.source].original
    return model.source if model.kind == "hub" else None


def _front_matter(report: Report) -> str:
    facts: dict[str, Any] = {}
    base = _base_id(report)
    if base:
        facts |= {"base_model": base, "base_model_relation": "finetune"}
    facts |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fullrank", "full-fine-tuning"],
    }
    return yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)


def _introduction(report: Report) -> str:
    model, base = report.train.model, _base_id(report)
    if model.kind == "folder":
        named = f"a local {model.architecture} (`{Path(model.source).name}`)"
    else:
        named = f"[{base}](https://huggingface.co/{base})" if base else f"`{model.source}`"
        named += f" at commit `{model.commit}`" if model.kind == "hub" and model.commit else ""
    text = (
        f"# {report.recipe.name}\n\nA full fine-tuning of {named}: all {format_count(model.parameters)} parameters "
        "were updated, "
        f"with fullrank. {report.verdict.headline}"
    )
    if report.verdict.outcome != "unmeasured":
        text += f" {report.verdict.sentence}"
    if model.kind == "embedded":
        text += (
            "\n\n**The base weights are approximate.** They were dequantized from a 4-bit (Q4_1) file"
            + (f", so they are near those of {base} but not equal to them" if base else "")
            + "; this model inherits that."
        )
        if base:
            text += f" To start from the original, write `model: {{source: {base}}}` in the recipe."
    return text


def _scores(report: Report) -> str:
    if not report.tests:
        return ""
    intro = (
        "Base and tuned model on the same items, with 95 % intervals; the difference (tuned - base) is taken in pairs, and p is "
        "from a permutation test."
    )
    if report.evaluation and report.evaluation.base_was_instructed:
        intro += " The base model was also given instructions that say what is asked."
    return "\n\n".join(["## Scores", intro, *(_table(test, scores) for test, scores in report.tests.items())])


def _table(test: str, scores: TestScores) -> str:
    lines = [
        f"**{test}**, {plural(scores.examples, 'item')}",
        "",
        "| score | base | tuned | difference |",
        "|---|---|---|---|",
    ]
    for key, difference in scores.difference.items():
        if key not in scores.base or key not in scores.tuned:
            continue
        base, tuned = scores.base[key], scores.tuned[key]
        cells = [f"{score_text(score.value)} ({interval_text(score)})" for score in (base, tuned)]
        words = f"{interval_text(difference, signed=True)}; {p_text(scores.p_value[key])}"
        cells.append(f"{score_text(difference.value, signed=True)} ({words})")
        lines.append(f"| {metric_name(key)} | {' | '.join(cells)} |")
    return "\n".join(lines)


_RULES = {"adamw": "AdamW", "muon": "Muon", "adafactor": "Adafactor", "lomo": "LOMO", "adalomo": "AdaLomo"}


def _rule(train: Train) -> str:
    """The optimizer, what its states are made of, and the type of the weights."""
    optimizer = train.optimizer
    words = [_RULES[optimizer.name]]
    if isinstance(optimizer, AdamW | Muon):
        words[0] += f" (betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g})"
    if isinstance(optimizer, AdamW) and optimizer.moments == "int8":
        words.append("moments of 8 bits")
    if train.precision.startswith("bf16") and train.precision != "bf16-mixed":
        words.append(f"bf16 weights ({train.precision.removeprefix('bf16-')} rounding)")
    return ", ".join(words)


def _training(report: Report) -> str:
    train, recipe = report.train, report.recipe.train
    optimizer, schedule = recipe.optimizer, recipe.schedule
    facts = []
    if report.data:
        names = ", ".join(f"`{Path(file).name}`" for file in report.data.train.files)
        facts.append(
            f"{plural(report.data.train.examples, 'training example')} from {names}; "
            f"{report.data.validation.examples:,} for validation"
        )
    facts += [
        f"{plural(train.steps, 'step')} of up to {plural(recipe.global_batch_size, 'example')}"
        + (f", stopped early out of {train.steps_planned:,}" if train.stopped_early else "")
        + f"; {format_count(train.tokens_seen)} tokens, {format_count(train.supervised_tokens_seen)} of them with loss",
        f"{_rule(recipe)}, peak learning rate {optimizer.learning_rate:g}, {schedule.name} schedule, weight decay "
        f"{optimizer.weight_decay:g}",
        f"validation loss {train.validation_loss_before:.4f} before, {train.validation_loss_best:.4f} for the "
        "exported weights "
        f"(step {train.best_step:,})",
    ]
    where = f" on {report.plan.where}" if report.plan else ""
    facts.append(f"{format_seconds(train.loop_seconds)}{where}, peak memory {format_bytes(report.measured_peak_bytes)}")
    proof = train.proof
    if proof.export_logits_identical:
        facts.append(
            f"{proof.changed_tensors:,} of {proof.trainable_tensors:,} trainable tensors changed in training; reloaded in a "
            "fresh process, these "
            f"{proof.export_dtype} weights give the logits of the trained model bit for bit "
            f"({plural(proof.export_probe_tokens, 'token')} compared)"
        )
    elif proof.export_weights_identical:
        facts.append(
            f"{proof.changed_tensors:,} of {proof.trainable_tensors:,} trainable tensors changed in training; the weights that a "
            f"fresh process loads are bit for bit those of the ranks, in {proof.export_dtype}"
        )
    return "## Training\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _use(report: Report) -> str:
    words = "## How to use it\n\n`folder` is this folder, or the hub id it was uploaded under."
    return f"{words}\n\n```python\n{usage(report, '.')}\n```"


def _limitations(report: Report) -> str:
    """What the records leave open."""
    points = list(report.verdict.cautions)
    if report.tests:
        sizes = " and ".join(f"{plural(scores.examples, 'item')} ({test})" for test, scores in report.tests.items())
        points.insert(
            0,
            f"The scores rest on {sizes}, drawn as the test data were; nothing is known of other kinds of input or "
            "other languages.",
        )
    else:
        points.append("The base and the tuned model were not compared on a task.")
    if report.data:
        points.append(
            f"Examples of up to {report.data.train.lengths.longest:,} tokens were trained on; longer ones are "
            "outside what it has seen."
        )
    return "## Limitations\n\n" + "\n".join(f"- {point}" for point in points)
