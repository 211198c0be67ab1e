"""BatchNorms of real models that stayed although there was an exact home, and what is like them but has none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_files import File, assert_same, fold_and_compare, fold_onnx, is_folded, norms, op_types, run

from export.fold.report import Strategy

# -- constants for each channel --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [(6, 1, 1), (1, 6, 1, 1), ()], ids=str)
@pytest.mark.parametrize("op_type", ["Mul", "Add", "Sub", "Div", "Mul first", "Add first", "Sub first"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_arithmetic_with_a_constant_for_each_channel(
    form: tuple[int, ...], op_type: str, norm_first: bool, tmp_path: Path
) -> None:
    """Frozen BatchNorms of detectors, LayerScale, normalised inputs: such a node blocked the BatchNorm beside it."""
    file = File()
    h = file.conv(file.input("x", "n", 4, "h", "w"), 4, 6)
    h = file.node("Sigmoid", h) if norm_first else h
    constant = file.constant(file.rng.uniform(0.5, 2, form) * file.rng.choice([-1, 1], form))
    h = file.norm(h, 6) if norm_first else h
    h = file.node(op_type.split()[0], *([constant, h] if "first" in op_type else [h, constant]))
    h = h if norm_first else file.norm(h, 6)
    file.node("Tanh", file.conv(h, 6, 5, 3, pads=[0] * 4) if norm_first else h, outputs=["y"])
    file.output("y", "n", 5 if norm_first else 6, "v", "u")
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("form", [(6,), (6, 1), (6, 1, 1, 1), (1, 1, 6, 1, 1), (6, 6, 6), (1, 1, 6, 6)], ids=str)
@pytest.mark.parametrize("op_type", ["Mul", "Add"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_arithmetic_with_another_constant(
    form: tuple[int, ...], op_type: str, norm_first: bool, tmp_path: Path
) -> None:
    """Where every size is 6, what is a channel is told by the axis. Some constants add one."""
    file = File()
    h = file.conv(file.input("x", 6, 4, 6, 6), 4, 6)
    h = file.norm(file.node("Relu", h), 6) if norm_first else h
    h = file.node(op_type, h, file.constant(file.rng.uniform(0.5, 2, form)))
    rank = max(len(form), 4)
    if rank == 4:
        h = file.conv(h, 6, 6) if norm_first else file.norm(h, 6)
    elif not norm_first:
        h = file.norm(h, 6, positive=True)
    file.node("Relu", h, outputs=["y"])
    file.output("y", *[6] * 4) if rank == 4 else file.output("y", 1, *[6] * 4)
    source = file.save(tmp_path)
    fold_and_compare(source)


def test_a_division_by_the_signal_is_no_scale(tmp_path: Path) -> None:
    file = File()
    h = file.node("Exp", file.norm(file.conv(file.input("x", "n", 4, 8, 8), 4, 6), 6))
    h = file.node("Div", file.constant(file.rng.uniform(0.5, 2, (6, 1, 1))), h)
    file.node("Tanh", file.norm(h, 6), outputs=["y"])
    file.output("y", "n", 6, 8, 8)
    assert len(fold_and_compare(file.save(tmp_path)).report.kept) == 1


def test_batchnorms_in_their_parts(tmp_path: Path) -> None:
    """As basic-pitch has them: x - mean, times gamma over the root of the variance, which is computed, plus beta."""
    file = File()

    def parts(h: str) -> str:
        gamma, beta, mean, var = (file.constant(array.reshape(6, 1, 1)) for array in file.parameters(6))
        root = file.node("Sqrt", file.node("Add", var, file.constant(1e-3)))
        scale = file.node("Mul", gamma, file.node("Reciprocal", root))
        return file.node("Add", file.node("Mul", file.node("Sub", h, mean), scale), beta)

    h = parts(file.conv(file.input("x", "n", 4, 8, 8), 4, 6))
    h = file.norm(parts(file.norm(file.node("Relu", h), 6)), 6)
    file.node("Relu", file.conv(h, 6, 5, 1), outputs=["y"])
    file.output("y", "n", 5, 8, 8)
    assert is_folded(file.save(tmp_path))


def test_layer_scale(tmp_path: Path) -> None:
    """x + gamma · BatchNorm(conv(x)), twice."""
    file = File()
    h = file.input("x", "n", 6, 8, 8)
    for _ in range(2):
        scale = file.constant(file.rng.uniform(0.1, 0.5, (6, 1, 1)))
        h = file.node("Add", h, file.node("Mul", file.norm(file.conv(h, 6, 6), 6), scale))
    file.norm(file.node("Mul", file.conv(h, 6, 5), file.constant(np.full((5, 1, 1), 0.5))), 5, outputs=["y"])
    file.output("y", "n", 5, 8, 8)
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("how", ["weight norm", "slice", "split", "scaled"])
def test_weights_that_are_computed_of_constants(how: str, tmp_path: Path) -> None:
    """weight_norm, sliced and scaled weights, of more than a thousand elements."""
    file = File(13)
    whole = file.random(80, 16, 3, 3)
    if how == "weight norm":
        length = file.node("ReduceL2", whole, axes=[1, 2, 3])
        gain = file.constant(file.rng.uniform(0.5, 2, (80, 1, 1, 1)))
        weight = file.node("Mul", whole, file.node("Div", gain, length))
    elif how == "slice":
        weight = file.node("Slice", whole, *(file.constant([number], dtype="int64") for number in (0, 40, 0)))
    elif how == "split":
        names = [file.free("half"), file.free("half")]
        weight = file.node("Split", whole, file.constant([40, 40], dtype="int64"), outputs=names, axis=0)
    else:
        weight = file.node("Mul", whole, file.constant(0.5))
    channels = 80 if how in ("weight norm", "scaled") else 40
    h = file.node("Conv", file.input("x", "n", 16, 6, 6), weight, pads=[1] * 4)
    file.norm(h, channels, outputs=["y"])
    file.output("y", "n", channels, 6, 6)
    assert is_folded(file.save(tmp_path))


# -- branches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel": 1}, {"kernel": 5}, {"group": 2}, {"group": 6}, {"dilations": [2, 2], "pads": [2] * 4}],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False])
def test_a_batchnorm_beside_a_convolution(options: dict[str, int], first: bool, tmp_path: Path) -> None:
    """conv(x) + BatchNorm(x), as RepVGG and MobileOne have it: the scale is a diagonal in the kernel's centre."""
    file = File()
    x = file.input("x", "n", 6, "h", "w")
    sides = [file.conv(x, 6, 6, **({"kernel": 3} | options)), file.norm(x, 6)]
    file.node("Add", *(sides if first else reversed(sides)), outputs=["y"])
    file.output("y", "n", 6, "h", "w")
    assert is_folded(file.save(tmp_path))
    assert op_types(tmp_path / "folded.onnx") == {"Conv": 1}


