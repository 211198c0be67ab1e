"""Folding ONNX files: the same cases as on torch's graph, and what only a file can get wrong."""

from __future__ import annotations

import io
import itertools
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import enliven, random_network
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_rules import CASES, conv
from torch import Tensor, nn

from export.fold import FoldError
from export.fold.onnx_model import explain_onnx, fold_onnx
from export.fold.report import Strategy

IMAGE = torch.randn(3, 4, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def save(model: nn.Module, x: Tensor, path: Path, opset: int = 17) -> Path:
    """Write the model with its BatchNorms as they are, by the exporter that keeps them and is quick."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.onnx.export(
            model,
            (x,),
            buffer,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            opset_version=opset,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
        )
    path.write_bytes(buffer.getvalue())
    return path


def count(path: Path) -> int:
    return sum(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)


def run(path: Path, x: np.ndarray) -> list[np.ndarray]:
    """The reference implementation of ONNX, which knows float64 and optimises nothing."""
    return list(ReferenceEvaluator(str(path)).run(None, {"x": x}))


LEFT = {
    "4 circular padding": 1,  # written as slices and a concatenation, which is no padding any more
    "1 shared weights, of which it gets a copy": 1,  # the exporter makes one convolution of two that are alike
}
NOT_WRITTEN = {"refused: statistics of the batch"}  # the exporter does not take it; see test_training_mode
NOT_IN_THE_REFERENCE = {"1 after a grouped transposed convolution"}
"""What ONNX's reference implementation can't run; onnxruntime runs it in float32."""


@pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_WRITTEN])
def test_case(case: str, tmp_path: Path) -> None:
    """As many are folded as on torch's graph, and the file equals the original in float64."""
    build, x, expected = CASES[case]
    torch.manual_seed(0)
    strategy: Strategy = {"7": "ones", "8": "bias-map", "9": "floor"}.get(case[0], "auto")  # type: ignore[assignment]
    model = enliven(build(), x)
    source = save(model, x, tmp_path / "model.onnx")
    assert count(source) == len(expected)
    # onnxruntime has no convolution in float64, the reference has.
    result = fold_onnx(source, tmp_path / "folded.onnx", strategy, unchecked=True)
    kept = LEFT.get(case, list(expected.values()).count("kept"))
    assert len(result.report.kept) == kept, result.report
    assert count(tmp_path / "folded.onnx") == kept
    if case in NOT_IN_THE_REFERENCE:
        result = fold_onnx(save(model.float(), x.float(), source), tmp_path / "folded.onnx")
        assert result.difference is not None
        assert result.difference < 1e-6
        return
    for inputs in (x, torch.randn_like(x)[:2] * 3):
        for wanted, found in zip(
            run(source, inputs.numpy()), run(tmp_path / "folded.onnx", inputs.numpy()), strict=True
        ):
            assert np.abs(found - wanted).max() / np.abs(wanted).max() <= 1e-12


def small(tmp_path: Path, opset: int = 17) -> Path:
    torch.manual_seed(0)
    layers = [conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 5), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(495, 7), nn.ReLU(), nn.BatchNorm1d(7), nn.Linear(7, 3))
    return save(enliven(model, IMAGE).float(), IMAGE.float(), tmp_path / "model.onnx", opset)


@pytest.mark.parametrize("opset", [11, 13, 15, 18, 20])
def test_opsets(opset: int, tmp_path: Path) -> None:
    result = fold_onnx(small(tmp_path, opset), tmp_path / "folded.onnx")
    assert len(result.report.folded) == 3
    assert result.difference is not None
    assert result.difference < 1e-5
    assert onnx.load(tmp_path / "folded.onnx").opset_import[0].version == opset


