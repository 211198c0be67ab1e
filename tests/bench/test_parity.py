"""The verdict: its limits, and the faults that it must find in real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bench.backend import Options, Profile, Session, find_backend
from bench.parity import TF32_ROUNDING, ParityVerdict, judge
from export.bundle import Bundle, Oracle, Tolerances

E32 = 1e-6
TOLERANCES = Tolerances(float32_rms_error=E32)


def oracle_of(logits: np.ndarray, labels: np.ndarray | None = None) -> Oracle:
    return Oracle(np.zeros((len(logits), 1), np.uint8), labels, logits.astype(np.float64))


@pytest.fixture
def scores() -> np.ndarray:
    """2,000 rows of 10 scores, each with a margin of at least 0.5."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 10))
    logits[np.arange(2000), logits.argmax(1)] += 0.5
    return logits


def flipped(logits: np.ndarray, count: int) -> np.ndarray:
    changed = logits.copy()
    changed[:count] = np.roll(changed[:count], 1, axis=1)
    return changed


def test_strict_limits_the_rms_error(scores: np.ndarray) -> None:
    for factor, passes in ((3.9, True), (4.1, False)):
        verdict = judge(scores + factor * E32, oracle_of(scores), TOLERANCES, Profile.STRICT)
        assert verdict.passed is passes
        assert verdict.rms_error == pytest.approx(factor * E32)
        assert verdict.rms_error_in_float32_errors == pytest.approx(factor)
        assert verdict.max_abs_error == pytest.approx(factor * E32, rel=1e-3)


@pytest.mark.parametrize(("margin", "passes"), [(0.9e-4, True), (1.1e-4, False)])
def test_strict_forgives_a_flip_of_a_tie_only(margin: float, passes: bool, scores: np.ndarray) -> None:
    scores[7] = 0
    scores[7, 3], scores[7, 4] = 1 + margin, 1
    found = scores.copy()
    found[7, 4] = 1 + 2 * margin
    verdict = judge(found, oracle_of(scores), Tolerances(float32_rms_error=1.0), Profile.STRICT)
    assert verdict.passed is passes
    assert verdict.flips is not None
    (flip,) = verdict.flips
    assert (flip.image_index, flip.oracle_prediction, flip.prediction, flip.label) == (7, 3, 4, None)
    assert flip.margin == pytest.approx(margin)


@pytest.mark.parametrize(("flips", "passes"), [(2, True), (3, False)])
def test_fast_limits_the_share_of_flips(flips: int, passes: bool, scores: np.ndarray) -> None:
    verdict = judge(flipped(scores, flips), oracle_of(scores), TOLERANCES, Profile.FAST)
    assert verdict.flips is not None
    assert len(verdict.flips) == flips
    assert verdict.passed is passes


def test_fast_limits_the_top1(scores: np.ndarray) -> None:
    """Two flips of 2,000 are within 0.1 %, but 0.1 points of top-1 are not within 0.05."""
    oracle = oracle_of(scores, scores.argmax(1))
    verdict = judge(flipped(scores, 2), oracle, TOLERANCES, Profile.FAST)
    assert not verdict.passed
    assert verdict.top1_percent == pytest.approx(99.9)
    assert verdict.oracle_top1_percent == 100
    assert judge(flipped(scores, 1), oracle, TOLERANCES, Profile.FAST).passed


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_number_that_is_none_fails(profile: Profile, value: float, scores: np.ndarray) -> None:
    found = scores.copy()
    found[3, 2] = value
    verdict = judge(found, oracle_of(scores), TOLERANCES, profile)
    assert not verdict.passed
    assert verdict.non_finite == 1
    assert verdict.rms_error is None


def test_another_shape_fails(scores: np.ndarray) -> None:
    verdict = judge(scores[:, :9], oracle_of(scores), TOLERANCES, Profile.STRICT)
    assert not verdict.passed
    assert "[2000, 9]" in verdict.failures[0]


