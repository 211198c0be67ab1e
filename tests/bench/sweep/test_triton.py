"""The model repository for Triton, checked against the server's own schema."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from bundles import tamper
from sweeps import MB, TORCH, Figures, sweep_of

import bench.sweep.triton
from bench.cli.main import app
from bench.errors import EXIT_BAD_INPUT, EXIT_NEGATIVE, EXIT_UNAVAILABLE, BenchError
from bench.results.files import write_result
from bench.results.schema import Result
from bench.results.studies import Sweep
from bench.run.plan import Choice, opened
from bench.sweep.recommend import candidates, recommend
from bench.sweep.triton import CONFIG_NAME, queue_delay_us, servable, write_repository
from export.bundle import sha256_file

ONNX, RAW = Choice("onnx-cpu", "float32", 2), Choice("openvino-cpu", "int8-raw", 1)
SCRIPT, PRESET = Choice("torchscript-cpu", "float32", 2), Choice("openvino-cpu-throughput", "int8-raw", 2)
WORLD = {
    TORCH: Figures({1: 500, 64: 10_000}, {1: 3.0, 64: 9.0}, file="model.unfolded.pt2"),
    ONNX: Figures({1: 4000, 64: 8_000}, {1: 0.3, 64: 10.0}),
}


@pytest.fixture(scope="module")
def whole(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle with an OpenVINO model in its two files: only their names and hashes count here."""

    def add(fields: dict[str, Any]) -> None:
        entry, other = (
            {
                "path": path,
                "sha256": sha256_file(small_bundle / source),
                "bytes": (small_bundle / source).stat().st_size,
            }
            for path, source in (("model.int8.raw.xml", "model.onnx"), ("model.int8.raw.bin", "model.ts"))
        )
        kind = {"format": "openvino", "precision": "int8", "folded": True, "takes": "raw", "companions": [other]}
        fields["files"].append(entry | kind)

    copy = tamper(small_bundle, tmp_path_factory.mktemp("whole") / "bundle", manifest=add)
    (copy / "model.int8.raw.xml").write_bytes((small_bundle / "model.onnx").read_bytes())
    (copy / "model.int8.raw.bin").write_bytes((small_bundle / "model.ts").read_bytes())
    return copy


def swept(result: Result, bundle: Path, *more: tuple[Choice, Figures]) -> Sweep:
    return sweep_of(result, WORLD | dict(more), opened(bundle))


def written(sweep: Sweep, folder: Path, max_p99_ms: float | None = None) -> tuple[Path, Any]:
    """The model's folder, and its configuration as the server reads it."""
    target = write_repository(sweep, recommend(sweep, max_p99_ms, None), folder)
    schema = importlib.import_module(bench.sweep.triton.SCHEMA)
    text_format = importlib.import_module("google.protobuf.text_format")
    return target, text_format.Parse((target / CONFIG_NAME).read_text(), schema.ModelConfig())


@pytest.fixture(autouse=True)
def _with_tritonclient() -> None:
    pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs the extra [triton]")


def tensors(config: Any) -> list[tuple[str, str, list[int]]]:
    return [
        (
            one.name,
            type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[one.data_type].name,
            list(one.dims),
        )
        for one in (*config.input, *config.output)
    ]


