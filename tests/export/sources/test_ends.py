"""What a user says of inputs and outputs, and what a model shows of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.sources.ends import Given, dynamic_shapes, other_sizes, outputs_of, parse_output, random_inputs
from trainer.errors import UserError


@pytest.mark.parametrize(
    ("text", "given", "shape"),
    [
        ("3x224x224", Given((3, 224, 224), (False,) * 3), ("batch", 3, 224, 224)),
        ("3x224?x192?", Given((3, 224, 192), (False, True, True)), ("batch", 3, "height", "width")),
        ("mask=16:int64", Given((16,), (False,), "mask", "int64"), ("batch", 16)),
        ("1x16000?", Given((1, 16000), (False, True)), ("batch", 1, "length")),
        ("a=5?x3?x3x3x3", Given((5, 3, 3, 3, 3), (True, True, False, False, False), "a"), None),
    ],
)
def test_inputs_are_read(text: str, given: Given, shape: tuple[object, ...] | None) -> None:
    assert Given.parse(text) == given
    if shape is not None:
        assert given.spec("x").shape == shape


@pytest.mark.parametrize("text", ["", "3x0x4", "x3", "3x", "3x4:complex64", "a b=3", "3x-1", "?x3"])
def test_what_is_no_input_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no shape of one input"):
        Given.parse(text)


def test_outputs_are_read() -> None:
    assert parse_output("out:scores") == ("out", "scores")
    with pytest.raises(ValueError, match="expected NAME:KIND"):
        parse_output("out:circles")


def test_one_name_is_one_dimension() -> None:
    specs = [Given.parse("3x8?x8?").spec("a"), Given.parse("1x8?x8?").spec("b")]
    first, second = dynamic_shapes(specs)
    assert list(first) == [0, 2, 3]
    assert all(first[axis] is second[axis] for axis in first)


def test_other_sizes_are_twice_as_large() -> None:
    specs = [Given.parse("3x8?x4").spec("a"), Given.parse("5").spec("b")]
    arrays = np.zeros((2, 3, 8, 4)), np.zeros((2, 5))
    found = other_sizes(specs, arrays)
    assert found is not None
    assert [array.shape for array in found] == [(2, 3, 16, 4), (2, 5)]
    assert other_sizes(specs[1:], arrays[1:]) is None


def test_random_inputs_are_of_their_dtype() -> None:
    assert random_inputs(Given.parse("4"), 3).dtype == np.float32
    whole = random_inputs(Given.parse("4:int64"), 30)
    assert whole.dtype == np.int64
    assert set(whole.ravel()) == {0, 1}


def test_outputs_have_the_names_of_the_dict() -> None:
    made = {"out": torch.zeros(2, 5, 8, 8), "aux": [torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)]}
    again = {"out": torch.zeros(2, 5, 16, 16), "aux": [torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)]}
    out, first, second = outputs_of(made, again, {"out": "scores"}, "m")
    assert (out.name, out.shape, out.kind) == ("out", ("batch", 5, "out_2", "out_3"), "scores")
    assert (first.name, second.name, second.dtype) == ("aux_0", "aux_1", "int64")


def test_outputs_without_names_are_counted() -> None:
    assert [output.name for output in outputs_of(torch.zeros(2, 3), None, {}, "m")] == ["output"]
    pair = (torch.zeros(2, 3), torch.zeros(2))
    assert [output.name for output in outputs_of(pair, None, {}, "m")] == ["output_0", "output_1"]


@pytest.mark.parametrize(
    ("made", "kinds", "says"),
    [
        ((torch.zeros(2, 3), None), {}, "returns tuple of NoneType, Tensor"),
        ({}, {}, "of nothing"),
        (torch.zeros(3, 2), {}, r"has shape \[3, 2\] for 2 inputs"),
        (torch.tensor(1.0), {}, r"has shape \[\]"),
        (torch.zeros(2, 3), {"logits": "scores"}, "has no such output, but output"),
    ],
)
def test_what_is_no_output_is_refused(made: object, kinds: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        outputs_of(made, None, kinds, "m")  # type: ignore[arg-type]
