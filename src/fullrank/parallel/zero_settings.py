"""DeepSpeed's configuration as a recipe means it, and a user's own checked against the recipe.

A recipe decides what a step is, so what a DeepSpeed file says of batches, optimizer, schedule and precision is there twice.
"auto" is filled in. What says the same as the recipe is welcome; what says something else is refused with both values,
everything at once. Settings of speed and memory (buckets, prefetching, logging) are DeepSpeed's own and go through as they are.
What is known to change numbers, and what is not known here, is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullrank.errors import UsageError
from fullrank.recipe import Recipe

#: Elements that are summed, or gathered ahead, at once: DeepSpeed's 500 million would take 2 GB of fp32 for a small model, too.
BUCKET_ELEMENTS = 20_000_000
#: Parameters of stage 3 that are no larger stay whole: DeepSpeed's default.
PERSISTENT_ELEMENTS = 100_000

#: Sizes and switches of ZeRO that change speed and memory alone.
_HARMLESS_OF_ZERO = frozenset(
    [
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "contiguous_gradients",
        "ignore_unused_parameters",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "overlap_comm",
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "module_granularity_threshold",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
    ]
)
#: Of DeepSpeed as a whole: logging, timing, tracing.
_HARMLESS = frozenset(
    [
        "comms_logger",
        "csv_monitor",
        "dump_state",
        "flops_profiler",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "tensorboard",
        "wall_clock_breakdown",
        "wandb",
    ]
)
#: Sections that would change numbers, or have no part in what fullrank does, unless they are off.
_OFF = {
    "amp": "mixed precision is train.precision",
    "autotuning": "fullrank plans rows and memory itself",
    "compression_training": "it changes the model that is trained",
    "curriculum_learning": "the order of examples is the recipe's",
    "data_efficiency": "the order of examples is the recipe's",
    "eigenvalue": "it belongs to DeepSpeed's compression",
    "elasticity": "train.global_batch_size says what a step is",
    "fp16": "fullrank trains in fp32 or bf16: train.precision",
    "progressive_layer_drop": "it leaves blocks out of the step",
    "sparse_attention": "it changes the model that is trained",
    "sparse_gradients": "every weight is updated",
    "torch_autocast": "mixed precision is train.precision",
    "zenflow": "it updates some weights later than others",
    "zero_hpz_partition_size": "a second division of the weights is not served",
    "zero_quantized_gradients": "it rounds gradients",
    "zero_quantized_nontrainable_weights": "it rounds weights",
    "zero_quantized_weights": "it rounds weights",
    "mics_shard_size": "a second division of the weights is not served",
    "mics_hierarchical_params_gather": "a second division of the weights is not served",
    "elastic_checkpoint": "checkpoints are fullrank's",
    "load_from_fp32_weights": "checkpoints are fullrank's",
    "legacy_stage1": "it is no part of DeepSpeed any more",
}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_AUTO = "auto"
#: Stands for any value of what leaves the numbers alone.
_WHATEVER = object()


def stage_of(recipe: Recipe) -> int:
    """The ZeRO stage of a run: the recipe's, else the DeepSpeed file's, else 3."""
    if recipe.parallel.zero_stage != "auto":
        return recipe.parallel.zero_stage
    given = _read(recipe).get("zero_optimization")
    stage = given.get("stage", _AUTO) if isinstance(given, dict) else _AUTO
    return stage if stage in (1, 2, 3) else 3


def settings_of(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration, complete.

    Args:
        recipe: `auto`s resolved.
        ranks: of the run.

    Raises:
        UsageError: the user's file cannot be read, contradicts the recipe, or asks for what is not served; everything at once.
    """
    given = _read(recipe)
    check = _Check(recipe, ranks, stage_of(recipe))
    passed = check.top(given)
    zero = check.zero(given.get("zero_optimization", {}))
    if check.problems:
        raise UsageError(
            "\n".join(f"{recipe.parallel.deepspeed_config}: {problem}" for problem in check.problems),
            hint='change the file or the recipe; "auto" in the file takes over what the recipe says',
        )
    return {
        "steps_per_print": 2**31,
        **passed,
        # A row is what DeepSpeed takes for a batch; the loop counts them, and sets where a step ends.
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the optimizer clips
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _read(recipe: Recipe) -> dict[str, Any]:
    """The user's file; empty where there is none.

    Raises:
        UsageError: it is no JSON object.
    """
    path = recipe.parallel.deepspeed_config
    if path is None:
        return {}
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"parallel.deepspeed_config: {path} cannot be read as JSON: {error}") from None
    if not isinstance(given, dict):
        raise UsageError(f"parallel.deepspeed_config: {path} holds no JSON object, which a DeepSpeed configuration is")
    return given


