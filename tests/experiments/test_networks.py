import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.networks.cifar import ResNet
from experiments.networks.convolution import Conv, convolve
from experiments.networks.heads import Heads
from experiments.networks.image import ConvEncoder, ResidualBlock, ResidualEncoder
from experiments.networks.text import (
    PADDING,
    BagEncoder,
    ConvTextEncoder,
    character_ngrams,
    hashed_ids,
)
from experiments.networks.unet import UNet


def reference(inputs, kernel, strides, padding):
    layout = ("NHWC", "HWIO", "NHWC") if inputs.ndim == 4 else ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(inputs, kernel, strides, padding, dimension_numbers=layout)


def arrays(inputs_shape, kernel_shape, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(keys[0], inputs_shape, dtype),
        jax.random.normal(keys[1], kernel_shape, dtype),
    )


def assert_close(actual, expected, tolerance=1e-6):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding"),
    [
        (7, 3, 1, "SAME"),
        (8, 3, 2, "SAME"),
        (9, 3, 2, "VALID"),
        (8, 1, 2, "SAME"),
        (9, 4, 3, "VALID"),
        (8, 2, 3, ((1, 0), (2, 1))),
    ],
)
def test_convolution_and_its_gradients(size, window, stride, padding):
    inputs, kernel = arrays((2, size, size + 1, 3), (window, window, 3, 5))
    strides = (stride, stride)
    outputs, pullback = jax.vjp(lambda x, w: convolve(x, w, strides, padding), inputs, kernel)
    expected, expected_pullback = jax.vjp(
        lambda x, w: reference(x, w, strides, padding), inputs, kernel
    )
    cotangent = jax.random.normal(jax.random.key(1), outputs.shape)
    assert_close(outputs, expected)
    for gradient, wanted in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize("batched_inputs", [True, False])
def test_convolution_of_one_space_axis_under_vmap(batched_inputs):
    inputs, kernels = arrays((4, 2, 9, 3), (4, 3, 3, 5))
    if not batched_inputs:
        inputs = inputs[0]

    def gradients(conv):
        def energy(x, w):
            return jnp.sum(conv(x, w, (2,), "SAME") ** 2)

        return jax.vmap(jax.grad(energy, (0, 1)), (0 if batched_inputs else None, 0))

    actual, expected = gradients(convolve)(inputs, kernels), gradients(reference)(inputs, kernels)
    jax.tree.map(assert_close, actual, expected)


def test_convolution_in_bfloat16():
    inputs, kernel = arrays((2, 8, 8, 3), (3, 3, 3, 5), jnp.bfloat16)
    outputs, pullback = jax.vjp(lambda x, w: convolve(x, w, (1, 1), "SAME"), inputs, kernel)
    expected, expected_pullback = jax.vjp(
        lambda x, w: reference(x, w, (1, 1), "SAME"), inputs, kernel
    )
    assert outputs.dtype == jnp.bfloat16
    assert_close(outputs, expected, 0.02)
    for gradient, wanted in zip(pullback(outputs), expected_pullback(expected), strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert_close(gradient, wanted, 0.02)


def test_convolution_has_no_jvp():
    inputs, kernel = arrays((2, 8, 8, 3), (3, 3, 3, 5))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: convolve(x, kernel, (1, 1), "SAME"), (inputs,), (inputs,))


def layouts_in_a_scan(conv):
    inputs, _ = arrays((4, 16, 16, 3), ())
    _, first = arrays((), (3, 3, 3, 8))
    _, second = arrays((), (3, 3, 8, 16))

    def energy(kernels):
        x = conv(inputs, kernels[0], (1, 1), "SAME")
        return jnp.sum(conv(jax.nn.relu(x), kernels[1], (2, 2), "SAME") ** 2)

    def step(kernels, _):
        return jax.tree.map(lambda w, g: w - g, kernels, jax.grad(energy)(kernels)), None

    program = jax.jit(lambda kernels: lax.scan(step, kernels, length=3)[0])
    return re.findall(r"dim_labels=(\S+?)[,\s]", program.lower((first, second)).compile().as_text())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA:CPU's layouts")
def test_all_convolutions_in_a_scan_are_in_canonical_layout():
    # Forward twice, the kernels' gradients twice, and the gradient of the second one's inputs.
    assert layouts_in_a_scan(convolve) == ["b01f_01io->b01f"] * 5
    # What this guards against; once XLA does it by itself, `convolve` can go.
    assert set(layouts_in_a_scan(reference)) != {"b01f_01io->b01f"}


def test_conv_layer():
    inputs, _ = arrays((2, 8, 8, 3), ())
    layer = Conv(5, (3, 3), strides=(2, 2))
    variables = layer.init(jax.random.key(0), inputs)
    kernel, bias = variables["params"]["kernel"], jnp.arange(5.0)
    variables = {"params": {"kernel": kernel, "bias": bias}}
    assert_close(
        layer.apply(variables, inputs),
        reference(inputs, kernel, (2, 2), "SAME") + bias.reshape(1, 1, 1, 5),
    )


