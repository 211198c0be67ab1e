"""OpenVINO's intermediate representation, quantised to int8 by NNCF: a `.xml` file and the weights in a `.bin`.

Owns quantising, writing and running such files. Knows nothing of folding.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

NEEDS = ("openvino", "nncf")


def missing() -> str | None:
    """Why such files can't be made here and what would change that, or None where they can."""
    lacking = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if not lacking:
        return None
    return f"{' and '.join(lacking)} must be installed: pip install 'ninefold[openvino]'"


def write(source: Path, path: Path, inputs: np.ndarray) -> None:
    """Quantise the ONNX file `source` by its values for `inputs` [N, …], as its input wants them.

    Activations may have a zero point of their own (NNCF's preset "mixed"): raw pixels then are the quantised input
    just as they come, and the logits' error is 0.20 where the symmetric preset's is 0.27 (article's network, MNIST).
    """
    import openvino

    nncf = _nncf()
    with _quiet():
        quantised = nncf.quantize(
            openvino.Core().read_model(str(source)),
            nncf.Dataset([row[None] for row in inputs]),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(inputs),
        )
        openvino.save_model(quantised, str(path), compress_to_fp16=False)


def weights(path: Path) -> Path:
    """The file with the weights, which must lie beside the `.xml` file."""
    return path.with_suffix(".bin")


def batchnorms(path: Path) -> int:
    """How many BatchNormInference operations the file holds."""
    import openvino

    operations = openvino.Core().read_model(str(path)).get_ordered_ops()
    return sum(operation.get_type_name() == "BatchNormInference" for operation in operations)


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The file as a function, batch → float32 logits, on the CPU; what is not int8 is computed in float32."""
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda batch: np.asarray(compiled(batch)[0])


def _nncf() -> ModuleType:
    os.environ.setdefault("NNCF_CI", "1")  # read once, on import: without it NNCF reports its use to its makers
    with _quiet():
        return importlib.import_module("nncf")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF logs and draws progress bars, and makes torch look for a CUDA compiler; none of it tells a user anything."""
    loggers = [logging.getLogger(name) for name in ("nncf", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
