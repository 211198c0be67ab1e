"""ONNX files drawn at random: folding never makes a wrong number, never raises, and reports each BatchNorm once.

    python tests/export/fold/test_random_files.py 1000 --processes 2
    python tests/export/fold/test_random_files.py --only 1234 --reduce

draws that many and prints what became of them, and one of them alone, cut down to the nodes that still fail.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import campaign
from campaign import Outcome
from choosing import Chooser, Draw
from file_programs import Feeds, File, NotRun, batchnorms, cast, run, session
from random_files import draw_file, runs, without

import export.fold.onnx_model
from export.fold.report import Strategy

FEW_TIMES = 8.0
"""How many times the original's own error the folded file's may be: against float32 in float16, between optimised and
unoptimised in float32."""

SLACK = {"float64": 1e-9, "float32": 1e-4, "float16": 0.02}
"""And how much, of the largest value, above that."""

NOISE = {"float64": 1e-9, "float32": 1e-3, "float16": 0.1}
"""A file whose own error is larger than this shows nothing about a fold."""


class NotCounted(Exception):
    """The case says nothing about folding; another is drawn."""


Results = list[np.ndarray]


def errors(wanted: Results, found: Results) -> list[float]:
    """Largest difference of each, relative to the largest value wanted; infinite where the two can't be compared."""
    if len(wanted) != len(found):
        return [math.inf]

    def error(a: np.ndarray, b: np.ndarray) -> float:
        if a.shape != b.shape:
            return math.inf
        a, b = a.astype(np.float64), b.astype(np.float64)
        value = float(np.abs(b - a).max() / max(float(np.abs(a).max()), 1e-2))
        return math.inf if math.isnan(value) else value

    return [error(a, b) for a, b in zip(wanted, found, strict=True)]


class Trial:
    """The original's results on one set of inputs, and how far from them others may be."""

    def __init__(self, file: File, feeds: Feeds):
        self.feeds = cast(feeds, file.dtype)
        model, kind = file.model(), str(file.dtype)
        self.plain = run(session(model), self.feeds)
        self.optimised = run(session(model, optimised=True), self.feeds)
        self.wanted = self.plain
        if kind == "float16":
            single = np.dtype(np.float32)
            self.wanted = run(session(file.model(single)), cast(feeds, single))
        if not all(np.isfinite(r).all() for r in (*self.plain, *self.optimised)):
            raise NotCounted("its own result is not finite")
        own = [
            max(both) for both in zip(errors(self.wanted, self.plain), errors(self.wanted, self.optimised), strict=True)
        ]
        if max(own) > NOISE[kind]:
            raise NotCounted("its own error is too large")
        self.limits = [FEW_TIMES * e + SLACK[kind] for e in own]

    def worst(self, model: onnx.ModelProto) -> tuple[float, float]:
        """The largest error, as a share of what is allowed, and as it is, with optimisations and without."""
        worst = (0.0, 0.0)
        for optimised in (False, True):
            found = run(session(model, optimised=optimised), self.feeds)
            if [r.dtype for r in found] != [r.dtype for r in self.plain]:
                return math.inf, math.inf
            worst = max(
                worst, *((e / limit, e) for e, limit in zip(errors(self.wanted, found), self.limits, strict=True))
            )
        return worst


