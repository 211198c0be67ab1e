"""Faults seeded on purpose: each is a really wrong file or manifest that a real runtime runs. Parity must fail, and the
layer that is named must be the faulty one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from typer.testing import CliRunner

import bench.run.rounds
import bench.worker.bisect
from bench.backends.contract import Options, Profile, Session
from bench.backends.registry import find_backend
from bench.cli.main import app
from bench.errors import BenchError
from bench.report.terminal.parity import FLIPS_SHOWN
from bench.results.parity import Bisection, ParityVerdict, worst_images
from bench.run.plan import Plan
from bench.run.rounds import BISECTED_IMAGES, run
from bench.worker.bisect import bisect
from export.bundle import Bundle
from export.bundle.verdict import McNemar
from export.formats import torchscript
from trainer.model import Net

ROOT = Path(__file__).parents[3]
OPTIONS = Options(threads=1)
Weights = dict[str, np.ndarray]
Change = Callable[[onnx.GraphProto, Weights], None]


def trained(bundle: Path) -> Net:
    net = Net()
    net.load_state_dict(load_file(bundle / "checkpoint.safetensors"))
    return net.eval()


def edited(change: Change) -> Callable[[Path], None]:
    """Rewrites an ONNX file. `change` gets the graph and a copy of its weights, both to be changed in place."""

    def rewrite(path: Path) -> None:
        model = onnx.load(str(path))
        weights = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
        change(model.graph, weights)
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
        onnx.save(model, str(path))

    return rewrite


def swap_classes(graph: onnx.GraphProto, weights: Weights) -> None:
    for name in ("classifier.5.weight", "classifier.5.bias"):
        weights[name][[3, 5]] = weights[name][[5, 3]]


def nudge_a_weight(layer: str) -> Change:
    """The layer's largest by a hundredth: a small one may belong to a channel that is never active."""

    def change(graph: onnx.GraphProto, weights: Weights) -> None:
        flat = weights[f"{layer}.weight"].reshape(-1)
        flat[np.abs(flat).argmax()] += 1e-2

    return change


def transpose_the_input(graph: onnx.GraphProto, weights: Weights) -> None:
    first = graph.node[0]
    first.input[0] = "transposed"
    graph.node.insert(0, helper.make_node("Transpose", ["image"], ["transposed"], name="turn", perm=[0, 1, 3, 2]))


def forget_the_border_of_the_ones(graph: onnx.GraphProto, weights: Weights) -> None:
    """What the channel of ones adds inside, added everywhere: the shift in the bias as if nothing were padded."""
    ones = weights["features.6.weight"][:, 10]
    weights["features.6.bias"] += ones.sum((1, 2))
    ones[:] = 0


def forget_the_border_of_the_map(graph: onnx.GraphProto, weights: Weights) -> None:
    bias = weights["features.9.bias_map"]
    bias[:] = bias[:, :, 7:8, 7:8]


def fold_with_another_eps(graph: onnx.GraphProto, weights: Weights, net: Net) -> None:
    """The first BatchNorm folded into the layer after it with an eps of 1e-3, which is the default elsewhere."""
    norm, layer = net.features[5], net.features[6]
    gamma, beta, mean, var, kernel = (
        tensor.detach().double().numpy()
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var, layer.weight)
    )
    scale = gamma / np.sqrt(var + 1e-3)
    folded = weights["features.6.weight"]
    folded[:, :10] = kernel * scale[:, None, None]
    folded[:, 10] = (kernel * (beta - scale * mean)[:, None, None]).sum(1)


def scale_the_second_layer(graph: onnx.GraphProto, weights: Weights) -> None:
    """By a power of two, taken back in the layer after: in float32 every product stays as exact as it was."""
    weights["features.2.weight"][:10] *= 2.0**17
    weights["features.2.bias"][:10] *= 2.0**17
    weights["features.6.weight"][:, :10] *= 2.0**-17


def overflow_in_float16(graph: onnx.GraphProto, weights: Weights) -> None:
    """The scaled second layer's outputs kept as float16: some exceed 65,504, the largest that there is.

    The layer itself stays float32: onnxruntime has no float16 convolution on the CPU, and would widen a whole float16
    network without a word, so that nothing could overflow.
    """
    scale_the_second_layer(graph, weights)
    (place,) = (place for place, node in enumerate(graph.node) if "features.2.weight" in node.input)
    made = graph.node[place].output[0]
    graph.node[place].output[0] = "wide"
    graph.node.insert(place + 1, helper.make_node("Cast", ["wide"], ["half"], name="narrow", to=TensorProto.FLOAT16))
    graph.node.insert(place + 2, helper.make_node("Cast", ["half"], [made], name="widen", to=TensorProto.FLOAT))


