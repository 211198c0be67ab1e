"""A file as x86 without VNNI would run it: sums of two products in 16 bits, everything else as onnxruntime has it.

Owns the emulation. Layers whose weights can't saturate, and all that is no integer layer, are onnxruntime's own, one
node at a time: their numbers are the same on every kind of CPU but for the rounding of floats.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from export.bundle import Arrays
from export.formats.onnx_session import open_session
from export.int8.layers import IntegerLayer, attribute, integer_layers, optimised
from export.int8.pairs import as_pairs, excess

CONVOLUTION, GEMM = "QLinearConv", "QGemm"
EMULATED = {CONVOLUTION, GEMM}
Values = dict[str, np.ndarray]


class NotEmulated(Exception):
    """A layer of a kind that the emulation does not know, in words."""


class SaturatingFile:
    """An ONNX file of uint8 activations and int8 weights, batch → outputs, as a CPU with AVX2 alone computes it.

    Raises NotEmulated where a layer that can saturate is of a kind that is not known here.
    """

    def __init__(self, path: Path) -> None:
        model = optimised(path)
        self._constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        layers = {layer.node.output[0]: layer for layer in integer_layers(model) if layer.saturating.any()}
        for layer in layers.values():
            if layer.node.op_type not in EMULATED:
                raise NotEmulated(f"{layer.name} is a {layer.node.op_type}")
        self.layers = tuple(layers.values())
        (self._input,) = (each.name for each in model.graph.input if each.name not in self._constants)
        self._output = model.graph.output[0].name
        self._steps = [self._step(model, node, layers.get(node.output[0])) for node in model.graph.node]
        self._uses = Counter(name for node in model.graph.node for name in node.input)

    def __call__(self, batch: np.ndarray) -> Arrays:
        values: Values = {self._input: batch}
        left = Counter(self._uses)
        for inputs, outputs, run in self._steps:
            values.update(zip(outputs, run(values), strict=True))
            for name in inputs:  # a batch of feature maps is large: none is kept longer than it is needed
                left[name] -= 1
                if not left[name] and name != self._output:
                    values.pop(name, None)
        return (values[self._output],)

    def _step(
        self, model: onnx.ModelProto, node: onnx.NodeProto, layer: IntegerLayer | None
    ) -> tuple[list[str], list[str], Callable[[Values], list[np.ndarray]]]:
        inputs, outputs = [name for name in node.input if name], [name for name in node.output if name]
        if layer is None:
            return inputs, outputs, self._by_onnxruntime(model, node)
        emulate = self._convolution(layer) if node.op_type == CONVOLUTION else self._gemm(layer)
        return inputs, outputs, lambda values: [emulate(values[node.input[0]])]

    def _by_onnxruntime(self, model: onnx.ModelProto, node: onnx.NodeProto) -> Callable[[Values], list[np.ndarray]]:
        names = list(dict.fromkeys(name for name in node.input if name))
        given = [name for name in names if name not in self._constants]
        outputs = [name for name in node.output if name]
        session = None

        def run(values: Values) -> list[np.ndarray]:
            nonlocal session
            if session is None:  # only now are the types of what it reads known
                ends = [_value(name, values[name]) for name in given]
                constants = [numpy_helper.from_array(self._constants[n], n) for n in names if n in self._constants]
                graph = onnx.helper.make_graph(
                    [node], "node", ends, [onnx.ValueInfoProto(name=name) for name in outputs], constants
                )
                alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
                session = open_session(alone.SerializeToString(), silent=True)
            found: list[np.ndarray] = session.run(None, {name: values[name] for name in given})
            return found

        return run

    def _convolution(self, layer: IntegerLayer) -> Callable[[np.ndarray], np.ndarray]:
        import torch

        node = layer.node
        x_scale, x_zero, weights, w_scale, w_zero, y_scale, y_zero = (self._constants[n] for n in node.input[1:8])
        bias = self._bias(node, 8)
        kernel, spatial = weights.shape[2:], weights.ndim - 2
        strides = [int(s) for s in attribute(node, "strides", [1] * spatial)]
        dilations = [int(d) for d in attribute(node, "dilations", [1] * spatial)]
        groups = int(attribute(node, "group", 1))
        convolve = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[
            spatial
        ]
        # Exact: float64 holds every integer that a sum of products of 8 bits can come to.
        exact = torch.from_numpy(weights.astype(np.float64) - float(w_zero.reshape(-1)[0]))
        places = list(itertools.product(*(range(size) for size in kernel)))
        channels_in, per_group = weights.shape[1], len(weights) // groups
        pairs, neighbours = np.flatnonzero(layer.saturating.any(0)).tolist(), as_pairs(layer.rows.astype(np.int32))
        scale = (x_scale * w_scale / y_scale).reshape(1, -1, *[1] * spatial)
        shift = 128 if x_zero.dtype == np.int8 else 0
        zero = int(x_zero)

        def run(x: np.ndarray) -> np.ndarray:
            before, after = pads(node, x.shape[2:], kernel, strides, dilations)
            widths = [(0, 0), (0, 0), *zip(before, after, strict=True)]
            whole = np.pad(x.astype(np.int32), widths, constant_values=zero)
            sums = convolve(torch.from_numpy(whole - zero).double(), exact, None, strides, 0, dilations, groups).numpy()
            sizes = sums.shape[2:]

            def products(k: int, group: int) -> np.ndarray:
                """The activations that weight k of a group's rows meets, int32 [N · positions]."""
                if k >= layer.rows.shape[1]:
                    return np.zeros(len(x) * int(np.prod(sizes)), np.int32)
                place, channel = places[k // channels_in], group * channels_in + k % channels_in
                cut = tuple(
                    slice(p * d, p * d + (size - 1) * s + 1, s)
                    for p, d, s, size in zip(place, dilations, strides, sizes, strict=True)
                )
                found: np.ndarray = whole[(slice(None), channel, *cut)].reshape(-1) + shift
                return found

            for pair, group in itertools.product(pairs, range(groups)):
                members = np.arange(group * per_group, (group + 1) * per_group)
                members = members[layer.saturating[members, pair]]
                if not len(members):
                    continue
                lost = excess(products(2 * pair, group), products(2 * pair + 1, group), neighbours[members, pair])
                sums[:, members] -= np.moveaxis(lost.reshape(len(x), *sizes, len(members)), -1, 1)
            return requantised(sums + bias.reshape(1, -1, *[1] * spatial), scale, y_zero)

        return run

    def _gemm(self, layer: IntegerLayer) -> Callable[[np.ndarray], np.ndarray]:
        node = layer.node
        a_scale, a_zero, _, b_scale, b_zero = (self._constants[n] for n in node.input[1:6])
        bias = self._bias(node, 6)
        y_scale, y_zero = (self._constants[n] for n in node.input[7:9]) if len(node.input) > 8 else (None, None)
        if attribute(node, "transA", 0):
            raise NotEmulated(f"{layer.name} reads its activations transposed")
        alpha = np.float32(attribute(node, "alpha", 1.0))
        exact = (layer.rows.astype(np.float64) - float(b_zero.reshape(-1)[0])).T
        shift = 128 if a_zero.dtype == np.int8 else 0
        pairs, neighbours = np.flatnonzero(layer.saturating.any(0)).tolist(), as_pairs(layer.rows.astype(np.int32))

        def run(a: np.ndarray) -> np.ndarray:
            sums = (a.astype(np.float64) - float(a_zero)) @ exact
            raw = np.pad(a.astype(np.int32) + shift, ((0, 0), (0, 1)))
            for pair in pairs:
                members = np.flatnonzero(layer.saturating[:, pair])
                sums[:, members] -= excess(raw[:, 2 * pair], raw[:, 2 * pair + 1], neighbours[members, pair])
            total = sums + bias
            if y_scale is None or y_zero is None:
                floats: np.ndarray = (total.astype(np.float32) * (alpha * a_scale * b_scale)).astype(np.float32)
                return floats
            return requantised(total, alpha * a_scale * b_scale / y_scale, y_zero)

        return run

    def _bias(self, node: onnx.NodeProto, place: int) -> np.ndarray:
        """A layer's integer bias, [channels], or [1] where it has none."""
        name = node.input[place] if len(node.input) > place else ""
        return self._constants[name].astype(np.int64) if name else np.zeros(1, np.int64)


def requantised(sums: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Integer sums times `scale`, to the nearest 8-bit number (ties to even) around its zero point, as MLAS does it."""
    limits, shift = np.iinfo(zero.dtype), float(zero)
    scaled = sums.astype(np.float32) * scale.astype(np.float32)
    rounded: np.ndarray = np.rint(np.clip(scaled, limits.min - shift, limits.max - shift)) + shift
    return rounded.astype(zero.dtype)


def pads(
    node: onnx.NodeProto, sizes: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> tuple[list[int], list[int]]:
    """How many rows a convolution adds before and after each spatial dimension (ONNX, Conv)."""
    kind = attribute(node, "auto_pad", b"NOTSET")
    if kind == b"VALID":
        return [0] * len(sizes), [0] * len(sizes)
    if kind in (b"SAME_UPPER", b"SAME_LOWER"):
        whole = [
            max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
        ]
        less, more = [pad // 2 for pad in whole], [pad - pad // 2 for pad in whole]
        return (less, more) if kind == b"SAME_UPPER" else (more, less)
    given = [int(pad) for pad in attribute(node, "pads", [0] * 2 * len(sizes))]
    return given[: len(sizes)], given[len(sizes) :]


def _value(name: str, value: np.ndarray) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * value.ndim)
