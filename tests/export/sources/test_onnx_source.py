"""`python -m export --onnx`: the bundle of a file, what it is held to, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_files import BATCHNORM, File, op_types

from bench.backends.contract import Profile
from bench.run.plan import Plan, Selection
from bench.run.rounds import run as run_plan
from export import onnx_build, variants
from export.bundle import Bundle
from export.formats import onnx_file
from export.onnx_build import build
from export.sources.ends import Given
from export.sources.onnx_source import FEWEST_RANDOM, FORMATS, load
from export.sources.own import Own
from trainer.errors import UserError

ROOT = Path(__file__).parents[3]
SHAPE = (3, 16, 16)
CLASSES = 4


def network(*sizes: int | str, opset: int = 17, dtype: Any = np.float32) -> File:
    """Two BatchNorms, one before a border, and class scores; its input has these sizes."""
    file = File(opset=opset, dtype=dtype)
    x = file.input("image", *sizes)
    x = file.node("Relu", file.norm(file.conv(file.norm(x, 3), 3, 8), 8))
    x = file.node("Flatten", file.node("GlobalAveragePool", file.conv(x, 8, 6)))
    file.output(file.node("Gemm", x, file.random(6, CLASSES), file.random(CLASSES)), sizes[0], CLASSES)
    return file


def bundle_of(file: Path, out: Path, **said: Any) -> Bundle:
    return build(load(Own(str(file), **said), print, out.parent), out, "auto", lambda what: None)


def data(folder: Path, count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Path:
    """Pixels with labels."""
    rng = np.random.default_rng(seed)
    path = folder / f"data{seed}.npz"
    np.savez(path, inputs=rng.integers(0, 256, (count, *shape), np.uint8), labels=rng.integers(0, CLASSES, count))
    return path


def parity(bundle: Bundle) -> dict[str, bool]:
    """Of each backend for ONNX files whether it is right, on the folded file and on the control."""
    selection = Selection((bundle.path,), ("onnx-cpu",), control=("onnx-cpu",))
    result = run_plan(Plan(selection, 1, Profile.STRICT, 60.0), lambda what, done: None)
    return {subject.label: subject.parity is not None and subject.parity.passed for subject in result.subjects}


def test_the_control_is_the_file_and_the_folded_one_is_folded(tmp_path: Path) -> None:
    source = network("n", *SHAPE).save(tmp_path)
    bundle = bundle_of(source, tmp_path / "bundle")
    bundle.verify()
    manifest = bundle.manifest
    assert (bundle.path / "model.unfolded.onnx").read_bytes() == source.read_bytes()
    assert op_types(bundle.path / "model.onnx")[BATCHNORM] == 0
    assert {entry.path for entry in manifest.files} == {"model.onnx", "model.unfolded.onnx"}
    assert (manifest.input.name, manifest.input.dtype, manifest.input.shape) == ("image", "float32", ("batch", *SHAPE))
    assert (manifest.output.name, manifest.output.shape) == (onnx.load(source).graph.output[0].name, ("batch", CLASSES))
    assert manifest.source.factory == "model.onnx"
    assert manifest.fixed_batch is None
    assert 0 < manifest.tolerances.float32_rms_error < 1e-5
    assert len(manifest.fold.folded) == 2
    assert parity(bundle) == {"onnx-cpu": True, "onnx-cpu:unfolded": True}


def test_a_wrong_fold_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnx_build.fold_onnx

    def wrong(source: Path, target: Path, strategy: Any) -> Any:
        result = real(source, target, strategy)
        model = onnx.load(target)
        (weights,) = (tensor for tensor in model.graph.initializer if list(tensor.dims) == [CLASSES])
        weights.raw_data = (np.frombuffer(weights.raw_data, np.float32) + np.float32(1e-3)).tobytes()
        onnx.save(model, target)
        return result

    monkeypatch.setattr(onnx_build, "fold_onnx", wrong)
    with pytest.raises(UserError, match=r"model\.onnx is not right: RMS error"):
        bundle_of(network("n", *SHAPE).save(tmp_path), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_reference_that_is_wrong_is_no_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnx_build.Float64File.__call__
    monkeypatch.setattr(onnx_build.Float64File, "__call__", lambda self, x: tuple(1.1 * y for y in real(self, x)))
    with pytest.raises(UserError, match="one of the two computes something else"):
        bundle_of(network("n", *SHAPE).save(tmp_path), tmp_path / "bundle")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_the_only_one(tmp_path: Path, batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    source = network(batch, *SHAPE).save(tmp_path)
    bundle = bundle_of(source, tmp_path / "bundle", data=data(tmp_path, 40), scale=1 / 255)
    assert bundle.manifest.fixed_batch == batch
    assert bundle.manifest.output.shape[0] == batch
    assert len(bundle.oracle().logits) == 40 // batch * batch
    assert ("left out" in capsys.readouterr().out) == bool(40 % batch)
    assert parity(bundle) == {"onnx-cpu": True, "onnx-cpu:unfolded": True}


def test_a_file_that_states_any_batch_and_takes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An old exporter wrote the batch of its example into a Reshape."""
    file = File()
    x = file.node("Reshape", file.conv(file.input("x", "n", 3, 8, 8), 3, 4), file.constant(np.array([1, 256])))
    file.output(file.node("Relu", x), "n", 256)
    bundle = bundle_of(file.save(tmp_path), tmp_path / "bundle")
    assert bundle.manifest.fixed_batch == 1
    assert "one image at a time only" in capsys.readouterr().out


