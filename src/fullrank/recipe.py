"""Every word a user may write: the recipe as pydantic models, one line of documentation a field.

A recipe says *what* a run is: model, data, objective, optimizer step, and what is measured at the end. How it is carried
out (micro-batches, recomputation, seconds, bytes) is the plan's to say. Unknown keys are errors, values are validated
once, and a recipe never changes after loading; `fullrank.loading` reads it from YAML.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fullrank.units import parse_bytes


class Section(BaseModel):
    """Base of every recipe section: frozen, strict about its keys, documented by the string under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    """The base model."""

    source: str = Field(min_length=1)
    """An embedded name (smollm2-135m-instruct), a local Hugging Face folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit it resolves to is recorded in the run."""


class Source(Section):
    """One source of records: a file or several, or a split of a hub dataset."""

    path: str | None = None
    """A .jsonl, .json, .csv, .tsv, .parquet or .txt file, plain or compressed (.gz, .bz2, .xz, .zst), or a pattern such as
    data/*.jsonl; relative to the recipe's folder, then to the working directory."""
    hub: str | None = None
    """A hub dataset id, read through the `hub` extra."""
    config: str | None = None
    """The configuration of a hub dataset that has several, such as `main`."""
    split: str = "train"
    """The split of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; its main branch by default."""
    streaming: bool = False
    """Read a hub dataset over the network as it is needed, storing nothing; for datasets larger than the disk."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first `limit` records."""
    weight: float | None = Field(default=None, gt=0.0)
    """Share of the mix, relative to the other sources' weights; without weights every example is used once."""
    repeat: int = Field(default=1, ge=1)
    """Most times an example of this source may stand in an epoch, when its weight asks for more than there are."""

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source has either `path` (a file) or `hub` (a dataset id)")
        if self.path is not None and (self.revision is not None or self.streaming):
            raise ValueError("`revision` and `streaming` belong to a hub dataset, not to a file")
        return self


def _as_sources(value: Any) -> Any:
    """A bare path, or a list mixing paths and mappings, as a list of sources."""
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _weighted(items: list[Source]) -> list[Source]:
    without = sum(item.weight is None for item in items)
    if 0 < without < len(items):
        raise ValueError(f"{without} of {len(items)} sources have no `weight`; give one to all of them, or to none")
    if without and any(item.repeat > 1 for item in items):
        raise ValueError("`repeat` says how far a `weight` may go; give every source a weight, or list the file twice")
    return items


Sources = Annotated[
    Annotated[list[Source], Field(min_length=1), AfterValidator(_weighted)],
    BeforeValidator(_as_sources, json_schema_input_type=str | Source | list[str | Source]),
]

#: What the audit looks for, each by the name that findings carry.
AuditKind = Literal[
    "exact_duplicate",
    "near_duplicate",
    "leak",
    "label_conflict",
    "label_spelling",
    "label_balance",
    "label_rare",
    "label_unseen",
    "length",
    "prompt_length",
    "refusal_answer",
    "truncated",
    "language",
    "mojibake",
    "hidden_unicode",
    "homoglyph",
    "control_token_text",
    "secret",
    "personal_data",
    "contamination",
    "too_little_data",
]


class DataAudit(Section):
    """What the audit of the data looks for, and what of it is accepted."""

    accept: list[AuditKind] = Field(default_factory=list)
    """Kinds of findings that are errors and shall not stop the run."""
    skip: list[AuditKind] = Field(default_factory=list)
    """Kinds not to look for; the audit says that they were left out."""
    mask: list[Literal["secret", "personal_data"]] = Field(default_factory=list)
    """Replace what is found by a placeholder such as [EMAIL] in what is trained on; the files stay as they are."""

    @model_validator(mode="after")
    def _looked_for_to_be_masked(self) -> DataAudit:
        both = [kind for kind in self.mask if kind in self.skip]
        if both:
            raise ValueError(f"{both[0]!r} is in `mask` and in `skip`: what is not looked for cannot be masked")
        return self


class ValidationSplit(Section):
    """Validation examples taken out of the training data."""

    ratio: float = Field(gt=0.0, lt=1.0)
    """Share of the training records held out, chosen by the seed."""


def _validation_form(value: Any) -> str:
    is_split = isinstance(value, ValidationSplit) or (isinstance(value, dict) and "ratio" in value)
    return "a ratio" if is_split else "sources of its own"  # no words that could be keys: they appear in error paths


