"""A batch taken in microbatches: the numbers of the whole batch, in the memory of one of them."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from mtl_jax._checks import is_key, leaf_name, read_integer
from mtl_jax._tasks import describe
from mtl_jax._transforms import read_output, split_aux
from mtl_jax._typing import Losses, PyTree

Argnums = int | Sequence[int] | None
Count = Callable[..., PyTree]


def microbatched(
    losses_fn: Callable[..., Any],
    n: int,
    count: Count | None = None,
    *,
    has_aux: bool = False,
    batch_argnums: Argnums = None,
) -> Callable[..., Any]:
    r"""Take the losses of a batch in n microbatches, one after the other, with the memory of one.

    .. math:: L_k = \frac{\sum_i c_{ik} L_{ik}}{\sum_i c_{ik}}, \qquad
              L_k = 0 \text{ if no microbatch has a label of task } k,

    :math:`L_{ik}` being the loss of task k in microbatch i and :math:`c_{ik}` its count there. What
    is returned takes the place of ``losses_fn`` everywhere: in :func:`mtl_jax.value_and_grad`, for
    any weighting or aggregator, in :func:`mtl_jax.make_train_step`, and as the ``heads`` of
    :func:`mtl_jax.representation_value_and_grad` (their encoder: :func:`microbatched_encoder`).
    The weights are then decided on the losses, and the Gramian, of the whole batch. What a
    backward pass needs of a microbatch is computed anew in it, so each backward pass costs one more
    forward pass; parameters narrower than float32 have their gradients added up in float32.

    Args:
      losses_fn: ``losses_fn(params, *args) -> losses``, or ``(losses, aux)`` with ``has_aux``. A
        loss must be a mean over the examples of its batch, or over those that have a label. An
        example's own loss must not depend on the others: normalisation by batch statistics, in
        training, would use those of the microbatch.
      n: the number of microbatches. With 1, ``losses_fn`` is returned as it is.
      count: where labels can be missing: ``count(*args)`` returns, for the arguments of a
        microbatch, what each task's loss there is a mean over, a pytree like the losses: the number
        of labelled examples (or tokens, or the sum of their weights). By default all microbatches
        count alike, which is right for complete labels only. A microbatch of count 0 does not
        enter, whatever its loss is; its gradient must be finite, which :func:`mtl_jax.masked_mean`
        sees to. Inside ``shard_map`` counts are global, as the losses are.
      has_aux: whether ``losses_fn`` returns auxiliary output. Of this, what does not depend on the
        microbatch (a model state that is left alone, a counter) is returned as it is; an array with
        one row for each example is put together in the order of the batch; a key is that of the
        first microbatch. All else, batch statistics above all, has no value for the whole batch and
        is refused.
      batch_argnums: which arguments of ``losses_fn`` hold the batch, ``params`` being number 0;
        all others by default. Every array in them is split along its leading axis. What is no
        array or has no axis, and all that is in the other arguments (a model state), is given to
        every microbatch as it is. Batches of different sizes, such as one for each task, must be in
        arguments that are named. A ``jax.random.key``, in any argument, is split, so that each
        microbatch draws random numbers of its own.

    Returns:
      The function, to be called as ``losses_fn`` is. Microbatch i consists of the examples i, i +
      n, i + 2n, ...: so the microbatches of a batch that is sharded over devices are each sharded
      over all of them, with no example sent elsewhere.

    Raises:
      ValueError: if ``n`` is not a positive integer; in a call, if ``batch_argnums`` names no
        argument after the parameters, the batch cannot be split into n equal microbatches, its
        arrays differ in the leading axis, the count is not of the structure of the losses, or
        ``aux`` holds what is neither by example nor the same for all microbatches.
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
    n = read_integer(n, "`n`, the number of microbatches,")
    if n == 1:
        return losses_fn

    def in_microbatches(params: PyTree, *args: Any) -> Any:
        def microbatch(params: PyTree, args: list[Any]) -> tuple[tuple[Losses, PyTree | None], Any]:
            losses, aux = read_output(losses_fn(params, *args), has_aux, "`losses_fn`")
            return (losses, None if count is None else _read_counts(count(*args), losses)), aux

        (losses, counts), aux = Microbatches.of(args, n, batch_argnums).run(microbatch, params)
        losses = jax.tree.map(widened, losses)
        if counts is None:
            losses = jax.tree.map(lambda loss: jnp.mean(loss, axis=0), losses)
        else:
            losses = jax.tree.map(_mean_by_count, losses, counts)
        return (losses, aux) if has_aux else losses

    return in_microbatches