def test_sizes_that_are_not_fixed(tmp_path: Path) -> None:
    source = network("n", 3, "h", "w").save(tmp_path)
    with pytest.raises(UserError, match=r"3x\?x\?, where \? is not fixed\. Say them with --input"):
        load(Own(str(source)), print, tmp_path)
    said = load(Own(str(source), inputs=(Given.parse("3x12x20"),)), print, tmp_path)
    assert said.input.shape == ("batch", 3, 12, 20)
    seen = load(Own(str(source), data=data(tmp_path, 5)), print, tmp_path)
    assert seen.input.shape == ("batch", *SHAPE)
    with pytest.raises(UserError, match=r"takes inputs of 3x\?x\? each, --input says 1x12x20"):
        load(Own(str(source), inputs=(Given.parse("1x12x20"),)), print, tmp_path)


def test_large_inputs_are_few() -> None:
    from export.sources.onnx_source import _random_count

    assert _random_count((1, 28, 28)) == 256
    assert _random_count((3, 224, 224)) == 32
    assert _random_count((3, 1024, 1024)) == FEWEST_RANDOM


def test_several_outputs(tmp_path: Path) -> None:
    file = File()
    x = file.node("GlobalAveragePool", file.norm(file.conv(file.input("x", "n", 3, 8, 8), 3, 4), 4))
    scores = file.output(file.node("Flatten", x), "n", 4)
    file.output(file.node("ArgMax", scores, axis=1, keepdims=1), "n", 1, dtype=np.int64)
    bundle = bundle_of(file.save(tmp_path), tmp_path / "bundle")
    assert [(output.dtype, output.shape) for output in bundle.manifest.outputs] == [
        ("float32", ("batch", 4)),
        ("int64", ("batch", 1)),
    ]
    assert bundle.oracle().outputs[1].dtype == np.int64


@pytest.mark.parametrize("opset", [11, 17, 20])
def test_variants(tmp_path: Path, opset: int) -> None:
    pytest.importorskip("openvino")
    source = network("n", *SHAPE, opset=opset).save(tmp_path)
    own = Own(
        str(source), data=data(tmp_path, 60), calibration=data(tmp_path, 60, 1), scale=1 / 255, mean=(0.5,), std=(0.25,)
    )
    plan = variants.plan(["all"], False, None, None, None, FORMATS)
    bundle = build(load(own, print, tmp_path), tmp_path / "bundle", "auto", lambda what: None, plan)
    have = {(entry.format, entry.variant) for entry in bundle.manifest.files if entry.folded}
    wanted = {("onnx", variant) for variant in ("float32", "float16", "float32-raw", "float16-raw")}
    wanted |= {(format, variant) for format in ("onnx", "openvino") for variant in ("int8", "int8-raw")}
    assert have == wanted, bundle.manifest.left_out
    assert [(left.what, left.asked_for) for left in bundle.manifest.left_out] == [("bfloat16, bfloat16-raw", False)]
    raw = bundle.oracle().raw
    assert raw.dtype == np.uint8
    (from_raw,) = onnx_file.runner(bundle.path / "model.float32-raw.onnx")(raw)
    assert np.abs(from_raw - bundle.oracle().logits).max() < 1e-5


def test_what_torch_alone_can_write_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="bfloat16 can't be made: it is written as pt2 alone"):
        variants.plan(["bfloat16"], False, None, None, None, FORMATS)


def test_weights_beside_the_file(tmp_path: Path) -> None:
    model = network("n", *SHAPE).model()
    source = tmp_path / "model.onnx"
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size
    bundle = bundle_of(source, tmp_path / "bundle")
    (tmp_path / "weights.bin").unlink()
    assert parity(bundle) == {"onnx-cpu": True, "onnx-cpu:unfolded": True}
    with pytest.raises(UserError, match=r"weights\.bin"):
        load(Own(str(source)), print, tmp_path)


def two_inputs(folder: Path) -> Path:
    file = File()
    file.output(file.node("Add", file.input("a", "n", 3), file.input("b", "n", 3)), "n", 3)
    return file.save(folder)


