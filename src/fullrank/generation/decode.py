"""Greedy decoding of many prompts: each answer as if its prompt were alone, whatever is written beside it.

Prompts are taken longest first. As many are written side by side as a budget of bytes for their keys and values allows; one that
ends makes room for the next at once, so that nothing is computed for texts that are finished, nor for padding, and what all
prompts begin with is computed once (`fullrank.generation.slots`). Whether a model can be run this way is tried on the model
itself first; one that cannot (state spaces, other memories than keys and values) is decoded by transformers (`.padded`), and the
caller is told why. Where memory runs out, half as many texts go on, from the tokens they have.

Answers are a function of the model and the prompts, up to rounding: of two tokens whose logits are all but equal either may win.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from fullrank.errors import DataError, FitError
from fullrank.generation.padded import Padded
from fullrank.generation.slots import Slots, attending_to_slots
from fullrank.models.rows import RowModel
from fullrank.parallel import device as devices

#: Keys and values of the texts that are written side by side.
CACHE_BYTES = 2 << 30

#: Texts written side by side. Products of 64 rows come near the rate of a CPU; those of 128 are little faster.
BATCH_SIZE = 64

#: A common beginning shorter than this is not worth a forward pass of its own.
_SHORTEST_SHARED = 16

#: Tokens of the prompts that arrive in one forward pass (a longer prompt arrives alone).
_ARRIVING_TOKENS = 2048

#: Largest difference of a logit, relative to the largest logit, that rounding may explain.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE_OF_16_BITS = 3e-2

#: Settings of a generation configuration that would make the likeliest token another one, or look for it another way.
_BENDING = (
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "prompt_lookup_num_tokens",
)


@dataclass(frozen=True)
class Answer:
    """What the model wrote after one prompt."""

    prompt: int
    """Number of the prompt."""
    ids: list[int]
    """Without the stop token."""
    stopped: bool
    """A stop token came before the limit."""


def greedy_arguments(stop_ids: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """What makes transformers' `generate` greedy, whatever the model's own generation configuration says."""
    return dict.fromkeys(_BENDING) | {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(stop_ids),
        "pad_token_id": stop_ids[0],
    }


def room_for_answer(model: PreTrainedModel, prompt_tokens: int, wanted: int) -> int:
    """New tokens that fit behind a prompt: those wanted, or what is left of the model's context.

    Raises:
        DataError: nothing is left.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = wanted if context is None else min(wanted, context - prompt_tokens)
    if room < 1:
        raise DataError(
            f"a prompt of {prompt_tokens} tokens fills the model's context of {context}",
            hint="shorten the prompt (or evaluate.base_instructions)",
        )
    return room


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    cache_bytes: int = CACHE_BYTES,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Answer]:
    """Answers to prompts, each as soon as it is finished (longest prompts first, so that memory trouble shows at once).

    Args:
        model: in any mode; it is used in evaluation mode.
        prompts: prompt ids, at least one each.
        stop_ids: ids that end an answer.
        max_new_tokens: longest answer; less where the model's context leaves less room.
        batch_size: most prompts decoded together.
        cache_bytes: most bytes of the keys and values of what is decoded together, if each answer became as long as it may; one
            prompt is decoded whatever it takes.
        tell: is told what is not as usual: a model that transformers decodes, memory that ran out.

    Raises:
        DataError: a prompt fills the model's context.
        FitError: memory runs out with a single prompt.
    """
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    texts = [_Text(n, list(prompts[n]), room_for_answer(model, len(prompts[n]), max_new_tokens)) for n in order]
    if not texts:
        return
    say = tell or (lambda _: None)
    beginning = _shared_beginning(prompts)
    was_training = model.training
    model.eval()
    try:
        rows = RowModel(model)
        if why := _against_slots(rows):
            say(f"answers are decoded by transformers, a padded batch at a time: {why}")
            yield from _padded(model, texts, beginning, stop_ids, batch_size, say)
        else:
            yield from _Writer(rows, beginning, stop_ids, batch_size, cache_bytes, say).answers(texts)
    finally:
        model.train(was_training)


@dataclass(eq=False)
class _Text:
    """A prompt and what was written behind it so far."""

    number: int
    prompt: list[int]
    room: int
    """Most tokens of the answer."""
    written: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.written

    @property
    def longest(self) -> int:
        """Tokens that keys and values may come to be kept of: all but the last, which nothing follows."""
        return len(self.prompt) + self.room - 1

    def take(self, token: int, stop_ids: Collection[int]) -> Answer | None:
        """The answer, if it ends with this token."""
        if token in stop_ids:
            return Answer(self.number, self.written, stopped=True)
        self.written.append(token)
        return Answer(self.number, self.written, stopped=False) if len(self.written) == self.room else None