@dataclass
class _Check:
    """Goes through a user's file, and notes what stands against the recipe."""

    recipe: Recipe
    ranks: int
    stage: int
    problems: list[str] = field(default_factory=list)

    # ---- the sections -------------------------------------------------------------------------------------------------

    def top(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What goes through of the keys outside of ZeRO's section."""
        served: dict[str, Callable[[Any], None]] = {
            "activation_checkpointing": self._activation_checkpointing,
            "bf16": self._bf16,
            "bfloat16": self._bf16,
            "checkpoint": lambda value: None,  # DeepSpeed's own are never written
            "communication_data_type": lambda value: self._same("communication_data_type", value, "fp32", "sums over ranks"),
            "data_types": self._data_types,
            "gradient_clipping": self._clipping,
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "zero_allow_untested_optimizer": lambda value: self._same("zero_allow_untested_optimizer", value, True, "fullrank"),
            "zero_force_ds_cpu_optimizer": lambda value: self._same("zero_force_ds_cpu_optimizer", value, False, "fullrank"),
            "zero_optimization": lambda value: None,  # see `zero`
        }
        batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        self._batch({key: given[key] for key in batch if given.get(key, _AUTO) != _AUTO})
        passed: dict[str, Any] = {}
        for key, value in given.items():
            if key in served:
                served[key](value)
            elif key in _HARMLESS:
                passed |= {} if value == _AUTO else {key: value}
            elif key in _OFF:
                self._off(key, value)
            elif key not in batch:
                self._unknown(key)
        return passed

    def zero(self, given: Any) -> dict[str, Any]:
        """ZeRO's section, complete."""
        offloads = {
            "offload_optimizer": self.recipe.machine.optimizer_states == "host",
            "offload_param": self.recipe.parallel.offload_parameters,
        }
        made: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": BUCKET_ELEMENTS}
        if self.stage == 3:
            # What is not kept whole is given back as soon as its module is done.
            made |= {
                "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
                "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
                "stage3_max_reuse_distance": 0,
            }
        made |= {key: {"device": "cpu", "pin_memory": True} for key, wanted in offloads.items() if wanted}
        if not isinstance(given, dict):
            self.problems.append(f"zero_optimization: {_shown(given)} is no object")
            return made
        for key, value in given.items():
            where = f"zero_optimization.{key}"
            if key == "stage":
                self._same(where, value, self.stage, "parallel.zero_stage")
            elif key in offloads:
                made |= self._offload(key, value, wanted=offloads[key])
            elif key in _HARMLESS_OF_ZERO:
                made |= {} if value == _AUTO else {key: value}
            elif key in _OFF:
                self._off(where, value)
            else:
                self._unknown(where)
        return made

    # ---- what is there twice --------------------------------------------------------------------------------------------

    def _batch(self, given: Mapping[str, Any]) -> None:
        wanted = self.recipe.train.global_batch_size
        sizes = {key: value for key, value in given.items() if isinstance(value, int) and value > 0}
        for key in given.keys() - sizes.keys():
            self.problems.append(f"{key}: {_shown(given[key])} is no number of examples or steps; write {_AUTO!r}")
        if "train_batch_size" in sizes:
            self._same("train_batch_size", sizes["train_batch_size"], wanted, "train.global_batch_size")
        parts = {key: value for key, value in sizes.items() if key != "train_batch_size"}
        product = self.ranks
        for value in parts.values():
            product *= value
        if parts and (product != wanted if len(parts) == 2 else wanted % product):
            words = " x ".join([*(f"{key} {value}" for key, value in parts.items()), f"{self.ranks} ranks"])
            fits = "is not" if len(parts) == 2 else "does not divide"
            self.problems.append(
                f"{words} = {product} {fits} train.global_batch_size {wanted}; write {_AUTO!r}: "
                "fullrank lays examples out in rows itself"
            )

    def _clipping(self, value: Any) -> None:
        wanted = self.recipe.train.clip_norm
        self._same("gradient_clipping", 0.0 if value is None else value, wanted or 0.0, "train.max_grad_norm")

    def _optimizer(self, value: Any) -> None:
        if value == _AUTO or not self._is_section("optimizer", value, {"type", "params"}):
            return
        own = self.recipe.train.optimizer
        kind = value.get("type", _AUTO)
        if kind != _AUTO and str(kind).lower() not in ({"adam", "adamw"} if own.name == "adamw" else {own.name}):
            self._conflict("optimizer.type", kind, "train.optimizer.name", own.name)
            return
        known: dict[str, tuple[str, Any]] = {
            "lr": ("train.optimizer.learning_rate", own.learning_rate),
            "weight_decay": ("train.optimizer.weight_decay", own.weight_decay),
        }
        if own.name == "adamw":
            known |= {
                "betas": ("train.optimizer.betas", list(own.betas)),
                "eps": ("train.optimizer.eps", own.eps),
                "adam_w_mode": ("decoupled decay", True),
                "amsgrad": ("amsgrad of adamw", False),
                "bias_correction": ("bias correction of adamw", True),
                "torch_adam": ("", _WHATEVER),
                "fused": ("", _WHATEVER),
            }
        self._parameters("optimizer.params", value.get("params", {}), known)

    def _scheduler(self, value: Any) -> None:
        if value == _AUTO or not self._is_section("scheduler", value, {"type", "params"}):
            return
        own = self.recipe.train
        kind = value.get("type", _AUTO)
        if kind != _AUTO and _SCHEDULES.get(kind) != own.schedule.name:
            self._conflict("scheduler.type", kind, "train.schedule.name", own.schedule.name)
            return
        least = ("train.schedule.min_lr_ratio", own.schedule.min_lr_ratio)
        known: dict[str, tuple[str, Any]] = {
            "warmup_min_lr": ("the rate that warmup begins with", 0.0),
            "warmup_min_ratio": ("the rate that warmup begins with", 0.0),
            "warmup_max_lr": ("train.optimizer.learning_rate", own.optimizer.learning_rate),
            "warmup_type": ("the shape of warmup", "linear"),
            "cos_min_ratio": least,
            "warmup_num_steps": ("what train.schedule.warmup_ratio comes to", _AUTO),
            "total_num_steps": ("what train.epochs comes to", _AUTO),
        }
        self._parameters("scheduler.params", value.get("params", {}), known)
        if kind == "WarmupDecayLR":  # has no key for it
            self._same("scheduler: the rate that WarmupDecayLR ends with, as a ratio,", 0.0, least[1], least[0])

    def _bf16(self, value: Any) -> None:
        if value == _AUTO or not self._is_section("bf16", value, {"enabled", "check_grad_overflow"}):
            return
        is_mixed = self.recipe.train.precision == "bf16-mixed"
        if value.get("enabled", _AUTO) not in (_AUTO, is_mixed):
            self.problems.append(
                f"bf16.enabled is {_shown(value['enabled'])}, but train.precision is {_shown(self.recipe.train.precision)}: "
                f"write {_shown(is_mixed)} or {_AUTO!r} here, or change the recipe"
            )

    def _data_types(self, value: Any) -> None:
        if self._is_section("data_types", value, {"grad_accum_dtype"}):
            self._same("data_types.grad_accum_dtype", value.get("grad_accum_dtype") or "fp32", "fp32", "sums of gradients")

    def _activation_checkpointing(self, value: Any) -> None:
        if isinstance(value, dict) and not any(value.values()):
            return
        self.problems.append(
            f"activation_checkpointing: {_shown(value)}: what is recomputed is the plan's to say, by machine.memory_limit; "
            "remove it"
        )

    def _offload(self, key: str, value: Any, *, wanted: bool) -> dict[str, Any]:
        own, off, on = {
            "offload_optimizer": ("machine.optimizer_states", self.recipe.machine.optimizer_states, "host"),
            "offload_param": ("parallel.offload_parameters", "false", "true"),
        }[key]
        where = f"zero_optimization.{key}"
        if value in (_AUTO, None) or not self._is_section(where, value, {"device", "pin_memory", "buffer_count", "fast_init"}):
            return {}
        device = value.get("device", _AUTO)
        if device == "nvme":
            self.problems.append(
                f"{where}.device: nvme is not served; write cpu, or for optimizer states {_AUTO!r} with "
                "machine.optimizer_states: disk"
            )
        elif device not in (_AUTO, "cpu" if wanted else "none"):
            self._conflict(f"{where}.device", device, own, on if wanted else off)
        elif wanted:
            return {key: {"device": "cpu", "pin_memory": True, **{k: v for k, v in value.items() if v != _AUTO}}}
        return {}

    # ---- how it is said ---------------------------------------------------------------------------------------------------

    def _is_section(self, where: str, value: Any, keys: set[str]) -> bool:
        if not isinstance(value, dict):
            self.problems.append(f"{where}: {_shown(value)} is no object")
            return False
        for key in value.keys() - keys:
            self._unknown(f"{where}.{key}")
        return True

    def _parameters(self, where: str, given: Any, known: Mapping[str, tuple[str, Any]]) -> None:
        """Compares what a section's `params` say with what is known: key -> (who says so, value)."""
        if not isinstance(given, dict):
            self.problems.append(f"{where}: {_shown(given)} is no object")
            return
        for key, value in given.items():
            if key not in known:
                self._unknown(f"{where}.{key}")
            elif known[key][1] is not _WHATEVER:
                self._same(f"{where}.{key}", value, known[key][1], known[key][0])

    def _same(self, where: str, value: Any, wanted: Any, own: str) -> None:
        if value != _AUTO and value != wanted:
            self._conflict(where, value, own, wanted)

    def _conflict(self, where: str, value: Any, own: str, wanted: Any) -> None:
        if wanted == _AUTO:
            self.problems.append(f"{where} is {_shown(value)}, but {own} is counted by fullrank: write {_AUTO!r} here")
            return
        self.problems.append(
            f"{where} is {_shown(value)}, but {own} is {_shown(wanted)}: write {_shown(wanted)} or {_AUTO!r} here, "
            "or change the recipe"
        )

    def _off(self, where: str, value: Any) -> None:
        if _is_on(value):
            self.problems.append(f"{where}: {_shown(value)} is not served: {_OFF[where.rpartition('.')[2]]}; remove it")

    def _unknown(self, where: str) -> None:
        self.problems.append(f"{where} is not known here, so it cannot be said that it leaves the numbers alone; remove it")


def _is_on(value: Any) -> bool:
    """Whether a switch, a section with `enabled` or a size of groups asks for something; "auto" does not."""
    if isinstance(value, dict):
        value = value.get("enabled", bool(value))
    return value is True or value not in (False, None, _AUTO, 1, -1)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
