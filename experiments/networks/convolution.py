"""A convolution that is as fast inside a loop as outside, on CPU too."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

Padding = str | Sequence[tuple[int, int]]

# XLA:CPU hands a convolution to its fast kernel only in canonical layout: in all three arrays
# channels last, inputs before outputs in the kernel. It brings convolutions into that layout in the
# entry computation alone. The gradients that JAX derives are not in it, and in the body of a `scan`
# or a branch of a `cond` they fall back to a plain loop, 20 to 100 times slower. So the transposes
# are written out here, behind a barrier: without it XLA folds them into the convolution again.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    inputs: Float[Array, "batch *space channels"],
    kernel: Float[Array, "*window channels features"],
    strides: Sequence[int],
    padding: Padding,
) -> Float[Array, "batch *out_space features"]:
    """Convolution with channels last; the gradients are those of ``lax.conv_general_dilated``.

    It has a ``vjp`` but no ``jvp``: forward-mode differentiation raises JAX's ``TypeError``.

    Args:
      inputs: the examples.
      kernel: the kernel, with as many window axes as the inputs have space axes.
      strides: the step of the window along each space axis.
      padding: ``"SAME"``, ``"VALID"``, or the padding before and after for each space axis.

    Returns:
      The convolution, in the dtype of the arguments.
    """
    return _convolve(inputs, kernel, strides, padding)


def _convolve(
    inputs: Array, kernel: Array, strides: Sequence[int], padding: Padding, **options: Any
) -> Array:
    space = "012"[: inputs.ndim - 2]
    layout = (f"N{space}C", f"{space}IO", f"N{space}C")
    return lax.conv_general_dilated(
        inputs, kernel, strides, padding, dimension_numbers=layout, **options
    )


def _forward(
    inputs: Array, kernel: Array, strides: Sequence[int], padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(inputs, kernel, strides, padding), (inputs, kernel)


def _backward(
    strides: Sequence[int], padding: Padding, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    inputs, kernel = residuals
    axes = tuple(range(inputs.ndim - 2))
    sizes, window = inputs.shape[1:-1], kernel.shape[:-2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sizes, window, strides, padding)
    before = [low for low, _ in padding]
    # The distance that the window travels along each space axis.
    travel = [(cotangent.shape[1 + axis] - 1) * strides[axis] for axis in axes]

    # The batch takes the place of the channels. A negative padding cuts off what a strided window
    # never reached.
    kernel_cotangent = _convolve(
        lax.optimization_barrier(inputs.swapaxes(0, -1)),
        lax.optimization_barrier(
            cotangent.transpose(*(1 + axis for axis in axes), 0, inputs.ndim - 1)
        ),
        (1,) * len(axes),
        [(before[i], travel[i] + window[i] - sizes[i] - before[i]) for i in axes],
        rhs_dilation=strides,
    ).transpose(*(1 + axis for axis in axes), 0, inputs.ndim - 1)
    inputs_cotangent = _convolve(
        cotangent,
        lax.optimization_barrier(lax.rev(kernel, axes).swapaxes(-1, -2)),
        (1,) * len(axes),
        [(window[i] - 1 - before[i], sizes[i] - 1 + before[i] - travel[i]) for i in axes],
        lhs_dilation=strides,
    )
    return inputs_cotangent, kernel_cotangent


convolve.defvjp(_forward, _backward)


class Conv(nn.Module):
    """A convolution layer with channels last.

    It is :func:`convolve` on CPU, and JAX's own convolution, which also has a ``jvp``, elsewhere:
    the kernel's gradient as a convolution with a window as large as the picture is XLA:CPU's
    business alone.

    Attributes:
      features: the number of output channels.
      window: the window's size along each space axis.
      strides: the window's step along each space axis; 1 everywhere if ``None``.
      padding: ``"SAME"``, ``"VALID"``, or the padding before and after for each space axis.
      use_bias: whether to add a bias to each output channel.
      kernel_init: the initializer of the kernel.
    """

    features: int
    window: Sequence[int]
    strides: Sequence[int] | None = None
    padding: Padding = "SAME"
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch *space channels"]
    ) -> Float[Array, "batch *out_space features"]:
        """Apply the layer."""
        window = tuple(self.window)
        shape = (*window, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias)
        strides = tuple(self.strides or (1,) * len(window))
        convolution = convolve if jax.default_backend() == "cpu" else _convolve
        outputs: Any = convolution(inputs, kernel, strides, self.padding)
        return outputs if bias is None else outputs + bias.reshape((1,) * len(window) + (1, -1))
