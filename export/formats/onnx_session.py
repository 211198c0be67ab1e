"""An ONNX file in onnxruntime on the CPU. Imports no torch: whoever only looks at a file need not wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def open_session(
    model: str | bytes, *, silent: bool = False, optimised: bool = False, entries: Mapping[str, str] | None = None
) -> Any:
    """A file, or its content, in onnxruntime on the CPU with every graph optimisation off, or all of them.

    `silent` keeps onnxruntime from printing what it also raises; `entries` go to the session's configuration. Raises
    whatever onnxruntime does.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    if silent:
        options.log_severity_level = 4
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