Validation = Annotated[
    Annotated[ValidationSplit, Tag("a ratio")] | Annotated[Sources, Tag("sources of its own")], Discriminator(_validation_form)
]


def _as_named(name: str) -> Callable[[Any], Any]:
    """Sources, or named ones; sources alone get this name."""

    def named(value: Any) -> Any:
        is_mapping = isinstance(value, dict) and not set(value) & set(Source.model_fields)
        return value if is_mapping else {name: value}

    return named


class Data(Section):
    """What is trained on, validated on and tested on."""

    train: Sources
    """A path, a {path|hub, split, limit} mapping, or a list of them."""
    validation: Validation = ValidationSplit(ratio=0.1)
    """A file (or list), or {ratio: 0.1} of the training data; a tenth by default, so that overfitting is always seen."""
    test: Annotated[
        dict[str, Sources], BeforeValidator(_as_named("test"), json_schema_input_type=Sources | dict[str, Sources])
    ] = Field(default_factory=dict)
    """A file, or named files {seen: a.jsonl, unseen: b.jsonl}; touched by the final evaluation only."""
    general: Annotated[
        dict[str, Sources], BeforeValidator(_as_named("general"), json_schema_input_type=Sources | dict[str, Sources])
    ] = Field(default_factory=dict)
    """A file, or named files, of what the task does not cover, in any form that training data may have: never trained on; the
    final evaluation measures what the tuned model has forgotten of them."""
    max_length: int = Field(default=2048, ge=2)
    """Longest example in tokens; 2048 covers most instruction data."""
    too_long: Literal["error", "drop", "truncate", "chunk"] = "error"
    """What happens to a longer example; an error by default, since cutting an answer is a choice. `chunk`: raw text only."""
    chunk_overlap_ratio: float = Field(default=0.125, ge=0.0, lt=1.0)
    """Share of a chunk that repeats the end of the chunk before it as context, without loss; an eighth costs an eighth of the
    time and spares most tokens a beginning without context."""
    mix_by: Literal["examples", "tokens"] = "examples"
    """What the weights of sources are shares of."""
    quarantine_budget: int = Field(default=0, ge=0)
    """Records that may be rejected before the run is refused; none by default, so that nothing is lost unseen."""
    audit: DataAudit = DataAudit()
    """What is looked for in the data before training."""
    glossary: str | None = None
    """Domain terms, one a line, whose tokens the audit shows; without it terms are found in the data."""
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """Tokens that carry loss: every assistant turn, only the last one, or every token. Raw text always carries loss."""
    chat_template: str | None = None
    """A Jinja file that replaces (or supplies) the model's chat template; it is exported with the tuned model."""
    template_date: datetime.date = datetime.date(2026, 1, 1)
    """The day that templates which print today's date see: fixed, so that the same recipe gives the same tokens."""

    @model_validator(mode="after")
    def _only_training_is_mixed(self) -> Data:
        others = [source for items in self.test.values() for source in items]
        others += self.validation if isinstance(self.validation, list) else []
        if any(source.weight is not None or source.repeat > 1 for source in others):
            raise ValueError("`weight` and `repeat` mix training data; validation and test data are measured on as they are")
        return self

    @field_validator("test", "general")
    @classmethod
    def _names_are_file_names(cls, named: dict[str, list[Source]], info: ValidationInfo) -> dict[str, list[Source]]:
        taken = ("train", "validation")
        wrong = [name for name in named if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name in taken]
        if wrong:
            what = "a test set" if info.field_name == "test" else "general data"
            raise ValueError(
                f"{wrong[0]!r} cannot be the name of {what}: letters, digits, - and _ may; `train` and `validation` are taken"
            )
        return named


