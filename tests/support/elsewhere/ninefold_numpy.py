"""A backend as another package brings it: ONNX's own evaluator, in NumPy. A folder on the path is its installation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.backends.contract import (
    Backend,
    Device,
    Options,
    Placement,
    Program,
    Runnable,
    Session,
    Setting,
    file_path,
    preparation,
)
from export.bundle import Bundle, Format


@dataclass(frozen=True)
class Evaluator:
    name: str = "numpy-cpu"
    device: Device = "cpu"
    formats: tuple[Format, ...] = ("onnx",)
    reference: bool = False
    on_request: bool = True
    shows_fold: bool = False
    server: None = None

    def unavailable_reason(self) -> str | None:
        return None

    def load(self, bundle: Bundle, options: Options) -> Session:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(str(file_path(self, bundle, options)))
        return Evaluated(evaluator, preparation(bundle, options), bundle.manifest.input.name)

    def program(self, file: Runnable) -> Program | None:
        return Program(
            ["from onnx.reference import ReferenceEvaluator", "", f"model = ReferenceEvaluator({file.path!r})"],
            [f"return model.run(None, {{{file.input.name!r}: x}})[0]"],
        )


class Evaluated:
    def __init__(self, evaluator: Any, prepare: Callable[[np.ndarray], np.ndarray], name: str) -> None:
        self._evaluator, self._name = evaluator, name
        self.prepare = prepare

    def run(self, prepared: np.ndarray) -> np.ndarray:
        (logits,) = self._evaluator.run(None, {self._name: prepared})
        return np.asarray(logits)

    def fetch(self, output: np.ndarray) -> tuple[np.ndarray, ...]:
        return (output.astype(np.float32),)

    def gpu_ns(self, call: Callable[[], object]) -> int | None:
        return None

    def placement(self) -> Placement:
        return Placement({"cpu": len(self._evaluator.rt_nodes_)}, "NumPy is on the CPU alone")

    def settings(self) -> dict[str, Setting]:
        return {"numpy": np.__version__, "intra_op_threads": 1}

    def close(self) -> None:
        self._evaluator = None


CPU: Backend = Evaluator()
