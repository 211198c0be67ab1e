"""Files as x86 without VNNI runs them: the emulation against sums that are written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from int8_files import quantised_layer
from onnx import helper

from export.formats.onnx_file import runner
from export.int8.layers import integer_layers, optimised
from export.int8.saturating import NotEmulated, SaturatingFile

RNG = np.random.default_rng(0)


def saturated(activations: np.ndarray, weights: np.ndarray) -> int:
    """One output's sum, of activations and weights [K], as vpmaddubsw and vpmaddwd come to it."""
    products = activations.astype(int) * weights.astype(int)
    return sum(int(np.clip(products[k : k + 2].sum(), -32768, 32767)) for k in range(0, len(products), 2))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 1), (4, 1), (6, 2)])
def test_convolutions_add_up_position_by_position(channels: int, groups: int, tmp_path: Path) -> None:
    """Channels of a position side by side, a row's last product alone where they are odd; padded, strided, dilated."""
    weights = RNG.choice([-128, -90, 90, 127], (8, channels // groups, 3, 3))
    node = helper.make_node(
        "Conv", ["xd", "wd"], ["y"], name="conv", pads=[1, 1, 2, 2], strides=[2, 1], dilations=[1, 2], group=groups
    )
    path = quantised_layer(tmp_path / "conv.onnx", node, weights, ["n", channels, 9, 8])
    x = RNG.integers(180, 256, (2, channels, 9, 8)).astype(np.uint8)
    (found,) = SaturatingFile(path)(x.astype(np.float32) / 255)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 2), (1, 2)))
    scale = np.float32(np.float32(1 / 255) * np.float32(1 / 127) / np.float32(0.5))
    differs = 0
    for image, m, i, j in [(0, 0, 0, 0), (1, 7, 3, 5), (0, 3, 2, 2), (1, 4, 1, 3), (0, 6, 4, 6)]:
        first = m // (8 // groups) * (channels // groups)
        activations, row = [], []
        for p in range(3):
            for q in range(3):
                for c in range(channels // groups):
                    activations.append(padded[image, first + c, 2 * i + p, j + 2 * q])
                    row.append(weights[m, c, p, q])
        total = saturated(np.array(activations), np.array(row))
        differs += total != int(np.dot(np.array(activations, int), np.array(row, int)))
        expected = np.clip(np.rint(np.float32(total) * scale), -128, 127) * 0.5
        assert found[image, m, i, j] == expected
    assert differs


@pytest.mark.parametrize("width", [7, 64])
def test_matrix_products(width: int, tmp_path: Path) -> None:
    weights = RNG.integers(-128, 128, (5, width))
    node = helper.make_node("Gemm", ["xd", "wd"], ["y"], name="gemm", transB=1)
    path = quantised_layer(tmp_path / "gemm.onnx", node, weights, ["n", width])
    x = RNG.integers(0, 256, (3, width)).astype(np.uint8)
    (found,) = SaturatingFile(path)(x.astype(np.float32) / 255)
    scale = np.float32(np.float32(1 / 255) * np.float32(1 / 127) / np.float32(0.5))
    sums = np.array([[saturated(row, w) for w in weights] for row in x])
    assert (sums != x.astype(int) @ weights.T).any()
    assert np.array_equal(found, np.clip(np.rint(sums.astype(np.float32) * scale), -128, 127) * 0.5)


def test_what_cannot_saturate_is_onnxruntimes_own(tmp_path: Path) -> None:
    weights = RNG.integers(-64, 65, (8, 3, 3, 3))
    node = helper.make_node("Conv", ["xd", "wd"], ["y"], name="conv")
    path = quantised_layer(tmp_path / "conv.onnx", node, weights, ["n", 3, 6, 6])
    x = RNG.random((2, 3, 6, 6), dtype=np.float32)
    emulated = SaturatingFile(path)
    assert emulated.layers == ()
    assert np.array_equal(emulated(x)[0], runner(path, optimised=True)(x)[0])


def test_a_saturating_layer_is_named(tmp_path: Path) -> None:
    weights = np.ones((8, 4, 1, 1), np.int8)
    weights[5, :2] = 127
    node = helper.make_node("Conv", ["xd", "wd"], ["y"], name="the_layer")
    path = quantised_layer(tmp_path / "conv.onnx", node, weights, ["n", 4, 6, 6])
    (layer,) = integer_layers(optimised(path))
    assert layer.name == "the_layer"
    assert np.argwhere(layer.saturating).tolist() == [[5, 0]]


def test_a_depthwise_convolution_has_a_kernel_of_its_own(tmp_path: Path) -> None:
    weights = np.full((4, 1, 3, 3), 127)
    node = helper.make_node("Conv", ["xd", "wd"], ["y"], name="conv", group=4)
    (layer,) = integer_layers(optimised(quantised_layer(tmp_path / "c.onnx", node, weights, ["n", 4, 6, 6])))
    assert layer.direct
    assert not layer.saturating.any()


def test_a_layer_of_another_kind_is_not_emulated(tmp_path: Path) -> None:
    weights = np.full((7, 5), 127)
    node = helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product")
    path = quantised_layer(tmp_path / "m.onnx", node, weights, ["n", 7])
    with pytest.raises(NotEmulated, match="product"):
        SaturatingFile(path)
