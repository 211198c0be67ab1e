"""onnxruntime, on its CPU or its CUDA execution provider.

Owns sessions, their placement, and the input and output binding on CUDA. Nothing that onnxruntime says of itself is
believed: its list of providers names CUDA on machines without a GPU, and a session that can't have CUDA runs on the CPU
without a word. What counts is which provider each node was assigned to, which onnxruntime records when asked (since
1.24, microsoft/onnxruntime#26781).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.backend import Backend, Options, Placement, Profile, Session, Setting
from bench.backends.torch_runtime import TorchDevice, TorchInput, torch_unavailable_reason

if TYPE_CHECKING:
    import numpy as np
    import torch

    from export.bundle import Bundle, Format

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
class Onnx:
    """An ONNX file with all of the runtime's own graph optimisations, as a user would load it."""

    device: TorchDevice
    format: ClassVar[Format | None] = "onnx"

    @property
    def name(self) -> str:
        return f"onnx-{self.device}"

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

    def load(self, bundle: Bundle, options: Options) -> Session:
        if self.device == "cuda":
            import torch  # noqa: F401  # before onnxruntime, so that both use one CUDA and one cuDNN

        path = bundle.locate(bundle.entry("onnx", folded=options.folded))
        session = open_session(str(path), self.device, options)
        placement = read_placement(session, self.device, path)
        settings = _settings(session, self.device)
        if self.device == "cpu":
            return CpuSession(session, bundle, placement, settings)
        return CudaSession(session, bundle, placement, settings)


def open_session(model: str | bytes, device: TorchDevice, options: Options, *, optimised: bool = True) -> Any:
    """An onnxruntime session with the provider of `device` first; never one that quietly changed its providers at run
    time.
    """
    import onnxruntime

    config = onnxruntime.SessionOptions()
    config.intra_op_num_threads = options.threads
    config.inter_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    config.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    config.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    config.log_severity_level = 3  # errors; a warning for every shape node on the CPU would bury them
    providers: list[Any] = [PROVIDERS["cpu"]]
    if device == "cuda":
        tf32 = "0" if options.profile is Profile.STRICT else "1"
        providers.insert(0, (PROVIDERS["cuda"], {"use_tf32": tf32}))
    return onnxruntime.InferenceSession(model, config, providers=providers, enable_fallback=0)


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
        "providers": ", ".join(session.get_providers()),
    }
    for key, value in session.get_provider_options().get(PROVIDERS[device], {}).items():
        settings[f"{PROVIDERS[device]}.{key}"] = value
    return settings


class OnnxSession:
    """What a session on either device has: the loaded model, its names, and what is known of it."""

    def __init__(self, session: Any, bundle: Bundle, placement: Placement, settings: dict[str, Setting]) -> None:
        self._session = session
        self._input_name = bundle.manifest.input.name
        self._output_name = bundle.manifest.output.name
        self._placement = placement
        self._settings = settings

    def placement(self) -> Placement:
        return self._placement

    def settings(self) -> dict[str, Setting]:
        return self._settings

    def close(self) -> None:
        self._session = None


class CpuSession(OnnxSession):
    """Host memory in, host memory out. `run` with NumPy arrays copies nothing, so there is nothing for a binding to
    save.
    """

    def __init__(self, session: Any, bundle: Bundle, placement: Placement, settings: dict[str, Setting]) -> None:
        super().__init__(session, bundle, placement, settings)
        self._preprocessing = bundle.manifest.preprocessing
        self._input_shape = bundle.manifest.input.shape
        self._outputs = [self._output_name]

    def prepare(self, raw: np.ndarray) -> np.ndarray:
        return self._preprocessing.apply(raw, self._input_shape)

    def run(self, prepared: np.ndarray) -> np.ndarray:
        output: np.ndarray = self._session.run(self._outputs, {self._input_name: prepared})[0]
        return output

    def fetch(self, output: np.ndarray) -> np.ndarray:
        return output.astype("float32", copy=False)


@dataclass(frozen=True)
class Bound:
    """A binding and the device memory that it points into, which must live as long."""

    binding: Any
    tensor: torch.Tensor


class CudaSession(OnnxSession):
    """Device memory in, device memory out: without a binding every call would pay two copies that torch doesn't pay.

    The input lies in a torch tensor, prepared by the code that the torch backends use. The output is allocated on the
    device by onnxruntime at the first run of a binding, as torch allocates its own: before the timed part in both.
    """

    def __init__(self, session: Any, bundle: Bundle, placement: Placement, settings: dict[str, Setting]) -> None:
        super().__init__(session, bundle, placement, settings)
        self._bundle = bundle

    @cached_property
    def _input(self) -> TorchInput:
        """Made at the first use: a session that fell back to the CPU is to be refused by its placement."""
        return TorchInput(self._bundle, "cuda")

    def prepare(self, raw: np.ndarray) -> Bound:
        import numpy as np

        tensor = self._input.prepare(raw)  # complete: onnxruntime works on a stream of its own
        binding = self._session.io_binding()
        binding.bind_input(self._input_name, "cuda", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output(self._output_name, "cuda")
        return Bound(binding, tensor)

    def run(self, prepared: Bound) -> Bound:
        self._session.run_with_iobinding(prepared.binding)  # synchronises the device before it returns
        return prepared

    def fetch(self, output: Bound) -> np.ndarray:
        logits: np.ndarray = output.binding.copy_outputs_to_cpu()[0]
        return logits.astype("float32", copy=False)


CPU: Backend = Onnx("cpu")
CUDA: Backend = Onnx("cuda")