class _Rule(Section):
    """What every rule of the update has."""

    learning_rate: float = Field(default=2e-5, gt=0.0)
    """Peak learning rate; 2e-5 is the usual start for full fine-tuning (1e-5 to 5e-5), small models take more."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled decay of matrices; 0 by default: decay pulls towards zero, away from the base model."""
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Factor on the learning rate from each block to the one below it, the embedding lowest; 1 by default: one rate for all.
    0.9 leaves early blocks, which hold what is general, nearer to the base (Howard & Ruder 2018, discriminative fine-tuning)."""


class AdamW(_Rule):
    """AdamW (Loshchilov & Hutter 2019): the reference for full fine-tuning. Two fp32 moments, 8 bytes a parameter."""

    name: Literal["adamw"] = "adamw"
    """adamw."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Moment decays; 0.95 for the second reacts faster in short runs than the pre-training habit of 0.999."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Term added to the root of the second moment."""
    moments: Literal["fp32", "int8"] = "fp32"
    """Type of the moments. int8: block-wise codes of 8 bits (Dettmers et al. 2022), 2 bytes a parameter instead of 8."""

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError("both betas must be in [0, 1)")
        return betas


class Muon(_Rule):
    """Muon (Jordan et al. 2024) for the matrices of blocks: one fp32 momentum, orthogonalised; AdamW for everything else. 4 bytes
    a parameter of the blocks. A modern alternative to AdamW, mostly known from pre-training."""

    name: Literal["muon"]
    """muon."""
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of the momentum."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Moment decays of AdamW, where it is used."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Term of AdamW, where it is used."""


class Adafactor(_Rule):
    """Adafactor (Shazeer & Stern 2018) as torch has it: a second moment by rows and columns, no first. Bytes of a row and a
    column. For little memory where AdaLomo's gradient release is not wanted."""

    name: Literal["adafactor"]
    """adafactor."""
    learning_rate: float = Field(default=5e-4, gt=0.0)
    """Peak rate *relative to the root mean square of each tensor*: with weights of about 0.05, 5e-4 moves them as AdamW's
    2e-5."""


class Lomo(_Rule):
    """LOMO (Lv et al. 2023): plain gradient descent, fused into the backward pass. No state, so 0 bytes a parameter; learns
    clearly less well than AdamW. For models of which nothing else fits."""

    name: Literal["lomo"]
    """lomo."""
    learning_rate: float = Field(default=1e-2, gt=0.0)
    """Peak learning rate; gradient descent takes a hundred times and more of AdamW's (the authors search 1e-2 to 1e-1)."""


class AdaLomo(_Rule):
    """AdaLomo (Lv et al. 2024): Adafactor's second moment, updates normalised tensor by tensor, fused into the backward pass.
    Bytes of a row and a column; its normalisation takes the place of clipping. The choice for the largest models."""

    name: Literal["adalomo"]
    """adalomo."""
    learning_rate: float = Field(default=5e-4, gt=0.0)
    """Peak rate *relative to the root mean square of each tensor*; 5e-4 is the authors' for instruction tuning."""


_RULES = ("adamw", "muon", "adafactor", "lomo", "adalomo")


