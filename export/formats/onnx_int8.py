"""int8 by onnxruntime: static quantisation of an ONNX file, written with QuantizeLinear and DequantizeLinear nodes.

Owns the choice of what is quantised and how. The numbers are onnxruntime's.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

CALIBRATION_BATCH = 100
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def write(source: Path, path: Path, inputs: np.ndarray) -> int:
    """Quantise `source` by the ranges that its values take for `inputs` [N, …], as its input wants them; → the opset.

    Activations are uint8 and weights int8 with a scale for each output channel: the pair that AVX-512 VNNI multiplies
    and adds up in 32 bits, where nothing overflows. Measured with the article's network (onnxruntime 1.31, batch 256):
    int8 activations ran at 0.90 of uint8's speed, since a ReLU can't be part of their quantisation.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            _Inputs(model.graph.input[0].name, inputs),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_before_the_layers(model.graph),
        )
    written = onnx.load(str(path), load_external_data=False)
    return max(int(used.version) for used in written.opset_import if used.domain == "")


class _Inputs:
    """The calibration inputs in batches, as onnxruntime asks for them."""

    def __init__(self, name: str, inputs: np.ndarray) -> None:
        starts = range(0, len(inputs), CALIBRATION_BATCH)
        self._batches = iter([{name: inputs[start : start + CALIBRATION_BATCH]} for start in starts])

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