def whole_numbers(folder: Path) -> Path:
    file = File()
    x = file.input("ids", "n", 3, dtype=np.int64)
    file.output(file.node("Cast", x, to=onnx.TensorProto.FLOAT), "n", 3)
    return file.save(folder)


def half(folder: Path) -> Path:
    file = File()
    x = file.node("Cast", file.input("x", "n", 3), to=onnx.TensorProto.FLOAT16)
    file.output(file.node("Cast", file.node("Relu", x), to=onnx.TensorProto.FLOAT), "n", 3)
    return file.save(folder)


def quantised(folder: Path) -> Path:
    file = File()
    scale, zero = file.constant(np.array(0.1)), file.constant(np.array(0, np.uint8), dtype=np.uint8)
    x = file.node("QuantizeLinear", file.input("x", "n", 3), scale, zero)
    file.output(file.node("DequantizeLinear", x, scale, zero), "n", 3)
    return file.save(folder)


def foreign(folder: Path) -> Path:
    file = File()
    file.domains.append(onnx.helper.make_opsetid("com.example", 1))
    file.output(file.node("Fold", file.input("x", "n", 3), domain="com.example"), "n", 3)
    return file.save(folder)


def random(folder: Path) -> Path:
    file = File()
    file.output(file.node("RandomNormalLike", file.input("x", "n", 3)), "n", 3)
    return file.save(folder)


def sums(folder: Path) -> Path:
    file = File()
    file.nodes.append(onnx.helper.make_node("ReduceSum", [file.input("x", "n", 3)], ["y"], keepdims=0))
    file.outputs.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, []))
    return file.save(folder)


def cut_off(folder: Path) -> Path:
    path = network("n", *SHAPE).save(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def text(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_text("hello")
    return path


def missing(folder: Path) -> Path:
    return folder / "none.onnx"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing, "there is no file .*none.onnx"),
        (text, "is no valid ONNX model"),
        (cut_off, "is no valid ONNX model"),
        (two_inputs, r"has 2 inputs \(a, b\)"),
        (whole_numbers, "the input ids is int64; expected float32"),
        (half, "computes in float16; expected a file in float32"),
        (quantised, r"is quantised \(QuantizeLinear\)"),
        (foreign, "onnxruntime does not load .*Fold"),
        (random, "can't be computed in float64.*RandomNormalLike .*is random"),
        (sums, r"is float32 of \[\] for 2 inputs; expected"),
    ],
)
def test_what_is_refused(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        bundle_of(make(tmp_path), tmp_path / "bundle")
    assert refusal.value.exit_code == 4
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--onnx", "model.onnx"], 0, "published artifacts/bundles/model"),
        (["--onnx", "none.onnx"], 4, "there is no file none.onnx"),
        (["--onnx", "model.onnx", "--aoti"], 2, "--aoti is for a model of torch"),
        (["--onnx", "model.onnx", "--model", "a:b"], 2, "--model is for a model of torch"),
    ],
)
def test_the_command(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    network("n", *SHAPE).save(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "export", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_resnet18_as_torch_exports_it(tmp_path: Path) -> None:
    import torch
    import torchvision

    torch.manual_seed(0)
    net, source = torchvision.models.resnet18().eval(), tmp_path / "resnet18.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
        names: dict[str, Any] = {"input_names": ["image"], "dynamic_axes": {"image": {0: "n"}}}
        torch.onnx.export(net, (torch.randn(2, 3, 224, 224),), str(source), dynamo=False, **kept, **names)
    bundle = bundle_of(source, tmp_path / "bundle")
    assert len(bundle.manifest.fold.folded) == 20
    oracle = bundle.oracle()
    with torch.no_grad():
        wanted = net.double()(torch.from_numpy(oracle.raw[:4]).double()).numpy()
    assert np.abs(oracle.logits[:4] - wanted).max() <= 1e-10 * np.abs(wanted).max()


PACKAGES = ROOT / "artifacts" / "packages"
OCR = "rapidocr-onnxruntime==1.4.4/rapidocr_onnxruntime/models"


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGES.exists(), reason="python tests/zoo/zoo.py files downloads these packages")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ch_ppocr_mobile_v2.0_cls_infer.onnx", "3x48x192"),
        ("ch_PP-OCRv4_det_infer.onnx", "3x128x160"),
        ("ch_PP-OCRv4_rec_infer.onnx", "3x48x160"),
    ],
)
def test_files_that_others_publish(tmp_path: Path, name: str, size: str) -> None:
    bundle = bundle_of(PACKAGES / OCR / name, tmp_path / "bundle", inputs=(Given.parse(size),))
    assert parity(bundle) == {"onnx-cpu": True, "onnx-cpu:unfolded": True}
