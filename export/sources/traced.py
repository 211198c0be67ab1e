"""A model of torch as an ONNX file that was traced: for models that torch.export doesn't take.

Owns that way to a file. What the model's code decides by its numbers is decided as it was for the example; the files
are held to the model itself all the same.
"""

from __future__ import annotations

from pathlib import Path

import torch

from export.formats import onnx_file
from export.sources.material import Material
from export.sources.onnx_source import OnnxMaterial


def traced(material: Material, scratch: Path) -> OnnxMaterial:
    """The model, traced on the first of its inputs, in a file in the folder `scratch`. Raises UserError where the model
    can't be traced, or the file is none.
    """
    file = scratch / "traced.onnx"
    batch = material.input.shape[0]
    examples = material.examples if isinstance(batch, str) else tuple(rows[:batch] for rows in material.examples)
    given = tuple(map(torch.from_numpy, examples))
    onnx_file.write_traced(material.module, given, file, *material.names("preprocessed"), free=isinstance(batch, str))
    return OnnxMaterial(
        file,
        material.source,
        material.input,
        material.outputs,
        material.preprocessing,
        material.raw,
        material.labels,
        material.class_names,
        material.calibration,
        material.module,
    )
