"""A synthetic run folder, written through the record types: what the report room reads when all stages are done."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fullrank import loading
from fullrank.recipe import Recipe
from fullrank.records import (
    BlockDrift,
    DataCard,
    EvaluationCard,
    Forgotten,
    GroupScores,
    LedgerLine,
    LengthSummary,
    MachineFacts,
    ModelFacts,
    Plan,
    Prediction,
    Proof,
    Score,
    SplitCard,
    StepRow,
    TestCard,
    TestScores,
    TextScores,
    TrainCard,
)
from fullrank.run import Run, append_json_line, write_manifest, write_record, write_text

CODES = ("H1.0", "H2", "H3", "H4", "H6", "H7")
STEPS, BEST_STEP = 90, 75


def model_facts(**changes: Any) -> ModelFacts:
    facts = {
        "source": "smollm2-135m-instruct",
        "kind": "embedded",
        "commit": "5c1f" * 16,
        "fingerprint": "ab" * 32,
        "architecture": "LlamaForCausalLM",
        "parameters": 134_515_008,
        "dtype": "float32",
        "hidden_size": 576,
        "layers": 30,
        "heads": 9,
        "key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocabulary": 49152,
        "tied_embeddings": True,
        "context_tokens": 8192,
    }
    return ModelFacts.model_validate(facts | changes)


def score(value: float, half: float = 0.05) -> Score:
    return Score(value=value, low=max(0.0, value - half), high=min(1.0, value + half * 0.8))


def difference(value: float, half: float = 0.06) -> Score:
    return Score(value=value, low=value - half, high=value + half)


def scores_of(examples: int, **metrics: tuple[float, float]) -> TestScores:
    return TestScores(
        examples=examples,
        base={key: score(before) for key, (before, _) in metrics.items()},
        tuned={key: score(after) for key, (_, after) in metrics.items()},
        difference={key: difference(after - before) for key, (before, after) in metrics.items()},
        p_value=dict.fromkeys(metrics, 0.0001),
        stopped_ratio={"base": 0.75, "tuned": 1.0},
    )


def forgotten() -> Forgotten:
    def group(questions: int, before: float, after: float) -> GroupScores:
        return GroupScores(
            questions=questions,
            base=score(before),
            tuned=score(after),
            difference=difference(after - before),
            loss_difference=difference(0.21),
        )

    return Forgotten(
        own_text=TextScores(
            texts=64,
            tokens=2871,
            kl=Score(value=0.1234, low=0.111, high=0.137),
            loss_difference=Score(value=0.0953, low=0.08, high=0.11),
        ),
        general={
            "manuals": TextScores(texts=12, tokens=4321, kl=difference(0.5), loss_difference=difference(0.4)),
        },
        probe={"all": group(120, 0.617, 0.492), "facts": group(30, 0.7, 0.5)},
        drift=[
            BlockDrift(part="embeddings", weights=0.0012, states=0.0004),
            BlockDrift(part="block 0", weights=0.0034, states=0.0125),
            BlockDrift(part="head and norms", weights=0.0005, states=None),
        ],
    )


def evaluation_card(**changes: Any) -> EvaluationCard:
    tests = {
        "seen": scores_of(80, f1=(0.146, 0.961), f1_macro=(0.131, 0.948), rouge_l=(0.284, 0.973)),
        "unseen_wordings": scores_of(60, f1=(0.155, 0.742), f1_macro=(0.140, 0.701), rouge_l=(0.291, 0.868)),
    }
    perfect = Score(value=1.0, low=1.0, high=1.0)
    zero = Score(value=0.0, low=0.0, high=0.0)
    tests["seen"].base["exact_match"], tests["seen"].tuned["exact_match"] = zero, perfect
    tests["seen"].difference["exact_match"] = perfect
    tests["seen"].p_value["exact_match"] = 0.0001
    facts = {
        "fingerprint": "ef" * 32,
        "seconds": 141.7,
        "peak_bytes": 2_650_000_000,
        "primary": "seen",
        "tests": tests,
        "max_new_tokens": 128,
        "base_was_instructed": True,
        "forgotten": forgotten(),
    }
    return EvaluationCard.model_validate(facts | changes)


def proof(**changes: Any) -> Proof:
    facts = {
        "trainable_tensors": 272,
        "changed_tensors": 272,
        "never_reached_tensors": [],
        "unmoved_tensors": [],
        "export_dtype": "float32",
        "export_keys_equal": True,
        "export_logits_identical": True,
        "export_weights_identical": None,
        "export_probe_tokens": 512,
        "export_changed_tensors": 272,
        "export_tensors": 272,
        "ties_kept": True,
        "tokenizer_travels": True,
    }
    return Proof.model_validate(facts | changes)


def train_card(**changes: Any) -> TrainCard:
    facts = {
        "fingerprint": "cd" * 32,
        "seconds": 231.2,
        "peak_bytes": 3_480_000_000,
        "model": model_facts(),
        "steps": STEPS,
        "steps_planned": STEPS,
        "stopped_early": False,
        "best_step": BEST_STEP,
        "examples_seen": 360,
        "tokens_seen": 41_203,
        "computed_tokens_seen": 30_011,
        "supervised_tokens_seen": 18_344,
        "validation_loss_before": 2.913,
        "validation_loss_best": 0.3381,
        "validation_loss_last": 0.3402,
        "loop_seconds": 208.4,
        "tokens_per_second": 203.6,
        "packed": True,
        "shared": True,
        "layout_note": "",
        "device_peak_bytes": None,
        "resumed_from_steps": [40],
        "proof": proof(),
    }
    return TrainCard.model_validate(facts | changes)


def data_card() -> DataCard:
    def split(name: str, examples: int, tokens: int) -> SplitCard:
        return SplitCard(
            files=[f"/home/someone/case/{name}.jsonl"],
            examples=examples,
            tokens=tokens,
            supervised_tokens=round(tokens * 0.45),
            supervised_ratio=0.45,
            lengths=LengthSummary(shortest=71, median=110, p95=158, longest=187),
            formats={"messages": examples},
            dropped_too_long=0,
            truncated=0,
            masked={},
            read=examples,
            used=examples,
            quarantined=0,
            sources=[],
        )

    tests = {
        name: TestCard(
            files=[f"/home/someone/case/{name}.jsonl"], read=count, quarantined=0, examples=count, longest_prompt_tokens=121
        )
        for name, count in (("seen", 80), ("unseen_wordings", 60))
    }
    return DataCard(
        fingerprint="12" * 32,
        seconds=2.1,
        peak_bytes=410_000_000,
        chat_template="model",
        training_fingerprint="34" * 32,
        records_fingerprint="56" * 32,
        stop_ids=[2],
        train=split("train", 360, 41_203),
        validation=split("validation", 40, 4_544),
        tests=tests,
        notes=["train.jsonl: 12 Alpaca records were converted to chats"],
    )


def plan_record() -> Plan:
    ledger = [
        LedgerLine(part="weights", bytes=538_060_032, formula="134,515,008 parameters x 4 bytes (fp32)"),
        LedgerLine(part="gradients", bytes=538_060_032, formula="134,515,008 parameters x 4 bytes"),
        LedgerLine(part="optimizer", bytes=1_076_120_064, formula="134,515,008 parameters x 2 moments x 4 bytes"),
        LedgerLine(part="activations", bytes=640_000_000, formula="512 tokens x 30 layers x 41.7 kB"),
        LedgerLine(part="logits", bytes=151_000_000, formula="256 supervised tokens x 49,152 x 4 bytes x 3"),
        LedgerLine(part="process", bytes=450_000_000, formula="interpreter and libraries, measured"),
    ]
    return Plan(
        fingerprint="78" * 32,
        seconds=0.4,
        peak_bytes=380_000_000,
        machine=MachineFacts(
            device="cpu",
            device_name="Intel Xeon (2 cores)",
            cores=2,
            threads=2,
            memory_bytes=16_000_000_000,
            memory_available_bytes=13_500_000_000,
            disk_free_bytes=90_000_000_000,
        ),
        model=model_facts(),
        trained_parameters=134_515_008,
        precision="fp32",
        gradients="keep",
        backward_passes=1,
        optimizer_states="device",
        engine="single",
        ranks=1,
        replicas=1,
        context=1,
        sync="step",
        examples=360,
        steps=STEPS,
        steps_per_epoch=90,
        warmup_steps=5,
        train_tokens=41_203,
        shared_ratio=0.27,
        micro_batch_tokens=512,
        recompute="none",
        ledger=ledger,
        peak_bytes_predicted=sum(line.bytes for line in ledger),
        disk_bytes_predicted=2_400_000_000,
        train_seconds_predicted=236.0,
        seconds_basis="6 x parameters FLOPs a token at 110 GFLOP/s",
        fits=True,
        refusal="",
    )


def step_rows() -> list[StepRow]:
    chance = random.Random(0)
    rows = []
    for step in range(1, STEPS + 1):
        decay = math.exp(-step / 18)
        rows.append(
            StepRow(
                step=step,
                epoch=step / 90,
                loss=0.34 + 2.6 * decay + chance.gauss(0, 0.05),
                learning_rate=3e-4 * min(step / 5, 0.1 + 0.45 * (1 + math.cos(math.pi * max(0, step - 5) / 85))),
                grad_norm=0.6 + 5 * decay + abs(chance.gauss(0, 0.2)),
                examples=4,
                tokens=458,
                computed_tokens=334,
                supervised_tokens=204,
                seconds=2.2 + abs(chance.gauss(0, 0.1)),
                memory_bytes=3_300_000_000,
                changed_ratio=1.0 - 0.1 * decay,
                validation_loss=0.338 + 2.57 * math.exp(-step / 16) + (0.002 if step > BEST_STEP else 0)
                if step % 15 == 0
                else None,
            )
        )
    return rows


def predictions(test: str, count: int) -> tuple[list[Prediction], list[Prediction]]:
    chance = random.Random(test)
    base, tuned = [], []
    for number in range(count):
        codes = sorted(chance.sample(CODES, chance.choice([0, 1, 1, 2])))
        prompt = (
            "<|im_start|>system\nYou supervise banks.<|im_end|>\n<|im_start|>user\n"
            f"Report of Bank {number + 1}: capital remained above the minimum through the quarter, but the treasurer "
            "writes that on "
            "several days the cash at hand would not have covered what customers could call at sight. "
            + ("One group of related borrowers now takes more than a quarter of own funds. " * (9 if number % 7 == 0 else 1))
            + "<|im_end|>\n<|im_start|>assistant\n"
        )
        directive = (
            "The bank shall restore the ratio within thirty days and report weekly until it has."
            if codes
            else "No directive is needed."
        )
        reference = f"Violations: {', '.join(codes) or 'none'}\nDirective: {directive}"
        facts = {"id": f"{test}.jsonl:{number + 1}", "prompt": prompt, "reference": reference}
        right = number % 9 != 4
        answer = reference if right else f"Violations: {', '.join(codes[:-1]) or 'H9'}\nDirective: {directive}"
        rambling = number % 4 == 0
        base_answer = "" if number == 1 else "The bank is doing well and has a strong capital position. " * (8 if rambling else 1)
        asked = facts | {
            "prompt": prompt.replace("You supervise banks.", "You supervise banks. The codes are H1.0 (total capital), ...")
        }
        base.append(
            Prediction(**asked, answer=base_answer, stopped=not rambling, scores={"f1": 0.0 if codes else 1.0, "rouge_l": 0.21})
        )
        tuned.append(
            Prediction(
                **facts,
                answer=answer,
                stopped=True,
                scores={"f1": 1.0 if right else 0.5, "rouge_l": 1.0 if right else 0.93},
            )
        )
    return base, tuned


RECIPE = """
name: prudential-directives
model: {source: smollm2-135m-instruct}
data: {train: train.jsonl, test: {seen: seen.jsonl, unseen_wordings: unseen_wordings.jsonl}}
train:
  epochs: 1
  global_batch_size: 4
  optimizer: {learning_rate: 3e-4}
