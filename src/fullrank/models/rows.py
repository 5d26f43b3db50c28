"""A causal language model as the loss law sees it: a row of segments in; hidden states that predict something, and a head, out.

Everything that a layout relies on is asked of the model itself before training relies on it: that examples which share a row, or
a beginning, have the logits they have alone, that the head is what it looks like, and that the last block may be spared the
tokens that predict nothing. What does not hold is not used, and said. Where ranks share rows, each computes its part, and the
same is asked of their ring; a model that it is not right for is refused, since nothing else could compute its rows in parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fullrank.errors import ModelError
from fullrank.models.attention import Ring, attending_to_rows, flex_is_right, windows_met, windows_of
from fullrank.models.blocks import blocks_of
from fullrank.models.load import drops
from fullrank.models.tuned import Tuned
from fullrank.models.widened import Widened
from fullrank.sequences.fused import with_fastest
from fullrank.sequences.head import Head
from fullrank.sequences.layout import MicroBatch, row_of
from fullrank.sequences.parts import part_of
from fullrank.sequences.store import Example

#: Largest difference of a logit, relative to the largest logit, that rounding may explain.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE_OF_16_BITS = 3e-2


class RowModel:
    """Wraps a model, which stays what it is outside of `ready`.

    Args:
        model: of any family; in any mode.
        adds_gradients: whether modules may add their gradients to the parameters' themselves (`fullrank.models.tuned`), which a
            parameter must then hold as a plain tensor of its own.
        widened: of this model, where it computes in another type than its weights are stored in.
        ring: of the ranks that share each row with this one, where they do.
        entry: what is called for a forward pass: an engine that stands around the model and must hear of each; the model itself
            by default.
        device: that computes; the model's own by default, which is another one where weights wait beside it.

    Raises:
        ModelError: rows are to be shared, and this model's cannot be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        adds_gradients: bool = False,
        widened: Widened | None = None,
        ring: Ring | None = None,
        entry: Callable[..., Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.widened, self.ring = model, widened, ring
        self.device: torch.device = model.device if device is None else device
        self._entry: Callable[..., Any] = model if entry is None else entry
        is_fp32 = widened is not None or all(p.dtype == torch.float32 for p in model.parameters())
        is_plain = self.device.type == "cpu" and is_fp32
        self.tuned = Tuned(model) if adds_gradients and is_plain else None
        self.head: Head | None = None
        self.trims = False
        self._flex = self.device.type != "cpu" and _flex_is_right(model, self.device)
        self.packs, self.shares, self.why = _trial(self)
        if self._flex and not self.shares:  # flex attention may be what failed, not the model
            self._flex = False
            self.packs, self.shares, self.why = _trial(self)
        self.head = _head_of(self)
        self.trims = self.head is not None and _trims(self)
        if adds_gradients and self.head is not None and self.device.type != "cpu":  # only training sums losses with gradients
            self.head = with_fastest(self.head, self.device, _compute_type(model, self.device))
        self.drops = _drops(model)
        if self.shares and self.drops:
            # One draw for all examples that share a beginning is another step than one for each.
            self.shares = False
            self.why = "this model is trained with dropout, which draws for every example anew: no beginning is shared"
        if ring is not None and (against := _against_ring(self, ring)):
            raise ModelError(
                f"parallel.context: the rows of {model.name_or_path or type(model).__name__} cannot be divided: {against}",
                hint="leave parallel.context out: each rank then computes rows of its own",
            )

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model takes rows."""
        with contextlib.ExitStack() as stack:
            if self.widened is not None:
                stack.enter_context(self.widened.forward())
            if self.tuned is not None:
                stack.enter_context(self.tuned())
            if self.packs:
                stack.enter_context(attending_to_rows(self.model, flex=self._flex))
            if self.trims:
                stack.enter_context(_trimmed(self.model))
            yield

    def settle(self) -> None:
        """Inside `ready`: makes the gradients whole, of which its end would add the last parts."""
        if self.tuned is not None:
            self.tuned.settle()

    def own(self, row: MicroBatch) -> MicroBatch:
        """What this rank computes of a row: its part, or all of it."""
        return row if self.ring is None else part_of(row, self.ring.size, self.ring.rank)

    def whole(self, losses_S: torch.Tensor, own: MicroBatch) -> torch.Tensor:
        """losses_S of a row, from those of the parts; all ranks that share it together."""
        return losses_S if self.ring is None or own.part is None else self.ring.whole(losses_S, own.part)

    def predictions(self, batch: MicroBatch) -> tuple[torch.Tensor, Head | None]:
        """See `fullrank.sequences.loss.Predictor`; inside `ready`."""
        given: dict[str, Any] = {"input_ids": batch.input_ids_1T, "position_ids": batch.position_ids_1T, "use_cache": False}
        if self.packs:
            given["row"] = batch
        if batch.part is not None:
            given["ring"] = self.ring
        if self.head is not None:
            hidden_SH = self._as_a_whole(lambda: self.model.base_model(**given).last_hidden_state[0, batch.predicting_S])
            return hidden_SH, self._head_now(self.head)
        logits_SV = self._entry(**given, logits_to_keep=batch.predicting_S).logits[0]
        if logits_SV.shape[0] != len(batch.predicting_S):  # a model that has no logits_to_keep
            logits_SV = logits_SV[batch.predicting_S]
        return logits_SV, None

    def _as_a_whole(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` gives, in place of the model's own forward pass: what is hooked to that, as the gathering of weights
        from ranks is, happens around it."""
        model: Any = self.model
        before = model.__dict__.get("forward")
        model.forward = compute
        try:
            found: torch.Tensor = self._entry()
            return found
        finally:
            _restore(model, before)

    def _head_now(self, head: Head) -> Head:
        """The head with its parameters as they are now: whole ones, where ranks hold parts between their uses."""
        module: Any = self.model.get_output_embeddings()
        return head._replace(weight_VH=module.weight, bias_V=module.bias)

    def _logits(self, batch: MicroBatch) -> torch.Tensor:
        with torch.no_grad(), self.ready():
            found, head = self.predictions(batch)
            return found.float() if head is None else head.logits(found)


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---- what the model keeps apart ---------------------------------------------------------------------------------------


def _examples(model: PreTrainedModel) -> list[Example]:
    """Random tokens, the same for every model, so that anything that reaches across a border moves the logits: two examples that
    begin alike, one that goes on from the first, and one that is like none.
    """
    draw = np.random.default_rng(0)
    beginning, first, second, longer, other = (draw.integers(_vocabulary(model), size=n) for n in (8, 5, 7, 6, 9))
    whole = [[beginning, first], [beginning, second], [beginning, first, longer], [other]]
    return [Example(np.concatenate(parts), np.ones(sum(map(len, parts)), np.bool_)) for parts in whole]


def _alone(rows: RowModel, examples: list[Example]) -> torch.Tensor:
    """logits_PV of the examples one at a time, by the model's own forward pass."""
    model, parts = rows.model, []
    with contextlib.nullcontext() if rows.widened is None else rows.widened.forward():
        for example in examples:
            ids_1T = torch.from_numpy(example.ids[:-1]).to(rows.device)[None]
            positions_1T = torch.arange(ids_1T.shape[1], device=rows.device)[None]
            parts.append(model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False).logits[0].float())
    return torch.cat(parts)


