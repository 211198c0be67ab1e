"""int8 on CPUs with VNNI and without: this project's files against the libraries' own, on networks of two kinds.

    python tests/benchmarks/int8.py [article] [resnet18] [mobilenet_v2]     the first needs `nox -s train export`

For each network and quantiser: the error of the outputs as this CPU computes them, as a CPU without VNNI does
(emulated, and where qemu-x86_64 is installed by onnxruntime itself on an emulated Haswell; OpenVINO's kernels for AVX2
run here), and images per second against onnxruntime's own file, in turns. NNCF is looked at where it is installed.
Results go to docs/results/int8.json, each network's in place of an earlier one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "support"))

from export.bundle import Bundle
from export.bundle.limits import rms, spread
from export.fold import fold_batchnorm
from export.fold.batchnorm import any_batch, export_program
from export.formats import onnx_file, onnx_int8, openvino_file
from export.formats.running import run_in_batches
from export.int8.cpus import kind_here
from export.int8.saturating import SaturatingFile
from export.writing import _activations_first
from trainer import mnist
from trainer.provenance import cpu_name

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "int8.json"
SIDE, CALIBRATED, JUDGED = 96, 100, 200
ROUNDS, BLOCK_S = 40, 0.1
QEMU = "qemu-x86_64"

ORT = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x, name = numpy.load(sys.argv[2]), session.get_inputs()[0].name
numpy.save(sys.argv[3], numpy.concatenate([session.run(None, {name: x[i : i + 20]})[0] for i in range(0, len(x), 20)]))
"""
OPENVINO = """
import sys, numpy, openvino
model = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
x = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], numpy.concatenate([model(x[i : i + 20])[0] for i in range(0, len(x), 20)]))
"""


@dataclass(frozen=True)
class Network:
    """A float32 ONNX file, inputs to calibrate with and to judge by, what it should give for the latter, and labels."""

    file: Path
    calibration: np.ndarray
    inputs: np.ndarray
    truth: np.ndarray
    labels: np.ndarray | None


def article(folder: Path) -> Network:
    """The article's network, as `python -m export` folds it for int8, and all test images."""
    from export import writing

    bundle = Bundle.open(ROOT / "artifacts" / "bundles" / "article")
    oracle, manifest = bundle.oracle(), bundle.manifest
    from export.sources import article as source

    material = source.load(bundle.path / "checkpoint.safetensors", manifest.source, ROOT / "data", calibrated=True)
    example = torch.from_numpy(material.examples[0])
    model64 = material.module.double()
    folded = fold_batchnorm(model64, (example.double(),), dynamic_shapes=any_batch())
    network = writing._for_int8(model64, folded, example.double(), "auto").float()
    path = folder / "article.onnx"
    program = export_program(network, (example,), any_batch())
    onnx_file.write(program, path, ["image"], ["logits"], optimize=True, quantised=True)
    assert material.calibration is not None
    ranges = material.preprocessing.apply(material.calibration.raw[:400], material.input.shape)
    return Network(path, ranges, material.inputs, oracle.logits, oracle.labels)


def large(name: str, folder: Path) -> Network:
    """A network of torchvision's with random weights and the statistics of its images: digits, coloured and large."""
    import torchvision

    torch.manual_seed(0)
    data = mnist.load(ROOT / "data")
    images = np.concatenate([data.train_images[:CALIBRATED], data.test_images[:JUDGED]])
    x = torch.from_numpy(images).float()[:, None].repeat(1, 3, 1, 1) / 255
    x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear")
    x = (x * torch.rand(len(x), 3, 1, 1) - 0.45) / 0.225
    module = getattr(torchvision.models, name)(weights=None).train()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        for start in range(0, CALIBRATED, 50):
            module(x[start : start + 50])
    module = module.eval()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    example = x[:2]
    folded = fold_batchnorm(module.double(), (example.double(),), dynamic_shapes=any_batch())
    with torch.no_grad():
        truth = torch.cat([module(part.double()) for part in x[CALIBRATED:].split(50)]).numpy()
    path = folder / f"{name}.onnx"
    network = _activations_first(folded.module).float()
    program = export_program(network, (example,), any_batch())
    onnx_file.write(program, path, ["image"], ["logits"], optimize=True, quantised=True)
    return Network(path, x[:CALIBRATED].numpy(), x[CALIBRATED:].numpy(), truth, None)


