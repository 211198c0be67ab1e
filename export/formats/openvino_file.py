"""OpenVINO's intermediate representation: a `.xml` file and the weights in a `.bin`.

Owns writing and running such files, and what their weights can do. Knows nothing of folding.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from export.bundle import Arrays
from export.formats.running import Run
from export.int8.pairs import can_saturate, worst_pairs


def missing() -> str | None:
    """Why such files can't be made here and what would change that, or None where they can."""
    if importlib.util.find_spec("openvino") is not None:
        return None
    return "openvino must be installed: pip install 'ninefold[openvino]'"


def write(source: Path, path: Path) -> None:
    """Write the quantised ONNX file `source` as IR: OpenVINO computes of it in 8 bits what onnxruntime does.

    Measured with the article's network (OpenVINO 2026.4, AVX-512 VNNI, two threads): 1.00 of the time of what NNCF 3.4
    makes at batch 256, 0.99 at batch 1. The RMS error of the logits is 2.2 % of their spread, NNCF's 4.9 %, and 5.3 %
    without VNNI.
    """
    import openvino

    openvino.save_model(openvino.Core().read_model(str(source)), str(path), compress_to_fp16=False)


def weights(path: Path) -> Path:
    """The file with the weights, which must lie beside the `.xml` file."""
    return path.with_suffix(".bin")


def batchnorms(path: Path) -> int:
    """How many BatchNormInference operations the file holds."""
    import openvino

    operations = openvino.Core().read_model(str(path)).get_ordered_ops()
    return sum(operation.get_type_name() == "BatchNormInference" for operation in operations)


def saturating(path: Path) -> tuple[str, ...]:
    """The weights with which a CPU without VNNI could saturate, whatever order its kernels multiply in, by their names.

    Those of 8 bits; a channel is what the first dimension counts.
    """
    import openvino

    names = []
    for operation in openvino.Core().read_model(str(path)).get_ordered_ops():
        if operation.get_type_name() == "Constant" and operation.get_element_type() == openvino.Type.i8:
            weights = operation.get_data()
            if weights.ndim > 1 and can_saturate(worst_pairs(weights.reshape(len(weights), -1))).any():
                names.append(str(operation.get_friendly_name()))
    return tuple(names)


def runner(path: Path) -> Run:
    """The file as a function, inputs → outputs, on the CPU; what is not int8 is computed in float32."""
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(*batch: np.ndarray) -> Arrays:
        made = compiled(list(batch))
        return tuple(np.array(made[place]) for place in range(len(compiled.outputs)))

    return run