def _with_a_name(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    name = value.get("name", "adamw")
    if name not in _RULES:
        raise ValueError(f"there is no optimizer {name!r} here; allowed: {', '.join(_RULES)}")
    return {"name": name, **value}


Optimizer = Annotated[
    Annotated[AdamW | Muon | Adafactor | Lomo | AdaLomo, Field(discriminator="name")], BeforeValidator(_with_a_name)
]


class Schedule(Section):
    """The learning rate as a pure function of the step."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warmup."""
    warmup_ratio: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of all steps over which the rate climbs linearly from 0; 5 % steadies Adam's first estimates."""
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Final rate as a share of the peak."""


class EarlyStopping(Section):
    """Stop when the validation loss no longer falls; the best weights are kept."""

    patience: int = Field(ge=1)
    """Validations without improvement before stopping."""
    min_delta: float = Field(default=0.0, ge=0.0)
    """Smallest fall of the loss (nats per token) that counts as improvement."""


_LOSES_UPDATES = (
    "{what} would learn next to nothing: a bf16 number has 8 significant bits, so an update below about 1/512 of its weight "
    "(half a unit in the last place) vanishes, and most updates of fine-tuning are; use bf16-stochastic (2 bytes a weight), "
    "bf16-kahan (4), or bf16-mixed or fp32 (4, the master copy)"
)


class Train(Section):
    """The optimizer steps."""

    epochs: float = Field(default=3, gt=0)
    """Passes over the training examples; fractions are allowed."""
    global_batch_size: int = Field(default=16, ge=1)
    """Examples per optimizer step, whatever the micro-batches."""
    optimizer: Optimizer = AdamW()
    """The rule of the update: adamw (by default), muon, adafactor, lomo or adalomo."""
    schedule: Schedule = Schedule()
    """The learning rate over the steps."""
    max_grad_norm: float | Literal["auto"] | None = "auto"
    """Global gradient norm above which gradients are scaled down; null switches clipping off. auto: 1.0, and null for adalomo,
    which normalises its updates itself."""
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16-stochastic", "bf16-kahan", "bf16-nearest"] = "auto"
    """Type of weights and products; auto takes bf16-mixed on CUDA devices that have it, fp32 elsewhere. fp32: all of it.
    bf16-mixed: bf16 products over fp32 weights, which are the master copy. bf16-stochastic: weights of 2 bytes, updates rounded
    up or down by chance, so that small ones are kept on average. bf16-kahan: 2 bytes more, which hold what rounding left over.
    bf16-nearest: what is too small for the nearest bf16 number is lost; lomo and adalomo alone, as their authors publish them."""
    frozen: list[str] = Field(default_factory=list)
    """Parameters that are not trained, by name or pattern, such as model.embed_tokens.* or model.layers.[0-3].*; none by
    default."""
    evaluate_every_steps: int = Field(default=500, ge=1)
    """Steps between validations; there is always one before the first step and one after the last."""
    early_stopping: EarlyStopping | None = None
    """Off unless given; the weights of the best validation are exported either way."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the validation split, the order of examples, dropout and stochastic rounding."""

    @property
    def rounding(self) -> Literal["none", "stochastic", "kahan", "nearest"]:
        """How weights are rounded to 16 bits; `none` where they are of 32."""
        match self.precision:
            case "bf16-stochastic":
                return "stochastic"
            case "bf16-kahan":
                return "kahan"
            case "bf16-nearest":
                return "nearest"
            case _:
                return "none"

    @property
    def clip_norm(self) -> float | None:
        """`max_grad_norm` with `auto` resolved."""
        if self.max_grad_norm == "auto":
            return None if self.optimizer.name == "adalomo" else 1.0
        return self.max_grad_norm

    @field_validator("max_grad_norm")
    @classmethod
    def _norm_above_zero(cls, norm: float | str | None) -> float | str | None:
        if isinstance(norm, float) and norm <= 0.0:
            raise ValueError("must be greater than 0; null switches clipping off")
        return norm

    @field_validator("precision", mode="before")
    @classmethod
    def _keeps_small_updates(cls, precision: Any) -> Any:
        if precision in ("bf16", "bfloat16"):
            raise ValueError(_LOSES_UPDATES.format(what="bf16 weights without a master copy"))
        return precision

    @model_validator(mode="after")
    def _rounding_fits_the_rule(self) -> Train:
        if self.precision == "bf16-nearest" and self.optimizer.name not in ("lomo", "adalomo"):
            raise ValueError(_LOSES_UPDATES.format(what=f"precision: bf16-nearest with {self.optimizer.name}"))
        return self


Metric = Literal["exact_match", "f1", "rouge_l", "numeric", "bleu", "chrf", "json_valid", "json_fields", "choice", "python"]

#: Words of other tools for a metric, and the one that is meant.
_METRIC_WORDS: dict[str, Metric] = {
    "accuracy": "exact_match",
    "acc": "choice",
    "acc_norm": "choice",
    "acc_bytes": "choice",
    "multiple_choice": "choice",
    "loglikelihood": "choice",
    "sacrebleu": "bleu",
    "chrf2": "chrf",
    "rougel": "rouge_l",
    "rouge": "rouge_l",
    "math": "numeric",
    "number": "numeric",
    "gsm8k": "numeric",
    "json": "json_valid",
    "json_schema": "json_valid",
    "custom": "python",
    "function": "python",
}

#: Keys of a task that one metric alone has.
_OF_ONE_METRIC = {"tokenize": "bleu", "json_schema": "json_valid", "function": "python", "range": "python"}


class Task(Section):
    """One score of the models' answers."""

    metric: Metric
    """exact_match: equal strings; f1: set F1 over labels; rouge_l: longest common subsequence F-measure; numeric: the last number
    of the answer; bleu, chrf: n-gram overlap by sacrebleu; json_valid: share of valid JSON; json_fields: share of the reference's
    JSON fields; choice: the likeliest of a record's `choices`, without generating; python: a function of your own."""
    name: str | None = Field(default=None, pattern=r"^[a-z0-9_]+$")
    """Name of the score in records and reports; by default the metric's own, and for python the function's."""
    tests: list[str] | None = Field(default=None, min_length=1)
    """Names of the test sets it is measured on; all by default, for choice those whose records have `choices`."""
    pattern: str | None = None
    """Regular expression whose first group is the part of the answer that is scored; the whole answer by default."""
    label_pattern: str | None = None
    """f1: regular expression that every label in the part matches; with it, separator and none play no part."""
    separator: str = Field(default=",", min_length=1)
    """f1: what stands between labels."""
    none: str = "none"
    """f1: the word that stands for an empty set of labels."""
    tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """bleu: sacrebleu's tokenizer; 13a is its default, zh is for Chinese, char for other languages without spaces."""
    json_schema: str | None = None
    """json_valid: a file with a JSON Schema that answers must be valid against, relative to the recipe's folder, then to the
    working directory."""
    function: str | None = None
    """python: path/to/file.py:name, the path as for json_schema. It is called as name(references, answers, prompts) and returns
    a list of one number per item, larger ones better."""
    range: tuple[float, float] = (0.0, 1.0)
    """python: lowest and highest number that the function may return."""

    @property
    def key(self) -> str:
        """The score's name."""
        return self.name or (self.function.rpartition(":")[2] if self.function else self.metric)

    @property
    def keys(self) -> list[str]:
        """The names of all its scores."""
        beside = {"f1": "macro", "json_fields": "whole", "choice": "per_token"}.get(self.metric)
        return [self.key, f"{self.key}_{beside}"] if beside else [self.key]

    @property
    def generates(self) -> bool:
        """Whether it scores generated answers."""
        return self.metric != "choice"

    @field_validator("metric", mode="before")
    @classmethod
    def _is_a_metric(cls, metric: Any) -> Any:
        known = get_args(Metric)
        if isinstance(metric, str) and metric not in known:
            near = difflib.get_close_matches(metric.lower(), known, n=1)
            meant = _METRIC_WORDS.get(metric.lower()) or (near[0] if near else None)
            words = ", ".join(repr(word) for word in known)
            raise ValueError(f"Input should be one of {words}" + (f"; did you mean {meant!r}?" if meant else ""))
        return metric

    @field_validator("pattern", "label_pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None, info: ValidationInfo) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
            if info.field_name == "pattern" and groups < 1:
                raise ValueError("the pattern needs a group (...) around the part to score")
        return pattern

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, function: str | None) -> str | None:
        if function is not None:
            path, _, name = function.rpartition(":")
            if not path.endswith(".py") or not name.isidentifier():
                raise ValueError("a function is named as path/to/file.py:name")
        return function

    @field_validator("range")
    @classmethod
    def _range_has_a_width(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if ends[0] >= ends[1]:
            raise ValueError("a range is [lowest, highest], and the lowest must be the smaller")
        return ends

    @model_validator(mode="after")
    def _keys_of_the_metric(self) -> Task:
        for key, metric in _OF_ONE_METRIC.items():
            if self.metric != metric and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"`{key}` belongs to metric: {metric}, and the metric is {self.metric}")
        if self.metric == "choice" and self.pattern is not None:
            raise ValueError(
                "metric: choice compares likelihoods of the record's choices and generates no answer to match `pattern`"
            )
        if self.metric == "python":
            if self.function is None:
                raise ValueError("metric: python needs `function`: path/to/file.py:name")
            if not re.fullmatch(r"[a-z0-9_]+", self.key):
                raise ValueError(
                    f"the function's name {self.key!r} cannot name a score; give the task a `name` of a-z, 0-9 and _"
                )
        return self


class Forgetting(Section):
    """How forgetting is measured: on text that the base model writes by itself, and by a small general probe."""

    texts: int = Field(default=64, ge=2, le=64)
    """Texts that are drawn from the base model, each after a neutral beginning."""
    tokens: int = Field(default=48, ge=1)
    """Most new tokens of a text."""
    seed: int = 0
    """Of the draws. Runs with the same base model and seed are measured on the same texts."""


class Evaluate(Section):
    """What is measured on the test data, with the base and with the tuned model."""

    tasks: list[Task] = Field(default_factory=lambda: [Task(metric="exact_match"), Task(metric="rouge_l")])
    """Scores of the models' answers."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest generated answer."""
    base_instructions: str | None = None
    """What the *base* model is told, so that it is asked fairly: text before each prompt, or around it where it says {prompt}."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first `limit` records of each test set."""
    forgetting: Forgetting | None = Forgetting()
    """What the tuned model no longer is or knows, measured on what needs no data of yours; null leaves it out."""

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: list[Task]) -> list[Task]:
        keys = [key for task in tasks for key in task.keys]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise ValueError(f"two scores are named {repeated[0]!r}; give each task a `name` of its own")
        taken = sorted({"validation_loss", "perplexity"} & set(keys))
        if taken:
            raise ValueError(f"{taken[0]!r} is the name of a score that every run has; give the task another `name`")
        return tasks