@pytest.mark.parametrize("added", ["Add", "Sum"])
def test_a_block_of_parallel_branches(added: str, tmp_path: Path) -> None:
    """RepVGG's: BatchNorm(conv3×3(x)) + BatchNorm(conv1×1(x)) + BatchNorm(x), then ReLU; two of them."""
    file = File()
    h = file.input("x", "n", 6, 8, 8)
    for _ in range(2):
        branches = [file.norm(file.conv(h, 6, 6, 3), 6), file.norm(file.conv(h, 6, 6, 1), 6), file.norm(h, 6)]
        if added == "Sum":
            total = file.node("Sum", *branches)
        else:
            total = file.node("Add", file.node("Add", *branches[:2]), branches[2])
        h = file.node("Relu", total)
    file.node("Identity", h, outputs=["y"])
    file.output("y", "n", 6, 8, 8)
    assert is_folded(file.save(tmp_path)) or added == "Sum"


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_branches_that_are_subtracted(skip: bool, norm: bool, tmp_path: Path) -> None:
    """x + (conv(x) - BatchNorm(x)), as FastViT's mixer is: its input is one more tap."""
    file = File()
    x = file.input("x", "n", 6, 8, 8)
    total = file.node("Sub", file.conv(x, 6, 6), file.norm(x, 6) if norm else file.conv(x, 6, 6, 1))
    file.norm(file.node("Add", x, total) if skip else total, 6, outputs=["y"])
    file.output("y", "n", 6, 8, 8)
    fold_and_compare(file.save(tmp_path))
    assert op_types(tmp_path / "folded.onnx")["Conv"] == 1
    assert not {"Add", "Sub", "BatchNormalization"} & set(op_types(tmp_path / "folded.onnx"))