def test_an_onnx_file(result: Result, whole: Path, tmp_path: Path) -> None:
    """torch's program is faster here, but the server has no backend for it."""
    target, config = written(swept(result, whole), tmp_path / "new" / "repository")
    assert target == tmp_path / "new" / "repository" / "article"
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == {
        "config.pbtxt",
        "1/model.onnx",
    }
    assert (target / "1" / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    assert (config.name, config.backend, config.default_model_filename) == ("article", "onnxruntime", "model.onnx")
    assert tensors(config) == [("image", "TYPE_FP32", [1, 28, 28]), ("logits", "TYPE_FP32", [10])]
    model = onnx.load(str(target / "1" / "model.onnx"), load_external_data=False).graph
    assert [one.name for one in (*model.input, *model.output)] == [name for name, _, _ in tensors(config)]
    assert config.max_batch_size == 64
    assert list(config.dynamic_batching.preferred_batch_size) == [64]
    assert config.dynamic_batching.max_queue_delay_microseconds == 8000, "64 images at 8,000 a second"
    (group,) = config.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (1, "KIND_CPU")
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters == {"intra_op_thread_count": "2", "inter_op_thread_count": "1"}


def test_an_openvino_model_that_takes_pixels(result: Result, whole: Path, tmp_path: Path) -> None:
    figures = Figures({64: 30_000}, {64: 3.0}, file="model.int8.raw.xml", file_bytes=MB)
    target, config = written(
        swept(result, whole, (RAW, figures), (PRESET, replace(figures, per_s={64: 50_000}))), tmp_path
    )
    assert {path.name for path in (target / "1").iterdir()} == {"model.xml", "model.bin"}
    assert (target / "1" / "model.bin").read_bytes() == (whole / "model.int8.raw.bin").read_bytes()
    assert tensors(config) == [("pixels", "TYPE_UINT8", [28, 28]), ("logits", "TYPE_FP32", [10])]
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert (config.backend, config.max_batch_size) == ("openvino", 64)
    assert parameters == {"INFERENCE_NUM_THREADS": "1", "ENABLE_BATCH_PADDING": "YES"}, "a preset is not servable"


def test_a_torchscript_file_of_single_images(result: Result, whole: Path, tmp_path: Path) -> None:
    """Its tensors have places instead of names; and where one image is best, there is nothing to gather."""
    figures = Figures({1: 9_000}, {1: 0.2}, file="model.ts")
    target, config = written(swept(result, whole, (SCRIPT, figures)), tmp_path)
    assert (target / "1" / "model.pt").read_bytes() == (whole / "model.ts").read_bytes()
    assert (config.backend, config.default_model_filename) == ("pytorch", "model.pt")
    assert [name for name, _, _ in tensors(config)] == ["image__0", "logits__0"]
    assert config.max_batch_size == 1
    assert not config.HasField("dynamic_batching")


def test_a_bound_of_the_p99_chooses_and_limits_the_waiting(result: Result, whole: Path, tmp_path: Path) -> None:
    sweep = swept(result, whole, (SCRIPT, Figures({64: 9_000}, {64: 20.0}, file="model.ts")))
    _, config = written(sweep, tmp_path, max_p99_ms=12.0)
    assert config.backend == "onnxruntime", "the faster TorchScript exceeds the bound"
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000, "what 11 ms, the bound of its p99, leave of 12"
    one = servable(candidates(sweep), 12.0)
    assert queue_delay_us(one, 100.0) == queue_delay_us(one, None) == 8000


def test_what_stands_there_is_not_overwritten(result: Result, whole: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "article"
    foreign.mkdir()
    (foreign / "theirs.txt").write_text("theirs")
    with pytest.raises(BenchError, match="exists already, and is not overwritten") as caught:
        written(swept(result, whole), tmp_path)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert [path.name for path in foreign.iterdir()] == ["theirs.txt"]


def test_a_repository_is_written_whole_or_not_at_all(
    result: Result, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.sweep.triton.shutil, "copyfile", full)
    with pytest.raises(BenchError, match=r"No space left.*another folder with --triton") as caught:
        written(swept(result, whole), tmp_path)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gone", [True, False])
def test_only_the_bundle_that_was_swept_is_served(
    result: Result, whole: Path, small_bundle: Path, tmp_path: Path, gone: bool
) -> None:
    sweep = swept(result, whole)
    path = tmp_path / "nowhere" if gone else small_bundle
    moved = sweep.model_copy(update={"bundle": sweep.bundle.model_copy(update={"path": str(path)})})
    with pytest.raises(BenchError, match="no bundle at" if gone else "is another one by now") as caught:
        written(moved, tmp_path / "repository")
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert not (tmp_path / "repository").exists()


def test_an_altered_file_is_not_served(result: Result, whole: Path, tmp_path: Path) -> None:
    copy = tamper(whole, tmp_path / "bundle")
    sweep = swept(result, copy)
    (copy / "model.onnx").write_bytes(b"altered")
    with pytest.raises(BenchError, match="was altered"):
        written(sweep, tmp_path / "repository")
    assert list((tmp_path / "repository").iterdir()) == []


def test_what_the_server_cannot_run_is_said(result: Result, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"can run nothing that was measured \(torch-cpu\)") as caught:
        written(sweep_of(result, {TORCH: WORLD[TORCH]}, opened(whole)), tmp_path)
    assert caught.value.exit_code == EXIT_NEGATIVE


def test_without_tritonclient_the_command_says_how_to_get_it(
    result: Result, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.sweep.triton, "SCHEMA", "tritonclient_that_is_not_installed")
    write_result(swept(result, whole), tmp_path / "sweep.json")
    with pytest.raises(BenchError, match=r"python -m pip install 'ninefold\[triton\]'") as caught:
        app(["recommend", str(tmp_path), "--triton", str(tmp_path / "repository")], standalone_mode=False)
    assert caught.value.exit_code == EXIT_UNAVAILABLE
    assert not (tmp_path / "repository").exists()


def test_the_command_writes_it(result: Result, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(swept(result, whole), tmp_path / "sweep.json")
    app(["recommend", str(tmp_path), "--triton", str(tmp_path / "repository")], standalone_mode=False)
    assert f"Triton model repository: {tmp_path / 'repository' / 'article'}" in capsys.readouterr().out