def by_onnxruntime(network: Network, path: Path, *, unsigned_weights: bool = False, reduce_range: bool = False) -> None:
    """As onnxruntime quantises by itself, a scale for each channel: U8S8 unless told otherwise."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with onnx_int8._quiet():
        quant_pre_process(str(network.file), str(path.with_suffix(".prepared.onnx")), skip_symbolic_shape=True)
        quantize_static(
            str(path.with_suffix(".prepared.onnx")),
            str(path),
            onnx_int8._Inputs("image", network.calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QUInt8 if unsigned_weights else QuantType.QInt8,
            reduce_range=reduce_range,
        )


def by_nncf(network: Network, path: Path) -> None:
    """As NNCF quantises for OpenVINO by itself."""
    import nncf
    import openvino

    model = nncf.quantize(
        openvino.Core().read_model(str(network.file)),
        nncf.Dataset([row[None] for row in network.calibration]),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(network.calibration),
    )
    openvino.save_model(model, str(path), compress_to_fp16=False)


def judged(outputs: np.ndarray, network: Network) -> dict[str, float | int]:
    """Error in percent of the spread, flips and top-1, of outputs for the first of the network's inputs."""
    truth = network.truth[: len(outputs)]
    found: dict[str, float | int] = {
        "images": len(outputs),
        "rms_error_percent": round(100 * rms(outputs - truth) / spread(network.truth), 4),
        "flips": int((outputs.argmax(1) != truth.argmax(1)).sum()),
    }
    if network.labels is not None:
        found["top1_percent"] = round(100 * float((outputs.argmax(1) == network.labels[: len(outputs)]).mean()), 2)
    return found


def elsewhere(
    program: str, file: Path, inputs: np.ndarray, folder: Path, *, before: list[str], **more: str
) -> np.ndarray:
    """The outputs of a program in a process of its own."""
    x, y = folder / "x.npy", folder / "y.npy"
    np.save(x, inputs)
    command = [*before, sys.executable, "-W", "ignore", "-c", program, str(file), str(x), str(y)]
    subprocess.run(command, env=os.environ | more, check=True, stderr=subprocess.DEVNULL)
    return np.asarray(np.load(y))


def of_onnx(file: Path, network: Network, folder: Path, emulated_images: int) -> dict[str, Any]:
    """An ONNX file here, emulated, and in onnxruntime on an emulated CPU with AVX2 alone."""
    here = run_in_batches(onnx_file.runner(file, optimised=True), (network.inputs,), 20)[0]
    found: dict[str, Any] = {"here": judged(here, network)}
    few = network.inputs[:emulated_images]
    there = run_in_batches(SaturatingFile(file), (few,), 20)[0]
    found["without_vnni_emulated"] = judged(there, network)
    if shutil.which(QEMU):
        real = elsewhere(ORT, file, few, folder, before=[QEMU, "-cpu", "Haswell"])
        found["without_vnni_in_qemu"] = judged(real, network)
        found["emulated_equals_qemu"] = bool(np.array_equal(real, there))
        found["largest_difference_of_the_two"] = float(np.abs(real - there).max())
    errors = [judged(outputs, network)["rms_error_percent"] for outputs in (there, here[:emulated_images])]
    found["rms_without_vnni_over_here"] = round(errors[0] / errors[1], 4)
    return found