class Export(Section):
    """The model folder a run ends with."""

    dtype: Literal["base", "fp32", "bf16", "fp16"] = "base"
    """Type of the exported weights; the base model's by default, so that it serves as the base does."""


class Machine(Section):
    """Where the run may take place; nothing here changes what is learned."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes CUDA, then MPS, then the CPU."""
    memory_limit: str | int | None = None
    """Most memory the plan may use for a rank, such as 8GB; by default nine tenths of what is free, shared by the ranks of a
    CPU."""
    gradients: Literal["auto", "keep", "release", "spill"] = "auto"
    """Where gradients wait for the update; the weights that follow are the same. keep: in memory, 4 bytes a parameter. release:
    one block's at a time is alive; where gradients are clipped, a first backward pass finds the norm and a second one updates.
    spill: one block's at a time is in memory, the rest on disk (on CUDA in host memory) until the norm is known: one pass. auto:
    release for lomo and adalomo, keep for the others."""
    optimizer_states: Literal["device", "host", "disk"] = "device"
    """Where moments wait between steps: on the device, in host memory (CUDA), or in a file beside the run; block by block they
    are brought to the update and taken away again."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that prepare data; by default one a core."""

    @field_validator("memory_limit")
    @classmethod
    def _is_a_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            parse_bytes(value)
        return value


