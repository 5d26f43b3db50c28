"""Many texts to ids at once: by fastokens, where it is installed and says what `tokenizers` says.

fastokens makes ids more than ten times as fast and nothing else: no offsets, and not for every kind of tokenizer. `tokenizers`
is what models are published and served with, so it decides. Both are asked about some trying texts before the first use and
about one text in thirty-two ever after; a tokenizer that fastokens cannot be, or is another, is used without it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from fullrank.errors import FullrankError

#: One text in this many is encoded by both.
_CHECKED = 32

#: What tokenizers disagree about, if they do: runs of white space, digits, contractions, joined and wide letters, bytes.
_TRYING = (
    "",
    " ",
    "\n",
    "  two\n\n\nlines \t and\r\n tabs  \u00a0\u3000 end \n",
    "I'll say IT'S 1234567 at 3.14e-10, don't",
    "camelCase HTTPServer snake_case __init__ (x)=>{y;}\n    return",
    "Zürich ﬁn e\u0301a\u0301 ſ K ǅ ʰ Straße İstanbul",
    "漢字かな交じり文。한국어 العربية हिन्दी ไทย ١٢٣ ⅷ ½ ²",
    "\u200b\u202e\ufeff\U0001f469\u200d\U0001f4bb \U000e0041 \x7f \x01",
)


class BatchEncoder:
    """Ids of texts, without offsets.

    Args:
        tokenizer: of `tokenizers`, which decides.
        description: its tokenizer.json.
        control_tokens: as text.
        name: what messages call it.
    """

    def __init__(self, tokenizer: Tokenizer, description: str, control_tokens: Sequence[str], name: str) -> None:
        self._tokenizer, self._control_tokens, self._name = tokenizer, tuple(control_tokens), name
        self._fast = _fastokens(description)
        self._tried = False
        self._turn = itertools.count()

    def _try(self) -> None:
        """Leaves fastokens where it is another tokenizer; at the first use, since it starts threads, which no fork copies."""
        self._tried = True
        trying = [*_TRYING, *(f"{near}{token}{near}" for token in self._control_tokens for near in ("", " ", "\n", "a"))]
        for add in (False, True):
            found = self._fastly(trying, add)
            if found is None or any(ids != self._exactly(text, add) for text, ids in zip(trying, found, strict=True)):
                self._fast = None

    @property
    def is_fast(self) -> bool:
        """Whether fastokens does it."""
        if not self._tried:
            self._try()
        return self._fast is not None

    def ids(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Ids of each text.

        Args:
            add_special_tokens: whether the tokenizer puts what begins and ends a sequence around each.

        Raises:
            FullrankError: the two disagree.
        """
        found = self._fastly(texts, add_special_tokens) if self.is_fast else None
        if found is None:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        for number in range(next(self._turn) % _CHECKED, len(texts), _CHECKED):
            if found[number] != self._exactly(texts[number], add_special_tokens):
                text = f"{texts[number]!r:.200}"
                raise FullrankError(
                    f"fastokens and tokenizers encode a text differently with the tokenizer of {self._name}: {text}",
                    hint="pip uninstall fastokens and run again, which prepares everything anew; it is slower and exact",
                )
        return found

    def _exactly(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _fastly(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]] | None:
        """None where it cannot: it refuses what its vocabulary has no bytes for, which `tokenizers` leaves out."""
        if self._fast is None:
            return None
        try:
            return [self._fast.encode(text, add_special_tokens).ids for text in texts]
        except (ValueError, NotImplementedError):
            return None


def _fastokens(description: str) -> Any:
    """A tokenizer of fastokens; None where it is not installed or does not take this kind."""
    if importlib.util.find_spec("fastokens") is None:
        return None
    from fastokens import Tokenizer as FastTokenizer

    try:
        return FastTokenizer.from_json_str(description)
    except (ValueError, NotImplementedError):
        return None


def version() -> str:
    """What encodes batches: shards are not shared between them, though they hold the same."""
    try:
        return f"fastokens {importlib.metadata.version('fastokens')}"
    except importlib.metadata.PackageNotFoundError:
        return "tokenizers"
