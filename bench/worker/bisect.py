"""Which node of an ONNX file is the first that departs from the torch graph, and by how much.

Owns the comparison node by node: the bundle's unfolded `torch.export` program in float64 on one side; on the other its
ONNX file on onnxruntime in the file's own precision, with every intermediate as an output and the runtime's
optimisations off. Knows nothing of how a file was folded: a fold moves scales and shifts to other nodes, so that nodes
are paired by what they compute and not by name or place. A node

    agrees      if some torch node has the same numbers for the same images, up to rounding. The reference of rounding
                is what float32 torch makes of that node, and 2^13 times that in the fast profile and for what the file
                computes from float16: to overflow is a divergence, to round is none. More channels at the end that no
                image changes (the channel of ones of a fold) count for nothing. The last node has to agree with the
                torch graph's own output.
    is meant    if it agrees with nothing, but something that is computed from it does: a fold's scale or shift is
                still missing there and is made up for later.
    diverges    otherwise; the first in the file's order is named, but for one that makes NaN or infinity of finite
                numbers: that one comes before all, since nothing after it can be told.

The named node is then run once more alone, in float64 on the very inputs that it had: if that gives what the runtime
gave, the file says something else than the torch graph, else the runtime (or its precision) makes something else of it
than the file says. Before the nodes the input is checked: whether the float64 program gives the oracle's logits for
this preprocessing at all, and whether the backend feeds the model what the preprocessing says.

Limits. Where the fault follows a node that is meant, before anything agrees again, that node is named: the fault is
there or in one of the few after it. A fault that appears on the images looked at only below `ROUNDING_FACTOR` is not
seen. A file without a fault on the images says so; what is wrong is then in the optimisations or the device. Nodes
inside the branches of an If or a Loop are not looked into, and a value whose size is no multiple of the number of
images is passed over. All intermediates are in memory at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bench.backends.contract import Backend, Options, Profile, Session
from bench.results.parity import Bisection, Divergence
from export.bundle.limits import TF32_COARSER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import onnx
    import torch

    from bench.backends.torch_runtime import TorchDevice
    from export.bundle import Arrays, Bundle

ROUNDING_FACTOR = 8.0
"""How much further from float64 a value may be than float32 torch's own, relative to its RMS. In files that are right
the largest factor seen was 2.2, at the last layer of the article's folded network."""
EPSILON = 2.0**-24
"""Half a unit in the last place of float32, relative: torch makes no error in a ReLU, and whoever rounds once may."""
KERNEL_ROUNDING = 1e-5
"""Between a kernel in float32 and the same node in float64, relative to the RMS: sums of some thousand products."""
INPUT_ROUNDING = 1e-6
"""Of the input and of float64 logits: far above rounding in either, far below any preprocessing that is wrong."""


@dataclass(frozen=True)
class _Reference:
    """A torch node's output, float64 [images, numbers of an image], and what float32 torch's error of it is, relative
    to its RMS."""

    name: str
    layer: str | None
    rows: np.ndarray
    rms: float
    float32_error: float

    def limit(self, coarse: bool) -> float:
        """How far a value may be from this one to be the same, relative to the RMS. TF32 rounds as coarsely as float16
        does."""
        return ROUNDING_FACTOR * max(self.float32_error, EPSILON) * (TF32_COARSER if coarse else 1.0)

    def distance(self, rows: np.ndarray) -> float | None:
        """RMS difference over the RMS, infinite for rows that are not finite; None where they can't be this value."""
        size = self.rows.shape[1]
        if not size <= rows.shape[1] <= 2 * size:
            return None
        if not np.isfinite(rows).all():
            return float("inf")
        if rows.shape[1] > size and np.ptp(rows[:, size:], axis=0).max() > EPSILON * np.abs(rows).max():
            return None
        return _rms(rows[:, :size] - self.rows) / self.rms


def bisectable(backend: Backend, variant: str) -> bool:
    """Whether it is onnxruntime with a file whose nodes are those of the torch graph, give or take rounding."""
    return backend.formats[:1] == ("onnx",) and variant == "float32"


