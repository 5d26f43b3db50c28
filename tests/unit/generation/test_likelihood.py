"""Each example's summed loss is the one transformers gives for it alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from fullrank.generation.likelihood import example_losses
from fullrank.sequences.chat import Tokens


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_losses_of_examples_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    examples = tiny.random_tokens(7)
    examples += [Tokens(examples[n].ids[:9] + [n] * 3, [False] * 8 + [True] * 4) for n in (0, 0, 0)]  # these begin alike
    store = tiny.write_store(tmp_path, examples)
    model = tiny.model(family).train()
    found = {name: (loss, count) for name, loss, count in example_losses(model, store, 70)}
    assert model.training
    assert sorted(found) == list(range(10))
    model.eval()
    for number, tokens in enumerate(examples):
        labels = [token if inside else -100 for token, inside in zip(tokens.ids, tokens.supervised, strict=True)]
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([tokens.ids]), labels=torch.tensor([labels])).loss.item()
        loss, count = found[number]
        assert count == tokens.supervised_targets()
        assert loss == pytest.approx(mean * count, rel=1e-5)  # fp32, sums in another order
