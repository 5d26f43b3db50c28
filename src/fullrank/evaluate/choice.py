"""Multiple choice by likelihood: the option that a model finds likeliest after the prompt, lengths made comparable.

Nothing is generated. Likelihoods are those of the option's own tokens, without the end of the turn; of options alike, the first
is taken, and an option with the text of the right one is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fullrank.evaluate.items import Items, mean
from fullrank.recipe import Task
from fullrank.records import ChoiceLikelihood


def choice(task: Task, references: Sequence[str], options: Sequence[Sequence[ChoiceLikelihood]]) -> dict[str, Items]:
    """Shares of items on which the right option is the likeliest, two ways of making lengths comparable.

    * `<key>`, the primary one: log-likelihood per UTF-8 byte of the option. It compares texts, not tokens, so it does not depend
      on the tokenizer. `acc_bytes` of EleutherAI's lm-evaluation-harness; its `acc_norm` divides by characters, which is the same
      for ASCII (Gao 2021, "Multiple Choice Normalization in LM Evaluation").
    * `<key>_per_token`: mean log-likelihood of the option's tokens (Brown et al. 2020, "Language Models are Few-Shot Learners",
      section 2.4).

    Args:
        references: text of the right option of each of N items.
        options: the options of each, with their likelihoods.
    """
    per_byte = [likeliest(item) == right for item, right in zip(options, references, strict=True)]
    per_token = [
        item[int(np.argmax([option.log_likelihood / option.tokens for option in item]))].text == right
        for item, right in zip(options, references, strict=True)
    ]
    return dict(zip(task.keys, (mean(per_byte), mean(per_token)), strict=True))


def likeliest(item: Sequence[ChoiceLikelihood]) -> str:
    """The option of the highest log-likelihood per UTF-8 byte."""
    return item[int(np.argmax([option.log_likelihood / len(option.text.encode()) for option in item]))].text
