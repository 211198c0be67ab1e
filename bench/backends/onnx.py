"""onnxruntime, on its CPU or its CUDA execution provider.

Owns sessions, their placement, and the input and output binding on CUDA. Nothing that onnxruntime says of itself is
believed: its list of providers names CUDA on machines without a GPU, and a session that can't have CUDA runs on the CPU
without a word. What counts is which provider each node was assigned to, which onnxruntime records when asked (since
1.24, microsoft/onnxruntime#26781).
"""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.backends.contract import (
    HALVES,
    Backend,
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
from bench.backends.pieces import piece_lines, pieces
from bench.backends.torch_lines import gpu_program
from bench.backends.torch_runtime import GpuMemory, TorchDevice, torch_unavailable_reason

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch

    from export.bundle import Arrays, Bundle, Format

# On an H100 with the article's network, CUDA graphs on: the search by default (EXHAUSTIVE) took 4.34 ms for a batch of
# 4,096 where the heuristic takes 2.32 (TF32: 4.07 and 2.06), 9.49 and 9.02 ms for 16,384, 67 and 62 µs for one image.
# prefer_nhwc was slower at every batch but one, and without cudnn_conv_use_max_workspace nothing changed.
CONVOLUTION_SEARCH = {"cudnn_conv_algo_search": "HEURISTIC"}

CAPTURE = {"enable_cuda_graph": "1"}
GRAPH_ID = "gpu_graph_id"
SPINNING = "session.intra_op.allow_spinning"
X86 = frozenset({"x86_64", "AMD64"})
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# Operators that compute with shapes. onnxruntime keeps such nodes on the CPU on purpose, since their results steer the
# launch of kernels. One of these is exempt from the placement rule, provided that all it makes is integers.
SHAPE_OPERATORS = frozenset(
    {
        "Shape",
        "Size",
        "Gather",
        "Squeeze",
        "Unsqueeze",
        "Concat",
        "Slice",
        "Cast",
        "Reshape",
        "Range",
        "ConstantOfShape",
    }
    | {"Add", "Sub", "Mul", "Div"}
)


@dataclass(frozen=True)
class Preset:
    """A way to set onnxruntime up; the default is what a user gets who sets nothing but the number of threads.

    Attributes:
        name: what it adds to the backend's name.
        every_optimisation: all graph optimisations, those of the CPU's memory layouts too; else the basic ones.
        spinning: whether idle threads of the pool keep a core busy for a while, to be there sooner for the next call.
        parallel: the session has no pool; a batch is cut into pieces, which as many threads of Python's share.
        cuda_graph: capture a graph for each batch size, where onnxruntime can do that for the model.
        nhwc: the channels last in memory, on CUDA.
    """

    name: str = ""
    every_optimisation: bool = True
    spinning: bool = True
    parallel: bool = False
    cuda_graph: bool = True
    nhwc: bool = False


DEFAULT = Preset()


@dataclass(frozen=True)
class Onnx:
    """An ONNX file on one of onnxruntime's providers."""

    device: TorchDevice
    preset: Preset = DEFAULT
    formats: ClassVar[tuple[Format, ...]] = ("onnx",)
    reference: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"onnx-{self.device}" + (f"-{self.preset.name}" if self.preset.name else "")

    @property
    def on_request(self) -> bool:
        return self.preset != DEFAULT

    def unavailable_reason(self) -> str | None:
        # torch prepares the input on the GPU, and imported first it lets both runtimes share CUDA and cuDNN.
        if self.device == "cuda" and (reason := torch_unavailable_reason("cuda")) is not None:
            return reason
        try:
            import onnxruntime
        except (ImportError, OSError) as error:  # OSError: a shared library is missing
            return f"onnxruntime can't be imported ({error}). Install it again: python -m pip install onnxruntime-gpu"
        if self.device == "cpu":
            return None
        version = onnxruntime.__version__
        if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
            return (
                f"onnxruntime {version} was built without CUDA. Replace it: python -m pip uninstall onnxruntime, then "
                "python -m pip install onnxruntime-gpu"
            )
        session = open_session(_one_node_model(), "cuda", Options(threads=1))
        if PROVIDERS["cuda"] not in session.get_providers():
            import torch

            return (
                f"onnxruntime {version}, built for CUDA {onnxruntime.cuda_version}, could not start its CUDA provider "
                f"beside torch {torch.__version__} with CUDA {torch.version.cuda}. The two need the same major "
                "versions of CUDA and cuDNN: install matching builds; see onnxruntime.print_debug_info()."
            )
        return None

    @property
    def shows_fold(self) -> bool:
        return not self.on_request

    @property
    def server(self) -> Server | None:
        if self.on_request:  # the server has no such session
            return None
        further = (("inter_op_thread_count", "1"),)
        return Server("onnxruntime", {".onnx": "model.onnx"}, "intra_op_thread_count", further)

    def program(self, file: Runnable) -> Program:
        if self.device == "cuda":
            return _program_on_gpu(file, self.preset)
        call = f"session.run([{text(file.output.name)}], {{{text(file.input.name)}: x}})[0]"
        if not self.preset.parallel:
            return Program(_session_lines(file, self.preset), [f"return {call}.astype(np.float32, copy=False)"])
        load = [
            "from concurrent.futures import ThreadPoolExecutor",
            "",
            *_session_lines(replace(file, threads=1), self.preset),
            f"pool = ThreadPoolExecutor({file.threads})",
            "",
            "",
            "def run(x):",
            f"    return {call}",
        ]
        run = [
            *piece_lines(file.threads),
            "found = run(x) if len(pieces) == 1 else np.concatenate(list(pool.map(run, pieces)))",
            "return found.astype(np.float32, copy=False)",
        ]
        return Program(load, run)

    def load(self, bundle: Bundle, options: Options) -> Session:
        path = file_path(self, bundle, options)
        if self.device == "cuda":
            return _load_on_gpu(path, bundle, options, self.preset)
        session = open_session(str(path), "cpu", options, self.preset)
        placement = replace(read_placement(session, "cpu", path), emulated=emulation(options.variant))
        settings = _settings(session, "cpu")
        if not self.preset.parallel:
            return CpuSession(session, bundle, options, placement, settings)
        settings |= {"session_threads": settings["intra_op_threads"], "intra_op_threads": options.threads}
        return ParallelSession(session, bundle, options, placement, settings)


def _session_lines(file: Runnable, preset: Preset) -> list[str]:
    """Lines of Python that load an ONNX file on the CPU as the preset does."""
    return [
        "import onnxruntime",
        "",
        *_options_lines(file, preset),
        f"session = onnxruntime.InferenceSession({text(file.path)}, options, providers=[{text(PROVIDERS['cpu'])}])",
    ]


def _options_lines(file: Runnable, preset: Preset) -> list[str]:
    """`options`, as `open_session` sets them, but for what it needs to know where nodes are."""
    level = "onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC"
    return [
        "options = onnxruntime.SessionOptions()",
        f"options.intra_op_num_threads = {file.threads}",
        "options.inter_op_num_threads = 1",
        *([] if preset.every_optimisation else [f"options.graph_optimization_level = {level}"]),
        *([] if preset.spinning else [f'options.add_session_config_entry("{SPINNING}", "0")']),
    ]


def _program_on_gpu(file: Runnable, preset: Preset) -> Program:
    """What `CudaSession` does: bound memory on the stream that prepares and fetches, and a CUDA graph for each shape,
    unless onnxruntime refused to capture any when this was measured.
    """
    captures = bool(file.settings.get("cuda_graph", preset.cuda_graph))
    settings = cuda_options(Profile.STRICT, preset) | (CAPTURE if captures else {})
    load = [
        "onnxruntime.preload_dlls()",
        *_options_lines(file, preset),
        "options.log_severity_level = 3",
        f"settings = {python(settings)}",
        'settings["user_compute_stream"] = str(stream.cuda_stream)',
        f"providers = [({text(PROVIDERS['cuda'])}, settings), {text(PROVIDERS['cpu'])}]",
        f"session = onnxruntime.InferenceSession({text(file.path)}, options, providers=providers)",
    ]
    sizes = "".join(f", {size}" for size in file.output.shape[1:] if isinstance(size, int))
    ends = [
        (file.input.name, "input", f"np.{file.input.dtype}", "x"),
        (file.output.name, "output", "np.float32", "made"),
    ]
    call = [
        f'made = torch.empty((len(x){sizes}), dtype=torch.float32, device="cuda")',
        "binding, run_options = session.io_binding(), onnxruntime.RunOptions()",
        *(
            f'binding.bind_{end}({text(name)}, "cuda", 0, {kind}, tuple({tensor}.shape), {tensor}.data_ptr())'
            for name, end, kind, tensor in ends
        ),
        f'run_options.add_run_config_entry("{GRAPH_ID}", str(len(slots) + 1))',
        "run = lambda: (session.run_with_iobinding(binding, run_options), made)[1]",
    ]
    # torch first, so that both use one CUDA and one cuDNN.
    return replace(gpu_program(file, ["import torch", "import onnxruntime"], load, call), differs="")


def _load_on_gpu(path: Path, bundle: Bundle, options: Options, preset: Preset) -> Session:
    """The session captures CUDA graphs where onnxruntime can do that for this model, and runs without where not."""
    memory = GpuMemory(bundle, options)  # imports torch, before onnxruntime, so that both use one CUDA and one cuDNN
    shared = {"user_compute_stream": str(memory.stream.cuda_stream)}
    graph: dict[str, Setting] = {"cuda_graph": preset.cuda_graph}
    try:
        captured = CAPTURE if preset.cuda_graph else {}
        session = open_session(str(path), "cuda", options, preset, shared | captured)
    except Exception as error:  # of no common kind: a model with control flow, or with nodes that are not on the GPU
        if not preset.cuda_graph:
            raise
        session = open_session(str(path), "cuda", options, preset, shared)
        graph = {"cuda_graph": False, "cuda_graph_refused": " ".join(str(error).split())}
    placement = read_placement(session, "cuda", path)
    return CudaSession(session, bundle, options, memory, placement, _settings(session, "cuda") | graph)


def open_session(
    model: str | bytes,
    device: TorchDevice,
    options: Options,
    preset: Preset = DEFAULT,
    provider_options: dict[str, str] | None = None,
    *,
    optimised: bool = True,
) -> Any:
    """An onnxruntime session with the provider of `device` first; never one that quietly changed its providers at run
    time. `provider_options` are added to those that profile and preset ask for, on CUDA. Not `optimised`: the nodes
    are run as the file has them.
    """
    import onnxruntime

    config = onnxruntime.SessionOptions()
    config.intra_op_num_threads = 1 if preset.parallel else options.threads
    config.inter_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    level = levels.ORT_ENABLE_ALL if preset.every_optimisation else levels.ORT_ENABLE_BASIC
    config.graph_optimization_level = level if optimised else levels.ORT_DISABLE_ALL
    config.add_session_config_entry(SPINNING, str(int(preset.spinning)))
    config.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    config.log_severity_level = 3  # errors; a warning for every shape node on the CPU would bury them
    providers: list[Any] = [PROVIDERS["cpu"]]
    if device == "cuda":
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA and cuDNN of the installed nvidia packages, which are torch's
        providers.insert(0, (PROVIDERS["cuda"], cuda_options(options.profile, preset) | (provider_options or {})))
    return onnxruntime.InferenceSession(model, config, providers=providers, enable_fallback=0)


def cuda_options(profile: Profile, preset: Preset) -> dict[str, str]:
    """What profile and preset ask of onnxruntime's CUDA provider."""
    tf32 = "0" if profile is Profile.STRICT else "1"
    return {"use_tf32": tf32} | CONVOLUTION_SEARCH | ({"prefer_nhwc": "1"} if preset.nhwc else {})


def _one_node_model() -> bytes:
    """The smallest model that a provider must start up for."""
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", value[:1], value[1:])
    # The oldest versions that all onnxruntimes of today read: this asks for a provider, not for a new operator.
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def read_placement(session: Any, device: TorchDevice, model: Path) -> Placement:
    """Which provider each node of an onnxruntime session was assigned to, and which are not where `device` says."""
    provider = PROVIDERS[device]
    if session.get_providers() == [provider]:
        # No other provider is registered in the session, so no node can be anywhere else, whatever the version.
        evidence = f"{provider} is the session's only provider"
    elif not hasattr(session, "get_provider_graph_assignment_info"):
        import onnxruntime

        return Placement(
            nodes={},
            stray=(f"onnxruntime {onnxruntime.__version__} can't tell where its nodes run: install 1.24 or newer",),
            evidence="none",
        )
    else:
        evidence = "the session's record of node assignments"
    nodes: dict[str, int] = {}
    stray, exempt = [], []
    integer_nodes: frozenset[str] | None = None
    for subgraph in _assignments(session):
        for node in subgraph.get_nodes():
            if subgraph.ep_name == provider:
                nodes[provider] = nodes.get(provider, 0) + 1
                continue
            if integer_nodes is None:
                integer_nodes = _integer_nodes(model)
            label = f"{node.op_type} {node.name} is on {subgraph.ep_name}"
            if node.op_type in SHAPE_OPERATORS and node.name in integer_nodes:
                exempt.append(label)
            else:
                nodes[subgraph.ep_name] = nodes.get(subgraph.ep_name, 0) + 1
                stray.append(label)
    if device == "cuda" and not nodes.get(provider):
        stray.append(f"no node is on {provider}")
    return Placement(nodes=nodes, stray=tuple(stray), exempt=tuple(exempt), evidence=evidence)


def emulation(variant: str) -> Emulation | None:
    """Why onnxruntime's CPU provider computes the layers of that variant in float32; None where it isn't known to.

    On x86 it has no float16 kernels for layers, whatever instructions the CPU has: those of MLAS are for ARM
    (`MLAS_F16VEC_INTRINSICS_SUPPORTED`). A cast to float32 is put before every node without a kernel and one back
    behind it, less those that cancel out (`InsertCastTransformer`; microsoft/onnxruntime#11831). Of the article's
    float16 file, on a CPU with AVX512_FP16, the optimised graph (1.31) has float32 weights, float32 in all its layers,
    and a single cast: it took 6.19 ms for 64 images on one core, the float32 file 6.24 (on a
    machine that was not quiet).
    """
    from export.bundle import precision_of

    return "no kernels" if precision_of(variant) in HALVES and platform.machine() in X86 else None


def _assignments(session: Any) -> Any:
    """The record of node assignments; empty where this onnxruntime keeps none."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return ()
    return session.get_provider_graph_assignment_info()


def _integer_nodes(model: Path) -> frozenset[str]:
    """The names of the nodes of an ONNX file that make integers or booleans only. A node that can't be judged is not in
    it.
    """
    import onnx
    from onnx import TensorProto

    graph = onnx.shape_inference.infer_shapes(onnx.load(str(model), load_external_data=False)).graph
    whole = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}
    integers = {value.name for value in (*graph.value_info, *graph.output) if value.type.tensor_type.elem_type in whole}
    return frozenset(
        node.name for node in graph.node if node.name and all(output in integers for output in node.output)
    )


def _settings(session: Any, device: TorchDevice) -> dict[str, Setting]:
    """The settings in effect, read back from the session."""
    import onnxruntime

    config = session.get_session_options()
    settings: dict[str, Setting] = {
        "onnxruntime": onnxruntime.__version__,
        "intra_op_threads": config.intra_op_num_threads,
        "inter_op_threads": config.inter_op_num_threads,
        "graph_optimization_level": config.graph_optimization_level.name,
        "execution_mode": config.execution_mode.name,
        "spinning": config.get_session_config_entry(SPINNING) == "1",
        "providers": ", ".join(session.get_providers()),
    }
    for key, value in session.get_provider_options().get(PROVIDERS[device], {}).items():
        settings[f"{PROVIDERS[device]}.{key}"] = value
    return settings


class OnnxSession:
    """What a session on either device has: the loaded model, its names, and what is known of it."""

    def __init__(
        self, session: Any, bundle: Bundle, options: Options, placement: Placement, settings: dict[str, Setting]
    ) -> None:
        self._session = session
        self._inputs = [spec.name for spec in inputs_of(bundle, options)]
        self._outputs = [spec.name for spec in bundle.manifest.outputs]
        self._placement = placement
        self._settings = settings

    def placement(self) -> Placement:
        return self._placement

    def settings(self) -> dict[str, Setting]:
        return self._settings

    def gpu_ns(self, call: Callable[[], object]) -> int | None:
        return None

    def close(self) -> None:
        self._session = None


Feeds = dict[str, "np.ndarray"]
"""The inputs by their names."""


class CpuSession(OnnxSession):
    """Host memory in, host memory out. `run` with NumPy arrays copies nothing, so there is nothing for a binding to
    save.
    """

    def __init__(
        self, session: Any, bundle: Bundle, options: Options, placement: Placement, settings: dict[str, Setting]
    ) -> None:
        super().__init__(session, bundle, options, placement, settings)
        self._prepare = preparation(bundle, options)

    def prepare(self, raw: np.ndarray, *more: np.ndarray) -> Feeds:
        return dict(zip(self._inputs, (self._prepare(raw), *more), strict=True))

    def run(self, prepared: Feeds) -> list[np.ndarray]:
        outputs: list[np.ndarray] = self._session.run(self._outputs, prepared)
        return outputs

    def fetch(self, output: list[np.ndarray]) -> Arrays:
        return tuple(map(in_float32, output))


class ParallelSession(CpuSession):
    """A batch in pieces, on as many threads as there are: onnxruntime lets Python go on while it computes, and several
    threads may run one session at a time. A session for each of them was no faster.
    """

    def __init__(
        self, session: Any, bundle: Bundle, options: Options, placement: Placement, settings: dict[str, Setting]
    ) -> None:
        super().__init__(session, bundle, options, placement, settings)
        self._threads = options.threads
        self._pool = ThreadPoolExecutor(options.threads)

    def run(self, prepared: Feeds) -> list[np.ndarray]:
        import numpy as np

        parts = pieces(len(prepared[self._inputs[0]]), self._threads)
        if len(parts) == 1:
            return super().run(prepared)
        feeds = [{name: array[part] for name, array in prepared.items()} for part in parts]
        return list(map(np.concatenate, zip(*self._pool.map(super().run, feeds), strict=True)))

    def close(self) -> None:
        self._pool.shutdown()
        super().close()


@dataclass(frozen=True)
class Bound:
    """A binding for one batch size and the memory on the GPU that it points into, which must live as long: the `inputs`
    and the `outputs` of the model.

    With `run_options` a run returns when the stream has done all that was asked of it, what prepared the input
    included; with `queueing` when it was asked, but that of a CUDA graph, which waits in either case
    (microsoft/onnxruntime#28686): there the GPU's clock times the way to the host and back too.
    """

    binding: Any
    run_options: Any
    queueing: Any
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


class CudaSession(OnnxSession):
    """Memory on the GPU in, memory on the GPU out, on the stream that prepares the one and fetches the other.

    Without a binding every call would pay two copies that torch doesn't pay. A CUDA graph is captured for each batch
    size, told apart by the `gpu_graph_id` of the run (microsoft/onnxruntime#19636).
    """

    def __init__(
        self,
        session: Any,
        bundle: Bundle,
        options: Options,
        memory: GpuMemory,
        placement: Placement,
        settings: dict[str, Setting],
    ) -> None:
        super().__init__(session, bundle, options, placement, settings)
        self._memory = memory
        self._output_sizes = bundle.output_sizes()
        self._bound: dict[int, Bound] = {}

    def prepare(self, raw: np.ndarray, *more: np.ndarray) -> Bound:
        tensors = self._memory.prepare(raw, *more)
        key = tensors[0].data_ptr()
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(tensors)
        return bound

    def run(self, prepared: Bound) -> Bound:
        run_options = prepared.queueing if self._memory.queueing else prepared.run_options
        self._session.run_with_iobinding(prepared.binding, run_options)
        return prepared

    def fetch(self, output: Bound) -> Arrays:
        return self._memory.fetch(output.outputs)

    def gpu_ns(self, call: Callable[[], object]) -> int | None:
        return self._memory.gpu_ns(call)

    def _bind(self, inputs: tuple[torch.Tensor, ...]) -> Bound:
        import numpy as np
        import onnxruntime
        import torch

        types = [_numpy_type(argument.type) for argument in self._session.get_outputs()]
        outputs = tuple(
            torch.empty((len(inputs[0]), *sizes), dtype=getattr(torch, dtype), device="cuda")
            for sizes, dtype in zip(self._output_sizes, types, strict=True)
        )
        binding = self._session.io_binding()
        for name, tensor in zip(self._inputs, inputs, strict=True):
            taken = np.dtype(str(tensor.dtype).removeprefix("torch.")).type
            binding.bind_input(name, "cuda", 0, taken, tuple(tensor.shape), tensor.data_ptr())
        for name, tensor, dtype in zip(self._outputs, outputs, types, strict=True):
            binding.bind_output(name, "cuda", 0, np.dtype(dtype).type, tuple(tensor.shape), tensor.data_ptr())
        run_options, queueing = onnxruntime.RunOptions(), onnxruntime.RunOptions()
        for options in (run_options, queueing):
            options.add_run_config_entry(GRAPH_ID, str(len(self._bound) + 1))
        queueing.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return Bound(binding, run_options, queueing, inputs, outputs)


def _numpy_type(type_: str) -> str:
    """NumPy's and torch's name of what onnxruntime calls ``tensor(float)``."""
    name = type_.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


CPU: Backend = Onnx("cpu")
PARALLEL: Backend = Onnx("cpu", Preset("parallel", parallel=True))
BASIC: Backend = Onnx("cpu", Preset("basic", every_optimisation=False))
SPINLESS: Backend = Onnx("cpu", Preset("spinless", spinning=False))
CUDA: Backend = Onnx("cuda")
NHWC: Backend = Onnx("cuda", Preset("nhwc", nhwc=True))
EAGER: Backend = Onnx("cuda", Preset("eager", cuda_graph=False))
