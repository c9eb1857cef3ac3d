"""Encoders of vectors."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float


class DenseEncoder(nn.Module):
    """Dense layers, each followed by SiLU.

    Attributes:
      widths: the size of each layer; the last one is that of the representation.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch features"]:
        """Encode vectors."""
        for width in self.widths:
            x = nn.silu(nn.Dense(width)(x))
        return x