def forget_eval(path: Path) -> None:
    """The trained network traced as it stood at the end of an epoch: batch statistics, and dropout."""
    torchscript.write(trained(path.parent).train(), (torch.zeros(2, 1, 28, 28),), path)


def normalise_otherwise(manifest: dict[str, Any]) -> None:
    manifest["preprocessing"] |= {"mean": [0.1307], "std": [0.3081]}


ALL_RIGHT = ("nothing", "scaled and scaled back")
# What bisecting must name: where, the layer, the operators of its nodes, and the torch node that should have been met.
FAULTS: dict[str, tuple[str, str | None, str | None, str | None]] = {
    "two swapped classes": ("node", "classifier.5", "Gemm", "linear_2"),
    "a weight of the first layer off by a hundredth": ("node", "features.0", "Conv", "conv2d"),
    "a weight in the middle off by a hundredth": ("node", "features.6", "Conv", "conv2d_2"),
    "a wrong eps": ("node", "features.6", "Conv", "conv2d_2"),
    "no border for the channel of ones": ("node", "features.6", "Conv", "conv2d_2"),
    "no border in the bias map": ("node", "features.9", "Conv with Add", "conv2d_3"),
    "an overflow in float16": ("node", "features.2", "Cast", "conv2d_1"),
    "a transposed input": ("input", None, "Transpose", "image"),
    "another normalisation": ("input", None, None, None),
}


