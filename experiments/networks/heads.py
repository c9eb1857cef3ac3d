"""Heads: from the shared representation to each task's prediction."""

from collections.abc import Mapping

import flax.linen as nn
from jaxtyping import Array, Float


class Heads(nn.Module):
    """One classifier for each task.

    Each reads its own entry of ``representations``, so that the tasks can be given separate copies
    of one representation.

    Attributes:
      classes: the number of classes of each task.
      hidden: the width of a hidden layer in each head; ``None`` for a linear head.
    """

    classes: Mapping[str, int]
    hidden: int | None = None

    @nn.compact
    def __call__(
        self, representations: Mapping[str, Float[Array, "batch features"]]
    ) -> dict[str, Float[Array, "batch classes"]]:
        """Each task's logits."""
        logits = {}
        for task, number in self.classes.items():
            x = representations[task]
            if self.hidden is not None:
                x = nn.relu(nn.Dense(self.hidden, name=f"{task}_hidden")(x))
            logits[task] = nn.Dense(number, name=task)(x)
        return logits
