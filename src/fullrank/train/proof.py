"""After the last step: what the run may claim, checked.

Every trainable tensor changed; the export has the base's tensors, keeps its ties, and computes bitwise the logits of the trained
weights in a fresh process. What does not hold is an error: the export is then not put under its name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fullrank.errors import ProofError
from fullrank.models import export
from fullrank.models.load import Base, held_by, load_model
from fullrank.models.resolved import ResolvedModel
from fullrank.models.streamed import StreamedWeights
from fullrank.records import Proof


def unchanged_tensors(tuned: PreTrainedModel, base: Path) -> list[str]:
    """Trainable tensors that equal those of the base's folder in the type they are trained in, bit by bit."""
    held = held_by(base, tuned)
    if held is None:  # the base is needed as a model
        before = dict(load_model(base, device=torch.device("cpu"), dtype=tuned.dtype).named_parameters())
        held = {name: torch.equal(p.detach().cpu(), before[name].detach()) for name, p in tuned.named_parameters()}
    return [name for name, p in tuned.named_parameters() if p.requires_grad and held[name]]


def check_changed(
    unchanged: Sequence[str], never_reached: set[str], *, rounded: bool, trained: int
) -> tuple[list[str], list[str]]:
    """The unchanged tensors that no step's gradient ever reached (an expert never routed to), and those that rounding to 16 bits
    left where they were, as it may with small tensors and few steps: listed, not errors.

    Args:
        unchanged: from `unchanged_tensors`.
        never_reached: by any gradient.
        rounded: whether weights are of 16 bits.
        trained: number of trainable tensors.

    Raises:
        ProofError: naming tensors that had gradients and still did not change; with weights of 16 bits only where none did.
    """
    stuck = [name for name in unchanged if name not in never_reached]
    if stuck and (not rounded or len(unchanged) == trained):
        raise ProofError(
            f"{len(stuck)} trainable tensors are bitwise what they were before training although they had gradients: "
            + ", ".join(stuck[:5]),
            hint=f"their updates were too small for {'16 bits' if rounded else 'fp32'}; raise train.optimizer.learning_rate or "
            "the number of steps",
        )
    return [name for name in unchanged if name in never_reached], stuck


