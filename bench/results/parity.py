"""The verdict on a backend in the result's words, and the first node that diverges where it failed.

What is right is decided by `export.bundle.verdict`, for whoever exports and whoever measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.backends.contract import Profile
from export.bundle import FLOAT32, Arrays, Manifest, Oracle, Precision
from export.bundle import verdict as contract


@dataclass(frozen=True, kw_only=True)
class ParityVerdict(contract.Verdict):
    """The contract's verdict, with the profile in which the backend ran."""

    profile: Profile


def judge(
    outputs: Arrays, oracle: Oracle, manifest: Manifest, profile: Profile, precision: Precision = FLOAT32
) -> ParityVerdict:
    """The verdict on a backend's outputs of all of the oracle's inputs, from a file of that precision."""
    tf32 = profile is Profile.FAST
    verdict = contract.judge_all(outputs, oracle, manifest.outputs, manifest.tolerances, precision, tf32=tf32)
    return ParityVerdict(profile=profile, **vars(verdict))


def at_batch(
    outputs: Arrays, oracle: Oracle, manifest: Manifest, profile: Profile, precision: Precision = FLOAT32
) -> str | None:
    """Why a backend's outputs of one batch are not right, in words, or None where they are.

    `outputs`, each [batch, …], are of the oracle's first inputs, which begin again where there are more.
    """
    tf32 = profile is Profile.FAST
    return contract.all_at_batch(outputs, oracle, manifest.outputs, manifest.tolerances, precision, tf32=tf32)


def worst_images(logits: np.ndarray, oracle: Oracle, count: int) -> tuple[int, ...]:
    """The places of the `count` images whose logits [N, …] are furthest from the oracle's, not finite ones first.

    Fewer where the oracle has fewer; the first of all where `logits` have another shape.
    """
    if logits.shape != oracle.logits.shape:
        return tuple(range(min(count, len(oracle.logits))))
    finite = np.isfinite(logits)
    error = np.where(finite, logits, 0) - oracle.logits
    largest = np.where(finite, np.abs(error), np.inf).reshape(len(logits), -1).max(1)
    return tuple(int(place) for place in np.argsort(-largest, kind="stable")[:count])


@dataclass(frozen=True)
class Divergence:
    """Where a file first departs from the torch graph.

    Attributes:
        where: the input itself, a node, or nowhere in the file: then the runtime's optimisations or device.
        node: operator and name of the ONNX node; None where no node is at fault.
        layer: the layer that the node belongs to, as the model names it; None where neither graph tells.
        nearest: the torch node that comes nearest to it; None where no torch node has an output of its size.
        relative_error: RMS of the difference from `nearest`, or from what was expected of the input or the output, over
            the RMS of that; None where there is nothing to compare with, or not every number is finite.
        non_finite: how many of the node's numbers are NaN or infinite.
        culprit: whether the file says what the runtime computes at this node; None where that could not be tried.
    """

    where: Literal["input", "node", "runtime"]
    node: str | None
    layer: str | None
    nearest: str | None
    relative_error: float | None
    non_finite: int
    culprit: Literal["file", "runtime"] | None


@dataclass(frozen=True)
class Bisection:
    """What was found on `images` (places in the oracle).

    `agreeing` of the file's `nodes` agree with a torch node; `from_float16` of them are float16, or computed from it.
    """

    images: tuple[int, ...]
    nodes: int
    agreeing: int
    from_float16: int
    divergence: Divergence | None

    def in_words(self) -> str:
        """One sentence for a person."""
        first = self.divergence
        if first is None:
            rounding = f"; {self.from_float16} may be off by float16's rounding" if self.from_float16 else ""
            agreeing = f"{self.agreeing} of {self.nodes} agree with a torch node, the others are meant"
            return f"no node diverges; {agreeing}{rounding}"
        error = "" if first.relative_error is None else f", off by {first.relative_error:.2g} of its RMS"
        if first.non_finite:
            error = f", with {first.non_finite} numbers that are NaN or infinite"
        if first.where == "input":
            return f"first divergence: the input itself ({first.node or 'before the first node'}){error}"
        if first.where == "runtime":
            return (
                "no node diverges while the runtime's optimisations are off, but its output differs with them"
                f"{error}: look at the optimisations and the device"
            )
        layer = "" if first.layer is None else f" of layer {first.layer}"
        nearest = "" if first.nearest is None else f"; the torch node nearest to it is {first.nearest}"
        culprits = {
            "file": "; the runtime computes what the file says, so the file is wrong",
            "runtime": "; in float64 the file says something else, so the runtime or its precision is wrong",
        }
        return f"first divergence: {first.node}{layer}{error}{nearest}{culprits.get(first.culprit or '', '')}"
