"""What an ONNX file may be made of beyond nodes and weights: versions, domains, functions, names, odd orders."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import (
    File,
    assert_reported,
    assert_same,
    explain_onnx,
    feeds,
    fold_and_compare,
    fold_onnx,
    is_folded,
    is_valid,
    norms,
    run,
)

from export.fold import FoldError


def plain(opset: int = 17, ir_version: int = 8) -> File:
    """Conv → BatchNorm → ReLU → BatchNorm → Conv."""
    file = File(opset, ir_version)
    h = file.norm(file.conv(file.input("x", "n", 4, 8, 8), 4, 6), 6)
    file.nodes[-1].name = "first"
    h = file.norm(file.node("Relu", h), 6, name="second")
    file.node("Identity", file.conv(h, 6, 5), outputs=["y"])
    file.output("y", "n", 5, 8, 8)
    return file


def right_or_refused(source: Path) -> None:
    """For files that are not quite valid: a FoldError, or a file that is right."""
    with contextlib.suppress(FoldError):
        assert_reported(onnx.load(source), explain_onnx(source))
    target = source.with_name("folded.onnx")
    try:
        fold_onnx(source, target)
    except FoldError:
        assert not target.exists()
    else:
        inputs = feeds(onnx.load(source))
        assert_same(run(source, inputs), run(target, inputs), 2e-5)


# -- versions and domains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "ir_version"), [(7, 3), (8, 3), (9, 4), (11, 6), (13, 7), (15, 8), (19, 9), (22, 10)]
)
def test_versions(opset: int, ir_version: int, tmp_path: Path) -> None:
    assert is_folded(plain(opset, ir_version).save(tmp_path))


@pytest.mark.parametrize("opset", [1, 5, 6])
def test_opsets_that_onnxruntime_does_not_run(opset: int, tmp_path: Path) -> None:
    """`is_test` is 0 where it is not said, and means the statistics of the batch."""
    file = File(opset, 3)
    legacy = {"consumed_inputs": [0, 0, 0, 1, 1]} if opset < 6 else {}
    h = file.node("Conv", file.input("x", 2, 4, 8, 8), file.random(6, 4, 3, 3), pads=[0] * 4, kernel_shape=[3, 3])
    h = file.norm(h, 6, name="in training", **legacy)
    file.norm(h, 6, outputs=["y"], is_test=1, **legacy)
    file.output("y", 2, 6, 6, 6)
    source = file.save(tmp_path)
    report = explain_onnx(source)
    assert_reported(onnx.load(source), report)
    assert "in training" in [norm.name for norm in report.kept]
    with pytest.raises(FoldError) as refused:
        fold_onnx(source, tmp_path / "folded.onnx")
    assert refused.value.exit_code == 1


@pytest.mark.parametrize("opset", [7, 8])
@pytest.mark.parametrize("channels_alone", [True, False])
def test_parameters_for_each_element(opset: int, channels_alone: bool, tmp_path: Path) -> None:
    """`spatial=0`, up to opset 8: parameters of [C, H, W]. Of [C, 1, 1], sizes and all, it is a usual BatchNorm."""
    size = 1 if channels_alone else 4
    file = File(opset, 3)
    h = file.node("Conv", file.input("x", "n", 4, size, size), file.random(6, 4, 1, 1))
    parameters = [file.constant(array.reshape(6, size, size)) for array in np.array(file.parameters(6 * size * size))]
    h = file.node("BatchNormalization", h, *parameters, spatial=0, name="norm")
    file.node("Relu", h, outputs=["y"])
    file.output("y", "n", 6, size, size)
    fold_and_compare(file.save(tmp_path))


@pytest.mark.parametrize(
    "domains",
    [[("", 17), ("ai.onnx", 17)], [("ai.onnx", 17)], [("", 17), ("ai.onnx.ml", 3), ("unused", 1)], []],
    ids=["both", "written out", "unused", "none"],
)
@pytest.mark.parametrize("node_domain", ["", "ai.onnx"])
def test_the_standard_domain_under_both_names(domains: list[tuple[str, int]], node_domain: str, tmp_path: Path) -> None:
    """onnxruntime takes "ai.onnx" for "", ONNX's checker not everywhere; without any import a file is not valid."""
    file = plain()
    file.domains = [helper.make_opsetid(*domain) for domain in domains]
    for node in file.nodes:
        node.domain = node_domain
    source = file.save(tmp_path)
    if is_valid(source):
        assert is_folded(source)
    else:
        right_or_refused(source)