def bisect(
    bundle: Bundle, session: Session, device: TorchDevice, options: Options, images: tuple[int, ...]
) -> Bisection:
    """Find the first divergence of the bundle's ONNX file (folded or not, as `options` say), loaded as `session`.

    `images` are places in the oracle, those with the largest errors for example. Raises BundleError where the bundle
    lacks a file, and what torch or onnxruntime raise.
    """
    import onnx

    manifest, oracle = bundle.manifest, bundle.oracle()
    raw, *more = (array[list(images)] for array in oracle.inputs)
    inputs = manifest.preprocessing.apply(raw, manifest.input.shape), *more
    references, output = _torch_values(bundle, inputs)
    truth = _rows(oracle.logits[list(images)], len(images))
    for rows, wanted in ((output.rows, truth), (_fed(session, raw, *more), inputs[0])):
        error = _rms(rows - wanted) / (_rms(wanted) or 1.0)
        if error > INPUT_ROUNDING:
            return Bisection(images, 0, 0, 0, Divergence("input", None, None, None, error, 0, None))

    model = onnx.load(str(bundle.locate(bundle.entry("onnx", folded=options.folded))))
    feeds = {spec.name: array for spec, array in zip(manifest.inputs, inputs, strict=True)}
    values = _onnx_values(model, feeds, device, options)
    walk = _Walk(model, values, references, output, manifest.output.name, len(images), options.profile)
    node = walk.first_diverging()
    divergence = None if node is None else walk.describe(node)
    if node is None:
        logits = _rows(session.fetch(session.run(session.prepare(raw, *more)))[0], len(images))
        distance = output.distance(logits)
        if distance is None or distance > output.limit(walk.is_coarse(manifest.output.name)):
            non_finite = int(np.count_nonzero(~np.isfinite(logits)))
            divergence = Divergence("runtime", None, None, output.name, _finite(distance), non_finite, "runtime")
    return Bisection(images, len(walk.nodes), walk.agreeing, walk.from_float16, divergence)


