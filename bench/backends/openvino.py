"""OpenVINO on the CPU, for one request at a time or with as many streams as threads.

Owns compiling a model for each batch size, the memory that its requests read and write, and what OpenVINO says of the
model that it made: which precision every node runs in. By default it computes in bf16 on CPUs that can, so that profile
`strict` asks for float32 by name, and placement looks at what became of that.

Where a run has fewer threads than there are CPUs, the harness says which CPUs its threads may use. OpenVINO's own
pinning is off, but its workers in a run of several threads don't keep to that: its scheduler sets their affinity anew
whenever they take up or end work. The thread that calls does keep to it, and with it a run of one thread.

Measured with the article's network on two cores (OpenVINO 2026.4, AVX-512 with VNNI, no bf16), from pixels to logits,
the median of nine interleaved rounds; eager torch: 909 µs and 47.6 ms.

                             one image, µs    batch 256, ms
    one stream    float32         260             15.0
    one stream    int8            147              8.7
    two streams   float32           –             14.5
    two streams   int8              –              9.6

A second thread gains little for one image (303 and 151 µs without). On a machine that was less quiet, a model compiled
for its batch size took 416 µs for one image in float32 and 173 in int8, one of a free batch size 473 and 266; compiling
takes 0.1 s for each batch size. To start a request and wait for it is no slower than `infer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from bench.backends.contract import (
    HALVES,
    Backend,
    Device,
    Emulation,
    Options,
    Placement,
    Profile,
    Program,
    Runnable,
    Server,
    Session,
    Setting,
    file_path,
    in_float32,
    inputs_of,
    preparation,
    python,
    text,
)
from bench.backends.pieces import piece_slices, pieces

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from export.bundle import Arrays, Bundle, Format

DEVICE = "CPU"
# What an executable model holds beside the nodes that compute: where numbers come from and go to.
ENDS = frozenset({"Const", "Input", "Output"})
# Nodes that change the type of numbers: they name one of the two.
CONVERSIONS = frozenset({"Convert", "Reorder"})
# How a program runs its requests, as a session does.
SEVERAL = [
    "if len(requests) == 1:",
    "    requests[0].infer()",
    "else:",
    "    for request in requests:",
    "        request.start_async()",
    "    for request in requests:",
    "        request.wait()",
]
REDUCED = frozenset({"bf16", "f16"})


@dataclass(frozen=True)
class OpenVino:
    """An IR, or where the bundle has none of that variant, an ONNX file. `streams` is how many requests run at a time:
    one, which has all threads, or one for each thread.
    """

    name: str
    throughput: bool
    device: ClassVar[Device] = "cpu"
    formats: ClassVar[tuple[Format, ...]] = ("openvino", "onnx")
    reference: ClassVar[bool] = False
    shows_fold: ClassVar[bool] = False

    @property
    def on_request(self) -> bool:
        return self.throughput

    @property
    def server(self) -> Server | None:
        files = {".xml": "model.xml", ".bin": "model.bin", ".onnx": "model.onnx"}
        padding = (("ENABLE_BATCH_PADDING", "YES"),)
        return None if self.throughput else Server("openvino", files, "INFERENCE_NUM_THREADS", padding)

    def program(self, file: Runnable) -> Program:
        """What `OpenVinoSession` does."""
        parts = piece_slices(file.threads) if self.throughput else "[slice(0, len(x))]"
        load = [
            "import openvino",
            "",
            f"settings = {python(configuration(Options(file.threads), self.throughput))}",
            "core = openvino.Core()",
            f"whole = core.read_model({text(file.path)})",
            "compiled, slots = {}, {}",
            "",
            "",
            "def compile(shape):  # for inputs of that shape alone",
            "    if shape not in compiled:",
            "        model = whole.clone()",
            "        model.reshape(list(shape))",
            f"        compiled[shape] = core.compile_model(model, {text(DEVICE)}, settings)",
            "    return compiled[shape]",
            "",
            "",
            "def slot(x):  # memory that the requests of one shape read and write",
            f"    parts = {parts}",
            "    models = [compile((part.stop - part.start, *x.shape[1:])) for part in parts]",
            "    port = models[0].output(0)",
            "    given, found = np.empty_like(x), np.empty((len(x), *port.shape[1:]), port.element_type.to_dtype())",
            "    requests = [model.create_infer_request() for model in models]",
            "    for request, part in zip(requests, parts):",
            "        request.set_input_tensor(0, openvino.Tensor(given[part], shared_memory=True))",
            "        request.set_output_tensor(0, openvino.Tensor(found[part], shared_memory=True))",
            "    return given, found, requests",
        ]
        run = [
            "if x.shape not in slots:",
            "    slots[x.shape] = slot(x)",
            "given, found, requests = slots[x.shape]",
            "given[...] = x",
            *(SEVERAL if self.throughput else ["requests[0].infer()"]),
            "return found.astype(np.float32)",
        ]
        return Program(load, run)

    def unavailable_reason(self) -> str | None:
        try:
            import openvino
        except (ImportError, OSError) as error:  # OSError: a shared library is missing
            return f"OpenVINO can't be imported ({error}). Install it: python -m pip install 'ninefold[openvino]'"
        devices = openvino.Core().available_devices
        if DEVICE not in devices:
            return (
                f"OpenVINO {openvino.__version__} finds no {DEVICE} device ({', '.join(devices) or 'none at all'}): it "
                "does not support this processor. Try another release: python -m pip install --upgrade openvino"
            )
        return None

    def load(self, bundle: Bundle, options: Options) -> Session:
        return OpenVinoSession(file_path(self, bundle, options), bundle, options, self.throughput)


Shapes = tuple[tuple[int, ...], ...]
"""Of each input."""


@dataclass(frozen=True)
class Slot:
    """The memory of one batch size and the requests that compute on it, each on a piece. An output is None whose size
    is known when it is there.
    """

    inputs: Arrays
    outputs: tuple[np.ndarray | None, ...]
    requests: tuple[Any, ...]


class OpenVinoSession:
    """A model compiled for every batch size when that is first seen. Requests read and write one piece of memory for
    each batch size, so that a call binds nothing and copies nothing.
    """

    def __init__(self, path: Path, bundle: Bundle, options: Options, throughput: bool) -> None:
        import openvino

        self._openvino: Any = openvino
        self._core: Any = openvino.Core()
        self._model: Any = self._core.read_model(path)
        self._threads = options.threads if throughput else 1
        self._config = configuration(options, throughput)
        self._prepare = preparation(bundle, options)
        self._inputs = _places(self._model.inputs, [spec.name for spec in inputs_of(bundle, options)])
        self._outputs = _places(self._model.outputs, [spec.name for spec in bundle.manifest.outputs])
        self._compiled: dict[Shapes, Any] = {}
        self._slots: dict[Shapes, Slot] = {}
        raw, *more = (array[: bundle.manifest.fixed_batch or 1].copy() for array in bundle.oracle().inputs)
        first = self._compile(tuple(array.shape for array in (self._prepare(raw), *more)))
        self._placement = read_placement(first, options)
        self._settings = _settings(first, openvino.__version__)

    def prepare(self, raw: np.ndarray, *more: np.ndarray) -> Slot:
        prepared = self._prepare(raw), *more
        shapes = tuple(array.shape for array in prepared)
        slot = self._slots.get(shapes)
        if slot is None:
            slot = self._slots[shapes] = self._slot(prepared)
        for taken, array in zip(slot.inputs, prepared, strict=True):
            taken[...] = array
        return slot

    def run(self, prepared: Slot) -> Slot:
        requests = prepared.requests
        if len(requests) == 1:
            requests[0].infer()
            return prepared
        for request in requests:
            request.start_async()
        for request in requests:
            request.wait()
        return prepared

    def fetch(self, output: Slot) -> Arrays:
        # Copies: the next call of this size writes there.
        return tuple(
            in_float32(output.requests[0].get_output_tensor(place).data.copy() if array is None else array.copy())
            for place, array in zip(self._outputs, output.outputs, strict=True)
        )

    def gpu_ns(self, call: Callable[[], object]) -> int | None:
        return None

    def placement(self) -> Placement:
        return self._placement

    def settings(self) -> dict[str, Setting]:
        return self._settings

    def close(self) -> None:
        self._slots.clear()
        self._compiled.clear()
        self._model = self._core = None

    def _slot(self, prepared: Arrays) -> Slot:
        import numpy as np

        images = len(prepared[0])
        parts = pieces(images, self._threads) if self._threads > 1 else [slice(0, images)]
        models = [self._compile(tuple(array[part].shape for array in prepared)) for part in parts]
        ports = [models[0].output(place) for place in self._outputs]
        taken = tuple(np.empty(array.shape, array.dtype) for array in prepared)
        # A list of boxes is as long as it comes out: OpenVINO allocates that.
        made = tuple(
            np.empty((images, *port.shape[1:]), port.element_type.to_dtype()) if port.partial_shape.is_static else None
            for port in ports
        )
        requests = [model.create_infer_request() for model in models]
        shared = self._openvino.Tensor
        for request, part in zip(requests, parts, strict=True):
            for place, array in zip(self._inputs, taken, strict=True):
                request.set_input_tensor(place, shared(array[part], shared_memory=True))
            for place, output in zip(self._outputs, made, strict=True):
                if output is not None:
                    request.set_output_tensor(place, shared(output[part], shared_memory=True))
        return Slot(taken, made, tuple(requests))

    def _compile(self, shapes: Shapes) -> Any:
        """The model for inputs of those shapes alone."""
        if shapes not in self._compiled:
            model = self._model.clone()
            model.reshape({place: list(shape) for place, shape in zip(self._inputs, shapes, strict=True)})
            self._compiled[shapes] = self._core.compile_model(model, DEVICE, self._config)
        return self._compiled[shapes]


def _places(ports: Sequence[Any], names: Sequence[str]) -> list[int]:
    """Where each name is among a model's inputs, or outputs: an IR may have them in another order, or without names."""
    known = {name: place for place, port in enumerate(ports) for name in port.get_names()}
    return [known.get(name, place) for place, name in enumerate(names)]