def _agree(rows: RowModel, found: torch.Tensor, wanted: torch.Tensor) -> bool:
    computed = torch.float32 if rows.widened is not None else rows.model.dtype
    tolerance = _TOLERANCES.get(computed, _TOLERANCE_OF_16_BITS)
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def _trial(rows: RowModel) -> tuple[bool, bool, str]:
    """Whether examples may share rows, whether they may share beginnings, and what stands against it."""
    if why := _layers_unknown(rows.model):
        return False, False, why
    examples = _examples(rows.model)
    named = list(enumerate(examples))
    with torch.no_grad(), _evaluating(rows.model):
        wanted = _alone(rows, examples)
        found = {}
        for shared in (False, True):
            batch = row_of(named, shared=shared).to(rows.device)
            rows.packs = True
            try:
                found[shared] = _agree(rows, rows._logits(batch)[batch.entry_P], wanted)
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                return False, False, f"this model's forward pass takes no rows ({error}): one example a row"
    if not found[False]:
        return False, False, "examples that share a row reach one another in this model: one example a row"
    told = set(windows_of(rows.model.config))
    if windows_met(batch) != told:
        # The trial's examples are shorter than most windows: it would not see one that the mask alone used to hold.
        return False, False, f"this model's layers do not tell their windows ({sorted(map(str, told))}): one example a row"
    if not found[True]:
        return True, False, "examples that begin alike do not have one beginning in this model: nothing is shared"
    return True, True, ""