class Parallel(Section):
    """How a run is spread over devices; nothing here changes what is learned."""

    engine: Literal["auto", "fsdp2", "deepspeed"] = "auto"
    """What computes steps. fsdp2: PyTorch's fully sharded data parallelism, each rank holding a part of weights, gradients and
    optimizer states. deepspeed: ZeRO, for adamw and lomo. auto: fsdp2 for several ranks, and where parameters are offloaded; a
    single one needs no engine of that kind otherwise."""
    zero_stage: Literal[1, 2, 3, "auto"] = "auto"
    """deepspeed: what is divided among ranks. 1: optimizer states; 2: gradients too; 3: weights as well. auto: what
    deepspeed_config says, else 3, which takes least memory."""
    offload_parameters: bool = False
    """Keep each rank's part of the weights in host memory beside a CUDA device. fsdp2: gradients are taken there and the update
    is computed there, so that machine.optimizer_states must be host, or disk. deepspeed: of stage 3; the optimizer's by
    machine.optimizer_states: host."""
    deepspeed_config: str | None = None
    """deepspeed: a DeepSpeed configuration of your own (JSON), relative to the recipe's folder, then to the working directory.
    "auto" in it is filled in from the recipe; what contradicts the recipe is an error."""
    ranks: int | Literal["auto"] = Field(default="auto")
    """Processes on this machine, one a device; auto starts one for each CUDA device, and one on other machines. What torchrun
    starts counts instead."""
    replicas: int = Field(default=1, ge=1)
    """Groups of ranks that hold the model once each, divided among the group (hybrid sharding): across machines less travels
    then, for more memory. 1 divides it among all ranks."""
    context: int = Field(default=1, ge=1)
    """Ranks that share each row of tokens (ring attention), for examples whose activations are too many for one; it divides the
    ranks. 1: each rank computes rows of its own, which needs fewer messages."""

    @property
    def needs_engine(self) -> bool:
        """Whether a single rank needs an engine of several, too."""
        return self.engine != "auto" or self.offload_parameters

    @field_validator("ranks")
    @classmethod
    def _at_least_one(cls, ranks: int | str) -> int | str:
        if isinstance(ranks, int) and ranks < 1:
            raise ValueError("must be at least 1, or auto")
        return ranks

    @model_validator(mode="after")
    def _of_the_engine(self) -> Parallel:
        if self.engine != "deepspeed":
            given = {"zero_stage": self.zero_stage != "auto", "deepspeed_config": self.deepspeed_config is not None}
            if meant := [key for key, is_given in given.items() if is_given]:
                raise ValueError(f"`{meant[0]}` belongs to engine: deepspeed, and the engine is {self.engine}")
        elif self.offload_parameters and self.zero_stage in (1, 2):
            raise ValueError(f"`offload_parameters` needs zero_stage: 3; stage {self.zero_stage} has whole weights on every rank")
        return self


