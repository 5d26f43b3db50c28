"""What only torch and transformers can tell about a recipe: what its `auto`s mean here, its model, its tokenizer and template.

It can be found here, or in a process that ends: preparing data needs none of these libraries, and takes several hundred megabytes
less without them.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from fullrank.errors import FullrankError, UsageError
from fullrank.models.resolved import ResolvedModel
from fullrank.recipe import Recipe
from fullrank.sequences.chat import ChatFormat


@dataclass(frozen=True)
class Described:
    """A recipe and what it comes to on this machine."""

    recipe: Recipe
    """With every `auto` replaced by what it means here."""
    base: ResolvedModel
    chat: ChatFormat


def describe(recipe: Recipe, tell: Callable[[str], None], *, needs_weights: bool = True) -> Described:
    """Finds it here.

    Args:
        recipe: as loaded.
        tell: called with words on what takes time.
        needs_weights: see `fullrank.models.source.resolve`.

    Raises:
        FullrankError: the device is not there, the model cannot be found or is refused, or the template cannot be used.
    """
    from fullrank.models.load import load_chat_format
    from fullrank.models.source import resolve
    from fullrank.parallel import device as devices

    device = devices.choose(recipe.machine.device)
    if recipe.machine.optimizer_states == "host" and device.type != "cuda":
        raise UsageError(
            f"machine.optimizer_states: host is memory beside a CUDA device, and the device here is {device.type}",
            hint="use machine.optimizer_states=disk",
        )
    precision, why = devices.resolve_precision(recipe.train.precision, device)
    if why:
        tell(why)
    resolved = recipe.model_copy(
        update={
            "machine": recipe.machine.model_copy(update={"device": device.type, "gradients": recipe.gradients}),
            "train": recipe.train.model_copy(update={"precision": precision, "max_grad_norm": recipe.train.clip_norm}),
        }
    )
    base = resolve(recipe.model, tell, needs_weights=needs_weights)
    data = recipe.data
    chat = load_chat_format(base.folder, data.chat_template, data.template_date, recipe.model.source)
    return Described(resolved, base, chat)


def describe_elsewhere(recipe: Recipe, tell: Callable[[str], None]) -> Described:
    """Finds it in a process of its own; see `describe`."""
    command = [sys.executable, "-m", "fullrank.workflows.described"]
    env = {key: value for key, value in os.environ.items() if key != "USE_TORCH"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert process.stdin and process.stdout
    with process.stdin, process.stdout:
        pickle.dump(recipe, process.stdin)
        process.stdin.close()
        while True:
            try:
                said = pickle.load(process.stdout)
            except EOFError:
                raise FullrankError(f"the process that describes the model ended with {process.wait()}") from None
            if isinstance(said, str):
                tell(said)
                continue
            process.wait()
            if isinstance(said, FullrankError):
                raise said
            assert isinstance(said, Described)
            return said


def main() -> None:
    """Answers `describe_elsewhere`: words, then what was found or the error."""
    sink = sys.stdout.buffer
    sys.stdout = sys.stderr

    def say(something: object) -> None:
        pickle.dump(something, sink)
        sink.flush()

    try:
        say(describe(pickle.load(sys.stdin.buffer), say))
    except FullrankError as error:
        say(error)


if __name__ == "__main__":
    from fullrank.workflows.described import main as answer  # so that what is sent is known by its module's name

    answer()