def _against_ring(rows: RowModel, ring: Ring) -> str:
    """What stands against rows in parts; empty where they come to the logits that whole rows have. One word for all ranks."""
    if not rows.packs:
        return rows.why
    if rows.drops:
        return "it is trained with dropout, whose draws would depend on who computes what"
    batch = row_of(list(enumerate(_sparse(_examples(rows.model)))), shared=rows.shares)
    why = "its logits are others then"
    with _evaluating(rows.model):
        wanted = rows._logits(batch.to(rows.device))
        own = rows.own(batch).to(rows.device)
        assert own.part is not None
        try:
            numbers_S, found = own.part.numbers_S.to(wanted.device), rows._logits(own)
            is_right = not len(numbers_S) or _agree(rows, found[: len(numbers_S)], wanted[numbers_S])
        except (TypeError, ValueError, RuntimeError) as error:
            is_right, why = False, str(error)
    return "" if ring.agreed(is_right, rows.device) else why


def _sparse(examples: list[Example]) -> list[Example]:
    """The same with a loss on every third token, so that blocks may leave out others."""
    return [Example(example.ids, np.arange(len(example.ids)) % 3 == 2) for example in examples]


def _flex_is_right(model: PreTrainedModel, device: torch.device) -> bool:
    draw = np.random.default_rng(1)  # several of the kernel's blocks of 128 tokens, some of them empty
    beginning, one, two, other = (draw.integers(_vocabulary(model), size=n) for n in (200, 150, 90, 170))
    whole = [np.concatenate([beginning, one]), np.concatenate([beginning, two]), other]
    row = row_of([(n, Example(ids, np.ones(len(ids), np.bool_))) for n, ids in enumerate(whole)], shared=True)
    return flex_is_right(model.config, device, _compute_type(model, device), row.to(device))


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _compute_type(model: PreTrainedModel, device: torch.device) -> torch.dtype:
    """Of products: bf16 where the device has it, as in training (`fullrank.parallel.device.resolve_precision`)."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else model.dtype


def _drops(model: PreTrainedModel) -> bool:
    return drops(model.config) or any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))


def _layers_unknown(model: PreTrainedModel) -> str:
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    unknown = ", ".join(sorted(kinds - {"full_attention", "sliding_attention"}))
    return f"this model has layers that attend neither to all nor to a window ({unknown}): one example a row" if unknown else ""


# ---- the head -----------------------------------------------------------------------------------------------------------


def _head_of(rows: RowModel) -> Head | None:
    """The model's head, where logits are no more than its product with the hidden states, scaled or capped."""
    model = rows.model
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or model.base_model is model:
        return None
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scales = {1.0, *(float(getattr(config, name, None) or 1.0) for name in ("logit_scale", "logits_scaling"))}
    scales |= {1 / scale for scale in scales}
    batch = row_of([(0, _examples(model)[0])], shared=False).to(rows.device)
    with torch.no_grad(), _evaluating(model):
        wanted = rows._logits(batch)
        for scale in sorted(scales, key=lambda scale: scale != 1.0):
            for own_cap in dict.fromkeys((cap, None)):
                bias: nn.Parameter | None = module.bias
                rows.head = Head(cast(nn.Parameter, module.weight), bias, scale, own_cap)
                with contextlib.suppress(AttributeError, TypeError):
                    if _agree(rows, rows._logits(batch), wanted):
                        return rows.head
    return None


