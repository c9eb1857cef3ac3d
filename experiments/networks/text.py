"""Encoders of texts, and the hashed n-grams that they read."""

import zlib
from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from experiments.networks.convolution import Conv

PADDING = 0
"""The id that stands where a text has no further n-gram; no n-gram has it."""


def character_ngrams(text: str, lengths: Sequence[int]) -> list[str]:
    """All runs of so many characters, from the text's start on; its two ends count as a space."""
    text = f" {text} "
    return [text[i : i + n] for i in range(len(text)) for n in lengths if i + n <= len(text)]


def hashed_ids(
    texts: Iterable[Iterable[str]], buckets: int, max_length: int
) -> Int32[np.ndarray, "texts max_length"]:
    """Ids of strings by a hash that is the same in every process.

    Args:
      texts: the strings (words, n-grams) of each text.
      buckets: the number of ids, :data:`PADDING` included.
      max_length: what a text has beyond this number of strings is left out.

    Returns:
      For each text the ids of its strings, in ``1 .. buckets - 1``, then :data:`PADDING`.
    """
    rows = [
        [1 + zlib.crc32(string.encode()) % (buckets - 1) for string in strings][:max_length]
        for strings in texts
    ]
    ids = np.full((len(rows), max_length), PADDING, np.int32)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = row
    return ids


class BagEncoder(nn.Module):
    """The sum of the embeddings of a text's n-grams, over the root of their number.

    So its scale does not depend on the text's length; that of a mean falls with it, and trains
    slower.

    Attributes:
      buckets: the number of ids.
      width: the size of the representation.
    """

    buckets: int
    width: int

    @nn.compact
    def __call__(self, ids: Int32[Array, "batch length"]) -> Float[Array, "batch features"]:
        """Encode texts."""
        present = (ids != PADDING)[..., None]
        embeddings = nn.Embed(self.buckets, self.width)(ids)
        number = jnp.maximum(present.sum(axis=1), 1).astype(embeddings.dtype)
        return embeddings.sum(axis=1, where=present) / jnp.sqrt(number)


class ConvTextEncoder(nn.Module):
    """Word embeddings, one convolution, and the maximum and mean over the text (after Kim, 2014).

    Attributes:
      buckets: the number of ids.
      embedding: the size of the embeddings.
      width: the number of features; the representation has twice the size.
      window: the number of consecutive words that a feature sees.

    References:
      Kim, `Convolutional Neural Networks for Sentence Classification
      <https://arxiv.org/abs/1408.5882>`_, 2014
    """

    buckets: int
    embedding: int = 64
    width: int = 128
    window: int = 3

    @nn.compact
    def __call__(self, ids: Int32[Array, "batch length"]) -> Float[Array, "batch features"]:
        """Encode texts."""
        present = (ids != PADDING)[..., None]
        x = nn.Embed(self.buckets, self.embedding)(ids) * present
        x = nn.relu(Conv(self.width, (self.window,))(x))
        number = jnp.maximum(present.sum(axis=1), 1).astype(x.dtype)
        mean = x.sum(axis=1, where=present) / number
        return jnp.concatenate([x.max(axis=1, where=present, initial=0), mean], axis=-1)


class RecurrentEncoder(nn.Module):
    """Word embeddings and a bidirectional recurrent layer of gated units (Cho et al., 2014).

    The representation has a vector for each word: the state of the layer that has read the text up
    to it, and of the one that has read it from the end. It is 0 where the text is over.

    Attributes:
      words: the number of ids.
      embedding: the size of the embeddings.
      width: the number of units in each direction; the representation has twice the size.
      dropout: the share of the embeddings' and of the representation's elements that are set to 0
        in training, which needs a key named ``dropout``.

    References:
      Cho et al., `Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine
      Translation <https://arxiv.org/abs/1406.1078>`_, 2014
    """

    words: int
    embedding: int = 64
    width: int = 64
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, ids: Int32[Array, "batch length"], train: bool = False
    ) -> Float[Array, "batch length features"]:
        """Encode texts."""
        present = ids != PADDING
        x = nn.Embed(self.words, self.embedding)(ids)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        directions = nn.RNN(nn.GRUCell(self.width)), nn.RNN(nn.GRUCell(self.width))
        z = nn.Bidirectional(*directions)(x, seq_lengths=present.sum(axis=1))
        z = nn.Dropout(self.dropout, deterministic=not train)(z)
        return z * present[..., None]


def mean_over_text(
    z: Float[Array, "batch length features"], ids: Int32[Array, "batch length"]
) -> Float[Array, "batch features"]:
    """The mean of the words' vectors; the padding does not count."""
    present = (ids != PADDING)[..., None]
    number = jnp.maximum(present.sum(axis=1), 1).astype(z.dtype)
    return z.sum(axis=1, where=present) / number