def test_names_metadata_and_other_nodes_stay(tmp_path: Path) -> None:
    source = small(tmp_path)
    model = onnx.load(source)
    model.producer_name, model.doc_string, model.model_version = "somebody", "a model", 7
    helper.set_model_props(model, {"author": "me"})
    output = model.graph.output[0].name
    model.graph.node.append(helper.make_node("Softmax", [output], ["probabilities"], name="unrelated", axis=-1))
    model.graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3]))
    onnx.save(model, source)
    fold_onnx(source, tmp_path / "folded.onnx")
    folded = onnx.load(tmp_path / "folded.onnx")
    for attribute in ("producer_name", "doc_string", "model_version", "metadata_props", "ir_version"):
        assert getattr(folded, attribute) == getattr(model, attribute), attribute
    assert [v.name for v in folded.graph.input] == [v.name for v in model.graph.input]
    assert [v.name for v in folded.graph.output] == [v.name for v in model.graph.output]
    (kept,) = [node for node in folded.graph.node if node.name == "unrelated"]
    assert list(kept.output) == ["probabilities"]


def test_a_batchnorm_at_the_output_leaves_its_name(tmp_path: Path) -> None:
    model = enliven(nn.Sequential(conv(4, 6), nn.BatchNorm2d(6)), IMAGE).float()
    source = save(model, IMAGE.float(), tmp_path / "model.onnx")
    fold_onnx(source, tmp_path / "folded.onnx")
    names = [[v.name for v in onnx.load(path).graph.output] for path in (source, tmp_path / "folded.onnx")]
    assert names[0] == names[1]


def test_constants_as_nodes(tmp_path: Path) -> None:
    """Weights in Constant nodes instead of initializers."""
    source = small(tmp_path)
    model = onnx.load(source)
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, source)
    result = fold_onnx(source, tmp_path / "folded.onnx")
    assert len(result.report.folded) == 3


def test_matmul_and_add_as_keras_writes_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def constant(name: str, *shape: int) -> TensorProto:
        array = rng.uniform(0.5, 1.5, shape) if name.startswith("var") else rng.standard_normal(shape)
        return numpy_helper.from_array(array.astype(np.float32), name)

    weights = [constant("w1", 5, 6), constant("b1", 6), constant("w2", 6, 3), constant("b2", 3)]
    norm = [constant(name, 6) for name in ("gamma", "beta", "mean", "var")]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"]),
        helper.make_node("Add", ["m1", "b1"], ["a1"]),
        helper.make_node("Relu", ["a1"], ["r"]),
        helper.make_node("BatchNormalization", ["r", "gamma", "beta", "mean", "var"], ["n"]),
        helper.make_node("MatMul", ["n", "w2"], ["m2"]),
        helper.make_node("Add", ["b2", "m2"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", s]) for n, s in (("x", 5), ("y", 3)))
    graph = helper.make_graph(nodes, "keras", [x], [y], [*weights, *norm])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), tmp_path / "k.onnx")
    result = fold_onnx(tmp_path / "k.onnx", tmp_path / "folded.onnx")
    assert [norm.method for norm in result.report.folded] == ["into the layers after"]
    assert [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node] == [
        "MatMul",
        "Add",
        "Relu",
        "MatMul",
        "Add",
    ]
    assert result.difference is not None
    assert result.difference < 1e-6


def test_weights_that_a_caller_may_override_stay(tmp_path: Path) -> None:
    source = small(tmp_path)
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, source)
    report = explain_onnx(source)
    assert not report.folded
    assert all("override" in norm.reason for norm in report.kept)


def test_training_mode(tmp_path: Path) -> None:
    source = small(tmp_path)
    model = onnx.load(source)
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    (mode,) = [attribute for attribute in norms[0].attribute if attribute.name == "training_mode"]
    mode.i = 1
    norms[0].output.extend(["running_mean", "running_var"])
    onnx.save(model, source)
    report = explain_onnx(source)
    assert [norm.name for norm in report.kept] == [norms[0].name]
    assert "statistics of the batch" in report.kept[0].reason


