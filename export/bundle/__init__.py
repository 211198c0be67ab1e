"""The bundle, and what stands in it: the contract between whoever exports and whoever runs.

`manifest` is what a bundle holds, `verdict` when its files are right; `errors` and `foundations` are what bench has of
trainer. The manifest's names can be taken from here too. It is imported when the first of them is asked for: who only
needs the errors, as every `--help`, doesn't wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.bundle.manifest import BOX_KINDS as BOX_KINDS
    from export.bundle.manifest import COARSER as COARSER
    from export.bundle.manifest import FLOAT32 as FLOAT32
    from export.bundle.manifest import MANIFEST_NAME as MANIFEST_NAME
    from export.bundle.manifest import VARIANTS as VARIANTS
    from export.bundle.manifest import Arrays as Arrays
    from export.bundle.manifest import Bundle as Bundle
    from export.bundle.manifest import BundleError as BundleError
    from export.bundle.manifest import CpuVerdict as CpuVerdict
    from export.bundle.manifest import DataFile as DataFile
    from export.bundle.manifest import Dimension as Dimension
    from export.bundle.manifest import Environment as Environment
    from export.bundle.manifest import FileEntry as FileEntry
    from export.bundle.manifest import FoldReport as FoldReport
    from export.bundle.manifest import Format as Format
    from export.bundle.manifest import ImageSteps as ImageSteps
    from export.bundle.manifest import Int8Layer as Int8Layer
    from export.bundle.manifest import Int8Layers as Int8Layers
    from export.bundle.manifest import LeftOut as LeftOut
    from export.bundle.manifest import Limits as Limits
    from export.bundle.manifest import Manifest as Manifest
    from export.bundle.manifest import Oracle as Oracle
    from export.bundle.manifest import Output as Output
    from export.bundle.manifest import OutputKind as OutputKind
    from export.bundle.manifest import Precision as Precision
    from export.bundle.manifest import Preprocessing as Preprocessing
    from export.bundle.manifest import Proof as Proof
    from export.bundle.manifest import Source as Source
    from export.bundle.manifest import Takes as Takes
    from export.bundle.manifest import TensorSpec as TensorSpec
    from export.bundle.manifest import Tolerances as Tolerances
    from export.bundle.manifest import precision_of as precision_of
    from export.bundle.manifest import sha256_file as sha256_file
    from export.bundle.manifest import takes_raw as takes_raw


def __getattr__(name: str) -> object:
    manifest = importlib.import_module("export.bundle.manifest")  # `from … import` would ask this function again
    try:
        return getattr(manifest, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