@pytest.mark.parametrize("shape", [(50, 1), (50, 4, 4), (50,)])
def test_outputs_that_are_no_class_scores_have_no_flips(shape: tuple[int, ...]) -> None:
    oracle = oracle_of(np.random.default_rng(0).normal(size=shape))
    off = oracle.logits + 5 * E32
    strict = judge(off, oracle, TOLERANCES, Profile.STRICT)
    assert strict.flips is None
    assert strict.top1_percent is None
    assert not strict.passed
    assert judge(off, oracle, TOLERANCES, Profile.FAST).passed
    assert not judge(oracle.logits + 4.1 * TF32_ROUNDING * E32, oracle, TOLERANCES, Profile.FAST).passed


# Faults in real files, run by a real runtime.


def verdict_of(
    bundle_path: Path, backend: str = "onnx-cpu", change: Callable[[np.ndarray], np.ndarray] | None = None
) -> ParityVerdict:
    bundle = Bundle.open(bundle_path)
    oracle = bundle.oracle()
    session: Session = find_backend(backend).load(bundle, Options(threads=1, folded=backend != "torch-cpu"))
    raw = oracle.raw.copy()
    logits = session.fetch(session.run(session.prepare(change(raw) if change else raw)))
    session.close()
    return judge(logits, oracle, bundle.manifest.tolerances, Profile.STRICT)


def change_weights(change: Callable[[list[np.ndarray]], None]) -> Callable[[Path], None]:
    """Rewrites an ONNX file. `change` gets its weights in the order in which the network uses them."""

    def rewrite(path: Path) -> None:
        model = onnx.load(str(path))
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        used = [tensors[name] for node in model.graph.node for name in node.input if name in tensors]
        weights = [numpy_helper.to_array(tensor).copy() for tensor in used]
        change(weights)
        for tensor, weight in zip(used, weights, strict=True):
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
        path.unlink()
        onnx.save(model, str(path))

    return rewrite


def swap_classes(weights: list[np.ndarray]) -> None:
    weight, bias = weights[-2:]
    assert bias.shape == (10,)
    weight[[3, 5]] = weight[[5, 3]]
    bias[[3, 5]] = bias[[5, 3]]


def nudge_one_weight(weights: list[np.ndarray]) -> None:
    """The largest of the first layer: one of the last may belong to a unit that is never active."""
    first = weights[0].reshape(-1)
    first[np.abs(first).argmax()] += 1e-2


@pytest.mark.parametrize("backend", ["torch-cpu", "torchscript-cpu", "onnx-cpu"])
def test_the_files_as_exported_pass(backend: str, small_bundle: Path) -> None:
    verdict = verdict_of(small_bundle, backend)
    assert verdict.passed, verdict.failures
    assert verdict.flips == ()


def test_two_swapped_classes_are_found(tampered: Any) -> None:
    verdict = verdict_of(tampered("model.onnx", change_weights(swap_classes)))
    assert not verdict.passed
    assert verdict.flips
    assert {frozenset((flip.oracle_prediction, flip.prediction)) for flip in verdict.flips} == {frozenset((3, 5))}


def test_one_weight_off_by_a_hundredth_is_found(tampered: Any) -> None:
    verdict = verdict_of(tampered("model.onnx", change_weights(nudge_one_weight)))
    assert not verdict.passed
    assert "RMS error" in verdict.failures[0]


def test_another_normalisation_is_found(tampered: Any) -> None:
    def renormalise(manifest: dict[str, Any]) -> None:
        manifest["preprocessing"] |= {"mean": [0.1307], "std": [0.3081]}

    bundle = tampered(manifest=renormalise)
    for backend in ("torch-cpu", "onnx-cpu"):
        assert not verdict_of(bundle, backend).passed


def test_a_transposed_input_is_found(small_bundle: Path) -> None:
    verdict = verdict_of(small_bundle, change=lambda raw: np.ascontiguousarray(raw.swapaxes(1, 2)))
    assert not verdict.passed