def judged(file: File, strategy: Strategy) -> Outcome:
    """Fold the file and compare. Raises NotCounted where it says nothing about the fold."""
    features = sorted(file.features() | {f"strategy: {strategy}"})
    context = f"strategy {strategy}, opset {file.opset}, IR {file.ir_version}, {file.dtype}"
    try:
        trials = [
            Trial(file, file.inputs(1, lambda axis, size: size if axis else 3)),
            Trial(file, file.inputs(2, lambda axis, size: size + 3 if axis else 5, scale=3.0)),
        ]
    except NotRun as error:
        raise NotCounted("onnxruntime does not run it, optimised") from error
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        original = file.model()
        onnx.save(original, source)
        content = source.read_bytes()
        try:
            result = export.fold.onnx_model.fold_onnx(source, target, strategy)
        except Exception as error:  # none is allowed
            return Outcome(
                "exception", f"{type(error).__name__}: {error}".replace(folder, "") + f"\n{context}", features=features
            )
        account = campaign.account(result.report)

        def outcome(verdict: str, detail: str = "") -> Outcome:
            return Outcome(verdict, f"{detail}\n{context}", features=features, **account)

        if source.read_bytes() != content:
            return outcome("wrong", "folding changed the source")
        folded = onnx.load(target)
    if result.difference is None:
        return outcome("wrong", f"the two files were not compared: {result.not_run}")
    if not result.difference <= max(t for trial in trials for t in trial.limits):
        return outcome("wrong", f"published with a difference of {result.difference:.1e}")
    ends = [
        [[v.name for v in side] for side in (m.graph.input[: len(file.example)], m.graph.output)]
        for m in (original, folded)
    ]
    if ends[0] != ends[1]:
        return outcome("wrong", "inputs or outputs have other names")
    try:
        onnx.checker.check_model(folded, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return outcome("wrong", f"the folded file is not valid: {error}")
    for trial in trials:
        sizes = ", ".join(str(array.shape) for array in trial.feeds.values())
        try:
            share, error = trial.worst(folded)
        except NotRun as raised:
            return outcome("exception", f"the folded file does not run: {raised}\nat {sizes}")
        if not share <= 1:
            return outcome("wrong", f"error {error:.1e}, {share:.1e} × what is allowed\nat {sizes}")
    kept = len(result.report.kept)
    total, expected, left = len(result.report.folded) + kept, batchnorms(original), batchnorms(folded)
    if total != expected:
        return outcome("report", f"{total} BatchNorms are reported, of {expected}")
    if left > kept:
        return outcome("report", f"{left} BatchNorms are left in the file, {kept} are reported as kept")
    names = collections.Counter(norm.name for norm in (*result.report.folded, *result.report.kept))
    if file.named and max(names.values()) > 1:
        return outcome("report", f"{names.most_common(1)[0][0]} is reported twice")
    return outcome("right")


def case(draw: Draw) -> tuple[File, Strategy, Outcome]:
    """The first file drawn that counts."""
    choose, strategies = Chooser(draw), get_args(Strategy)
    passed_over: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of overflows in half precision
        while True:
            strategy: Strategy = choose.pick(["auto"] * 3 + list(strategies))
            file = draw_file(draw)
            try:
                outcome = judged(file, strategy)
            except NotCounted as reason:
                passed_over[str(reason)] += 1
                continue
            outcome.passed_over = dict(passed_over)
            return file, strategy, outcome


def check(seed: int) -> Outcome:
    return case(random.Random(seed).randint)[-1]


def show(seed: int, reduce: bool) -> None:
    file, strategy, outcome = case(random.Random(seed).randint)

    def judge(smaller: File) -> Outcome:
        if not runs(smaller):
            raise NotCounted("it is no model any more")
        return judged(smaller, strategy)

    if reduce and outcome.verdict != "right":
        file, outcome = campaign.reduced(file, outcome, without, judge)
    campaign.print_case(file.listing(), outcome)


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_random_files(seed: int) -> None:
    outcome = check(seed)
    assert outcome.verdict == "right", outcome.detail


def one_weight_off(array: np.ndarray) -> None:
    array.reshape(-1)[0] += 0.1


def not_a_number(array: np.ndarray) -> None:
    array.reshape(-1)[0] = np.nan


@pytest.mark.parametrize("spoil", [one_weight_off, not_a_number])
def test_the_check_sees(spoil: Callable[[np.ndarray], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fold = export.fold.onnx_model.fold_onnx

    def spoiled(source: Path, target: Path, strategy: Strategy) -> Any:
        result = fold(source, target, strategy)
        model = onnx.load(target)
        for tensor in model.graph.initializer:
            if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16):
                array = onnx.numpy_helper.to_array(tensor).copy()
                spoil(array)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
                break
        onnx.save(model, target)
        return result

    monkeypatch.setattr(export.fold.onnx_model, "fold_onnx", spoiled)
    assert any(check(seed).verdict == "wrong" for seed in range(20))


def test_the_check_sees_what_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = export.fold.onnx_model.fold_onnx

    def silent(source: Path, target: Path, strategy: Strategy) -> Any:
        result = fold(source, target, strategy)
        report = result.report
        less = {"kept": report.kept[1:]} if report.kept else {"folded": report.folded[1:]}
        return dataclasses.replace(result, report=report.model_copy(update=less))

    monkeypatch.setattr(export.fold.onnx_model, "fold_onnx", silent)
    assert any(check(seed).verdict == "report" for seed in range(20))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_random_files(block: int) -> None:
    outcomes: dict[int, Any] = {s: campaign.checked(check, s) for s in range(100 * block + 1000, 100 * block + 1100)}
    assert not {seed: outcome.detail for seed, outcome in outcomes.items() if outcome.verdict != "right"}


if __name__ == "__main__":
    sys.exit(campaign.main(__file__, check, show, "files"))