def function(file: File, name: str, nodes: list[onnx.NodeProto], *inputs: str, domain: str = "own") -> None:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    file.functions.append(helper.make_function(domain, name, inputs, ["w"], nodes, imports[:1]))
    file.domains = imports


@pytest.mark.parametrize("where", ["weight", "gamma", "signal"])
@pytest.mark.parametrize("name", ["Identity", "Relu", "Cast", "Dropout"])
def test_functions_with_the_names_of_operators(where: str, name: str, tmp_path: Path) -> None:
    """Of another domain: `Identity` here doubles, and a weight behind it was read as if it did not."""
    file = File()
    function(file, name, [helper.make_node("Add", ["v", "v"], ["w"])], "v")

    def doubled(value: str, at: str) -> str:
        return file.node(name, value, domain="own") if at == where else value

    h = file.node("MatMul", file.input("x", "n", 5), doubled(file.random(5, 6), "weight"))
    gamma, *others = file.parameters(6)
    h = doubled(h, "signal")
    h = file.node("BatchNormalization", h, doubled(file.constant(gamma), "gamma"), *map(file.constant, others))
    file.node("MatMul", doubled(h, "signal"), file.random(6, 3), outputs=["y"])
    file.output("y", "n", 3)
    fold_and_compare(file.save(tmp_path))


def test_a_batchnormalization_of_another_domain(tmp_path: Path) -> None:
    """It is none: neither folded nor reported."""
    file = plain()
    function(file, "BatchNormalization", [helper.make_node("Sub", ["v", "m"], ["w"])], "v", "g", "b", "m", "s")
    file.nodes.pop()
    parameters = [file.constant(array) for array in (1.0, 2.0, 3.0, 4.0)]
    file.node("BatchNormalization", file.nodes[-1].output[0], *parameters, outputs=["y"], domain="own")
    result = fold_and_compare(file.save(tmp_path))
    assert len(result.report.folded) == 2
    assert not result.report.kept


@pytest.mark.parametrize("rank_is_known", [True, False])
def test_a_foreign_operator_before_batchnorms(rank_is_known: bool, tmp_path: Path) -> None:
    """Of unknown sizes, two BatchNorms behind it were a traceback: a refusal outside of where refusals are taken."""
    file = File()
    file.domains.append(helper.make_opsetid("example", 1))
    h = file.node("Own", file.input("x", "n", 6, 8, 8), domain="example")
    if rank_is_known:
        file.value_info.append(helper.make_tensor_value_info(h, TensorProto.FLOAT, ["n", 6, 8, 8]))
    for _ in range(3):
        h = file.norm(h, 6)
    file.node("Own", h, outputs=["y"], domain="example")
    file.output("y", "n", 6, 8, 8)
    source = file.save(tmp_path)
    assert_reported(onnx.load(source), explain_onnx(source))
    result = fold_onnx(source, tmp_path / "folded.onnx", unchecked=True)
    assert_reported(onnx.load(source), result.report)
    assert len(norms(onnx.load(tmp_path / "folded.onnx"))) == len(result.report.kept)
    assert not rank_is_known or len(result.report.kept) == 1