@pytest.mark.parametrize("what", ["no centre", "corner", "shrinks", "broadcast", "read twice", "other input", "same"])
def test_a_batchnorm_beside_something_else(what: str, tmp_path: Path) -> None:
    """Where the kernel has no centre, it may still have a tap that reads the same place; or there is none."""
    file = File()
    x = file.input("x", 2, 6, 8, 8)
    if what in ("no centre", "corner"):
        kernel, pads = (2, [0, 0, 1, 1]) if what == "no centre" else (3, [2, 2, 0, 0])
        side = file.conv(x, 6, 6, kernel, pads=pads)
    elif what == "shrinks":
        side = file.conv(file.node("Pad", x, file.constant([0, 0, 1, 1] * 2, dtype="int64")), 6, 6, pads=[0] * 4)
    elif what == "broadcast":
        side = file.conv(x, 6, 6, 8, pads=[0] * 4)
    elif what == "same":
        side = file.norm(x, 6)
    else:
        side = file.conv(file.node("Relu", x) if what == "other input" else x, 6, 6)
    total = file.node("Add", side, file.norm(x, 6))
    file.node("Mul", total, side if what == "read twice" else total, outputs=["y"])
    file.output("y", 2, 6, 8, 8)
    fold_and_compare(file.save(tmp_path))


@pytest.mark.parametrize("second", ["no shift", "no pass"])
@pytest.mark.parametrize("turned", [True, False])
def test_a_sum_takes_the_shift_on_either_side(second: str, turned: bool, tmp_path: Path) -> None:
    """Only its first side was asked: here the scale goes through both, and the shift through one alone."""
    file = File()
    x = file.input("x", "n", 4, 8, 8)
    free = file.conv(x, 4, 6)
    if second == "no shift":
        inner = file.conv(x, 4, 6, pads=[0] * 4)
        bound = file.node("Pad", inner, file.constant([0, 0, 1, 1] * 2, dtype="int64"))
    else:
        bound = file.node("Relu", file.conv(x, 4, 6))
    total = file.node("Add", *([free, bound] if turned else [bound, free]))
    file.norm(total, 6, positive=True, outputs=["y"])
    file.output("y", "n", 6, 8, 8)
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("strategy", ["bias-map", "all"])
def test_a_concatenation_of_a_value_and_its_padded_mean(strategy: Strategy, kernel: int, tmp_path: Path) -> None:
    """The bias map counted the part that needs none, before a 1 × 1, twice, and its check undid it."""
    file = File()
    h = file.norm(file.node("Sigmoid", file.conv(file.input("x", "n", 4, 8, 8), 4, 6)), 6)
    pool = file.node("AveragePool", h, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1], count_include_pad=1)
    file.node("Relu", file.conv(file.node("Concat", pool, h, axis=1), 12, 5, kernel), outputs=["y"])
    file.output("y", "n", 5, 8, 8)
    assert is_folded(file.save(tmp_path), strategy)


def test_shared_weights_whose_batchnorms_differ(tmp_path: Path) -> None:
    """EfficientDet's heads: one convolution for all levels, a BatchNorm for each. The weights are copied."""
    file = File()
    weight, bias = file.random(6, 6, 3, 3), file.random(6)
    for level, size in enumerate((8, 4, 2)):
        h = file.node("Conv", file.input(f"x{level}", "n", 6, size, size), weight, bias, pads=[1] * 4)
        file.norm(h, 6, outputs=[f"y{level}"])
        file.output(f"y{level}", "n", 6, size, size)
    file.node("Conv", "x0", weight, bias, outputs=["plain"])
    file.output("plain", "n", 6, 6, 6)
    assert is_folded(file.save(tmp_path))


# -- layers that are hard to see -------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_behind_a_layer_whose_padding_is_not_known(auto_pad: str, op_type: str, tmp_path: Path) -> None:
    """Folding after a layer needs no padding; it depends on the size here, which is any."""
    file = File()
    weight = file.random(*((6, 4) if op_type == "Conv" else (4, 6)), 3, 3)
    h = file.node(op_type, file.input("x", "n", 4, "h", "w"), weight, auto_pad=auto_pad, strides=[2, 2])
    file.norm(h, 6, outputs=["y"])
    file.output("y", "n", 6, "v", "u")
    assert is_folded(file.save(tmp_path), size=9)


def test_behind_a_transposed_convolution_to_a_fixed_size(tmp_path: Path) -> None:
    file = File()
    x = file.input("x", "n", 4, 5, 5)
    file.norm(
        file.node("ConvTranspose", x, file.random(4, 6, 3, 3), output_shape=[10, 10], strides=[2, 2]), 6, outputs=["y"]
    )
    file.output("y", "n", 6, 10, 10)
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose"])
def test_behind_a_layer_of_unknown_rank(layer: str, tmp_path: Path) -> None:
    """Its kernel has a rank. Compared with the operator that hides it replaced."""
    file = File()
    file.domains.append(onnx.helper.make_opsetid("example", 1))
    h = file.node("Own", file.input("x", "n", 6, 8, 8), domain="example")
    file.norm(file.node(layer, h, file.random(6, 6, 3, 3)), 6, outputs=["y"])
    file.output("y", "n", 6, "h", "w")
    paths = [file.save(tmp_path), tmp_path / "folded.onnx"]
    assert not fold_onnx(*paths, unchecked=True).report.kept
    results = []
    for path in paths:
        model = onnx.load(path)
        model.graph.node[0].CopyFrom(onnx.helper.make_node("Identity", ["x"], model.graph.node[0].output))
        onnx.save(model, path)
        results.append(run(path, {"x": np.random.default_rng(0).standard_normal((2, 6, 8, 8)).astype(np.float32)}))
    assert not norms(onnx.load(paths[1]))
    assert_same(*results, 2e-5)