class _Walk:
    """The nodes of an ONNX file that compute with the images, each with its verdict."""

    def __init__(
        self,
        model: onnx.ModelProto,
        values: dict[str, np.ndarray],
        references: list[_Reference],
        output: _Reference,
        output_name: str,
        images: int,
        profile: Profile,
    ) -> None:
        self._model = model
        self._values = values
        self._references = references
        self._images = images
        self._profile = profile
        given = [value.name for value in model.graph.input if value.name in values]
        self._input = given[0]
        self._dependent = set(given)
        self._half: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            # Of some inputs only the shape or the type is read, which no image changes.
            read = {"Shape": 0, "Size": 0, "CastLike": 1}.get(node.op_type, len(node.input))
            if not self._dependent.isdisjoint(node.input[:read]):
                self._dependent.update(node.output)
                if self._numbers(node) is not None:
                    self.nodes.append(node)
                    if values[node.output[0]].dtype == np.float16 or not self._half.isdisjoint(node.input):
                        self._half.update(node.output)
        self._agreed: dict[str, _Reference] = {}
        for node in self.nodes:
            last = node.output[0] == output_name
            if (reference := self._same(node, [output] if last else references)) is not None:
                self._agreed[node.output[0]] = reference
        self.agreeing = len(self._agreed)
        self.from_float16 = sum(node.output[0] in self._half for node in self.nodes)

    def is_coarse(self, name: str) -> bool:
        """Whether the value may be rounded to the 10 bits of TF32 or float16."""
        return self._profile is Profile.FAST or name in self._half

    def first_diverging(self) -> onnx.NodeProto | None:
        """The first node that neither agrees nor is made up for by one that does; an overflow among them before all."""
        sound = set(self._agreed)
        for node in reversed(self._model.graph.node):
            if not sound.isdisjoint(node.output):
                sound.update(node.input)
        diverging = [node for node in self.nodes if node.output[0] not in sound]
        overflows = (node for node in diverging if self._is_finite(node.input) and not self._is_finite(node.output[:1]))
        return next(overflows, diverging[0] if diverging else None)

    def _is_finite(self, names: Iterable[str]) -> bool:
        """Whether every number of these values is finite. Whole numbers are."""
        read = (self._values[name] for name in names if name in self._values)
        return all(bool(np.isfinite(value).all()) for value in read if value.dtype.kind == "f")

    def describe(self, node: onnx.NodeProto) -> Divergence:
        """What is known of a node that diverges, measured where its layer is complete."""
        layer = _layer_of_weights(node, self._model)
        parts = [node, *(self._rest_of_layer(node, layer) if layer else ())]
        rows = self._numbers(parts[-1])
        assert rows is not None
        taken = {id(reference) for reference in self._agreed.values()}
        free = [reference for reference in self._references if id(reference) not in taken]
        # Another layer's has to come twice as near: what is far off may come nearest to anything.
        nearest_ones = [
            (distance * (1 if reference.layer == layer else 2), reference.layer != layer, place, distance)
            for place, reference in enumerate(free)
            if (distance := reference.distance(rows)) is not None
        ]
        distance, nearest = None, None
        if nearest_ones:
            _, _, place, distance = min(nearest_ones)
            nearest = free[place]
            layer = layer or nearest.layer
        before_any_layer = self._reads_the_input(node) and not self._weights(node)
        culprits = {self._culprit(part) for part in parts}
        return Divergence(
            where="input" if before_any_layer else "node",
            node=" with ".join(f"{part.op_type} {part.name}" for part in parts),
            layer=None if before_any_layer else layer,
            nearest=None if nearest is None else nearest.name,
            relative_error=_finite(distance),
            non_finite=int(np.count_nonzero(~np.isfinite(rows))),
            culprit=next(culprit for culprit in ("runtime", None, "file") if culprit in culprits),
        )

    def _rest_of_layer(self, node: onnx.NodeProto, layer: str) -> list[onnx.NodeProto]:
        """The node after it that adds the same layer's bias, or its bias map; without it an output is no layer's."""
        after = (other for other in self.nodes if node.output[0] in other.input)
        return [other for other in after if _layer_of_weights(other, self._model) == layer][:1]

    def _numbers(self, node: onnx.NodeProto) -> np.ndarray | None:
        """The node's first output as float64 [images, numbers of an image]; None where it is none of an image's."""
        value = self._values.get(node.output[0])
        if value is None or value.dtype.kind != "f" or not value.size or value.size % self._images:
            return None
        return _rows(value, self._images)

    def _same(self, node: onnx.NodeProto, references: list[_Reference]) -> _Reference | None:
        """The torch node with the node's numbers."""
        rows = self._numbers(node)
        assert rows is not None
        for reference in references:
            distance = reference.distance(rows)
            if distance is not None and distance <= reference.limit(self.is_coarse(node.output[0])):
                return reference
        return None

    def _reads_the_input(self, node: onnx.NodeProto) -> bool:
        """Whether what the node computes with is the model's input, as it is."""
        image = self._references[0]
        read = [name for name in node.input if name in self._dependent]
        return all(name == self._input or self._agreed.get(name) is image for name in read)

    def _weights(self, node: onnx.NodeProto) -> list[str]:
        """The constants of floats that the node reads."""
        return [
            name
            for name in node.input
            if name not in self._dependent and name in self._values and self._values[name].dtype.kind == "f"
        ]

    def _culprit(self, node: onnx.NodeProto) -> Literal["file", "runtime"] | None:
        """Who made the node's numbers: the file, if float64 makes the same of the node's own inputs."""
        rows = self._numbers(node)
        assert rows is not None
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        names = [name for name in dict.fromkeys(node.input) if name]
        inputs, outputs = (
            [helper.make_empty_tensor_value_info(name) for name in side] for side in (names, node.output[:1])
        )
        graph = helper.make_graph([node], "alone", inputs, outputs)
        alone = helper.make_model(graph, opset_imports=self._model.opset_import, functions=self._model.functions)
        feeds = {name: self._values[name] for name in names if name in self._values}
        feeds = {name: value.astype(np.float64) if value.dtype.kind == "f" else value for name, value in feeds.items()}
        try:
            with np.errstate(all="ignore"):
                (wanted,) = ReferenceEvaluator(alone).run(None, feeds)
        except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError):
            return None  # the reference doesn't know the operator, or not in float64
        wanted = _rows(np.asarray(wanted), self._images)
        if not (np.isfinite(wanted).all() and np.isfinite(rows).all()):
            return "file" if np.array_equal(np.isfinite(wanted), np.isfinite(rows)) else "runtime"
        scale = _rms(wanted) * (TF32_COARSER if self.is_coarse(node.output[0]) else 1.0)
        return "file" if _rms(rows - wanted) <= KERNEL_ROUNDING * scale else "runtime"


