"""ONNX files drawn at random, node by node; onnxruntime runs each node on real data before it is taken.

Made with onnx.helper alone, so that what no exporter of today writes comes up too: old opsets with their attributes, IR
versions in which weights are listed as inputs, constants behind Identity or Transpose, weights that two nodes read. A
BatchNorm gets both signs of gamma and the statistics of the data that arrives at it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from choosing import LARGEST, MOST_ELEMENTS, Chooser, Draw
from file_programs import (
    BATCHNORM,
    MODEL_TYPE,
    Block,
    Constant,
    File,
    NotRun,
    Statement,
    batchnorms,
    cast,
    newest,
    run,
    session,
)
from onnx import TensorProto, helper

OLDEST_OPSET, OLDEST_IR = 7, 3

KINDS = {
    "norm": 6,
    "conv": 6,
    "dense": 2,
    "activation": 4,
    "pool": 2,
    "pad": 1,
    "resize": 1,
    "combine": 2,
    "arithmetic": 3,
    "reshape": 2,
    "transpose": 1,
    "nothing": 2,
    "split": 1,
    "opaque": 1,
    "branches": 1,
    "earlier": 3,
    "pattern": 9,
}


def draw_file(draw: Draw) -> File:
    """A file with a BatchNorm that onnx.checker accepts and onnxruntime runs at several sizes."""
    choose = Chooser(draw)
    while True:
        builder = Builder(choose)
        file = builder.build(choose.number(3, 11))
        if file is not None and batchnorms(file.model()) and runs(file):
            return file


def runs(file: File) -> bool:
    """Whether it is valid, and computes numbers at all sizes that a test may try."""
    try:
        model = file.model()
        onnx.checker.check_model(model, full_check=True)
        running = session(model)
        for batch, size in ((2, 32), (5, 7)):
            feeds = file.inputs(0, lambda axis, _, b=batch, s=size: s if axis else b)
            if not all(np.isfinite(result).all() for result in run(running, cast(feeds, file.dtype))):
                return False
    except (NotRun, onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


class Builder:
    """A file in the making: `values` are what onnxruntime makes of the example, in the file's own type."""

    def __init__(self, choose: Chooser) -> None:
        self.choose = choose
        opset, ir_version = newest()
        self.opset = choose.number(OLDEST_OPSET, opset)
        # Half of the files have an IR version of the opset's time, and some one that is older or newer.
        usual = helper.find_min_ir_version_for([helper.make_opsetid("", self.opset)])
        ir = min(usual, ir_version) if choose.one_in(2) else choose.number(OLDEST_IR, ir_version)
        dtype = np.dtype(choose.weighted({"float32": 12, "float16": 4, "float64": 2}))
        rank = int(
            choose.weighted({"2": 12, "1": 3, "0": 1, "3": 1} if dtype != np.float64 else {"0": 3, "1": 1, "2": 1})
        )
        batch = choose.number(2, 3)
        side = (4, 5) if rank == 3 else (5, 8)
        shape = (batch, choose.number(1, 4), *(choose.number(*side) for _ in range(rank)))
        symbols: dict[int, str] = {}
        if choose.weighted({"symbolic": 3, "fixed": 2}) == "symbolic":
            symbols[0] = choose.pick(["N", "batch", ""])
            if rank and choose.one_in(4):
                symbols |= {axis: f"size{axis}" for axis in range(2, rank + 2)}
        generator = np.random.default_rng(choose.number(0, 1_000_000))
        x = generator.standard_normal(shape).astype(np.float16).astype(np.float64)
        self.random = generator
        self.file = File(self.opset, ir, dtype, {"x": x}, {"x": symbols}, named=not choose.one_in(4))
        self.file.described = choose.one_in(4)
        self.values: dict[str, np.ndarray] = {"x": x.astype(dtype)}
        self.current = "x"
        self.count = 0
        self.planned: list[Callable[[], Any]] = []
        self.weights: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        self.block: list[Statement] | None = None  # of a branch in the making
        self.block_constants: list[str] = []

    @property
    def symbolic(self) -> set[int]:
        return set(self.file.symbols["x"])

    @property
    def value(self) -> np.ndarray:
        return self.values[self.current]

    # -- the frame

    def build(self, count: int) -> File | None:
        attempts = 0
        while len(self.file.statements) < count and attempts < 5 * count:
            attempts += 1
            (self.planned.pop(0) if self.planned else getattr(self, self.choose.weighted(KINDS)))()
        made = [m for s in self.file.statements for m in s.makes if m in self.values]
        read = {r for s in self.file.statements for r in s.everything()}
        outputs = [m for m in made if m not in read or m == self.current]
        if made and self.choose.one_in(4):
            outputs.append(self.choose.pick(made))
        self.file.outputs = tuple(dict.fromkeys(outputs))
        self.file.shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        used = read | {name for s in self.file.statements for b in s.blocks.values() for name in b.constants}
        self.file.constants = {name: c for name, c in self.file.constants.items() if name in used}
        self.file.overridable &= set(self.file.constants)
        return self.file if self.file.outputs else None

    def free(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def constant(self, stem: str, array: Any, kind: str = "model", *, simple: bool = False) -> str:
        """A new constant, in any form that a file may hold it in; sizes and paddings are `simple`."""
        array = np.asarray(array)
        weights = {"initializer": 12, "node": 2}
        if kind == "model" and not simple:
            weights |= {"identity": 1, "cast": 1 if self.file.dtype != np.float64 else 0}
            weights |= {"transposed": 2, "node, transposed": 1, "reshaped": 1} if array.ndim > 1 else {}
        form = self.choose.weighted({name: weight for name, weight in weights.items() if weight})
        if self.block is not None and self.file.ir_version < 4 and form != "node":
            form = "node"  # initializers would have to be inputs, which a branch has none of
        name = self.free(stem)
        if kind == "model" and self.file.dtype == np.float16:
            array = array.astype(np.float16).astype(np.float64)
        elif kind == "model" and self.file.dtype == np.float32:
            array = array.astype(np.float32).astype(np.float64)
        self.file.constants[name] = Constant(array, kind, form)
        if self.block is not None:
            self.block_constants.append(name)
        return name

    def weight(self, stem: str, shape: tuple[int, ...], scale: float = 1.0) -> str:
        """A weight of its own, or, seldom, one that another node reads already."""
        key = (stem, shape)
        if self.block is None and (others := self.weights.get(key)) and self.choose.one_in(3):
            return self.choose.pick(others)  # type: ignore[no-any-return]
        fan = max(1, int(np.prod(shape[1:])))
        name = self.constant(stem, self.random.standard_normal(shape) * scale / np.sqrt(fan))
        if self.block is None:
            self.weights.setdefault(key, []).append(name)
        return name

    def take(
        self, op_type: str, *reads: str, outputs: int = 1, blocks: Mapping[str, Block] | None = None, **attributes: Any
    ) -> bool:
        """Add a node if onnxruntime runs it and it makes sound values, and go on from its first output."""
        attributes = {key: value for key, value in attributes.items() if value is not None}
        makes = tuple(self.free("v") for _ in range(outputs))
        statement = Statement(op_type, reads, makes, attributes, blocks or {})
        try:
            results = self.tried(statement)
        except NotRun:
            return False
        for result in results[: 1 if op_type in (BATCHNORM, "Dropout", "MaxPool") else None]:
            if result.dtype != self.file.dtype or not self.sound(result):
                return False
        # Second outputs of another type, and statistics, are nothing to go on from.
        kept = [
            (r.dtype == self.file.dtype and r.ndim > 1 and op_type != BATCHNORM) or i == 0
            for i, r in enumerate(results)
        ]
        self.values |= {make: r for make, r, keep in zip(makes, results, kept, strict=True) if keep}
        (self.file.statements if self.block is None else self.block).append(statement)
        self.current = self.choose.pick([m for m in makes if m in self.values]) if op_type == "Split" else makes[0]
        return True

    def tried(self, statement: Statement) -> list[np.ndarray]:
        """What the node makes of the values. Raises NotRun."""
        read = [name for name in sorted(statement.everything()) if name]
        inner = {name for block in statement.blocks.values() for name in block.constants}
        nodes, initializers = self.file.held(
            [n for n in read if n in self.file.constants and n not in inner], self.file.dtype, plain=True
        )
        made_inside = {m for block in statement.blocks.values() for s in block.statements for m in s.makes}
        feeds = {n: self.values[n] for n in read if n in self.values and n not in made_inside}
        flags = {n: a for n, a in self.file.example.items() if n in read and a.dtype == np.bool_}
        feeds |= flags
        inputs = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feeds.items()
        ]
        if self.file.ir_version < 4:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in initializers]
        nodes.append(statement.node(self.file, self.file.dtype, "trial"))
        outputs = [helper.make_empty_tensor_value_info(m) for m in statement.makes]
        graph = helper.make_graph(nodes, "trial", inputs, outputs, initializers)
        opsets = [helper.make_opsetid("", self.opset)]
        return run(session(helper.make_model(graph, opset_imports=opsets, ir_version=self.file.ir_version)), feeds)

    def sound(self, result: np.ndarray) -> bool:
        if result.ndim < 2 or not 0 < result.size <= MOST_ELEMENTS or not np.isfinite(result).all():
            return False
        largest = 100.0 if self.file.dtype == np.float16 else LARGEST
        if np.abs(result).max() > largest:
            return False
        # What carries no signal hides what is wrong before it; a few may.
        return bool(result.size == 1 or result.max() - result.min() > 1e-3 or self.choose.one_in(6))

    # -- nodes

    def norm(self) -> bool:
        x = self.value
        if not 2 <= x.ndim <= 5:
            return False
        channels = x.shape[1]
        axes = tuple(axis for axis in range(x.ndim) if axis != 1)
        gamma = (0.5 + self.random.random(channels)) * np.where(self.random.random(channels) < 0.4, -1, 1)
        if channels > 3:
            gamma[3] = 0
        statistics = (
            "float32" if self.opset >= 15 and self.file.dtype == np.float16 and self.choose.one_in(3) else "model"
        )
        parts = [
            self.constant("gamma", gamma),
            self.constant("beta", self.random.standard_normal(channels)),
            self.constant("mean", x.astype(np.float64).mean(axes), statistics),
            self.constant("var", x.astype(np.float64).var(axes) + 0.1, statistics),
        ]
        options: dict[str, Any] = {"epsilon": self.choose.pick([1e-5, 1e-3, None])}
        if self.opset < 9 and self.choose.one_in(2):
            options["spatial"] = 1
        outputs = 1
        if self.choose.one_in(15) and self.block is None:
            outputs = 5 if self.opset < 14 else 3
            options |= {"training_mode": 1} if self.opset >= 14 else {}
        if self.file.ir_version >= 4 and self.block is None and self.choose.one_in(30):
            self.file.overridable |= {p for p in parts if self.file.constants[p].form == "initializer"}
        return self.take(BATCHNORM, self.current, *parts, outputs=outputs, **options)

    def conv(self, out: int = 0, *, same: bool = False) -> bool:
        choose, x = self.choose, self.value
        rank = x.ndim - 2
        if not 1 <= rank <= 3:
            return self.dense(out)
        channels = x.shape[1]
        groups = choose.pick([1, 1, 1, channels]) if not same else 1
        out = out or groups * choose.number(1, 4 if groups == 1 else 2)
        size = choose.pick([1, 3]) if same else choose.number(1, 3)
        options: dict[str, Any] = {"kernel_shape": [size] * rank if choose.one_in(2) else None}
        if groups > 1:
            options["group"] = groups
        if same:
            options["pads"] = [size // 2] * 2 * rank
        elif choose.one_in(5):
            options["auto_pad"] = choose.pick(["SAME_UPPER", "SAME_LOWER", "VALID"])
            options["strides"] = [choose.number(1, 2)] * rank
        else:
            options["pads"] = [choose.number(0, 2) for _ in range(2 * rank)] if choose.one_in(2) else None
            options["strides"] = [choose.number(1, 2)] * rank if choose.one_in(2) else None
            options["dilations"] = [choose.number(1, 2)] * rank if choose.one_in(2) else None
        transposed = not same and choose.one_in(6)
        if transposed:
            shape = (channels, out // groups, *[size] * rank)
            if choose.one_in(3):
                options["output_padding"] = [choose.number(0, 1)] * rank
            elif choose.one_in(4) and "auto_pad" not in options and not self.symbolic - {0}:
                stride = (options.get("strides") or [1])[0]
                options["output_shape"] = [s * stride for s in x.shape[2:]]
                options["pads"] = None
        else:
            shape = (out, channels // groups, *[size] * rank)
        reads = [self.current, self.weight("weight", shape)]
        if choose.one_in(2):
            reads.append(self.weight("bias", (out,), 0.5))
        return self.take("ConvTranspose" if transposed else "Conv", *reads, **options)

    def padded(self) -> bool:
        """A convolution that reads a border of zeros: there, and nowhere else, a shift is not a bias."""
        choose, x = self.choose, self.value
        rank, size = x.ndim - 2, choose.number(2, 3)
        if not 1 <= rank <= 3:
            return self.dense()
        out = choose.number(1, 5)
        border: dict[str, Any] = {"pads": [choose.number(0, 2) for _ in range(2 * rank)]}
        if choose.one_in(4):
            border = {"auto_pad": choose.pick(["SAME_UPPER", "SAME_LOWER"])}
        reads = [self.current, self.weight("weight", (out, x.shape[1], *[size] * rank))]
        reads += [self.weight("bias", (out,), 0.5)] if choose.one_in(2) else []
        return self.take("Conv", *reads, strides=[choose.number(1, 2)] * rank, **border)

    def dense(self, out: int = 0) -> bool:
        choose, x = self.choose, self.value
        out = out or choose.number(2, 5)
        if x.ndim == 2 and choose.one_in(2):
            turned, turned_x = choose.number(0, 1), 0
            shape = (out, x.shape[1]) if turned else (x.shape[1], out)
            reads = [self.current, self.weight("dense", shape)]
            if self.opset < 11 or not choose.one_in(3):
                options = [(out,), (out,), (1, out), (1,), ()]
                if not self.symbolic:
                    options += [(x.shape[0], 1), (x.shape[0], out)]
                reads.append(self.weight("bias", choose.pick(options), 0.5))
            alpha, beta = (choose.pick([None, None, 0.5, 2.0]) for _ in range(2))
            return self.take("Gemm", *reads, transB=turned or None, transA=turned_x or None, alpha=alpha, beta=beta)
        if not self.take("MatMul", self.current, self.weight("dense", (x.shape[-1], out))):
            return False
        if choose.one_in(2):
            reads = [self.current, self.constant("bias", self.random.standard_normal(out))]
            self.take("Add", *choose.pick([reads, reads[::-1]]))
        return True

    def activation(self, name: str = "") -> bool:
        choose, x = self.choose, self.value
        name = name or choose.pick(
            ["Relu", "Relu", "Relu", "Clip", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "Elu", "HardSigmoid",
             "Softplus", "Selu", "ThresholdedRelu", "Abs", "Neg", "HardSwish", "Gelu", "Mish", "Softmax", "swish"]
        )  # fmt: skip
        if name == "Clip":
            low, high = choose.pick([(0.0, 6.0), (0.0, 6.0), (-0.5, 1.2), (0.0, None), (None, 0.8)])
            if self.opset < 11:
                return self.take("Clip", self.current, min=low, max=high)
            reads = [self.current, "" if low is None else self.constant("low", low, simple=True)]
            reads += [] if high is None else [self.constant("high", high, simple=True)]
            return self.take("Clip", *reads)
        if name == "PRelu":
            slope = choose.pick([(x.shape[1], *[1] * (x.ndim - 2)), (1,)])
            return self.take("PRelu", self.current, self.constant("slope", self.random.random(slope)))
        if name == "swish":
            before = self.current
            return self.take("Sigmoid", before) and self.take("Mul", before, self.current)
        options = {"Softmax": {"axis": 1}, "LeakyRelu": {"alpha": 0.2}}.get(name, {})
        return self.take(name, self.current, **options)

    def relu(self) -> bool:
        return self.activation(self.choose.pick(["Relu", "Relu", "Relu", "Clip"]))

    def pool(self) -> bool:
        choose, rank = self.choose, self.value.ndim - 2
        if rank < 1:
            return False
        name = choose.pick(
            [
                "MaxPool",
                "MaxPool",
                "AveragePool",
                "AveragePool",
                "GlobalAveragePool",
                "GlobalMaxPool",
                "ReduceMean",
                "LpPool",
            ]
        )
        if name.startswith("Global"):
            return self.take(name, self.current)
        if name == "ReduceMean":
            axes, keep = list(range(2, rank + 2)), choose.number(0, 1)
            if self.opset < 18:
                return self.take(name, self.current, axes=axes, keepdims=keep)
            return self.take(name, self.current, self.constant("axes", axes, "int64", simple=True), keepdims=keep)
        size = choose.number(1, 3)
        options: dict[str, Any] = {"kernel_shape": [size] * rank, "strides": [choose.number(1, 2)] * rank}
        if choose.one_in(4):
            options["auto_pad"] = choose.pick(["SAME_UPPER", "SAME_LOWER", "VALID"])
        elif choose.one_in(2):
            options["pads"] = [choose.number(0, size // 2) for _ in range(2 * rank)]
        if self.opset >= 10 and name != "LpPool" and choose.one_in(3) and "auto_pad" not in options:
            options["ceil_mode"] = 1
        if name == "AveragePool" and choose.one_in(2):
            options["count_include_pad"] = 1
        if self.opset >= (10 if name == "MaxPool" else 19) and name != "LpPool" and choose.one_in(4):
            options["dilations"] = [2] * rank
        outputs = 2 if name == "MaxPool" and self.opset >= 8 and choose.one_in(8) else 1
        return self.take(name, self.current, outputs=outputs, **options)

    def pad(self) -> bool:
        choose, rank = self.choose, self.value.ndim
        if rank < 3:
            return False
        mode = choose.pick(["constant", "constant", "constant", "reflect", "edge"])
        ends = [choose.number(-1 if choose.one_in(4) and mode == "constant" else 0, 2) for _ in range(2 * (rank - 2))]
        half = len(ends) // 2
        pads = [0, 0, *ends[:half], 0, 0, *ends[half:]]
        filled = choose.pick([0.0, 0.0, 0.5])
        scalar = [filled] if choose.one_in(4) else filled  # some write one element where a scalar is meant
        if self.opset < 11:
            return self.take("Pad", self.current, pads=pads, mode=mode, value=filled if mode == "constant" else None)
        if self.opset >= 18 and choose.one_in(3):
            axes = self.constant("axes", list(range(2, rank)), "int64", simple=True)
            value = self.constant("value", scalar, simple=True)
            return self.take(
                "Pad", self.current, self.constant("pads", ends, "int64", simple=True), value, axes, mode=mode
            )
        reads = [self.current, self.constant("pads", pads, "int64", simple=True)]
        if mode == "constant" and (filled or choose.one_in(2)):
            reads.append(self.constant("value", scalar, simple=True))
        return self.take("Pad", *reads, mode=mode)

    def resize(self) -> bool:
        choose, x = self.choose, self.value
        if x.ndim < 3:
            return False
        scales = [1.0, 1.0, *[2.0] * (x.ndim - 2)]
        mode = choose.pick(["nearest", "nearest", "linear"])
        if self.opset < 9:
            return self.take("Upsample", self.current, scales=scales, mode=mode)
        factors = self.constant("scales", scales, "float32", simple=True)
        if self.opset < 11:
            return self.take("Upsample" if self.opset == 9 else "Resize", self.current, factors, mode=mode)
        options: dict[str, Any] = {"mode": mode}
        if choose.one_in(2):
            options["coordinate_transformation_mode"] = choose.pick(
                ["asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"]
            )
        if mode == "nearest":
            options["nearest_mode"] = choose.pick(["floor", "round_prefer_floor", None])
        roi = "" if self.opset >= 13 else self.constant("roi", np.zeros(0), "float32", simple=True)
        if choose.one_in(3) and not self.symbolic:
            sizes = self.constant(
                "sizes", [*x.shape[:2], *(s + choose.number(0, 3) for s in x.shape[2:])], "int64", simple=True
            )
            empty = "" if self.opset >= 13 else self.constant("none", np.zeros(0), "float32", simple=True)
            return self.take("Resize", self.current, roi, empty, sizes, **options)
        return self.take("Resize", self.current, roi, factors, **options)

    def combine(self) -> bool:
        choose, x = self.choose, self.value
        alike = [name for name, v in self.values.items() if v.shape == x.shape]
        other = choose.pick(alike)
        kind = choose.pick(["Add", "Add", "Add", "Sum", "Sum", "Sub", "Mul", "Concat", "Concat", "Max"])
        reads = choose.pick([[self.current, other], [other, self.current]])
        if kind == "Concat":
            fitting = [
                n
                for n, v in self.values.items()
                if v.ndim == x.ndim and v.shape[0] == x.shape[0] and v.shape[2:] == x.shape[2:]
            ]
            reads = [self.current, choose.pick(fitting), *([choose.pick(fitting)] if choose.one_in(4) else [])]
            return self.take("Concat", *reads, axis=1 if self.opset < 11 or choose.one_in(2) else 1 - x.ndim)
        if kind == "Sum" and choose.one_in(2):
            reads.append(choose.pick(alike))
        return self.take(kind, *reads)

    def arithmetic(self) -> bool:
        """A constant for each channel, or for all."""
        choose, x = self.choose, self.value
        kind = choose.pick(["Mul", "Mul", "Add", "Add", "Sub", "Div", "Pow"])
        spread = [1] * (x.ndim - 2)
        shapes = [(x.shape[1], *spread), (1, x.shape[1], *spread), (1,), ()]
        if not self.symbolic:
            shapes += [(1, *x.shape[1:]), x.shape]
        shape = choose.pick(shapes)
        if kind == "Pow":
            return self.take("Pow", self.current, self.constant("power", 2.0, simple=True))
        array = self.random.standard_normal(shape)
        first = kind != "Div" and choose.one_in(3)
        name = self.constant("constant", np.abs(array) + 0.5 if kind == "Div" else array)
        return self.take(kind, *([name, self.current] if first else [self.current, name]))

    def reshape(self) -> bool:
        choose, x = self.choose, self.value
        shape, symbolic = list(x.shape), self.symbolic
        rest = int(np.prod(shape[1:]))
        options: list[list[int]] = []
        if not symbolic - {0} or x.ndim == 2:
            options += [[-1, rest], [0, rest], [0, -1], [-1, *shape[1:]]]
        if x.ndim > 2:
            options += [[0, 0, -1], [0, shape[1], -1]]
            if not symbolic - {0}:
                options += [[0, -1, shape[-1]], [-1, *shape[2:]]]
        if x.ndim == 2:
            options += [[0, 0, 1, 1], [0, -1, 1], *([0, -1, n] for n in (2, 3) if shape[1] % n == 0)]
        if not symbolic:
            options += [[shape[0], -1], [shape[0], shape[1], -1], shape]
        kind = choose.pick(["Reshape", "Reshape", "Reshape", "Flatten", "Unsqueeze", "Squeeze", "computed"])
        if kind == "Flatten":
            return self.take("Flatten", self.current, axis=choose.pick([None, 1, 1, 2]))
        if kind == "Unsqueeze":
            axes = [choose.pick([2, x.ndim])]
            if self.opset < 13:
                return self.take("Unsqueeze", self.current, axes=axes)
            return self.take("Unsqueeze", self.current, self.constant("axes", axes, "int64", simple=True))
        if kind == "Squeeze":
            axes = [axis for axis in range(1, x.ndim) if shape[axis] == 1]
            if not axes:
                return False
            if self.opset < 13:
                return self.take("Squeeze", self.current, axes=axes)
            return self.take("Squeeze", self.current, self.constant("axes", axes, "int64", simple=True))
        if kind == "computed":
            return self.computed_reshape()
        return self.take("Reshape", self.current, self.constant("shape", choose.pick(options), "int64", simple=True))

    def computed_reshape(self) -> bool:
        """view(x.size(0), -1) as exporters write it: a shape made while the network runs."""
        x, result = self.current, self.value.reshape(self.value.shape[0], -1)
        if not self.sound(result):
            return False
        statements = self.file.statements if self.block is None else self.block
        names = [self.free("v") for _ in range(4)]
        index, rest = (
            self.constant("index", [0], "int64", simple=True),
            self.constant("rest", [-1], "int64", simple=True),
        )
        statements += [
            Statement("Shape", (x,), (names[0],)),
            Statement("Gather", (names[0], index), (names[1],), {"axis": 0}),
            Statement("Concat", (names[1], rest), (names[2],), {"axis": 0}),
            Statement("Reshape", (x, names[2]), (names[3],)),
        ]
        self.values[names[3]] = result
        self.current = names[3]
        return True

    def transpose(self) -> bool:
        rank = self.value.ndim
        last, first = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        return self.take(
            "Transpose", self.current, perm=self.choose.pick([last, first, last, [0, *range(rank - 1, 0, -1)]])
        )

    def nothing(self) -> bool:
        choose = self.choose
        kind = choose.pick(["Identity", "Dropout", "Cast", "Dropout, mask"])
        if kind == "Cast":
            other = choose.pick([TensorProto.DOUBLE, TensorProto.FLOAT])
            # Through another type: as a pair, since every value here has the file's own.
            middle, last = self.free("v"), self.free("v")
            statements = self.file.statements if self.block is None else self.block
            statements += [
                Statement("Cast", (self.current,), (middle,), {"to": other}),
                Statement("Cast", (middle,), (last,), {"to": MODEL_TYPE}),
            ]
            rounded = self.value.astype(np.float32) if other == TensorProto.FLOAT else self.value
            self.values[last] = rounded.astype(self.file.dtype)
            self.current = last
            return True
        if kind == "Identity":
            return self.take("Identity", self.current)
        outputs = 2 if kind == "Dropout, mask" else 1
        if self.opset < 12:
            return self.take("Dropout", self.current, outputs=outputs, ratio=0.3)
        reads = [self.constant("ratio", 0.3, "float32", simple=True)] if choose.one_in(2) else []
        return self.take("Dropout", self.current, *reads, outputs=outputs)

    def split(self) -> bool:
        choose, x = self.choose, self.value
        channels = x.shape[1]
        if channels < 2 or choose.one_in(3):
            start, stop = (0, channels) if channels < 2 else (choose.number(0, channels - 2), channels)
            if self.opset < 10:
                return self.take("Slice", self.current, starts=[start], ends=[stop], axes=[1])
            limits = [
                self.constant(n, [v], "int64", simple=True) for n, v in (("start", start), ("stop", stop), ("axis", 1))
            ]
            return self.take("Slice", self.current, *limits)
        parts = [choose.number(1, channels - 1)]
        parts.append(channels - parts[0])
        if self.opset < 13:
            return self.take("Split", self.current, outputs=2, axis=1, split=parts)
        return self.take("Split", self.current, self.constant("parts", parts, "int64", simple=True), outputs=2, axis=1)

    def opaque(self) -> bool:
        x = self.value
        if x.ndim < 3:
            return False
        kind = self.choose.pick(["InstanceNormalization", "LRN", "DepthToSpace", "LpNormalization", "Expand"])
        if kind == "InstanceNormalization":
            return self.take(
                kind, self.current, *(self.constant(n, self.random.random(x.shape[1])) for n in ("scale", "offset"))
            )
        if kind == "LRN":
            return self.take(kind, self.current, size=3)
        if kind == "Expand":
            return self.opset >= 8 and self.take(
                kind, self.current, self.constant("shape", [1, 1, *[1] * (x.ndim - 2)], "int64", simple=True)
            )
        return self.take(kind, self.current, **({"blocksize": 2} if kind == "DepthToSpace" else {"axis": 1}))

    def branches(self) -> bool:
        """If, of a flag that is an input; both sides end in a layer with as many channels."""
        if self.block is not None or not 2 <= self.value.ndim <= 4:
            return False
        start, out = self.current, self.choose.number(2, 4)
        before = dict(self.values)
        blocks = {}
        for key in ("then_branch", "else_branch"):
            self.block, self.block_constants = [], []
            self.current = start
            if self.choose.one_in(3):
                self.norm()
            done = self.conv(out, same=True) if self.value.ndim > 2 else self.dense(out)
            if self.choose.one_in(2):
                self.norm()
            if self.choose.one_in(2):
                self.relu()
            read = {r for s in self.block for r in s.reads}
            own = tuple(name for name in self.block_constants if name in read)
            blocks[key] = Block(tuple(self.block), (self.current,), own)
            self.block, self.values, self.current = None, dict(before), start
            if not done:
                return False
        if "flag" not in self.file.example:
            self.file.example["flag"] = np.array(True) if self.choose.one_in(2) else np.array([True])
            self.file.symbols["flag"] = {}
        return self.take("If", "flag", blocks=blocks)

    def earlier(self) -> None:
        self.current = self.choose.pick(list(self.values))

    # -- orders that folding is for

    def pattern(self) -> None:
        choose = self.choose
        patterns: list[list[Callable[[], Any]]] = [
            [self.conv, self.norm],
            [self.conv, self.relu, *([self.pool] if choose.one_in(3) else []), self.norm, self.padded],
            [self.padded, self.relu, self.norm, choose.pick([self.conv, self.padded])],
            [self.padded, self.relu, self.pool, self.norm, self.padded],
            [self.norm, self.relu, choose.pick([self.conv, self.padded])],
            [self.conv, self.norm, self.nothing, self.relu, self.norm, self.flat, self.dense],
            [self.norm, self.flat, self.dense, self.norm],
            [self.parallel],
            [self.shared],
            [self.keras_flat],
            [self.dense, self.norm, self.relu, self.dense],
            [self.conv, self.arithmetic, self.norm, self.conv],
        ]
        self.planned = choose.pick(patterns)

    def flat(self) -> bool:
        if self.symbolic - {0} and self.value.ndim > 2:
            return self.take("GlobalAveragePool", self.current) and self.take("Flatten", self.current)
        if self.choose.one_in(2):
            return self.take("Flatten", self.current)
        return self.reshape()

    def keras_flat(self) -> None:
        if self.value.ndim == 4 and not self.symbolic - {0} and self.norm():
            self.take("Transpose", self.current, perm=[0, 2, 3, 1])
            rest = int(np.prod(self.value.shape[1:]))
            self.take("Reshape", self.current, self.constant("shape", [-1, rest], "int64", simple=True))
            self.planned = [self.dense]

    def parallel(self) -> None:
        x, start = self.value, self.current
        if x.ndim < 3:
            return
        ends = []
        for side in self.choose.pick([["conv", "norm"], ["norm", "conv"], ["conv", "norm", "conv"], ["conv", "conv"]]):
            self.current = start
            if not (self.norm() if side == "norm" else self.conv(x.shape[1], same=True)):
                return
            if side == "conv" and self.choose.one_in(2):
                self.norm()
            ends.append(self.current)
        ends += [start] if self.choose.one_in(3) else []
        total = ends[0]
        for end in ends[1:]:
            if not self.take(self.choose.pick(["Add", "Add", "Sub"]), *self.choose.pick([[total, end], [end, total]])):
                return
            total = self.current

    def shared(self) -> None:
        """One weight in two layers, each with a BatchNorm of its own."""
        x, start = self.value, self.current
        twins = [name for name, v in self.values.items() if v.shape == x.shape]
        if x.ndim < 3:
            return
        reads = [self.weight("shared", (3, x.shape[1], *[3] * (x.ndim - 2)))]
        reads += [self.weight("bias", (3,), 0.5)] if self.choose.one_in(2) else []
        for value in (start, self.choose.pick(twins)):
            self.current = value
            if not self.take("Conv", value, *reads, pads=[1] * 2 * (x.ndim - 2)) or not self.norm():
                return


def without(file: File) -> Iterator[File]:
    """The same with one node, or one output, less; what read the node's output reads its first input."""
    for place in reversed(range(len(file.statements))):
        gone = file.statements[place]
        source = next((r for r in gone.reads if r not in file.constants and r != "flag"), None)
        if source is None:
            continue
        instead = dict.fromkeys(gone.makes, source)
        statements = [
            dataclasses.replace(s, reads=tuple(instead.get(r, r) for r in s.reads))
            for i, s in enumerate(file.statements)
            if i != place
        ]
        outputs = tuple(dict.fromkeys(instead.get(o, o) for o in file.outputs))
        yield _trimmed(
            dataclasses.replace(file, statements=statements, outputs=tuple(o for o in outputs if o not in file.example))
        )
    if len(file.outputs) > 1:
        for output in file.outputs:
            yield _trimmed(dataclasses.replace(file, outputs=tuple(o for o in file.outputs if o != output)))
    for name, constant in file.constants.items():
        if constant.form != "initializer":
            plain = dataclasses.replace(constant, form="initializer")
            yield dataclasses.replace(file, constants=file.constants | {name: plain})


def _trimmed(file: File) -> File:
    """Without nodes and constants that nothing reads."""
    statements, needed = [], set(file.outputs)
    for statement in reversed(file.statements):
        if needed & set(statement.makes):
            statements.insert(0, statement)
            needed |= set(statement.everything())
    inner = {name for s in statements for b in s.blocks.values() for name in b.constants}
    constants = {name: c for name, c in file.constants.items() if name in needed | inner}
    example = {name: a for name, a in file.example.items() if name in needed or name == "x"}
    return dataclasses.replace(file, statements=statements, constants=constants, example=example)