def export_and_prove(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: ResolvedModel,
    *,
    dtype: torch.dtype,
    stop_ids: Sequence[int],
    probe_ids_1T: torch.Tensor,
    unreached: Sequence[str],
    unmoved: Sequence[str],
    folder: Path,
) -> Proof:
    """Casts the model, writes it into an existing empty folder, and checks the folder against the model.

    Args:
        model: the trained weights; cast in place.
        dtype: of the export.
        stop_ids: what the exported generation configuration stops at.
        probe_ids_1T: the row whose (last) logits are compared.
        unreached: from `check_changed`.
        unmoved: likewise.

    Raises:
        ProofError: when the folder is not the model.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    export.cast(model, dtype)
    expected = export.probe_logits(model, probe_ids_1T)
    tied = export.tied_names(model)
    export.write_model(model, tokenizer, stop_ids, folder)
    text = str(tokenizer.decode(probe_ids_1T[0].tolist(), clean_up_tokenization_spaces=False))
    with tempfile.TemporaryDirectory(prefix="fullrank-") as scratch:
        fresh = export.fresh_process(folder, probe_ids_1T, text, model.device, Path(scratch))
    found = fresh.logits_1TV
    changed, stored = export.changed_tensors(folder, base.folder)
    proof = Proof(
        trainable_tensors=len(trainable),
        changed_tensors=len(trainable) - len(unreached) - len(unmoved),
        never_reached_tensors=list(unreached),
        unmoved_tensors=list(unmoved),
        export_dtype=str(dtype).removeprefix("torch."),
        export_keys_equal=export.keys_equal(folder, base.folder, tied),
        export_logits_identical=torch.equal(expected, found),
        export_weights_identical=None,
        export_probe_tokens=expected.shape[1],
        export_changed_tensors=changed,
        export_tensors=stored,
        ties_kept=tied == fresh.tied and bool(tied) == base.facts.tied_embeddings,
        tokenizer_travels=_travels(fresh, tokenizer, text, stop_ids),
    )
    return _held(proof, folder, tied ^ fresh.tied, expected, found)


def export_divided(
    model: PreTrainedModel,
    weights: Iterable[tuple[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    base: ResolvedModel,
    *,
    dtype: torch.dtype,
    stop_ids: Sequence[int],
    folder: Path,
) -> tuple[list[str], dict[str, str]]:
    """Writes a model that is divided among ranks, tensor by tensor, into an existing empty folder.

    Args:
        model: names, shapes and ties; of its numbers this rank has a part.
        weights: whole, one after the other (`fullrank.parallel.fsdp2.Fsdp2.whole_weights`).
        dtype: of the export.
        stop_ids: what the exported generation configuration stops at.

    Returns:
        The trainable tensors that are what they were in the base, bit by bit in the type they are trained in; and the SHA-256 of
        every tensor as it was written.
    """
    export.write_description(model, dtype, tokenizer, stop_ids, folder)
    writer, before = StreamedWeights(folder, model, dtype), Base(base.folder, model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    unchanged: list[str] = []
    digests: dict[str, str] = {}
    for name, whole in weights:
        if name in trained and before.holds(name, whole):
            unchanged.append(name)
        cast = whole.to(dtype)
        digests[name] = export.digest(cast)
        writer.write(name, cast)
    return unchanged, digests


def prove_divided(
    digests: Mapping[str, str],
    tied: set[str],
    tokenizer: PreTrainedTokenizerBase,
    base: ResolvedModel,
    *,
    trainable: int,
    dtype: torch.dtype,
    stop_ids: Sequence[int],
    probe_ids_1T: torch.Tensor,
    unreached: Sequence[str],
    unmoved: Sequence[str],
    folder: Path,
) -> Proof:
    """As the checks of `export_and_prove`, for a model that no process held: the fresh process finds the digests of its weights.

    Raises:
        ProofError: when the folder is not the model.
    """
    text = str(tokenizer.decode(probe_ids_1T[0].tolist(), clean_up_tokenization_spaces=False))
    with tempfile.TemporaryDirectory(prefix="fullrank-") as scratch:
        fresh = export.fresh_process(folder, probe_ids_1T, text, torch.device("cpu"), Path(scratch))
    changed, stored = export.changed_tensors(folder, base.folder)
    proof = Proof(
        trainable_tensors=trainable,
        changed_tensors=trainable - len(unreached) - len(unmoved),
        never_reached_tensors=list(unreached),
        unmoved_tensors=list(unmoved),
        export_dtype=str(dtype).removeprefix("torch."),
        export_keys_equal=export.keys_equal(folder, base.folder, tied),
        export_logits_identical=None,
        export_weights_identical=fresh.digests == dict(digests),
        export_probe_tokens=0,
        export_changed_tensors=changed,
        export_tensors=stored,
        ties_kept=tied == fresh.tied and bool(tied) == base.facts.tied_embeddings,
        tokenizer_travels=_travels(fresh, tokenizer, text, stop_ids),
    )
    return _held(proof, folder, tied ^ fresh.tied)


def _travels(fresh: export.Fresh, tokenizer: PreTrainedTokenizerBase, text: str, stop_ids: Sequence[int]) -> bool:
    same_ids = fresh.text_ids == list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return same_ids and fresh.chat_template == tokenizer.chat_template and sorted(fresh.stop_ids) == sorted(stop_ids)


def _held(
    proof: Proof,
    folder: Path,
    apart: set[str],
    expected: torch.Tensor | None = None,
    found: torch.Tensor | None = None,
) -> Proof:
    """The proof, if all of it holds.

    Raises:
        ProofError: what does not.
    """
    if not proof.export_keys_equal:
        raise ProofError(f"{folder}: the export's tensors are not the base model's: names or shapes differ")
    if not proof.ties_kept:
        raise ProofError(f"{folder}: tied weights came apart: {sorted(apart) or 'input and output embeddings'}")
    if not proof.tokenizer_travels:
        raise ProofError(f"{folder}: a fresh process finds another tokenizer, chat template or stop tokens than training used")
    if proof.export_weights_identical is False:
        raise ProofError(f"{folder}: a fresh process loads other weights than the ranks held")
    if proof.export_logits_identical is False:
        assert expected is not None and found is not None
        worst = float((expected.float() - found.float()).abs().max()) if expected.shape == found.shape else float("nan")
        raise ProofError(
            f"{folder}: a fresh process computes other logits than the trained weights (largest difference {worst:g})"
        )
    return proof
