"""Float64 for the problems of K numbers, whatever precision the network has.

A float32 Gramian holds more than a float32 solver can use: with dependent gradients, or gradients
of very different lengths, what decides between two pivots lies in the last digits, and they are
lost on the way. JAX has no float64 arrays unless ``jax_enable_x64`` is set. But a primitive may
compute in float64 what it gets and returns in float32, and that is what is done here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64  # pyright: ignore[reportAttributeAccessIssue]

T = TypeVar("T")


def in_float64(function: Callable[..., T], *args: Any) -> T:
    """Call a function of arrays in float64, and return its results in the precision of these.

    Args:
      function: ``function(*args, eps=...)``, ``eps`` being the rounding unit of the first argument
        as it came, with which what is noise in it can be told. It must not read other arrays.
      *args: arrays and pytrees of arrays; those narrower than float32 are widened to it.

    Returns:
      The results. On TPU, which has no float64, they are computed in float32.
    """
    leaves, structure = jax.tree.flatten(args)
    leaves = [_at_least_float32(jnp.asarray(leaf)) for leaf in leaves]
    args = jax.tree.unflatten(structure, leaves)
    real = jnp.issubdtype(leaves[0].dtype, jnp.floating)  # if not, `function` raises its error
    function = functools.partial(
        function, eps=float(jnp.finfo(leaves[0].dtype).eps) if real else 0.0
    )

    def flat(*leaves: Array) -> list[Array]:
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))

    shapes, result_structure = jax.tree.flatten(jax.eval_shape(function, *args))
    types = tuple((one.shape, one.dtype) for one in shapes)
    found = _in_float64.bind(*leaves, function=flat, types=types, batch=())
    return jax.tree.unflatten(result_structure, found)


def _at_least_float32(leaf: Array) -> Array:
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else leaf


_in_float64 = Primitive("in_float64")
_in_float64.multiple_results = True


@_in_float64.def_impl
def _run(*leaves: Array, **params: Any) -> Sequence[Array]:
    return jax.jit(functools.partial(_in_float64.bind, **params))(*leaves)


@_in_float64.def_abstract_eval
def _results(
    *leaves: ShapedArray, function: Any, types: Any, batch: tuple[int, ...]
) -> list[ShapedArray]:
    return [ShapedArray((*batch, *shape), dtype) for shape, dtype in types]


def _widened(*leaves: Array, function: Any, types: Any, batch: tuple[int, ...]) -> list[Array]:
    for _ in batch:
        function = jax.vmap(function)
    wide = jnp.dtype("float64") if jax.config.read("jax_enable_x64") else jnp.dtype("float32")
    found = function(
        *(
            leaf.astype(wide) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
            for leaf in leaves
        )
    )
    return [leaf.astype(dtype) for leaf, (_, dtype) in zip(found, types, strict=True)]


def _lower(context: Any, *leaves: Any, **params: Any) -> Any:
    # What is traced and lowered in here, and only that, knows float64.
    with enable_x64(True):
        rule = mlir.lower_fun(functools.partial(_widened, **params), multiple_results=True)
        return rule(context, *leaves)


mlir.register_lowering(_in_float64, _lower)
mlir.register_lowering(
    _in_float64,
    lambda context, *leaves, **params: mlir.lower_fun(
        functools.partial(_widened, **params), multiple_results=True
    )(context, *leaves),
    platform="tpu",
)


def _batch(
    leaves: Sequence[Array], axes: Sequence[int | None], *, batch: tuple[int, ...], **params: Any
) -> tuple[Sequence[Array], list[int]]:
    leaves = [jnp.asarray(leaf) for leaf in leaves]  # a number may come as one of Python's
    pairs = list(zip(leaves, axes, strict=True))
    size = next(leaf.shape[axis] for leaf, axis in pairs if axis is not None)
    moved = [
        jnp.broadcast_to(leaf, (size, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in pairs
    ]
    found = _in_float64.bind(*moved, batch=(size, *batch), **params)
    return found, [0] * len(found)


batching.primitive_batchers[_in_float64] = _batch
