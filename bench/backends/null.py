"""A backend that computes nothing: what it "takes" is the price of the harness around every other backend.

Owns no runtime and loads no file; its output is zeros, so it takes no part in parity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bench.backends.contract import Backend, Device, Options, Placement, Runnable, Server, Setting

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from export.bundle import Arrays, Bundle, Format


@dataclass(frozen=True)
class Null:
    """Does nothing, on no device."""

    name: ClassVar[str] = "null"
    device: ClassVar[Device] = "none"
    formats: ClassVar[tuple[Format, ...]] = ()
    reference: ClassVar[bool] = False
    on_request: ClassVar[bool] = True
    shows_fold: ClassVar[bool] = False
    server: ClassVar[Server | None] = None

    def unavailable_reason(self) -> str | None:
        return None

    def program(self, file: Runnable) -> None:
        return None

    def load(self, bundle: Bundle, options: Options) -> NullSession:
        return NullSession(bundle.output_sizes())


class NullSession:
    """Hands its input through; `fetch` returns the same zeros for each batch size, made at its first use."""

    def __init__(self, output_sizes: tuple[tuple[int, ...], ...]) -> None:
        self._output_sizes = output_sizes
        self._zeros: dict[int, Arrays] = {}

    def prepare(self, raw: np.ndarray, *more: np.ndarray) -> np.ndarray:
        return raw

    def run(self, prepared: np.ndarray) -> np.ndarray:
        return prepared

    def fetch(self, output: np.ndarray) -> Arrays:
        zeros = self._zeros.get(len(output))
        if zeros is None:
            import numpy as np

            zeros = tuple(np.zeros((len(output), *sizes), np.float32) for sizes in self._output_sizes)
            self._zeros[len(output)] = zeros
        return zeros

    def gpu_ns(self, call: Callable[[], object]) -> int | None:
        return None

    def placement(self) -> Placement:
        return Placement(nodes={}, evidence="there is nothing to place")

    def settings(self) -> dict[str, Setting]:
        return {}

    def close(self) -> None:
        self._zeros.clear()


NULL: Backend = Null()
