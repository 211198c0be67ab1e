"""Running an ONNX file on made-up inputs: of the types that it takes, of sizes and values that it does not refuse.

Owns the inputs. Knows nothing of folding, and imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from export.formats.onnx_session import open_session

Feeds = dict[str, Any]

BATCHES = (2, 3)
"""Sizes of the batch, the first dimension, where it is not fixed: what holds for one size may not for another."""

SIZES = (32, 64, 128, 224, 299)
"""For any other size that is not fixed, the first that the network takes: some leave nothing of 32 pixels."""

MANNERS = ("wide", "few", "ones", "zeros")
"""Numbers for inputs that are no floating-point ones, in the order in which they are tried: an input of bytes is an
image, but numbers of rows must be smaller than the table is long, and sizes and counts may not be zero, or must be.
"""

LARGEST_FILE = 2**31 - 1
"""Bytes that a protobuf message, hence an ONNX file without external data, can have."""


def batch_names(inputs: Iterable[Sequence[int | str] | None]) -> set[str]:
    """The names of sizes that stand first in some input."""
    return {dims[0] for dims in inputs if dims and isinstance(dims[0], str)}


def has_other_sizes(inputs: Iterable[Sequence[int | str] | None]) -> bool:
    """Whether a size is not fixed that is not the batch."""
    known = list(inputs)
    batch = batch_names(known)
    return any(isinstance(size, str) and size not in batch for dims in known for size in dims or ())


def concrete(dims: Sequence[int | str], batch: set[str], size: int, images: int = BATCHES[0]) -> tuple[int, ...]:
    """Numbers for sizes that have names."""
    return tuple(dim if isinstance(dim, int) else images if dim in batch else size for dim in dims)


def named(
    dims: Sequence[int | str | None], batch: set[str], inputs: Iterable[Sequence[int | str] | None], size: int
) -> Iterator[int | str | None]:
    """The same for sizes of another value; names that no input has stay."""
    names = {name for known in inputs for name in known or () if isinstance(name, str)}
    for dim in dims:
        yield concrete([dim], batch, size)[0] if isinstance(dim, str) and dim in names else dim


def feeds(session: Any, inputs: Mapping[str, Sequence[int | str] | None], size: int, images: int, manner: str) -> Feeds:
    """Random inputs, always the same. `inputs` are the sizes where the session does not tell them."""
    generator = np.random.default_rng(0)
    batch = batch_names(inputs.values())
    given: Feeds = {}
    for argument in session.get_inputs():
        dims = inputs.get(argument.name)
        numbers = concrete(dims, batch, size, images) if dims is not None else ()
        sizes = argument.shape
        if len(sizes) == len(numbers):  # a size that is declared as 0 is one
            numbers = tuple(0 if declared == 0 else number for declared, number in zip(sizes, numbers, strict=True))
        given[argument.name] = _array(argument.type, numbers, manner, generator)
    return given


def _array(kind: str, sizes: tuple[int, ...], manner: str, generator: np.random.Generator) -> Any:
    name = kind.removeprefix("tensor(").removesuffix(")")
    if name in ("float", "double", "float16", "bfloat16"):
        numbers = generator.standard_normal(sizes)
        if name != "bfloat16":
            return numbers.astype({"float": np.float32, "double": np.float64, "float16": np.float16}[name])
        import onnxruntime

        rounded = numbers.astype(ml_dtypes.bfloat16).view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(rounded, TensorProto.BFLOAT16)
    if name == "string":
        return np.full(sizes, "a", dtype=object)
    if name == "bool":
        return generator.random(sizes) < 0.5 if manner in ("wide", "few") else np.full(sizes, manner == "ones")
    if not kind.startswith("tensor("):
        raise ValueError(f"an input of type {kind} is not made up here")
    dtype = np.dtype(name)
    highest = {"wide": 256 if name == "uint8" else 128 if name == "int8" else 10, "few": 2}.get(manner)
    if highest is None:
        return np.full(sizes, int(manner == "ones"), dtype=dtype)
    return generator.integers(0, highest, sizes).astype(dtype)


def first_that_runs(
    session: Any, inputs: Mapping[str, Sequence[int | str] | None], sizes: Sequence[int]
) -> tuple[int, str, Feeds, list[Any]]:
    """The first size and manner that the network takes, what it was given and its results. Raises the first failure.

    Results without elements show nothing, and count only where there are no others.
    """
    kinds = {argument.type for argument in session.get_inputs()}
    plain = kinds <= {"tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)", "tensor(string)"}
    failure: Exception | None = None
    empty: tuple[int, str, Feeds, list[Any]] | None = None
    for size, manner in itertools.product(sizes, MANNERS[:1] if plain else MANNERS):
        given = feeds(session, inputs, size, BATCHES[0], manner)
        try:
            results = run(session, given)
        except Exception as error:  # onnxruntime has a class for each failure, and says in words what it would take
            failure = failure or error
            continue
        if not any(isinstance(result, np.ndarray) and not result.size for result in results):
            return size, manner, given, results
        empty = empty or (size, manner, given, results)
    if empty is not None:
        return empty
    assert failure is not None
    raise failure


def run(session: Any, given: Feeds) -> list[Any]:
    """The outputs: arrays, lists or dictionaries of them, strings, or None."""
    if all(isinstance(value, np.ndarray) for value in given.values()):
        return list(session.run(None, given))
    # Through onnxruntime's own values, which have a type that numpy has not.
    import onnxruntime

    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in given.items()
    }
    return [value.numpy() for value in session.run_with_ort_values(None, values)]


def observe(
    model: ir.Model, names: Sequence[str], inputs: Mapping[str, Sequence[int | str] | None], sizes: Sequence[int]
) -> tuple[int, dict[str, tuple[int, ...]]] | None:
    """Sizes of values as onnxruntime makes them, and with which of `sizes` it runs. Raises what onnxruntime does."""
    if weight_bytes(model) > LARGEST_FILE:
        return None
    proto = ir.to_proto(model)
    taken = {value for node in proto.graph.node for value in node.output}
    outputs: dict[str, str] = {}
    for index, name in enumerate(names):
        outputs[name] = next(
            f"sizes{index}{'_' * n}" for n in itertools.count() if f"sizes{index}{'_' * n}" not in taken
        )
        proto.graph.node.append(helper.make_node("Shape", [name], [outputs[name]]))
    if names:
        del proto.graph.output[:]
    proto.graph.output.extend(
        helper.make_tensor_value_info(output, TensorProto.INT64, None) for output in outputs.values()
    )
    session = open_session(proto.SerializeToString(), silent=True)
    del proto
    size, _, _, results = first_that_runs(session, inputs, sizes)
    shapes = zip(outputs, results, strict=True) if names else ()
    return size, {name: tuple(int(n) for n in found) for name, found in shapes}


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