def configuration(options: Options, throughput: bool) -> dict[str, str | int | bool]:
    """What OpenVINO is told. Where nothing is said of the precision, it takes the fastest that the CPU has."""
    config: dict[str, str | int | bool] = {
        "PERFORMANCE_HINT": "THROUGHPUT" if throughput else "LATENCY",
        "NUM_STREAMS": str(options.threads if throughput else 1),
        "INFERENCE_NUM_THREADS": options.threads,
        "ENABLE_CPU_PINNING": False,  # the harness says which CPUs a run may use
    }
    if options.profile is Profile.STRICT:
        config["INFERENCE_PRECISION_HINT"] = "f32"
    return config


def read_placement(compiled: Any, options: Options) -> Placement:
    """How many nodes of a compiled model run in which precision; and which don't compute in float32 though they
    should.
    """
    from export.bundle import FLOAT32, precision_of

    devices = list(compiled.get_property("EXECUTION_DEVICES"))
    facts = [_facts(node) for node in compiled.get_runtime_model().get_ordered_ops()]
    must_be_float32 = options.profile is Profile.STRICT and precision_of(options.variant) == FLOAT32
    return replace(placement_of(devices, facts, must_be_float32), emulated=emulation(facts, options))


def emulation(nodes: Iterable[Mapping[str, str]], options: Options) -> Emulation | None:
    """Why a float16 or bfloat16 file is computed in float32; None where any node of it computes in a narrower type.

    Profile strict asks for float32 (`INFERENCE_PRECISION_HINT`), whatever the file has. Where nothing is asked for,
    OpenVINO takes a narrower type if the CPU has one: bfloat16 on an Intel Xeon with AVX512_BF16, of a float16 file
    too (2026.4).
    """
    from export.bundle import precision_of

    computing = [node for node in nodes if node["layerType"] not in CONVERSIONS | ENDS]
    if precision_of(options.variant) not in HALVES or any(node["runtimePrecision"] in REDUCED for node in computing):
        return None
    return "float32 asked for" if options.profile is Profile.STRICT else "no instructions"