def of_openvino(file: Path, network: Network, folder: Path) -> dict[str, Any]:
    """An IR here, and with oneDNN limited to AVX2."""
    here = elsewhere(OPENVINO, file, network.inputs, folder, before=[])
    there = elsewhere(OPENVINO, file, network.inputs, folder, before=[], ONEDNN_MAX_CPU_ISA="AVX2")
    return {
        "here": judged(here, network),
        "avx2_kernels": judged(there, network),
        "equal": bool(np.array_equal(here, there)),
        "largest_difference": float(np.abs(here - there).max()),
    }


def session(file: Path, inputs: np.ndarray) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    opened = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda: opened.run(None, {"image": inputs})


def request(file: Path, inputs: np.ndarray) -> Callable[[], object]:
    import openvino

    model = openvino.Core().read_model(str(file))
    model.reshape(list(inputs.shape))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "1"}
    infer = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    infer.set_input_tensor(openvino.Tensor(inputs.copy()))
    return infer.infer  # type: ignore[no-any-return]


def speed(new: Callable[[], object], old: Callable[[], object]) -> dict[str, float]:
    """Images/s of `new` over those of `old`, in turns: the median of the rounds' ratios, and their quartiles."""
    ratios, calls = [], []
    for run in (new, old):
        began, count = time.perf_counter(), 0
        while time.perf_counter() < began + 0.3:
            run()
            count += 1
        calls.append(max(1, int(count * BLOCK_S / 0.3)))
    for number in range(ROUNDS):
        took = {}
        for place in (0, 1) if number % 2 else (1, 0):
            run = (new, old)[place]
            time.sleep(0.06)  # until the other's threads have stopped to spin
            run()
            began = time.perf_counter()
            for _ in range(calls[place]):
                run()
            took[place] = (time.perf_counter() - began) / calls[place]
        ratios.append(took[1] / took[0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def measured(network: Network, folder: Path, emulated_images: int, batch_sizes: tuple[int, ...]) -> dict[str, Any]:
    own, ours = folder / "own.onnx", folder / "ours.onnx"
    by_onnxruntime(network, own)
    began = time.perf_counter()
    onnx_int8.Quantiser(network.file, network.calibration, folder).write(ours)
    found: dict[str, Any] = {"seconds_to_quantise": round(time.perf_counter() - began, 2)}
    found["onnxruntime's own"] = of_onnx(own, network, folder, emulated_images)
    found["ninefold's"] = of_onnx(ours, network, folder, emulated_images)
    sizes = {size: np.ascontiguousarray(network.inputs[:size]) for size in batch_sizes}
    for name, ways in (("U8U8", {"unsigned_weights": True}), ("reduced range", {"reduce_range": True})):
        by_onnxruntime(network, other := folder / "other.onnx", **ways)
        found[f"onnxruntime's own, {name}"] = {
            "here": judged(run_in_batches(onnx_file.runner(other, optimised=True), (network.inputs,), 20)[0], network),
            "images/s over ninefold's": {
                str(size): speed(session(other, x), session(ours, x)) for size, x in sizes.items()
            },
        }
    found["ninefold's over onnxruntime's own, images/s"] = {
        str(size): speed(session(ours, x), session(own, x)) for size, x in sizes.items()
    }
    if openvino_file.missing() is None:
        ir = folder / "ours.xml"
        openvino_file.write(ours, ir)
        found["ninefold's, OpenVINO"] = of_openvino(ir, network, folder)
        try:
            by_nncf(network, nncf_file := folder / "nncf.xml")
        except ImportError:
            return found
        found["NNCF's, OpenVINO"] = of_openvino(nncf_file, network, folder)
        found["ninefold's over NNCF's, images/s"] = {
            str(size): speed(request(ir, x), request(nncf_file, x)) for size, x in sizes.items()
        }
    return found


def main() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "vnni": kind_here() == "vnni",
        "platform": platform.platform(),
    }
    for name in sys.argv[1:] or ("article", "resnet18", "mobilenet_v2"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            whole = name == "article"
            network = article(folder) if whole else large(name, folder)
            results[name] = measured(network, folder, 10_000 if whole else 40, (1, 256) if whole else (1, 32))
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