def test_a_batchnorm_in_a_subgraph_is_reported(tmp_path: Path) -> None:
    floats = [numpy_helper.from_array(np.ones(2, np.float32), name) for name in ("g", "b", "m", "v")]
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["x", *("gbmv" if op == "BatchNormalization" else "")], [f"{op}_out"], name=op)],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, ["batch", 2, 4])],
        )
        for op in ("BatchNormalization", "Relu")
    ]
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch[0], else_branch=branch[1])
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 4]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2, 4])]
    graph = helper.make_graph([node], "if", inputs, output, floats)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "if.onnx")
    report = explain_onnx(tmp_path / "if.onnx")
    assert [norm.name for norm in report.kept] == ["BatchNormalization"]
    assert "subgraph" in report.kept[0].reason


def test_a_folded_file_is_as_fast_to_load_and_has_no_stale_weights(tmp_path: Path) -> None:
    source = small(tmp_path)
    fold_onnx(source, tmp_path / "folded.onnx")
    folded = onnx.load(tmp_path / "folded.onnx")
    read = {name for node in folded.graph.node for name in node.input}
    assert {tensor.name for tensor in folded.graph.initializer} <= read


@pytest.mark.parametrize("what", ["missing", "truncated", "not ONNX", "outside", "loop", "nan"])
def test_files_that_are_no_good(what: str, tmp_path: Path) -> None:
    source = small(tmp_path)
    target = tmp_path / "folded.onnx"
    target.write_text("what was there before")
    model = onnx.load(source)
    if what == "missing":
        source.unlink()
    elif what == "truncated":
        source.write_bytes(source.read_bytes()[:-1000])
    elif what == "not ONNX":
        source.write_bytes(b"\x89PNG not a model at all" * 50)
    elif what == "outside":
        (tmp_path / "secret").write_bytes(b"\0" * 864)
        (tmp_path / "inner").mkdir()
        source = tmp_path / "inner" / "model.onnx"
        tensor = model.graph.initializer[0]
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "../secret"), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        source.write_bytes(model.SerializeToString())
    elif what == "loop":
        model.graph.node[0].input[0] = model.graph.node[-1].output[0]
        source.write_bytes(model.SerializeToString())
    else:
        array = numpy_helper.to_array(model.graph.initializer[0]).copy()
        array.reshape(-1)[0] = np.nan
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, model.graph.initializer[0].name))
        onnx.save(model, source)
    with pytest.raises(FoldError) as refused:
        fold_onnx(source, target)
    assert refused.value.exit_code == 4
    assert str(source) in str(refused.value)
    assert target.read_text() == "what was there before"


def test_a_wrong_number_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the writer wrong, the comparison of the two files would see it, and leave the fold out."""
    from export.fold.from_onnx import write

    real = write._Writer._constant

    def wrong(self, stem, tensor, dtype):  # type: ignore[no-untyped-def]
        return real(self, stem, tensor * 1.01, dtype)

    monkeypatch.setattr(write._Writer, "_constant", wrong)
    source = small(tmp_path)
    result = fold_onnx(source, tmp_path / "folded.onnx")
    assert not result.report.folded
    assert all("the outputs of the file differ" in norm.reason for norm in result.report.kept)
    assert (tmp_path / "folded.onnx").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_other_folds_hold(which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that the file does not bear is found among the others."""
    from export.fold.from_onnx import write

    source = small(tmp_path)
    into = [norm.into[0] for norm in explain_onnx(source).folded][which]
    real = write._Writer._layer

    def wrong(self, node, op, read_as):  # type: ignore[no-untyped-def]
        real(self, node, replace(op, weight=op.weight * 1.5) if node.name == into else op, read_as)

    monkeypatch.setattr(write._Writer, "_layer", wrong)
    result = fold_onnx(source, tmp_path / "folded.onnx")
    assert result.report.folded
    assert result.report.kept
    assert result.difference is not None
    assert result.difference < 1e-5