def placement_of(devices: list[str], nodes: Iterable[Mapping[str, str]], must_be_float32: bool) -> Placement:
    """The placement that the facts of an executable model's nodes amount to."""
    computing = [node for node in nodes if node["layerType"] not in ENDS]
    stray = [f"the model is on {device}" for device in devices if device != DEVICE]
    if must_be_float32:
        stray += [
            f"{node['layerType']} {node['name']} computes in {node['runtimePrecision']}"
            for node in computing
            if node["runtimePrecision"] in REDUCED and node["layerType"] not in CONVERSIONS
        ]
    where = "+".join(devices)
    return Placement(
        nodes=dict(Counter(f"{where} {node['runtimePrecision']}" for node in computing)),
        stray=tuple(stray),
        evidence="execution devices, and type and precision of every node of the compiled model, for one image",
    )


def _facts(node: Any) -> dict[str, str]:
    """What OpenVINO notes of a node of a compiled model: `layerType`, `runtimePrecision` and more; and its `name`."""
    return {key: value.astype(str) for key, value in node.get_rt_info().items()} | {"name": node.get_friendly_name()}


def _settings(compiled: Any, version: str) -> dict[str, Setting]:
    """The settings in effect, read back from the compiled model."""
    return {
        "openvino": version,
        "intra_op_threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
        "streams": int(compiled.get_property("NUM_STREAMS")),
        "performance_hint": str(compiled.get_property("PERFORMANCE_HINT")),
        "inference_precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
        "cpu_pinning": bool(compiled.get_property("ENABLE_CPU_PINNING")),
    }


LATENCY: Backend = OpenVino("openvino-cpu", throughput=False)
THROUGHPUT: Backend = OpenVino("openvino-cpu-throughput", throughput=True)