def _torch_values(bundle: Bundle, inputs: Arrays) -> tuple[list[_Reference], _Reference]:
    """What each node of the unfolded program computes, its input first; and the one that is its first output."""
    import torch

    from bench.backends.torch_program import read_program

    exported = read_program(bundle.locate(bundle.entry("pt2", folded=False))).module(check_guards=False)
    module = torch.fx.GraphModule(exported, exported.graph)
    result = module.graph.output_node().all_input_nodes[0]  # the first output of the manifest
    images = len(inputs[0])
    given = [torch.from_numpy(array) for array in inputs]
    with torch.inference_mode():
        # In float32 first: `double` changes the module.
        single = dict(_recorded(module, given))
        wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
        double = dict(_recorded(module.double(), wide))
    layers = {node.name: _module_path(node) for node in module.graph.nodes}
    references, output = [], None
    for name, value in double.items():
        if not value.size or value.size % images:
            continue
        rows = _rows(value, images)
        if name != result.name and not np.ptp(rows, axis=0).any() and images > 1:
            continue  # a constant: to have the same one says nothing
        rms = _rms(rows) or 1.0
        reference = _Reference(name, layers[name], rows, rms, _rms(_rows(single[name], images) - rows) / rms)
        references.append(reference)
        if name == result.name:
            output = reference
    assert output is not None
    return references, output


def _recorded(module: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and output of each node that makes floats, in the order of the graph; the input too."""
    import torch

    values: dict[str, np.ndarray] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                return None  # it would refuse float64
            result = super().run_node(node)
            if node.op != "get_attr" and isinstance(result, torch.Tensor) and result.is_floating_point():
                values[node.name] = result.clone().numpy()  # a node after it may work in place
            return result

    Recorder(module).run(*inputs)
    yield from values.items()


def _module_path(node: torch.fx.Node) -> str | None:
    """The innermost module whose code made the node, as `features.0`; None for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0] or None) if stack else None


def _onnx_values(
    model: onnx.ModelProto, inputs: dict[str, np.ndarray], device: TorchDevice, options: Options
) -> dict[str, np.ndarray]:
    """Every tensor of the file's graph on the runtime, optimisations off: input, constants and what nodes make."""
    import onnx
    from onnx import numpy_helper

    from bench.backends.onnx import open_session

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    outputs = {value.name for value in model.graph.output}
    made = (name for node in model.graph.node for name in node.output if name and name not in outputs)
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    session = open_session(shown.SerializeToString(), device, options, optimised=False)
    names = [value.name for value in session.get_outputs()]
    values = {constant.name: numpy_helper.to_array(constant) for constant in model.graph.initializer}
    values |= dict(zip(names, session.run(names, inputs), strict=True))
    values |= inputs
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def _layer_of_weights(node: onnx.NodeProto, model: onnx.ModelProto) -> str | None:
    """`features.9` where the node reads `features.9.weight`: exporters keep the names of parameters."""
    constants = {constant.name for constant in model.graph.initializer}
    return next((name.rpartition(".")[0] for name in node.input if name in constants and "." in name), None)


def _fed(session: Session, raw: np.ndarray, *more: np.ndarray) -> np.ndarray:
    """What the backend's session of onnxruntime makes of the first input, raw, in host memory."""
    from bench.backends.onnx import Bound

    prepared = session.prepare(raw.copy(), *more)
    if not isinstance(prepared, Bound):
        return np.asarray(next(iter(prepared.values())))
    session.run(prepared)  # which waits for what prepared its input
    return np.asarray(prepared.inputs[0].cpu().numpy())


def _rows(value: np.ndarray, images: int) -> np.ndarray:
    return value.reshape(images, -1).astype(np.float64)


def _rms(value: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