def _shared_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with, at least one token of each left; empty where it is short."""
    if len(prompts) < 2:
        return []
    first, *others = (prompt[:-1] for prompt in prompts)
    length = min(_common(first, other) for other in others)
    return list(first[:length]) if length >= _SHORTEST_SHARED else []


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two prompts begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


# ---- in slots -------------------------------------------------------------------------------------------------------


class _Steps:
    """Forward passes over texts in slots."""

    def __init__(self, rows: RowModel) -> None:
        self._rows = rows
        self.slots = Slots(rows.model.device)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        with self._rows.ready(), attending_to_slots(self._rows.model):
            yield

    def begin(self, ids: Sequence[int]) -> None:
        """Computes what all texts begin with."""
        self._logits([], [ids], begins=True)

    def logits(self, newest: Sequence[int], arriving: Sequence[Sequence[int]], most_tokens: int) -> torch.Tensor:
        """logits_SV behind each running text's newest token and each arriving prompt, which run from now on.

        Args:
            newest: token of each running text.
            arriving: ids behind the common beginning.
            most_tokens: that any of them may come to have there.
        """
        longest = max([length + 1 for length in self.slots.lengths] + [len(ids) for ids in arriving])
        self.slots.reserve(len(newest) + len(arriving), longest, most_tokens)
        return self._logits(newest, arriving)

    def _logits(self, newest: Sequence[int], arriving: Sequence[Sequence[int]], *, begins: bool = False) -> torch.Tensor:
        row = self.slots.row(newest, arriving, begins=begins)
        hidden_SH, head = self._rows.predictions(row)
        self.slots.advance(row)
        return hidden_SH if head is None else head.logits(hidden_SH)


class _Writer:
    """Texts of one model, some of them running, the others waiting."""

    def __init__(
        self,
        rows: RowModel,
        beginning: list[int],
        stop_ids: Sequence[int],
        batch_size: int,
        cache_bytes: int,
        say: Callable[[str], None],
    ) -> None:
        self._steps = _Steps(rows)
        self._slots = self._steps.slots
        self._beginning, self._stop_ids, self._say = beginning, frozenset(stop_ids), say
        self._most, self._cache_bytes = batch_size, cache_bytes
        self._running: list[_Text] = []
        self._waiting: deque[_Text] = deque()

    def answers(self, texts: Sequence[_Text]) -> Iterator[Answer]:
        """Answers as they end; the model attends as usual while the caller has one."""
        self._waiting.extend(texts)
        while self._waiting or self._running:
            ended: list[Answer] = []
            with self._steps.ready():
                while not ended and (self._waiting or self._running):
                    ended = self._step()
            yield from ended

    def _step(self) -> list[Answer]:
        """One more token of every running text, and the first of those that arrive; the answers that end with it."""
        arriving: list[_Text] = []
        trouble: BaseException | None = None
        try:
            if self._beginning and not self._slots.beginning_tokens:
                self._steps.begin(self._beginning)
            arriving = self._admitted()
            newest, skip = [text.written[-1] for text in self._running], len(self._beginning)
            most = max(text.longest for text in self._running + arriving) - skip
            logits_SV = self._steps.logits(newest, [text.ids[skip:] for text in arriving], most)
            tokens: list[int] = logits_SV.argmax(-1).tolist()
        except (RuntimeError, MemoryError) as error:
            if not devices.out_of_memory(error):
                raise
            trouble = error
        if trouble is not None:  # outside of the handler, where the failed pass no longer holds its tensors
            self._give_way(arriving, trouble.with_traceback(None))
            return []
        self._running += arriving
        found = [text.take(token, self._stop_ids) for text, token in zip(self._running, tokens, strict=True)]
        for number in reversed(range(len(found))):
            if found[number] is not None:
                self._slots.drop(number)
                self._running[number] = self._running[-1]
                self._running.pop()
        return [answer for answer in found if answer is not None]

    def _admitted(self) -> list[_Text]:
        """Those of the waiting that start now: as many as the budget allows once all texts are as long as they may become."""
        found: list[_Text] = []
        tokens = 0
        skip, size = len(self._beginning), self._slots.bytes_per_token
        longest = max((text.longest for text in self._running), default=0)
        while self._waiting and len(self._running) + len(found) < self._most:
            text = self._waiting[0]
            longest = max(longest, text.longest)
            tokens += len(text.ids) - skip
            texts = len(self._running) + len(found) + 1
            if texts > 1 and (texts * (longest - skip) + skip) * size > self._cache_bytes:
                break
            if found and (not size or tokens > _ARRIVING_TOKENS):  # the first pass tells what a token takes
                break
            found.append(self._waiting.popleft())
        return found

    def _give_way(self, arriving: list[_Text], error: BaseException) -> None:
        """Goes on with half as many texts; those that were running arrive again, with what was written of them.

        Raises:
            FitError: there was only one.
        """
        texts = self._running + arriving
        if len(texts) < 2:
            tokens = len(texts[0].ids) if texts else len(self._beginning)
            raise FitError(
                f"memory runs out while one text of {tokens} tokens is continued",
                hint="shorten the prompts or evaluate.max_new_tokens, or use a machine with more memory",
            ) from error
        self._most = len(texts) // 2
        self._say(f"memory ran out while {len(texts)} texts were written side by side: {self._most} go on")
        self._waiting = deque(sorted([*texts, *self._waiting], key=lambda text: (-len(text.ids), text.number)))
        self._running = []
        self._slots.clear()
        if self._slots.device.type == "cuda":
            torch.cuda.empty_cache()


def _against_slots(rows: RowModel) -> str:
    """What stands against writing a model's texts in slots; empty where the logits are those of each text alone.

    Random tokens: two texts arrive behind a common beginning, a third while they run, the first ends, and two more tokens are
    written; then the logits of all are compared with the model's own.
    """
    model = rows.model
    if not rows.packs:
        return rows.why
    if kinds := _stretched(model):
        return f"its positions depend on the longest text of a batch ({kinds})"
    draw = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    beginning, *rests = (torch.randint(vocabulary, (length,), generator=draw).tolist() for length in (7, 5, 9, 3))
    texts = [[*beginning, *rest] for rest in rests]
    steps = _Steps(rows)
    try:
        with steps.ready():
            steps.begin(beginning)

            def step(running: list[list[int]], arriving: list[list[int]]) -> torch.Tensor:
                newest, new = [text[-1] for text in running], [text[len(beginning) :] for text in arriving]
                logits_SV = steps.logits(newest, new, 16)
                for text, token in zip([*running, *arriving], logits_SV.argmax(-1).tolist(), strict=True):
                    text.append(token)
                return logits_SV

            step([], texts[:2])
            step(texts[:2], texts[2:])
            steps.slots.drop(0)
            running = [texts[2], texts[1]]
            step(running, [])
            found = step(running, []).float()
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        if devices.out_of_memory(error):
            raise
        return f"its forward pass takes no slots ({error})"
    alone = [
        model(input_ids=torch.tensor([text[:-1]], device=model.device), use_cache=False).logits[0, -1].float() for text in running
    ]
    wanted = torch.stack(alone)
    most = _TOLERANCES.get(model.dtype, _TOLERANCE_OF_16_BITS) * wanted.abs().max()
    return "" if (found - wanted).abs().max() <= most else "its logits are others in slots"


def _stretched(model: PreTrainedModel) -> str:
    """Rotary embeddings that are scaled by the longest text in sight, by name."""
    config: Any = model.config.get_text_config()
    told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [told, *(some for some in told.values() if isinstance(some, dict))]
    kinds = {str(some.get("rope_type", some.get("type"))) for some in nested}
    return ", ".join(sorted(kinds & {"dynamic", "longrope"}))


# ---- by transformers ------------------------------------------------------------------------------------------------


def _padded(
    model: PreTrainedModel,
    texts: Sequence[_Text],
    beginning: list[int],
    stop_ids: Sequence[int],
    batch_size: int,
    say: Callable[[str], None],
) -> Iterator[Answer]:
    batches = Padded(model, beginning)
    start = 0
    while start < len(texts):
        batch = texts[start : start + batch_size]
        room = max(text.room for text in batch)
        trouble: BaseException | None = None
        try:
            written = batches.written([text.prompt for text in batch], greedy_arguments(stop_ids, room))
        except (RuntimeError, MemoryError) as error:
            if not devices.out_of_memory(error):
                raise
            trouble = error
        if trouble is not None:
            if len(batch) < 2:
                raise FitError(
                    f"memory runs out while one text of {len(batch[0].prompt)} tokens is continued",
                    hint="shorten the prompts or evaluate.max_new_tokens, or use a machine with more memory",
                ) from trouble.with_traceback(None)
            batch_size = len(batch) // 2
            say(f"memory ran out while {len(batch)} texts were written side by side: {batch_size} go on")
            continue
        for text, row in zip(batch, written, strict=True):
            answers = (text.take(token, stop_ids) for token in row)
            yield next(answer for answer in answers if answer is not None)
        start += len(batch)
