"""What a method may know of the batch that the model was called with, beyond the tensor at its site."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SKIP = -100
"""The label that transformers' losses leave out."""


class Batch(NamedTuple):
    """The rows of one forward, as the stack of blocks around a site sees them.

    `place` (batch, length) numbers the tokens of each prompt from 0; it is -1 for all else: padding, virtual tokens,
    completions, and what `generate` has added. `size` (batch, length) is how many the prompt has. A prompt is what a
    row begins with, and each sequence that is packed into one (position ids begin anew there): up to the first label
    where a language model gets labels, all of it where those begin with the second token (the first has none before
    it that could tell it). In the decoder of an encoder-decoder that generates it is what the decoding starts with.
    `decoding`: no column here belongs to a prompt, as in each step of cached generation but the first.
    """

    place: Tensor
    size: Tensor
    decoding: bool = False

    def rows(self, index: Tensor | slice) -> Batch:
        """The same for some rows of the batch."""
        return Batch(self.place[index], self.size[index], self.decoding)
