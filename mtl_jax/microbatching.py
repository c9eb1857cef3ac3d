"""A batch taken in pieces: the numbers of the whole batch, in the memory of one piece."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from mtl_jax.pieces import Argnums, Pieces, by_example, listed, where, widened
from mtl_jax.pytree import PyTree
from mtl_jax.tasks import Losses, describe
from mtl_jax.weighing import read_output, split_aux

Count = Callable[..., PyTree]


def microbatched(
    losses_fn: Callable[..., Any],
    n: int,
    count: Count | None = None,
    *,
    has_aux: bool = False,
    batch_argnums: Argnums = None,
) -> Callable[..., Any]:
    r"""Take the losses of a batch in n pieces, one after the other, with the memory of one.

    .. math:: L_k = \frac{\sum_i c_{ik} L_{ik}}{\sum_i c_{ik}}, \qquad
              L_k = 0 \text{ if no piece has a label of task } k,

    :math:`L_{ik}` being the loss of task k in piece i and :math:`c_{ik}` its count there. What is
    returned takes the place of ``losses_fn`` everywhere: in :func:`mtl_jax.value_and_grad`, for
    any weighting or aggregator, in :func:`mtl_jax.make_train_step`, and as the ``heads`` of
    :func:`mtl_jax.representation_value_and_grad` (their encoder: :func:`microbatched_encoder`).
    The weights are then decided on the losses, and the Gramian, of the whole batch. What a
    backward pass needs of a piece is computed anew in it, so each backward pass costs one more
    forward pass; parameters narrower than float32 have their gradients added up in float32.

    Args:
      losses_fn: ``losses_fn(params, *args) -> losses``, or ``(losses, aux)`` with ``has_aux``. A
        loss must be a mean over the examples of its batch, or over those that have a label. An
        example's own loss must not depend on the others: normalisation by batch statistics, in
        training, would use those of the piece.
      n: the number of pieces. With 1, ``losses_fn`` is returned as it is.
      count: where labels can be missing: ``count(*args)`` returns, for the arguments of a piece,
        what each task's loss there is a mean over, a pytree like the losses: the number of
        labelled examples (or tokens, or the sum of their weights). By default all pieces count
        alike, which is right for complete labels only. A piece of count 0 does not enter,
        whatever its loss is; its gradient must be finite, which :func:`mtl_jax.masked_mean` sees
        to. Inside ``shard_map`` counts are global, as the losses are.
      has_aux: whether ``losses_fn`` returns auxiliary output. Of this, what does not depend on the
        piece (a model state that is left alone, a counter) is returned as it is; an array with
        one row for each example is put together in the order of the batch; a key is that of the
        first piece. All else, batch statistics above all, has no value for the whole batch and
        is refused.
      batch_argnums: which arguments of ``losses_fn`` hold the batch, ``params`` being number 0;
        all others by default. Every array in them is split along its leading axis. What is no
        array or has no axis, and all that is in the other arguments (a model state), is given to
        every piece as it is. Batches of different sizes, such as one for each task, must be in
        arguments that are named. A ``jax.random.key``, in any argument, is split, so that each
        piece draws random numbers of its own.

    Returns:
      The function, to be called as ``losses_fn`` is. Piece i consists of the examples i, i + n,
      i + 2n, ...: so the pieces of a batch that is sharded over devices are each sharded over all
      of them, with no example sent elsewhere.

    Raises:
      ValueError: if ``n`` is not a positive integer; in a call, if the batch cannot be split into
        n equal pieces, its arrays differ in the leading axis, the count is not of the structure
        of the losses, or ``aux`` holds what is neither by example nor the same for all pieces.
      TypeError: if the count of a task is not one number.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def losses_fn(params, x, labelled):
      ...     return {"a": mtl_jax.masked_mean((params * x - 1) ** 2, labelled)}
      >>> def count(x, labelled):
      ...     return {"a": jnp.sum(labelled)}
      >>> x, labelled = jnp.arange(4.0), jnp.array([True, False, False, False])
      >>> float(losses_fn(2.0, x, labelled)["a"])
      1.0
      >>> float(mtl_jax.microbatched(losses_fn, 2, count)(2.0, x, labelled)["a"])
      1.0
      >>> float(mtl_jax.microbatched(losses_fn, 2)(2.0, x, labelled)["a"])  # a mean of means
      0.5
    """
    _check_number(n)
    if n == 1:
        return losses_fn

    def in_pieces(params: PyTree, *args: Any) -> Any:
        def piece(params: PyTree, args: list[Any]) -> tuple[tuple[Losses, PyTree | None], Any]:
            losses, aux = read_output(losses_fn(params, *args), has_aux, "`losses_fn`")
            return (losses, None if count is None else _read_counts(count(*args), losses)), aux

        (losses, counts), aux = Pieces.of(args, n, batch_argnums).run(piece, params)
        losses = jax.tree.map(widened, losses)
        if counts is None:
            losses = jax.tree.map(jnp.mean, losses)
        else:
            losses = jax.tree.map(_mean_by_count, losses, counts)
        return (losses, aux) if has_aux else losses

    return in_pieces


def microbatched_encoder(
    encoder: Callable[..., Any],
    n: int,
    *,
    has_aux: bool = False,
    batch_argnums: Argnums = None,
) -> Callable[..., Any]:
    """Take the representation of a batch in n pieces, one after the other.

    For :func:`mtl_jax.representation_value_and_grad`: the representation of the whole batch and
    the K gradients there are held, but of what the encoder needs for its backward pass only one
    piece's. Give it heads in pieces, too, where their memory matters: ``microbatched(heads, n,
    count)``, with ``count(zs, *args)``.

    Args:
      encoder: ``encoder(params, *args) -> z``, or ``(z, aux)`` with ``has_aux``. Every array in z
        has one row for each example.
      n: the number of pieces. With 1, ``encoder`` is returned as it is.
      has_aux: whether ``encoder`` returns auxiliary output, of which is returned what
        :func:`microbatched` says.
      batch_argnums: as in :func:`microbatched`.

    Returns:
      The function, to be called as ``encoder`` is.

    Raises:
      ValueError: as :func:`microbatched`, and if an array in z does not have one row for each
        example.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> encoder = mtl_jax.microbatched_encoder(lambda params, x: params * x, 2)
      >>> encoder(2.0, jnp.arange(4.0)).tolist()
      [0.0, 2.0, 4.0, 6.0]
    """
    _check_number(n)
    if n == 1:
        return encoder

    def in_pieces(params: PyTree, *args: Any) -> Any:
        def piece(params: PyTree, args: list[Any]) -> tuple[PyTree, Any]:
            output = encoder(params, *args)
            return split_aux(output, "`encoder`", "z") if has_aux else (output, None)

        pieces = Pieces.of(args, n, batch_argnums)
        z, aux = pieces.run(piece, params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(z):
            if not by_example(leaf.shape[1:], pieces.sizes):
                raise ValueError(
                    f"microbatched_encoder: the representation{where(path)} has shape "
                    f"{leaf.shape[1:]} for a piece of {listed(pieces.sizes)} examples; it must "
                    "have one row for each of them."
                )
        z = jax.tree.map(pieces.together, z)
        return (z, aux) if has_aux else z

    return in_pieces


def _check_number(n: int) -> None:
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
        raise ValueError(f"`n` is a number of pieces, an integer of at least 1, got {n!r}.")


def _read_counts(counts: PyTree, losses: Losses) -> PyTree:
    """The counts of a piece, checked: one number for each loss."""
    structure, expected = jax.tree.structure(counts), jax.tree.structure(losses)
    if structure != expected:
        raise ValueError(
            f"`count` must return the structure of the losses, {describe(expected)}; got "
            f"{describe(structure)}."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(counts):
        dtype = jnp.result_type(leaf)
        if jnp.shape(leaf) or not jnp.issubdtype(dtype, jnp.number):
            raise TypeError(
                f"The count{where(path)} has shape {jnp.shape(leaf)} and dtype {dtype}; it must be "
                "one number, that of the task's labels in the piece, such as jnp.sum(labelled)."
            )
    return jax.tree.map(jnp.asarray, counts)


def _mean_by_count(
    losses: Float[Array, "pieces"], counts: Real[Array, "pieces"]
) -> Float[Array, ""]:
    """The mean of the pieces' losses by their counts, 0 if all of these are."""
    counts = jax.lax.stop_gradient(counts).astype(losses.dtype)
    total = jnp.sum(counts)
    shares = counts / jnp.where(total > 0, total, 1)
    return jnp.sum(jnp.where(shares > 0, shares * losses, 0))