# ---- the last block -----------------------------------------------------------------------------------------------------


_NAMES = (
    ("self_attn", "o_proj", "input_layernorm"),
    ("self_attn", "dense", "input_layernorm"),
    ("attn", "c_proj", "ln_1"),
)


def _last_block(model: PreTrainedModel) -> tuple[Any, Any, Any, Any] | None:
    """(block, its attention, the projection that ends that, the norm before it), by the names that families use."""
    blocks = blocks_of(model)
    if blocks:
        block: Any = blocks[-1]
        for attention, projection, norm in _NAMES:
            own = getattr(block, attention, None)
            if own is not None and hasattr(own, projection) and hasattr(block, norm):
                return block, own, getattr(own, projection), getattr(block, norm)
    return None


@contextlib.contextmanager
def _trimmed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the last block computes keys and values for every token, the rest only for those that predict something."""
    found = _last_block(model)
    assert found is not None
    block, attention, projection, norm = found
    before = {module: module.__dict__.get("forward") for module in (block, attention, projection)}
    forwards: dict[Any, Callable[..., Any]] = {module: module.forward for module in before}

    kept_K: torch.Tensor | None = None  # of the row that the attention is at

    # What the parts need travels through the block's arguments, since a recomputing backward pass calls the block once more.
    def block_forward(hidden_1TH: torch.Tensor, *arguments: Any, row: MicroBatch, **named: Any) -> Any:
        own_K = _kept(row)
        out = forwards[block](hidden_1TH[:, own_K], *arguments, row=row, whole_1TH=hidden_1TH, **named)
        if isinstance(out, tuple):
            return (_spread(out[0], own_K, hidden_1TH), *out[1:])
        return _spread(out, own_K, hidden_1TH)

    def attention_forward(*_: Any, whole_1TH: torch.Tensor, row: MicroBatch, **named: Any) -> Any:
        nonlocal kept_K
        kept_K = _kept(row)
        named.pop("hidden_states", None)
        return forwards[attention](norm(whole_1TH), row=row, **named)

    def projection_forward(out_1TH: torch.Tensor) -> Any:
        return forwards[projection](out_1TH[:, kept_K])

    block.forward, attention.forward, projection.forward = block_forward, attention_forward, projection_forward
    try:
        yield
    finally:
        for module in before:
            _restore(module, before[module])


def _kept(row: MicroBatch) -> torch.Tensor:
    if "predicting" not in row.memo:
        row.memo["predicting"] = torch.unique(row.predicting_S)
    found: torch.Tensor = row.memo["predicting"]
    return found


def _restore(module: Any, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = forward


def _spread(kept_1KH: torch.Tensor, kept_K: torch.Tensor, like_1TH: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like_1TH).index_copy(1, kept_K, kept_1KH)


def _trims(rows: RowModel) -> bool:
    """Whether the last block may be trimmed: it must have known parts, and come to the same."""
    if not rows.packs or _last_block(rows.model) is None:
        return False
    batch = row_of(list(enumerate(_sparse(_examples(rows.model)))), shared=rows.shares).to(rows.device)
    with _evaluating(rows.model):
        wanted = rows._logits(batch)
        rows.trims = True
        try:
            return _agree(rows, rows._logits(batch), wanted)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