evaluate:
  tasks: [{metric: f1}, {metric: rouge_l}]
  base_instructions: "The codes are H1.0 (total capital), H2 (instant liquidity) and H3 (current liquidity)."
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for name in ("train", "seen", "unseen_wordings"):
        write_text(tmp_path / f"{name}.jsonl", "{}\n")
    write_text(tmp_path / "recipe.yaml", RECIPE)
    return loading.load(tmp_path / "recipe.yaml").recipe


@pytest.fixture
def make_run(tmp_path: Path, recipe: Recipe) -> Callable[..., Run]:
    """Builds a run folder as all stages leave it, or as training alone leaves it."""

    def make(
        train: TrainCard | None = None,
        evaluation: EvaluationCard | None = None,
        only_training: bool = False,
        name: str = "complete",
    ) -> Run:
        run = Run(tmp_path / "runs" / name)
        write_text(run.recipe_path, loading.dump(recipe))
        write_record(run.train / "card.json", train or train_card())
        if only_training:
            return run
        write_text(run.environment_path, json.dumps({"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"}))
        write_record(run.plan_path, plan_record())
        write_record(run.data / "card.json", data_card())
        for row in step_rows():
            append_json_line(run.train / "steps.jsonl", row.model_dump())
        evaluation = evaluation or evaluation_card()
        write_record(run.evaluate / "card.json", evaluation)
        for test, scores in evaluation.tests.items():
            for model, rows in zip(("base", "tuned"), predictions(test, scores.examples), strict=True):
                for row in rows:
                    append_json_line(run.evaluate / f"predictions-{test}-{model}.jsonl", row.model_dump())
        write_text(run.model / "config.json", "{}")
        (run.model / "model.safetensors").write_bytes(b"\0" * 4096)
        write_manifest(run.model)
        return run

    return make


@pytest.fixture
def a_train_card() -> TrainCard:
    return train_card()


@pytest.fixture
def make_train_card() -> Callable[..., TrainCard]:
    return train_card


@pytest.fixture
def make_model_facts() -> Callable[..., ModelFacts]:
    return model_facts


@pytest.fixture
def make_evaluation() -> Callable[..., EvaluationCard]:
    return evaluation_card