# -- names and order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a b", "größe/重み:0", "../../up", "quo\"te'", "line\nbreak", "{brace}%s", "x" * 5000], ids=range(7)
)
def test_names_of_any_characters(name: str, tmp_path: Path) -> None:
    """Of every value, weight and node."""
    file = plain()
    names: dict[str, str] = {}

    def renamed(old: str) -> str:
        return names.setdefault(old, f"{name}{len(names)}") if old else ""

    for value in (*file.inputs, *file.outputs, *file.weights):
        value.name = renamed(value.name)
    for node in file.nodes:
        node.name = f"{name} {node.name}" if node.op_type == "BatchNormalization" else renamed(node.name)
        node.input[:], node.output[:] = map(renamed, node.input), map(renamed, node.output)
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("name", ["", "same"])
def test_nodes_of_one_name_or_none(name: str, tmp_path: Path) -> None:
    """ONNX's checker takes nodes of the same name, onnxruntime refuses them."""
    file = plain()
    for node in file.nodes:
        node.name = name
    assert is_folded(file.save(tmp_path), unchecked=bool(name), reference=bool(name))


def test_names_that_folding_would_give_are_taken(tmp_path: Path) -> None:
    """A file that was folded once has them already; so may a subgraph."""
    file = plain()
    is_folded(file.save(tmp_path))
    added = {tensor.name for tensor in onnx.load(tmp_path / "folded.onnx").graph.initializer}
    added -= {tensor.name for tensor in file.weights}
    for position, name in enumerate(sorted(added)):
        if position % 2:
            file.node("Add", file.constant(1.0, name), name)
        else:
            file.node("Neg", "x", outputs=[name])
    assert is_folded(file.save(tmp_path))


@pytest.mark.parametrize("metadata", [True, False])
def test_optional_inputs_and_outputs_that_are_left_out(metadata: bool, tmp_path: Path) -> None:
    """Named "" as a placeholder, or simply not there."""
    file = File()
    h = file.node("Conv", file.input("x", "n", 4, 8, 8), file.random(6, 4, 3, 3), "", pads=[1] * 4)
    h = file.node("Clip", file.norm(h, 6), "", file.constant(1.0))
    h = file.node("MaxPool", h, outputs=[file.free("pool"), ""], kernel_shape=[2, 2], strides=[2, 2])
    h = file.node("Dropout", file.norm(h, 6), "", "", outputs=[file.free("drop"), ""])
    h = file.node("Resize", file.node("Conv", h, file.random(5, 6, 1, 1), ""), "", file.constant([1.0, 1.0, 2.0, 2.0]))
    file.norm(h, 5, outputs=["y"])
    file.output("y", "n", 5, 8, 8)
    model = file.model()
    if metadata:
        for item in (*model.graph.node, *model.graph.input, *model.graph.initializer):
            item.doc_string = "documented"
            item.metadata_props.add(key="k", value="v")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert is_folded(tmp_path / "model.onnx")


def test_nodes_out_of_order(tmp_path: Path) -> None:
    """onnxruntime sorts them itself; ONNX's checker refuses them."""
    file = plain()
    file.nodes.reverse()
    right_or_refused(file.save(tmp_path))


@pytest.mark.parametrize("what", ["unread", "input is output", "no nodes left", "empty"])
def test_graphs_with_little_in_them(what: str, tmp_path: Path) -> None:
    """A BatchNorm that nothing reads; an input that is an output; BatchNorms that are all there is; nothing at all."""
    file = File()
    file.input("x", "n", 4, 8, 8)
    if what == "unread":
        file.norm(file.conv("x", 4, 6), 6)
        file.node("Relu", "x", outputs=["y"])
    elif what == "input is output":
        file.norm(file.conv("x", 4, 4), 4, outputs=["y"])
        file.output("x", "n", 4, 8, 8)
    elif what == "no nodes left":
        constants = [file.constant(np.full(4, value)) for value in (1.0, 0.0, 0.0, 1.0)]
        file.node("BatchNormalization", "x", *constants, outputs=["y"], epsilon=0.0)
    else:
        file.node("Identity", "x", outputs=["y"])
    file.output("y", "n", 4, 8, 8)
    source = file.save(tmp_path)
    if what == "empty":
        result = fold_onnx(source, tmp_path / "folded.onnx")
        assert not result.report.folded
        assert not result.report.kept
    else:
        fold_and_compare(source)
