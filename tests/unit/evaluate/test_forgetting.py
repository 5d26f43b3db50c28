"""What is measured of forgetting, from a base and a tuned model on disk to the record."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from staging import staged, write_case
from tiny import write_jsonl

from fullrank.evaluate.forgetting import Asked
from fullrank.models.load import load_model, load_tokenizer
from fullrank.recipe import Forgetting
from fullrank.records import Forgotten
from fullrank.sequences.chat import ChatRenderer
from fullrank.sequences.store import TokenStore

CPU = torch.device("cpu")
STOP = [2]


def asked(model: Any, folder: Path, texts: Path, **wanted: Any) -> Asked:
    renderer = ChatRenderer(load_tokenizer(folder), datetime.date(2025, 1, 1), "tiny")
    section = Forgetting.model_validate({"texts": 6, "tokens": 5} | wanted)
    return Asked(model, "base", renderer, section, stop_ids=STOP, budget_tokens=300, texts_folder=texts)


def tuned_folder(base: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """The base with its tensors changed, saved as transformers saves it."""
    model = load_model(base, device=CPU)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(change(name, p))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "gpt2", "qwen3_moe"])
def base(request: pytest.FixtureRequest, tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder(request.param)


def measured(base: Path, tuned: Path, tmp_path: Path) -> Forgotten:
    before = asked(load_model(base, device=CPU), base, tmp_path / "texts")
    return before.against(load_model(tuned, device=CPU), base, tuned)


def test_the_base_has_forgotten_nothing_of_itself(base: Path, tmp_path: Path) -> None:
    found = measured(base, base, tmp_path)
    own = found.own_text
    assert (own.kl.value, own.kl.low, own.kl.high) == (0.0, 0.0, 0.0)
    assert own.loss_difference.value == 0.0
    assert (own.texts, own.tokens <= 30) == (6, True)
    everything = found.probe["all"]
    assert everything.questions == 120 and everything.base == everything.tuned
    assert everything.difference.value == everything.loss_difference.value == 0.0
    assert list(found.probe) == ["all", "facts", "instructions", "arithmetic", "formats"]
    assert all(part.weights == 0.0 and (part.states or 0.0) == pytest.approx(0.0, abs=1e-6) for part in found.drift)
    assert [part.part for part in found.drift] == ["embeddings", "block 0", "block 1", "head and norms"]


def test_drift_is_told_of_the_part_that_moved(base: Path, tmp_path: Path) -> None:
    """Every weight of the second block a tenth larger: nothing before it moves."""
    is_second = {"gpt2": "h.1."}.get(load_model(base, device=CPU).config.model_type, "layers.1.")
    tuned = tuned_folder(base, tmp_path / "tuned", lambda name, p: p * 1.1 if is_second in name else p)
    found = measured(base, tuned, tmp_path)
    weights = {part.part: part.weights for part in found.drift}
    assert weights["block 1"] == pytest.approx(0.1, rel=1e-4)
    assert weights["embeddings"] == weights["block 0"] == weights["head and norms"] == 0.0
    states = {part.part: part.states for part in found.drift}
    assert states["embeddings"] == pytest.approx(0.0, abs=1e-6) == states["block 0"]
    assert states["block 1"] is not None and states["block 1"] > 1e-6 and states["head and norms"] is None
    assert found.own_text.kl.low > 0


def test_a_base_writes_its_texts_once(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_folder("llama")
    model, texts = load_model(base, device=CPU), tmp_path / "texts"
    first = asked(model, base, texts)
    (kept,) = texts.iterdir()
    written = kept.read_bytes()
    other = tuned_folder(base, tmp_path / "tuned", lambda name, p: p * 1.3)
    again = asked(load_model(other, device=CPU), base, texts)  # by its fingerprint the same base: nothing is drawn
    assert again._texts == first._texts and kept.read_bytes() == written
    asked(model, base, texts, seed=1)
    assert len(list(texts.iterdir())) == 2
    kept.write_text("[[", encoding="utf-8")  # cut off: drawn again
    assert asked(model, base, texts)._texts == first._texts and kept.read_bytes() == written


def test_general_data_are_prepared_measured_and_never_trained_on(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The recipe's general data in its own form beside transformers' losses of the same conversations."""
    base = tiny_model_folder("llama")
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": f"Say {n} twice", "completion": f"{n} {n}"} for n in range(5)])
    case = staged(write_case(tmp_path, base, data={"general": {"other": "other.jsonl"}}))
    card = case.data()
    assert card.general["other"].examples == 5 and card.train.examples == 16
    store = TokenStore(case.run.data / "general-other")
    tuned = tuned_folder(base, tmp_path / "tuned", lambda name, p: p * 1.05)
    before, after = load_model(base, device=CPU), load_model(tuned, device=CPU)
    renderer = ChatRenderer(load_tokenizer(base), datetime.date(2025, 1, 1), "tiny")
    wanted = Forgetting(texts=4, tokens=3)
    folders = {"other": case.run.data / "general-other"}
    kept = Asked(
        before, "base", renderer, wanted, stop_ids=STOP, budget_tokens=300, texts_folder=tmp_path / "texts", general=folders
    )
    found = kept.against(after, base, tuned).general["other"]
    sums = dict.fromkeys((before, after), 0.0)
    for number in range(5):
        example = store[number]
        labels = torch.tensor([[int(i) if s else -100 for i, s in zip(example.ids, example.supervised, strict=True)]])
        for model in sums:
            with torch.no_grad():
                loss = model(input_ids=torch.tensor(example.ids.astype("int64"))[None], labels=labels).loss.item()
            sums[model] += loss * example.supervised_targets
    tokens = sum(store[n].supervised_targets for n in range(5))
    assert (found.texts, found.tokens) == (5, tokens)
    assert found.loss_difference.value == pytest.approx((sums[after] - sums[before]) / tokens, abs=1e-4)
    assert found.kl.value > 0
    before_fingerprint = card.training_fingerprint
    again = staged(write_case(tmp_path, base))
    assert again.data().training_fingerprint == before_fingerprint  # what is trained on is the same without them
