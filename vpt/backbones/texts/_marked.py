"""The part of a text family that reads a tokenizer's own marks off its ids."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, arange

from vpt.backbones.text import TextTower, Tokenizer
from vpt.errors import InputError


class Marked(TextTower):
    """Texts are a begin mark or none, words, an end mark, padding.

    Which ids mark end and padding (SigLIP's are the same) the tokenizer shows by an empty text.
    """

    seen_pads: ClassVar[int | None] = 0  # after the end, that matter; None: all

    def tokenize(self, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> Tensor:
        """Token ids (len(texts), T), cut after what matters of the longest text.

        Raises:
            InputError: a text that is longer than the tower's context; no tokenizer is known.
        """
        ids = super().tokenize(texts, tokenizer)
        end, pad = self._marks(tokenizer)
        # a tokenizer that truncates leaves no room for its padding, so the last column tells
        too_long = (ids[:, -2 if end == pad else -1] != pad).nonzero()
        if len(too_long):
            raise self._too_long(texts[int(too_long[0])], ids)
        stop = None if self.seen_pads is None else int(_lengths(ids, pad).max()) + self.seen_pads
        return ids[:, :stop]

    def words(self, text: str, tokenizer: Tokenizer | None = None) -> Tensor:
        """Token ids (N,) of the text's own words."""
        ids = self.tokenize([text], tokenizer)
        end, pad = self._marks(tokenizer)
        return ids[0, self.start : int(_lengths(ids, pad)) - (end != pad)]

    def _too_long(self, text: str, ids: Tensor) -> InputError:
        return InputError(
            f"{text!r} does not fit the text tower's {ids.shape[1]} tokens: shorten it"
        )

    def _marks(self, tokenizer: Tokenizer | None) -> tuple[int, int]:
        """The ids of end and padding."""
        ids = super().tokenize([""], tokenizer)[0]
        return int(ids[self.start]), int(ids[-1])


def _lengths(ids: Tensor, pad: int) -> Tensor:
    """(N,): how many of ids (N, T) stand before the padding."""
    return ((ids != pad) * arange(1, ids.shape[1] + 1, device=ids.device)).amax(1)