def microbatched_encoder(
    encoder: Callable[..., Any],
    n: int,
    *,
    has_aux: bool = False,
    batch_argnums: Argnums = None,
) -> Callable[..., Any]:
    """Take the representation of a batch in n microbatches, one after the other.

    For :func:`mtl_jax.representation_value_and_grad`: the representation of the whole batch and
    the K gradients there are held, but of what the encoder needs for its backward pass only one
    microbatch's. Give it heads in microbatches, too, where their memory matters:
    ``microbatched(heads, n, count)``, with ``count(zs, *args)``.

    Args:
      encoder: ``encoder(params, *args) -> z``, or ``(z, aux)`` with ``has_aux``. Every array in z
        has one row for each example.
      n: the number of microbatches. With 1, ``encoder`` is returned as it is.
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
    n = read_integer(n, "`n`, the number of microbatches,")
    if n == 1:
        return encoder

    def in_microbatches(params: PyTree, *args: Any) -> Any:
        def microbatch(params: PyTree, args: list[Any]) -> tuple[PyTree, Any]:
            output = encoder(params, *args)
            return split_aux(output, "`encoder`", "z") if has_aux else (output, None)

        microbatches = Microbatches.of(args, n, batch_argnums)
        z, aux = microbatches.run(microbatch, params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(z):
            if not by_example(leaf.shape[1:], microbatches.sizes):
                raise ValueError(
                    f"microbatched_encoder: the representation{where(path)} has shape "
                    f"{leaf.shape[1:]} for a microbatch of {listed(microbatches.sizes)} examples; "
                    "it must have one row for each of them."
                )
        z = jax.tree.map(microbatches.together, z)
        return (z, aux) if has_aux else z

    return in_microbatches


def _read_counts(counts: PyTree, losses: Losses) -> PyTree:
    """The counts of a microbatch, checked: one number for each loss."""
    structure, expected = jax.tree.structure(counts), jax.tree.structure(losses)
    if structure != expected:
        raise ValueError(
            f"`count` must return the structure of the losses, {describe(expected)}; got "
            f"{describe(structure)}."
        )
    for (path, leaf), loss in zip(
        jax.tree_util.tree_leaves_with_path(counts), jax.tree.leaves(losses), strict=True
    ):
        dtype = jnp.result_type(leaf)
        if jnp.shape(leaf) != loss.shape or not jnp.issubdtype(dtype, jnp.number):
            raise TypeError(
                f"The count{where(path)} has shape {jnp.shape(leaf)} and dtype {dtype}; it must be "
                "one number for each loss, that of the task's labels in the microbatch, such as "
                "jnp.sum(labelled)."
            )
    return jax.tree.map(jnp.asarray, counts)


def _mean_by_count(
    losses: Float[Array, "microbatches ..."], counts: Real[Array, "microbatches ..."]
) -> Float[Array, "..."]:
    """The mean of the microbatches' losses by their counts, 0 if all of these are."""
    counts = jax.lax.stop_gradient(counts).astype(losses.dtype)
    total = jnp.sum(counts, axis=0, keepdims=True)
    shares = counts / jnp.where(total > 0, total, 1)
    return jnp.sum(jnp.where(shares > 0, shares * losses, 0), axis=0)


