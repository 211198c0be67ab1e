"""A user's inputs, from files of arrays or a folder of images.

Owns what they must be. Which files there are, and how they are read, know `arrays` and `images`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from export.bundle.rows import Rows, StoredRows, pieces
from export.sources import images
from export.sources.arrays import INPUTS, arrays_in
from export.sources.framing import COLOURS, Framing
from export.sources.material import Calibration, known
from export.sources.scratch import store
from trainer.errors import UserError

RANDOM_INPUTS = 256
"""So many normally distributed inputs make the oracle of a model whose user gave none."""
LABELS = "labels"


@dataclass(frozen=True)
class Request:
    """Which inputs are asked for: `path` as `option` names it, each of `input_shape`, at most `samples` drawn evenly.

    `framing` is what is done to each image, where they are images. `scratch` is a folder that lasts as long as the
    inputs are read.
    """

    path: Path
    option: str
    input_shape: tuple[int, ...]
    scratch: Path
    samples: int | None = None
    framing: Framing = field(default_factory=Framing)


@dataclass(frozen=True)
class Data:
    """`inputs` [N, *input_shape], uint8 or float32, and `labels`, int64 [N] or None.

    `class_names` are those of a folder's classes. `span` is the least and the largest value, None of uint8.
    """

    inputs: Rows
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None = None
    span: tuple[float, float] | None = None


def read_data(asked: Request, say: Callable[[str], None]) -> Data:
    """The inputs and their labels; of images `say` is told which, and what is done to them. Raises UserError where they
    are not what they must be.
    """
    return _from_images(asked, say) if asked.path.is_dir() else _from_arrays(asked)


def calibration(given: Data, raw: Rows, where: str) -> Calibration:
    """`given`, from `where` in words, to calibrate with; none may be among `raw`, by which the files are judged."""
    inputs, labels = given.inputs, given.labels
    if inputs.dtype != raw.dtype:
        raise UserError(
            f"{where} holds {inputs.dtype} inputs, those that the files are checked with are {raw.dtype}. "
            "Calibrate with inputs of the same kind."
        )
    judged_by = int(known(inputs, raw).sum())
    if judged_by:
        raise UserError(
            f"{judged_by} of the {len(inputs)} inputs of {where} are among those that the files are "
            "checked with: the verdict on int8 would be a verdict on what it was fitted to. Calibrate with other "
            "inputs, for example training data."
        )
    contents = hashlib.sha256()
    for piece in pieces(inputs):
        contents.update(np.ascontiguousarray(piece).data)
    contents.update(b"" if labels is None else labels.tobytes())
    return Calibration(inputs, contents.hexdigest(), labels)


def _evenly(count: int, samples: int | None) -> list[int] | None:
    """Which of `count` to take, from the first on in even steps; None for all."""
    if samples is None or samples >= count:
        return None
    return [index * count // samples for index in range(samples)]


# -- images ----------------------------------------------------------------------------------------------------------


def _from_images(asked: Request, say: Callable[[str], None]) -> Data:
    shape, where = asked.input_shape, f"{asked.option} {asked.path}"
    if len(shape) != 3 or shape[0] not in COLOURS:
        raise UserError(
            f"{where} is a folder of images, which have 1 channel or 3; the model takes {list(shape)}. Give the inputs "
            "as an array, for example in an .npy file."
        )
    found = images.listing(asked.path, asked.option)
    chosen = _evenly(len(found.paths), asked.samples)
    taken = found if chosen is None else found.drawn(chosen)
    if len(taken.paths) < 2:
        raise UserError(f"{where} holds one image; expected 2 at least.")
    said = asked.framing.steps(shape[0]).words
    say(f"{_said_of(found, taken, where)}; each {said}, which is outside of every file")
    inputs = images.decode(taken, shape, asked.framing, asked.option, asked.scratch)
    labels = None if taken.classes is None else np.array(taken.classes, np.int64)
    return Data(inputs, labels, taken.class_names)


def _said_of(found: images.Listing, taken: images.Listing, where: str) -> str:
    """What was taken from a folder, in words."""
    said = f"{where}: {len(taken.paths)} images"
    if len(taken.paths) < len(found.paths):
        said += f" of {len(found.paths)}"
    if found.class_names is not None and found.classes is not None:
        named = ", ".join(found.class_names[:3]) + (", …" if len(found.class_names) > 3 else "")
        said += f" in {len(found.class_names)} classes ({named})"
        if empty := [name for index, name in enumerate(found.class_names) if index not in set(found.classes)]:
            said += f", none in {', '.join(empty[:3])}{', …' if len(empty) > 3 else ''}"
    if found.ignored:
        said += f"; {found.ignored} other files ignored"
    return said


# -- arrays ----------------------------------------------------------------------------------------------------------


def _from_arrays(asked: Request) -> Data:
    where = f"{asked.option} {asked.path}"
    arrays = arrays_in(asked.path, asked.option, asked.scratch)
    inputs, stored_labels = arrays.get(INPUTS), arrays.get(LABELS)
    _require_inputs(inputs, arrays, asked)
    assert inputs is not None
    labels = None
    if stored_labels is not None:
        if stored_labels.shape != (len(inputs),) or stored_labels.dtype.kind not in "ui":
            raise UserError(
                f"{where}: `labels` is {stored_labels.dtype} {list(stored_labels.shape)}; "
                f"expected {len(inputs)} whole numbers."
            )
        labels = np.asarray(stored_labels).astype(np.int64)
    rows: Rows = inputs
    if (chosen := _evenly(len(inputs), asked.samples)) is not None:
        rows = store(asked.scratch, (np.asarray(inputs[index : index + 1]) for index in chosen))
        labels = None if labels is None else labels[chosen]
    if inputs.dtype == np.uint8:
        return Data(rows, labels)
    return _floats(rows, labels, where, asked.scratch)


def _require_inputs(inputs: StoredRows | None, arrays: dict[str, StoredRows], asked: Request) -> None:
    """Raises UserError where the array is missing, or no array of such inputs."""
    shape, where = asked.input_shape, f"{asked.option} {asked.path}"
    if inputs is not None and len(shape) == 3 and inputs.shape[1:] == (*shape[1:], shape[0]) != shape:
        raise UserError(
            f"{where}: `inputs` has shape {list(inputs.shape)}, with the channels last; expected {['N', *shape]}. "
            "Transpose them: inputs.transpose(0, 3, 1, 2)."
        )
    if inputs is None or inputs.shape[1:] != shape or inputs.dtype.kind not in "fui" or len(inputs) < 2:
        have = {name: f"{array.dtype} {list(array.shape)}" for name, array in arrays.items()}
        raise UserError(
            f"{where} holds {have}; expected an array `inputs` of numbers with shape "
            f"{['N', *shape]}, N at least 2, and optionally `labels` [N]."
        )


def _floats(rows: Rows, labels: np.ndarray | None, where: str, scratch: Path) -> Data:
    """Numbers other than uint8, as float32."""
    least, largest = np.inf, -np.inf

    def checked() -> Iterator[np.ndarray]:
        nonlocal least, largest
        for piece in pieces(rows):
            with np.errstate(over="ignore"):
                floats = piece.astype(np.float32, copy=False)
            if not np.isfinite(floats).all():
                raise UserError(
                    f"{where}: `inputs` holds values that are not finite (NaN, infinity, or beyond float32's "
                    "range). Leave such inputs out."
                )
            least, largest = min(least, float(floats.min())), max(largest, float(floats.max()))
            yield floats

    if rows.dtype == np.dtype(np.float32):
        for _ in checked():
            pass
        return Data(rows, labels, None, (least, largest))
    return Data(store(scratch, checked()), labels, None, (least, largest))