def test_elsewhere_than_on_cpu_the_layer_is_jax_own_convolution(monkeypatch):
    inputs, _ = arrays((2, 8, 8, 3), ())
    layer = Conv(5, (3, 3), strides=(2, 2))
    variables = layer.init(jax.random.key(0), inputs)
    outputs = layer.apply(variables, inputs)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    primal, tangent = jax.jvp(lambda x: layer.apply(variables, x), (inputs,), (inputs,))
    assert_close(primal, outputs)
    assert_close(tangent, outputs)  # linear, and the bias is 0


@pytest.mark.parametrize(
    ("encoder", "inputs", "features"),
    [
        (ConvEncoder(channels=(4, 4), width=7), jnp.ones((3, 36, 36, 1)), 7),
        (ResidualEncoder(channels=(8, 8, 16)), jnp.ones((3, 32, 32, 3)), 16),
        (BagEncoder(50, width=7), jnp.ones((3, 5), jnp.int32), 7),
        (ConvTextEncoder(50, embedding=4, width=7), jnp.ones((3, 5), jnp.int32), 14),
    ],
)
def test_encoders_for_any_batch_size(encoder, inputs, features):
    variables = encoder.init(jax.random.key(0), inputs[:1])
    assert set(variables) == {"params"}
    outputs = encoder.apply(variables, inputs)
    assert outputs.shape == (3, features)
    assert_close(encoder.apply(variables, inputs[:1]), outputs[:1], 1e-5)


def without(variables, is_cut):
    """The variables with kernels of 0 where the path of the parameter says so."""

    def cut(path, value):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.zeros_like(value) if name.endswith("kernel") and is_cut(name, value) else value

    return jax.tree_util.tree_map_with_path(cut, variables)


@pytest.mark.parametrize(
    ("network", "is_cut"),
    [
        # All convolutions of window 3 but the first one: the shortcuts alone are left.
        (
            ResNet(1, (8, 16)),
            lambda name, value: len(value) == 3 and "NormalisedConv_0/" not in name,
        ),
        (ResidualBlock(8), lambda name, value: True),
        (ResidualBlock(16), lambda name, value: len(value) == 3),
        # All levels below the finest one: its map goes straight to the last convolutions.
        (UNet((8, 16)), lambda name, value: "Conv_2/" in name or "Conv_3/" in name),
    ],
)
def test_what_is_passed_by_is_there(network, is_cut):
    pictures = jax.random.normal(jax.random.key(0), (2, 16, 16, 8))
    variables = network.init(jax.random.key(1), pictures)
    left = without(variables, is_cut)
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (variables, left)), strict=True)
    )
    found = np.asarray(network.apply(left, pictures))
    assert np.ptp(found.reshape(2, -1, found.shape[-1]), axis=(0, 1)).max() > 0.1
    if network == ResidualBlock(8):
        np.testing.assert_array_equal(found, pictures)


@pytest.mark.parametrize("encoder", [BagEncoder(50, width=7), ConvTextEncoder(50)])
def test_padding_does_not_count(encoder):
    ids = jnp.array([[3, 9, 4], [5, PADDING, PADDING]])
    variables = encoder.init(jax.random.key(0), ids)
    longer = jnp.pad(ids, ((0, 0), (0, 4)), constant_values=PADDING)
    assert_close(encoder.apply(variables, longer), encoder.apply(variables, ids))
    assert np.isfinite(encoder.apply(variables, jnp.full((1, 3), PADDING))).all()


def test_bag_against_its_definition():
    ids = jnp.array([[3, 9, 9, PADDING]])
    encoder = BagEncoder(20, width=4)
    variables = encoder.init(jax.random.key(0), ids)
    table = variables["params"]["Embed_0"]["embedding"]
    expected = (table[3] + 2 * table[9]) / np.sqrt(3)
    assert_close(encoder.apply(variables, ids)[0], expected)


def test_each_head_reads_its_own_copy():
    heads = Heads({"a": 3, "b": 2}, hidden=4)
    zs = {"a": jnp.ones((2, 5)), "b": jnp.ones((2, 5))}
    variables = heads.init(jax.random.key(0), zs)
    jacobian = jax.jacobian(lambda zs: heads.apply(variables, zs))(zs)
    assert (jacobian["a"]["b"] == 0).all()
    assert (jacobian["b"]["a"] == 0).all()
    assert (jacobian["a"]["a"] != 0).any()
    assert jacobian["b"]["b"].shape == (2, 2, 2, 5)


def test_ngrams_and_their_ids():
    assert character_ngrams("ab", (1, 2)) == [" ", " a", "a", "ab", "b", "b ", " "]
    ids = hashed_ids([["ab", "c", "d"], []], buckets=1000, max_length=2)
    # zlib.crc32 of "ab" and of "c", the same on every machine.
    np.testing.assert_array_equal(ids, [[1 + 0x9E83486D % 999, 1 + 0x06B9DF6F % 999], [0, 0]])
    many = hashed_ids([map(str, range(10_000))], buckets=16, max_length=10_000)
    assert set(many.ravel()) == set(range(1, 16))