@pytest.mark.parametrize("shape", [(-1, 384), (0, -1), None], ids=str)
@pytest.mark.parametrize("perm", [None, (0, 2, 3, 1), (0, 3, 2, 1), (0, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("layer", ["MatMul", "Gemm"])
def test_before_a_linear_layer_behind_a_flattening(
    shape: tuple[int, int] | None, perm: tuple[int, ...] | None, layer: str, tmp_path: Path
) -> None:
    """Keras' way, channels last, and `view(-1, K)` with any batch."""
    file = File()
    h = file.norm(file.node("Sigmoid", file.conv(file.input("x", "n", 4, 8, 8), 4, 6)), 6)
    h = file.node("Transpose", h, perm=perm) if perm else h
    h = file.node("Reshape", h, file.constant(shape, dtype="int64")) if shape else file.node("Flatten", h)
    h = file.node(layer, h, file.random(384, 5))
    file.node("Add", h, file.random(5), outputs=["y"])
    file.output("y", "n", 5)
    assert is_folded(file.save(tmp_path))


def test_a_flattening_across_the_batch(tmp_path: Path) -> None:
    """Two images in one row, since the batch is 4 and K twice as long."""
    file = File()
    h = file.norm(file.node("Sigmoid", file.conv(file.input("x", 4, 4, 8, 8), 4, 6)), 6)
    h = file.node("Reshape", h, file.constant([-1, 768], dtype="int64"))
    file.node("MatMul", h, file.random(768, 5), outputs=["y"])
    file.output("y", 2, 5)
    fold_and_compare(file.save(tmp_path))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["tokens", "transposed", "image"])
def test_behind_a_linear_layer_and_a_change_of_shape(how: str, bias: bool, tmp_path: Path) -> None:
    """LeViT's tokens in one batch; token BatchNorms between two transpositions; a GAN's first layer."""
    file = File()
    x = file.input("x", "n", 5) if how == "image" else file.input("x", "n", 7, 5)
    h = file.node("MatMul", x, file.random(5, 96 if how == "image" else 6))
    h = file.node("Add", h, file.random(96 if how == "image" else 6)) if bias else h
    if how == "tokens":
        h = file.norm(file.node("Reshape", h, file.constant([-1, 6], dtype="int64")), 6)
        file.node("Reshape", h, file.constant([-1, 7, 6], dtype="int64"), outputs=["y"])
        file.output("y", "n", 7, 6)
    elif how == "transposed":
        h = file.norm(file.node("Transpose", h, perm=[0, 2, 1]), 6)
        file.node("Transpose", h, perm=[0, 2, 1], outputs=["y"])
        file.output("y", "n", 7, 6)
    else:
        file.norm(file.node("Reshape", h, file.constant([-1, 6, 4, 4], dtype="int64")), 6, outputs=["y"])
        file.output("y", "n", 6, 4, 4)
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("bounds", [(0.0, None), (0.0, 6.0), (-1.0, 1.0), (None, 1.0), (-0.5, None)], ids=str)
@pytest.mark.parametrize("group", [1, 6])
@pytest.mark.parametrize("size", [8, "any"])
def test_a_floor_and_a_ceiling(
    bounds: tuple[float | None, float | None], group: int, size: int | str, tmp_path: Path
) -> None:
    """ReLU6 and its kin: a clip(z, l, h) + s = clip(a z + s, a l + s, a h + s); before depthwise layers too."""
    file = File()
    sizes = (size, size) if size == 8 else ("h", "w")
    h = file.conv(file.input("x", "n", 4, *sizes), 4, 6)
    limits = ["" if bound is None else file.constant(np.array(bound)) for bound in bounds]
    h = file.norm(file.node("Clip", h, *limits), 6)
    file.node("Relu", file.conv(h, 6, 6, group=group), outputs=["y"])
    file.output("y", "n", 6, *sizes)
    source = file.save(tmp_path)
    for strategy in ("floor", "all"):
        assert is_folded(source, strategy)