class Recipe(Section):
    """A full fine-tuning run: what to train, on what, how, and what must be measured at the end."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    model: Model
    """The base model."""
    data: Data
    """Training, validation and test data."""
    train: Train = Train()
    """The optimizer steps."""
    evaluate: Evaluate = Evaluate()
    """Scores on the test data."""
    export: Export = Export()
    """The model folder at the end."""
    machine: Machine = Machine()
    """Where the run may take place."""
    parallel: Parallel = Parallel()
    """How it is spread over devices."""

    @property
    def gradients(self) -> Literal["keep", "release", "spill"]:
        """`machine.gradients` with `auto` resolved."""
        if self.machine.gradients == "auto":
            return "release" if self.train.optimizer.name in ("lomo", "adalomo") else "keep"
        return self.machine.gradients

    @field_validator("evaluate")
    @classmethod
    def _tasks_name_test_sets(cls, evaluate: Evaluate, info: ValidationInfo) -> Evaluate:
        sets = info.data["data"].test if "data" in info.data else None  # without, data have a problem of their own
        for number, task in enumerate(evaluate.tasks):
            for name in task.tests or []:
                if sets is not None and name not in sets:
                    near = difflib.get_close_matches(name, sets, n=1)
                    said = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sets) or 'none'}"
                    raise ValueError(f"tasks[{number}].tests: data.test has no set {name!r}; {said}")
        return evaluate

    @model_validator(mode="after")
    def _fused_rules_release(self) -> Recipe:
        if self.train.optimizer.name in ("lomo", "adalomo") and self.machine.gradients == "keep":
            raise ValueError(
                f"{self.train.optimizer.name} is fused into the backward pass: machine.gradients cannot be keep; leave it out, "
                "or write release or spill"
            )
        return self


#: Keys of other tools, and where fullrank keeps the same thing.
ALIASES: dict[str, str] = {
    "lr": "train.optimizer.learning_rate",
    "optim": "train.optimizer.name",
    "optimizer_in_bwd": "machine.gradients",
    "offload_optimizer": "machine.optimizer_states",
    "nproc_per_node": "parallel.ranks",
    "num_processes": "parallel.ranks",
    "deepspeed": "parallel.deepspeed_config",
    "offload_param": "parallel.offload_parameters",
    "stage": "parallel.zero_stage",
    "fsdp": "parallel.engine",
    "fsdp_config": "parallel.engine",
    "dp_replicate_size": "parallel.replicas",
    "data_parallel_replicate_degree": "parallel.replicas",
    "cp_size": "parallel.context",
    "cp_degree": "parallel.context",
    "context_parallel": "parallel.context",
    "context_parallel_size": "parallel.context",
    "context_parallel_degree": "parallel.context",
    "sequence_parallel_degree": "parallel.context",
    "freeze": "train.frozen",
    "unfrozen_parameters": "train.frozen",
    "adam_beta1": "train.optimizer.betas",
    "adam_beta2": "train.optimizer.betas",
    "adam_epsilon": "train.optimizer.eps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "batch_size": "train.global_batch_size",
    "micro_batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "lr_scheduler": "train.schedule.name",
    "lr_scheduler_type": "train.schedule.name",
    "warmup_steps": "train.schedule.warmup_ratio",
    "gradient_clipping": "train.max_grad_norm",
    "max_norm": "train.max_grad_norm",
    "eval_steps": "train.evaluate_every_steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "dtype": "train.precision",
    "torch_dtype": "train.precision",
    "early_stopping_patience": "train.early_stopping.patience",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "val_set_size": "data.validation",
    "eval_dataset": "data.validation",
    "base_model": "model.source",
    "model_name_or_path": "model.source",
    "output_dir": "name",
    "run_name": "name",
}

#: Keys that other tools know and fullrank refuses, with the reason.
REFUSED: dict[str, str] = {
    "trust_remote_code": "fullrank never runs code that comes with a model; use a model that transformers itself implements",
}
