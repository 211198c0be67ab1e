"""OpenVINO: which precision its nodes run in, which file it takes, and batches that several requests share."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.backends.contract import Options, Profile, file_of
from bench.backends.openvino import configuration, emulation, placement_of, read_placement
from bench.backends.registry import BACKENDS, find_backend
from bench.worker.clock import QUIET_LIMIT_S, wait_until_quiet
from bench.worker.messages import Evaluate, Evaluated, Job, Loaded
from bench.worker.process import Worker
from export.bundle import Bundle

openvino = pytest.importorskip("openvino")
from openvino import opset13 as ops  # noqa: E402

TamperedBundle = Callable[..., Path]


@pytest.fixture(scope="module")
def bundle(small_bundle: Path) -> Bundle:
    return Bundle.open(small_bundle)


def model_of(bundle: Bundle) -> Any:
    return openvino.Core().read_model(bundle.locate(bundle.entry("onnx")))


def with_preprocessing(model: Any, bundle: Bundle) -> Any:
    """The model, for pixels."""
    rule = bundle.manifest.preprocessing
    pixels = ops.parameter([-1, 28, 28], np.uint8, name=rule.raw.name)
    image = ops.unsqueeze(ops.convert(pixels, "f32"), ops.constant(np.int64(1)))
    scaled = ops.subtract(ops.multiply(image, np.float32(rule.scale)), np.float32(rule.mean[0]))
    (old,) = model.get_parameters()
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(ops.divide(scaled, np.float32(rule.std[0])).output(0))
    model.remove_parameter(old)
    model.add_parameters([pixels])
    model.validate_nodes_and_infer_types()
    return model


def entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"path": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.fixture
def with_ir(bundle: Bundle, tampered: TamperedBundle, tmp_path: Path) -> Bundle:
    """The small bundle with the float32 model for pixels as an IR."""
    made = tmp_path / "raw.xml"
    openvino.save_model(with_preprocessing(model_of(bundle), bundle), made, compress_to_fp16=False)
    kind = {"format": "openvino", "precision": "float32", "folded": True, "takes": "raw"}

    def add(fields: dict[str, Any]) -> None:
        fields["files"].append(entry(made) | kind | {"companions": [entry(made.with_suffix(".bin"))]})

    folder = tampered(manifest=add)
    for path in (made, made.with_suffix(".bin")):
        (folder / path.name).write_bytes(path.read_bytes())
    return Bundle.open(folder)


def node(kind: str, precision: str) -> dict[str, str]:
    return {"layerType": kind, "runtimePrecision": precision, "name": "n"}


NODES = [node("Const", "bf16"), node("Convert", "bf16"), node("Convolution", "bf16"), node("Convolution", "f32")]


def test_a_convolution_in_bf16_is_refused_where_float32_was_promised() -> None:
    placement = placement_of(["CPU"], NODES, must_be_float32=True)
    assert placement.stray == ("Convolution n computes in bf16",)
    assert placement.nodes == {"CPU bf16": 2, "CPU f32": 1}


def test_the_fast_profile_may_compute_in_bf16() -> None:
    assert placement_of(["CPU"], NODES, must_be_float32=False).stray == ()


@pytest.mark.parametrize(
    ("nodes", "options", "why"),
    [
        ([node("Const", "f16"), node("Convolution", "f32")], Options(1, variant="float16"), "float32 asked for"),
        (
            [node("Convert", "f16"), node("Convolution", "f32")],
            Options(1, Profile.FAST, True, "float16-raw"),
            "no instructions",
        ),
        (NODES, Options(1, Profile.FAST, variant="bfloat16"), None),
        ([node("Convolution", "f32")], Options(1), None),
        ([node("Convolution", "i8"), node("Pooling", "f32")], Options(1, variant="int8"), None),
    ],
)
def test_a_half_that_is_computed_in_float32_is_emulated(
    nodes: list[dict[str, str]], options: Options, why: str | None
) -> None:
    assert emulation(nodes, options) == why


def test_what_openvino_says_of_a_model_in_f32(bundle: Bundle) -> None:
    compiled = openvino.Core().compile_model(model_of(bundle), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert read_placement(compiled, Options(threads=1, variant="float16")).emulated == "float32 asked for"
    assert read_placement(compiled, Options(threads=1)).emulated is None


def test_another_device_is_refused() -> None:
    assert placement_of(["GPU.0"], [], must_be_float32=False).stray == ("the model is on GPU.0",)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (Options(threads=1), True),
        (Options(threads=1, profile=Profile.FAST), False),
        (Options(threads=1, variant="bfloat16"), False),
    ],
)
def test_what_openvino_says_of_a_model_in_bf16(options: Options, refused: bool, bundle: Bundle) -> None:
    compiled = openvino.Core().compile_model(model_of(bundle), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    if compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() != "bf16":
        pytest.skip("OpenVINO can't compute in bf16 on this CPU")
    placement = read_placement(compiled, options)
    assert placement.nodes["CPU bf16"] > 5
    assert any("Convolution" in line and "bf16" in line for line in placement.stray) is refused


def test_strict_asks_for_float32_and_fast_leaves_it_to_openvino() -> None:
    assert configuration(Options(threads=1), False)["INFERENCE_PRECISION_HINT"] == "f32"
    assert "INFERENCE_PRECISION_HINT" not in configuration(Options(threads=1, profile=Profile.FAST), False)


def test_settings_are_those_of_the_compiled_model(bundle: Bundle) -> None:
    for name, streams in (("openvino-cpu", 1), ("openvino-cpu-throughput", 2)):
        session = find_backend(name).load(bundle, Options(threads=2))
        found = session.settings()
        want = {"intra_op_threads": 2, "streams": streams, "inference_precision": "f32", "cpu_pinning": False}
        assert want.items() <= found.items()
        assert str(found["openvino"]).split(".")[:2] == openvino.__version__.split(".")[:2]
        session.close()


@pytest.mark.parametrize("name", ["openvino-cpu", "openvino-cpu-throughput"])
@pytest.mark.parametrize("images", [1, 3, 37])
def test_logits_come_in_the_order_of_the_images(name: str, images: int, bundle: Bundle) -> None:
    oracle = bundle.oracle()
    session = find_backend(name).load(bundle, Options(threads=2))
    limit = 20 * bundle.manifest.tolerances.float32_rms_error
    found = []
    for start in (0, 100):
        raw = oracle.raw[start : start + images].copy()
        found.append((start, session.fetch(session.run(session.prepare(raw)))[0]))
    for start, logits in found:  # the first ones are not overwritten by the second call
        assert np.abs(logits - oracle.logits[start : start + images]).max() < limit
    session.close()


def test_the_threads_stand_still_after_a_call(bundle: Bundle) -> None:
    session = find_backend("openvino-cpu-throughput").load(bundle, Options(threads=2))
    session.run(session.prepare(bundle.oracle().raw[:64].copy()))
    assert wait_until_quiet() < QUIET_LIMIT_S
    session.close()


def test_an_ir_is_preferred_to_an_onnx_file(with_ir: Bundle) -> None:
    manifest = with_ir.manifest
    twin = with_ir.entry("openvino", "float32-raw").model_copy(update={"takes": "preprocessed"})
    both = Bundle(with_ir.path, manifest.model_copy(update={"files": (*manifest.files, twin)}), with_ir.digest)
    assert file_of(find_backend("openvino-cpu"), both, Options(threads=1)) == twin


def test_an_ir_and_an_onnx_file_take_what_their_variant_says(with_ir: Bundle, tmp_path: Path) -> None:
    """In a worker, as `bench` does it: a process that has read both kinds of file with OpenVINO 2026.4 dies of the next
    signal that it handles, and other tests of this process handle some.
    """
    backend, oracle = find_backend("openvino-cpu"), with_ir.oracle()
    for variant, file in (("float32", "model.onnx"), ("float32-raw", "raw.xml")):
        options = Options(threads=1, variant=variant)
        assert (chosen := file_of(backend, with_ir, options)) is not None
        assert chosen.path == file
        worker = Worker(Job("openvino", BACKENDS["openvino-cpu"], with_ir.path, options), 60, tmp_path)
        try:
            assert isinstance(worker.receive(), Loaded)  # Misplaced, if any node were
            (logits,) = worker.ask(Evaluate(64), Evaluated).outputs
        finally:
            worker.kill()
        assert np.abs(logits - oracle.logits).max() < 20 * with_ir.manifest.tolerances.float32_rms_error


def test_without_the_library_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    reason = find_backend("openvino-cpu").unavailable_reason()
    assert reason is not None
    assert "python -m pip install 'ninefold[openvino]'" in reason