@pytest.fixture(scope="module")
def bundles(
    small_bundle: Path, tampered_at: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The untouched bundle as "nothing", one that is as right although it looks otherwise, and one for each fault."""
    folder = tmp_path_factory.mktemp("faults")
    net = trained(small_bundle)
    changes: dict[str, Change] = {
        "scaled and scaled back": scale_the_second_layer,
        "two swapped classes": swap_classes,
        "a weight of the first layer off by a hundredth": nudge_a_weight("features.0"),
        "a weight in the middle off by a hundredth": nudge_a_weight("features.6"),
        "a wrong eps": partial(fold_with_another_eps, net=net),
        "no border for the channel of ones": forget_the_border_of_the_ones,
        "no border in the bias map": forget_the_border_of_the_map,
        "an overflow in float16": overflow_in_float16,
        "a transposed input": transpose_the_input,
    }
    made = {name: tampered_at(folder / name, "model.onnx", edited(change)) for name, change in changes.items()}
    made["another normalisation"] = tampered_at(folder / "normalisation", manifest=normalise_otherwise)
    return {"nothing": small_bundle} | made


def judge(plan: Callable[..., Plan], bundles: Iterable[Path], backend: str = "onnx-cpu") -> list[ParityVerdict]:
    """The verdicts of `bench parity`, each from a runtime in a worker process."""
    wanted = plan(bundles=tuple(bundles), backends=(backend,), batch_sizes=(), rounds=0, timeout_s=300.0)
    verdicts = [subject.parity for subject in run(wanted, lambda what, done: None).subjects]
    return [verdict for verdict in verdicts if verdict is not None]


def test_every_fault_fails_and_what_is_right_passes(bundles: dict[str, Path], plan: Callable[..., Plan]) -> None:
    verdicts = dict(zip(bundles, judge(plan, bundles.values()), strict=True))
    assert verdicts.keys() == {*ALL_RIGHT, *FAULTS}
    for name, verdict in verdicts.items():
        assert verdict.passed == (name in ALL_RIGHT), (name, verdict.failures)
    overflow = verdicts["an overflow in float16"]
    assert overflow.non_finite
    assert overflow.rms_error is None

    swapped = verdicts["two swapped classes"]
    assert swapped.flips
    assert {frozenset((flip.oracle_prediction, flip.prediction)) for flip in swapped.flips} == {frozenset((3, 5))}
    assert swapped.mcnemar is not None
    assert swapped.mcnemar.b > swapped.mcnemar.c
    assert swapped.mcnemar.p_value < 1e-6
    untouched = verdicts["nothing"]
    assert untouched.flips == ()
    assert untouched.mcnemar == McNemar(0, 0, 1.0)


def test_a_forgotten_eval_fails(tampered: Callable[..., Path], plan: Callable[..., Plan]) -> None:
    (verdict,) = judge(plan, [tampered("model.ts", forget_eval)], "torchscript-cpu")
    assert not verdict.passed


def opened(path: Path, name: str = "onnx-cpu") -> tuple[Bundle, Session]:
    bundle = Bundle.open(path)
    return bundle, find_backend(name).load(bundle, OPTIONS)


def bisected(bundle: Bundle, session: Session, options: Options = OPTIONS) -> Bisection:
    """On the images that `bench parity` would choose."""
    oracle = bundle.oracle()
    logits = session.fetch(session.run(session.prepare(oracle.raw.copy())))[0]
    return bisect(bundle, session, "cpu", options, worst_images(logits, oracle, BISECTED_IMAGES))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_faulty_layer_is_named(fault: str, bundles: dict[str, Path]) -> None:
    where, layer, operators, nearest = FAULTS[fault]
    found = bisected(*opened(bundles[fault])).divergence
    assert found is not None
    assert (found.where, found.layer, found.nearest) == (where, layer, nearest)
    named = None if found.node is None else " with ".join(part.split()[0] for part in found.node.split(" with "))
    assert named == operators
    assert found.culprit == (None if operators is None else "file")
    if fault == "an overflow in float16":
        assert found.non_finite
        assert found.relative_error is None
    else:
        assert found.relative_error is not None
        assert 1e-5 < found.relative_error < 10


@pytest.mark.parametrize("name", ALL_RIGHT)
@pytest.mark.parametrize("folded", [True, False])
def test_no_node_of_a_right_file_is_named(name: str, folded: bool, bundles: dict[str, Path]) -> None:
    bundle, session = opened(bundles[name])
    found = bisected(bundle, session, replace(OPTIONS, folded=folded))
    assert found.divergence is None
    assert found.nodes > 15
    # The fold leaves one value by design to be made up for, before the bias map; the scaled file some more.
    assert found.nodes - found.agreeing == (0 if not folded else 1 if name == "nothing" else 4)
    assert "no node diverges" in found.in_words()


def test_the_fast_profile_forgives_rounding_but_no_fault(bundles: dict[str, Path]) -> None:
    fast = replace(OPTIONS, profile=Profile.FAST)
    small = bisected(*opened(bundles["a weight in the middle off by a hundredth"]), fast)
    assert small.divergence is None
    large = bisected(*opened(bundles["two swapped classes"]), fast)
    assert large.divergence is not None
    assert large.divergence.layer == "classifier.5"


@pytest.mark.usefixtures("faulty_backends")
def test_a_backend_that_feeds_something_else_is_told_from_a_wrong_file(small_bundle: Path) -> None:
    found = bisected(*opened(small_bundle, "transposed"))
    assert found.divergence is not None
    assert (found.divergence.where, found.divergence.node) == ("input", None)


class Misreading:
    """A session whose logits are wrong although every node of its file is right."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def fetch(self, output: Any) -> tuple[np.ndarray, ...]:
        return tuple(each[:, ::-1] for each in self._session.fetch(output))


def test_a_wrong_output_of_right_nodes_is_the_runtimes(small_bundle: Path) -> None:
    bundle, session = opened(small_bundle)
    found = bisected(bundle, Misreading(session)).divergence
    assert found is not None
    assert (found.where, found.node, found.culprit) == ("runtime", None, "runtime")


def test_a_wrong_kernel_is_told_from_a_wrong_file(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that computes with another weight than the file has."""
    other = onnx.load(str(bundles["a weight in the middle off by a hundredth"] / "model.onnx"))
    right = bench.worker.bisect._onnx_values

    def wrong(model: onnx.ModelProto, *arguments: Any) -> dict[str, np.ndarray]:
        values = right(other, *arguments)
        return values | {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    monkeypatch.setattr(bench.worker.bisect, "_onnx_values", wrong)
    found = bisected(*opened(bundles["nothing"])).divergence
    assert found is not None
    assert (found.layer, found.culprit) == ("features.6", "runtime")


def test_the_command_names_the_node_of_what_failed(bundles: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "bench", "parity", "--backend", "onnx-cpu", "--control", "--threads", "1"]
    command += ["--bundle", str(bundles["two swapped classes"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "onnx-cpu: first divergence: Gemm node_linear_2 of layer classifier.5, off by " in done.stdout
    assert "onnx-cpu:unfolded: " not in done.stdout, "its parity holds"
    assert "McNemar b, c" in done.stdout
    assert re.search(r" FAIL .* \d+, \d+ +\d\.\d+e-\d+ ", done.stdout), "b, c and p"
    flips = [line for line in done.stdout.splitlines() if "the oracle says" in line]
    assert len(flips) > FLIPS_SHOWN, "every one is listed"


@pytest.mark.parametrize(("options", "wanted"), [([], "failed"), (["--bisect"], "always")])
def test_bisect_asks_for_all(
    options: list[str], wanted: str, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def note(plan: Plan, progress: object) -> None:
        plans.append(plan)
        raise BenchError("enough", 4)

    monkeypatch.setattr(bench.run.rounds, "run", note)
    done = CliRunner().invoke(app, ["parity", "--bundle", str(small_bundle), *options])
    assert isinstance(done.exception, BenchError)
    assert [plan.bisect for plan in plans] == [wanted]