class Microbatches(NamedTuple):
    """The arguments of a function, but the first, cut into microbatches.

    Attributes:
      structure: the structure of all arguments, ``None`` standing for the first.
      leaves: their leaves, those of the batch with the shape ``[size, number, ...]``: so an axis
        that is spread over devices stays so, in every microbatch, where it is.
      axes: for each leaf the axis along which the microbatches lie; ``None`` if it is not cut.
      number: the number of microbatches.
      sizes: the numbers of examples in a microbatch: one, or several where tasks have batches of
        their own.
    """

    structure: Any
    leaves: list[Any]
    axes: list[int | None]
    number: int
    sizes: set[int]

    @classmethod
    def of(cls, args: tuple[Any, ...], number: int, argnums: Argnums) -> "Microbatches":
        """Cut the arguments.

        Raises:
          ValueError: if there is nothing to cut, or the batch cannot be cut into equal
            microbatches.
        """
        chosen = _read_argnums(argnums, len(args))
        # With the first argument in front, a path begins with the number of the argument.
        flat, structure = jax.tree_util.tree_flatten_with_path((None, *args))
        leaves, axes, batch = [], [], {}
        for path, leaf in flat:
            scalar, axis = not getattr(leaf, "ndim", 0), None
            if scalar and is_key(leaf):
                leaf, axis = jax.random.split(leaf, number), 0
            elif not scalar and path[0].idx in chosen:
                batch[f"argument {path[0].idx}{where(path[1:])}"], axis = leaf, 1
            leaves.append(leaf)
            axes.append(axis)
        if argnums is None:
            _check_same_size(batch)
        sizes = _microbatch_sizes(batch, number)
        leaves = [
            jnp.reshape(leaf, (leaf.shape[0] // number, number, *leaf.shape[1:]))
            if axis == 1
            else leaf
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        return cls(structure, leaves, axes, number, sizes)

    def arguments(self, index: Array) -> list[Any]:
        """The arguments of one microbatch."""
        leaves = [
            leaf if axis is None else jax.lax.dynamic_index_in_dim(leaf, index, axis, False)
            for leaf, axis in zip(self.leaves, self.axes, strict=True)
        ]
        return list(jax.tree.unflatten(self.structure, leaves)[1:])

    def together(self, leaf: Array) -> Array:
        """An array by microbatch and example, as one in the order of the batch."""
        shape = (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
        return jnp.reshape(jnp.swapaxes(leaf, 0, 1), shape)

    def run(
        self, function: Callable[[PyTree, list[Any]], tuple[PyTree, Any]], params: PyTree
    ) -> tuple[PyTree, Any]:
        """Run a function on every microbatch; what its backward pass needs is computed anew.

        Args:
          function: ``function(params, arguments) -> (output, aux)``.
          params: the first argument.

        Returns:
          The output, stacked over the microbatches, and ``aux`` of the whole batch.
        """
        dtypes = jax.tree.map(jnp.result_type, params)
        # The gradients of the microbatches are added up in the dtype that the parameters have here.
        params = jax.tree.map(widened, params)

        def microbatch(params: PyTree, index: Array) -> tuple[PyTree, Any]:
            # The batch is cut in here, so that no microbatch of it is stored for the backward pass.
            return function(jax.tree.map(_cast, params, dtypes), self.arguments(index))

        structure, varies = _varying_aux(microbatch, params, self.sizes)

        def outputs(index: Array) -> tuple[PyTree, list[Array]]:
            output, aux = jax.checkpoint(microbatch, prevent_cse=False)(params, index)
            leaves = jax.tree.leaves(aux)
            return output, [leaf for leaf, flag in zip(leaves, varies, strict=True) if flag]

        output, stacked = jax.lax.map(outputs, jnp.arange(self.number))
        # What is the same for all microbatches is taken from the first, not stacked for all of
        # them.
        same = [] if all(varies) else jax.tree.leaves(microbatch(params, jnp.asarray(0))[1])
        rows = iter(stacked)
        leaves = [
            self.together(next(rows)) if flag else same[position]
            for position, flag in enumerate(varies)
        ]
        return output, jax.tree.unflatten(structure, leaves)


def _varying_aux(
    microbatch: Callable[[PyTree, Array], tuple[PyTree, Any]], params: PyTree, sizes: set[int]
) -> tuple[Any, list[bool]]:
    """The structure of the auxiliary output and which of its leaves there are by example.

    Raises:
      ValueError: for a leaf that differs between the microbatches otherwise.
    """
    closed, (_, aux) = jax.make_jaxpr(microbatch, return_shape=True)(params, jnp.asarray(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(aux)
    varying = {id(closed.jaxpr.invars[-1])}
    for equation in closed.jaxpr.eqns:
        if any(id(variable) in varying for variable in equation.invars):
            varying.update(id(variable) for variable in equation.outvars)
    outputs = closed.jaxpr.outvars[len(closed.jaxpr.outvars) - len(leaves) :]
    flags = []
    for (path, leaf), variable in zip(leaves, outputs, strict=True):
        flags.append(id(variable) in varying and not (is_key(leaf) and leaf.ndim == 0))
        if flags[-1] and not by_example(leaf.shape, sizes):
            raise ValueError(
                f"microbatched: the auxiliary output{where(path)} of shape {leaf.shape} differs "
                f"between microbatches of {listed(sizes)} examples and is not by example, so it "
                "has no value for the whole batch. Batch statistics cannot be had in microbatches: "
                "normalise by group or layer, use stored statistics, or take the microbatches as "
                "steps, with optax.MultiSteps. Return a metric by example and take its mean "
                "afterwards."
            )
    return structure, flags


def by_example(shape: tuple[int, ...], sizes: set[int]) -> bool:
    """Whether an array of a microbatch has one row for each example."""
    return bool(shape) and shape[0] in sizes


def listed(sizes: set[int]) -> str:
    """The sizes of a microbatch, for an error message."""
    return " or ".join(map(str, sorted(sizes)))


def widened(leaf: Any) -> Any:
    """The leaf, in float32 if it is of narrower floating-point numbers."""
    dtype = jnp.result_type(leaf)
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return _cast(leaf, jnp.dtype("float32")) if narrow else leaf


def _cast(leaf: Any, dtype: Any) -> Any:
    return leaf if jnp.result_type(leaf) == dtype else jnp.asarray(leaf).astype(dtype)


def where(path: Any) -> str:
    """The place of a leaf, for an error message: nothing for a tree that is a leaf."""
    return f" at {leaf_name(path)!r}" if path else ""


def _read_argnums(argnums: Argnums, number: int) -> set[int]:
    """The numbers of the arguments that hold the batch, the parameters being number 0."""
    others = set(range(1, number + 1))
    if argnums is None:
        return others
    chosen = {argnums} if isinstance(argnums, int | np.integer) else set(argnums)
    if not chosen <= others:
        raise ValueError(
            f"`batch_argnums` is {argnums!r}, but the arguments after the parameters, number 0, "
            f"have the numbers {sorted(others)}."
        )
    return chosen


def _check_same_size(batch: dict[str, Any]) -> None:
    """Raise an error for arrays that differ in the leading axis."""
    for (first, leaf), (name, other) in itertools.pairwise(batch.items()):
        if other.shape[0] != leaf.shape[0]:
            raw = any(array.shape == (2,) and array.dtype == np.uint32 for array in (leaf, other))
            raise ValueError(
                f"microbatched: {first} has shape {leaf.shape} and {name} {other.shape}. All "
                "arrays are split along the leading axis, the examples of the batch: name the "
                "arguments that hold the batch in `batch_argnums`; the others go to every "
                "microbatch as they are."
                + " A raw key must be made a key by jax.random.wrap_key_data."
                * raw
            )


def _microbatch_sizes(batch: dict[str, Any], number: int) -> set[int]:
    """The numbers of examples in a microbatch, from the arrays of the batch by their names."""
    if not batch:
        raise ValueError(
            "microbatched: there is no array with a leading axis to split; see `batch_argnums`."
        )
    sizes = set()
    for name, leaf in batch.items():
        size, rest = divmod(leaf.shape[0], number)
        if rest:
            raise ValueError(
                f"microbatched: {name} has shape {leaf.shape}, of which the leading axis cannot be "
                f"split into n={number} equal microbatches. Choose an n that divides it, or pad "
                "the batch with examples that have no labels and pass `count`."
            )
        if size % (devices := _devices(leaf)):
            raise ValueError(
                f"microbatched: {name} has shape {leaf.shape} and is sharded over {devices} "
                f"devices, over which a microbatch of {size} examples cannot be. Choose a smaller "
                "n: devices times n must divide the batch."
            )
        sizes.add(size)
    return sizes


def _devices(leaf: Any) -> int:
    """The devices over which the leading axis is sharded, where JAX's types tell (Explicit)."""
    sharding = jax.typeof(leaf).sharding
    names = sharding.spec[0] if len(sharding.spec) else None
    return math.prod(sharding.mesh.shape[name] for name in np.atleast_1d(names or []))