def test_nothing_to_fold_takes_no_torch(tmp_path: Path) -> None:
    """Of a file without BatchNorms there is nothing to compute: 225 kB took 22 s."""
    layers = [conv(4, 6), nn.ReLU(), conv(6, 5), nn.Flatten(), nn.Linear(495, 7)]
    source = save(nn.Sequential(*layers).double().eval().float(), IMAGE.float(), tmp_path / "model.onnx")
    program = (
        "import sys; from pathlib import Path; from export.fold.onnx_model import explain_onnx, fold_onnx\n"
        f"source = Path({str(source)!r}); result = fold_onnx(source, source.with_name('folded.onnx'))\n"
        "assert explain_onnx(source) == result.report, result\n"
        "assert not result.report.folded and not result.report.kept and result.difference == 0\n"
        "assert 'torch' not in sys.modules and 'onnxruntime' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "folded.onnx").read_bytes() == source.read_bytes()


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What `explain` announces is what `fold` does, and `explain` sees nothing to do in what `fold` wrote."""
    from export.cli import app

    def said(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app(prog_name="export")
        assert not ended.value.code
        return capsys.readouterr().out

    source, target = small(tmp_path), tmp_path / "deep" / "folded.onnx"
    announced = said("explain", source)
    assert announced.endswith("3 BatchNorms folded, 0 kept\n")
    assert said("fold", source, "-o", target).startswith(announced)
    assert said("explain", target) == "0 BatchNorms folded, 0 kept\n"


@pytest.mark.slow
def test_a_model_over_100_mb_with_its_weights_beside_it(tmp_path: Path) -> None:
    layers = [conv(4, 6, padding=0), nn.ReLU(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(378, 9000), nn.ReLU()]
    model = nn.Sequential(*layers, nn.BatchNorm1d(9000), nn.Linear(9000, 3000))
    source = save(enliven(model, IMAGE).float(), IMAGE.float(), tmp_path / "whole.onnx")
    beside = tmp_path / "model.onnx"
    onnx.save(onnx.load(source), beside, save_as_external_data=True, location="model.onnx.data")
    assert beside.stat().st_size < 100_000 < 100_000_000 < (tmp_path / "model.onnx.data").stat().st_size
    for path in (source, beside):
        result = fold_onnx(path, tmp_path / "folded.onnx")
        assert len(result.report.folded) == 2
        assert result.difference is not None
        assert result.difference < 1e-5
        assert count(tmp_path / "folded.onnx") == 0


def test_what_no_single_file_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format ends at 2 GiB; here at a hundredth of the small model's size."""
    from export.fold import onnx_model

    source = small(tmp_path)
    monkeypatch.setattr(onnx_model, "LARGEST_FILE", source.stat().st_size // 100)
    with pytest.raises(FoldError, match="2 GiB"):
        fold_onnx(source, tmp_path / "folded.onnx")
    assert not (tmp_path / "folded.onnx").exists()


def fold_random(seed: int, folder: Path) -> bool:
    """Whether the network of that seed can be exported and run; those that can are folded and compared."""
    model, x = random_network(random.Random(seed).randint, adaptive=False)
    try:
        source = save(model.float(), x.float(), folder / "model.onnx")
        result = fold_onnx(source, folder / "folded.onnx")
    except torch.onnx.errors.SymbolicValueError:
        return False
    except FoldError as error:
        if "onnxruntime does not run it" not in str(error):
            raise
        return False
    left = count(folder / "folded.onnx")
    assert left <= len(result.report.kept)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    wild = torch.randn(5, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
    results = [
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(
            None, {"x": wild.numpy()}
        )
        for path in (source, folder / "folded.onnx")
    ]
    for wanted, found in zip(*results, strict=True):
        assert np.abs(found - wanted).max() <= 2e-4 * max(np.abs(wanted).max(), 1e-2), (seed, model, result.report)
    return True


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_through_onnx(seed: int, tmp_path: Path) -> None:
    if not fold_random(seed, tmp_path):
        pytest.skip("can't be exported or run")


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_random_networks_through_onnx(block: int, tmp_path: Path) -> None:
    """500 in all; seeds whose network can't be exported don't count."""
    seeds = itertools.count(1000 * (block + 1))
    for _ in range(50):
        while not fold_random(next(seeds), tmp_path):
            pass
