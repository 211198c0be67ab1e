"""A model repository for Triton Inference Server: a file of the bundle with the settings that were measured for it.

Owns which backend of the server runs which file, its configuration, and writing the folder whole or not at all. It
stands here and not in `export`, because the batch that the server is to gather is a measurement: of one file, on one
machine.

The configuration is built from the server's own schema, as the package tritonclient ships it, so that no field of it
can be one that the server doesn't know. The server gathers requests up to the best batch. A request waits for others at
most as long as a call with the best batch takes: waiting longer would cost more than the whole call. Where a bound of
the p99 is given, it waits no longer than what a call leaves of that.

One instance with the threads that were measured: what several at a time would do was not. OpenVINO's backend runs every
request at the largest batch and refuses smaller ones unless it may pad them (triton-inference-server/openvino_backend,
ENABLE_BATCH_PADDING); and it can't be told to compute in float32 on a CPU that has bfloat16.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.backends.contract import Server
from bench.backends.registry import find_backend
from bench.errors import EXIT_BAD_INPUT, EXIT_NEGATIVE, EXIT_UNAVAILABLE, BenchError
from bench.results.studies import Candidate, Recommendation, Sweep
from bench.sweep.recommend import candidates, fastest, fastest_under, input_of
from export.bundle import Bundle, BundleError, FileEntry, TensorSpec

CONFIG_NAME, VERSION = "config.pbtxt", "1"
SCHEMA = "tritonclient.grpc.model_config_pb2"
# The only ones that a file of a bundle has.
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "float64": "TYPE_FP64"}
TYPES |= {f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
TYPES |= {"bool": "TYPE_BOOL"}


def write_repository(sweep: Sweep, recommendation: Recommendation, folder: Path) -> Path:
    """Write the model into the repository at `folder` and return its place there, a folder of its own.

    It is the largest throughput of all that the server can run, under the recommendation's bound of the p99 if it has
    one.

    Raises BenchError: unavailable without tritonclient, negative where the server can run nothing of it, bad input
    where the bundle is another by now, or the model's folder exists already or can't be written.
    """
    candidate = servable(candidates(sweep, recommendation.batch_size), recommendation.max_p99_ms)
    bundle = _bundle(sweep)
    entry = next(entry for entry in bundle.manifest.files if entry.path == candidate.file)
    target = folder / bundle.manifest.name
    text = config_text(sweep, candidate, entry, recommendation.max_p99_ms, target.name)
    if target.exists():
        raise BenchError(
            f"{target} exists already, and is not overwritten. Name another folder with --triton, or move it away.",
            EXIT_BAD_INPUT,
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that it gets its name in one step.
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}.") as scratch:
            made = Path(scratch) / target.name
            (made / VERSION).mkdir(parents=True)
            (made / CONFIG_NAME).write_text(text)
            for source in (bundle.locate(entry), *(bundle.path / other.path for other in entry.companions)):
                shutil.copyfile(source, made / VERSION / _name_there(candidate, source))
            made.rename(target)
    except (OSError, BundleError) as error:
        raise BenchError(
            f"the model repository can't be written to {folder}: {error}. Name another folder with --triton.",
            EXIT_BAD_INPUT,
        ) from None
    return target


def servable(measured: Sequence[Candidate], max_p99_ms: float | None) -> Candidate:
    """The best that the server can run. Raises BenchError (negative) where it can run nothing of it."""
    able = [candidate for candidate in measured if find_backend(candidate.backend).server is not None]
    best = fastest(able) if max_p99_ms is None or not able else fastest_under(able, max_p99_ms)
    if best is None:
        names = ", ".join(dict.fromkeys(candidate.backend for candidate in measured))
        raise BenchError(
            f"Triton can run nothing that was measured ({names}). "
            "Sweep with onnx-cpu, openvino-cpu or torchscript-cpu, or their like on a GPU.",
            EXIT_NEGATIVE,
        )
    return best


def config_text(sweep: Sweep, candidate: Candidate, entry: FileEntry, max_p99_ms: float | None, name: str) -> str:
    """The content of config.pbtxt. Raises BenchError (unavailable) without tritonclient."""
    schema, text_format = _schema()
    server = _server(candidate)
    config = schema.ModelConfig(
        name=name,
        backend=server.backend,
        max_batch_size=candidate.batch_size,
        default_model_filename=_name_there(candidate, Path(entry.path)),
    )
    ends = (
        (config.input, (input_of(sweep, candidate), *sweep.more_inputs)),
        (
            config.output,
            (sweep.output, *sweep.more_outputs),
        ),
    )
    for field, specs in ends:
        for place, spec in enumerate(specs):
            tensor = field.add(name=spec.name + (f"__{place}" if server.indexed else ""), dims=_dims(spec))
            tensor.data_type = schema.DataType.Value(TYPES[spec.dtype])
    group = config.instance_group.add(count=1)
    group.kind = schema.ModelInstanceGroup.Kind.Value("KIND_GPU" if candidate.device == "cuda" else "KIND_CPU")
    if candidate.batch_size > 1:
        config.dynamic_batching.preferred_batch_size.append(candidate.batch_size)
        config.dynamic_batching.max_queue_delay_microseconds = queue_delay_us(candidate, max_p99_ms)
    for key, value in ((server.threads_parameter, str(candidate.threads)), *server.further):
        config.parameters[key].string_value = value
    bundle = f"{sweep.bundle.name} ({sweep.bundle.digest[:12]})"
    about = f"# {candidate.label} at batch {candidate.batch_size}, of bundle {bundle}\n"
    return about + str(text_format.MessageToString(config))


def queue_delay_us(candidate: Candidate, max_p99_ms: float | None) -> int:
    """How long a request may wait for others to come."""
    call_ms = 1e3 * candidate.batch_size / candidate.throughput_images_per_s.median
    left_ms = (
        float("inf")
        if max_p99_ms is None or candidate.latency_ms.p99_upper is None
        else max_p99_ms - candidate.latency_ms.p99_upper
    )
    return int(1e3 * min(call_ms, left_ms))


def _dims(spec: TensorSpec) -> list[int]:
    """Without the batch; -1 for what may vary."""
    return [size if isinstance(size, int) else -1 for size in spec.shape[1:]]


def _server(candidate: Candidate) -> Server:
    server = find_backend(candidate.backend).server
    assert server is not None, "of those that are servable"
    return server


def _name_there(candidate: Candidate, file: Path) -> str:
    return _server(candidate).suffixes[file.suffix]


def _bundle(sweep: Sweep) -> Bundle:
    """The bundle that was swept. Raises BenchError (bad input) where it is gone or is another by now."""
    try:
        bundle = Bundle.open(sweep.bundle.path)
    except BundleError as error:
        raise BenchError(f"the model's file is needed: {error}", EXIT_BAD_INPUT) from None
    if bundle.digest != sweep.bundle.digest:
        raise BenchError(
            f"the bundle at {sweep.bundle.path} is another one by now ({bundle.digest[:12]}, the sweep is of "
            f"{sweep.bundle.digest[:12]}). Sweep again.",
            EXIT_BAD_INPUT,
        )
    return bundle


def _schema() -> tuple[Any, Any]:
    """The server's schema, and what writes its messages as text. Raises BenchError (unavailable)."""
    try:
        return importlib.import_module(SCHEMA), importlib.import_module("google.protobuf.text_format")
    except ImportError as error:
        raise BenchError(
            f"--triton needs the server's own schema, which is in tritonclient ({error}). Install it: "
            "python -m pip install 'ninefold[triton]'",
            EXIT_UNAVAILABLE,
        ) from None
