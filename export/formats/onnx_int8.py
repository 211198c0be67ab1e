"""int8 by onnxruntime: static quantisation of an ONNX file, written with QuantizeLinear and DequantizeLinear nodes.

Owns the choice of what is quantised and how. The numbers are onnxruntime's, but for the scales and biases that
`export.int8.weights` knows better.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx

from export.bundle.rows import Rows
from export.int8.layers import LAYERS
from export.int8.weights import layers_of, shifts, with_biases

CALIBRATION_BATCH = 100


class Quantiser:
    """Quantises one ONNX file, by the ranges that its values take for `inputs` [N, …], as its input wants them; more
    than once where layers are to be compared. `model` is what it quantises: the file as onnxruntime prepares it.

    Activations are uint8 and weights int8 with a scale for each output channel: the pair that AVX-512 VNNI multiplies
    and adds up in 32 bits, where nothing overflows. Without VNNI two products are added up in 16 bits: the scales are
    such that these can't overflow either (`export.int8.pairs`). So every CPU comes to the same integers.

    What rounding the weights does to a layer's mean output, for these inputs, goes into its bias (Nagel, van Baalen,
    Blankevoort & Welling, Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019).

    Measured with the article's network, 10,000 images, in percent of the logits' spread (RMS) and flipped predictions:

    |                                        | with VNNI | without    |
    |----------------------------------------|-----------|------------|
    | onnxruntime 1.31's own scales          | 4.1, 15   | 7.1, 37    |
    | these scales, for pairs in its order   | 5.8, 18   | the same   |
    | those, and the biases                  | 1.8, 4    | the same   |
    | these, for any order, and the biases   | 1.5, 3    | the same   |

    At batch 256 int8 activations ran at 0.90 of uint8's speed, since a ReLU can't be part of their quantisation.
    """

    def __init__(self, source: Path, inputs: Rows, folder: Path) -> None:
        """`folder` is for what is kept between two files, and has to be there as long as this object is used."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        prepared = folder / "prepared.onnx"
        with _quiet():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        self.model = onnx.load(str(prepared))
        self._inputs, self._folder = inputs, folder
        self._before = _before_the_layers(self.model.graph)
        self._layers = {layer.node.name: layer for layer in layers_of(self.model.graph)}
        self._shifts = shifts(self.model, tuple(self._layers.values()), inputs)

    def write(self, path: Path, in_float: Collection[str] = ()) -> int:
        """Write the file; → the opset. The nodes named `in_float` stay as they are."""
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        layers = [layer for name, layer in self._layers.items() if name not in in_float]
        corrected = self._folder / "corrected.onnx"
        more = {name: shift for name, shift in self._shifts.items() if name not in in_float}
        onnx.save(with_biases(self.model, more), str(corrected))
        # Older releases (1.30) take the ranges anew each time.
        kept = "calibration_cache_path" in inspect.signature(quantize_static).parameters
        with _quiet():
            quantize_static(
                str(corrected),
                str(path),
                _Inputs(self.model.graph.input[0].name, self._inputs),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[*self._before, *in_float],
                extra_options={"TensorQuantOverrides": {layer.node.input[1]: layer.overrides() for layer in layers}},
                **({"calibration_cache_path": self._folder / "ranges.json"} if kept else {}),
            )
        written = onnx.load(str(path), load_external_data=False)
        return max(int(used.version) for used in written.opset_import if used.domain == "")


class _Inputs:
    """The calibration inputs in batches, as onnxruntime asks for them."""

    def __init__(self, name: str, inputs: Rows) -> None:
        starts = range(0, len(inputs), CALIBRATION_BATCH)
        self._batches = ({name: np.asarray(inputs[start : start + CALIBRATION_BATCH])} for start in starts)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self._batches


def _before_the_layers(graph: onnx.GraphProto) -> list[str]:
    """The nodes that no layer comes before: preprocessing, which would lose precision and gain nothing."""
    behind: set[str] = set()
    names = []
    for node in graph.node:  # in an order in which each comes after what it reads
        if node.op_type in LAYERS or behind.intersection(node.input):
            behind.update(node.output)
        else:
            names.append(node.name)
    return names


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantiser advises on the root logger, whatever was done already."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
