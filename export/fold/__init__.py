"""Folding BatchNorm exactly, wherever it stands.

`fold_batchnorm` folds a torch module; `FoldReport` says what became of each BatchNorm. Torch is imported when
`fold_batchnorm` is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from export.fold.errors import FoldError
from export.fold.report import FoldedNorm, FoldReport, KeptNorm

if TYPE_CHECKING:
    from export.fold.batchnorm import Folded, fold_batchnorm

__all__ = ["FoldError", "FoldReport", "Folded", "FoldedNorm", "KeptNorm", "fold_batchnorm"]


def __getattr__(name: str) -> Any:
    if name in ("Folded", "fold_batchnorm"):
        from export.fold import batchnorm

        return getattr(batchnorm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
