"""Making a model that a user names, and its weights.

Owns the spellings of `--model` and the kinds of files that weights come in. Importing this imports no torch.
"""

from __future__ import annotations

import importlib
import math
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.sources.framing import INTERPOLATIONS, Framing
from trainer.errors import EXIT_UNAVAILABLE, EXIT_USAGE, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Under which names a training's checkpoint keeps the weights, beside the optimiser's state and others."""
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class Declared:
    """What a library says of a model's input: pixels in [0, 1] less `mean`, over `std`; `shape` has no batch.

    `framing` is how an image comes to that shape, None where that is by none of the ways that are known here.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    framing: Framing | None


@dataclass(frozen=True)
class Made:
    """A model, what its library declares of its input, and what was noticed on the way, in words.

    `batch` is the only batch size that it takes, None where it takes any.
    """

    module: nn.Module
    declared: Declared | None
    notes: tuple[str, ...]
    batch: int | None = None


def make(model: str, arguments: Mapping[str, Any], weights: Path | None, pretrained: bool) -> Made:
    """The model in eval mode and float32.

    `model` is ``timm:NAME``, ``torchvision:NAME``, or ``module:factory`` to be called with `arguments`. `weights` is a
    file of its state: safetensors, or torch's own format, of which nothing but tensors is read. `pretrained`: with the
    library's weights. Raises UserError.
    """
    kind, _, name = model.partition(":")
    if kind in LIBRARIES:
        module, declared = LIBRARIES[kind](name, arguments, pretrained)
    elif pretrained:
        raise UserError("--pretrained goes with timm:NAME and torchvision:NAME; yours takes --weights.", EXIT_USAGE)
    else:
        module, declared = _by_factory(model, arguments), None
    notes = [] if weights is None else _load(module, weights)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()}
    if narrower := sorted(dtypes - {"float32", "float64"}):
        notes.append(f"the model is {' and '.join(narrower)}; it is exported in float32, to which nothing is lost")
    batch = None
    if kind == "torchvision" and name in _library("torchvision").models.list_models(module=_detection()):
        from export.sources.detector import OneImage

        module, batch = OneImage(module), 1
        notes.append("a detector: its files take one image at a time, and give lists of boxes, scores and classes")
    return Made(module.eval().float(), declared, tuple(notes), batch)


def _detection() -> Any:
    return importlib.import_module("torchvision.models.detection")


def _by_timm(name: str, arguments: Mapping[str, Any], pretrained: bool) -> tuple[nn.Module, Declared | None]:
    timm = _library("timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{_nearest(name, timm.list_models())}.", EXIT_USAGE)
    module = _called(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained, **arguments), pretrained)
    config = timm.data.resolve_model_data_config(module)
    shape = tuple(config["input_size"])
    return module, Declared(shape, tuple(config["mean"]), tuple(config["std"]), _framing_of_timm(config))


def _framing_of_timm(config: Mapping[str, Any]) -> Framing | None:
    """As `timm.data.create_transform` makes it of this configuration where it is not for training."""
    height, width = config["input_size"][1:]
    size = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    if config["interpolation"] not in INTERPOLATIONS:
        return None
    if config["crop_mode"] == "squash":
        return Framing(size, (height, width), config["interpolation"])
    if config["crop_mode"] == "center" and height == width:
        return Framing(size[:1], (height, width), config["interpolation"])
    return None


def _by_torchvision(name: str, arguments: Mapping[str, Any], pretrained: bool) -> tuple[nn.Module, Declared | None]:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise UserError(f"torchvision has no model {name!r}{_nearest(name, models.list_models())}.", EXIT_USAGE)
    best = models.get_model_weights(name).DEFAULT
    chosen = best if pretrained else None
    module = _called(f"torchvision:{name}", lambda: models.get_model(name, weights=chosen, **arguments), pretrained)
    preset = best.transforms()
    crop = getattr(preset, "crop_size", None)
    if not crop or not hasattr(preset, "mean"):
        return module, None
    framing = Framing(tuple(preset.resize_size), (crop[0], crop[-1]), preset.interpolation.value)
    return module, Declared((3, crop[0], crop[-1]), tuple(preset.mean), tuple(preset.std), framing)


LIBRARIES: dict[str, Callable[..., tuple[nn.Module, Declared | None]]] = {
    "timm": _by_timm,
    "torchvision": _by_torchvision,
}


def _by_factory(model: str, arguments: Mapping[str, Any]) -> nn.Module:
    module_name, _, attribute = model.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--model {model}: {error}. Expected module:factory, importable from the current folder, for example "
            "mypackage.nets:make_net; or timm:NAME or torchvision:NAME.",
            EXIT_USAGE,
        ) from error
    return _called(model, lambda: factory(**arguments), False)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} must be installed: pip install {name} ({error}).", EXIT_UNAVAILABLE) from None


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _called(model: str, call: Callable[[], Any], pretrained: bool) -> nn.Module:
    from torch import nn

    try:
        made = call()
    except Exception as error:  # whatever the user's own code raises, or a download
        if pretrained:
            raise UserError(
                f"--model {model}: its pretrained weights can't be had ({type(error).__name__}: {error}). Without a "
                "network, name a file of them with --weights.",
                EXIT_UNAVAILABLE,
            ) from error
        raise UserError(
            f"--model {model}: making it raised {type(error).__name__}: {error}. Its arguments are those of "
            "--model-args, in JSON."
        ) from error
    if not isinstance(made, nn.Module):
        raise UserError(f"--model {model} made {type(made).__name__}, expected a torch.nn.Module.")
    return made


# -- weights ---------------------------------------------------------------------------------------------------------


def _load(module: nn.Module, path: Path) -> list[str]:
    """Load a file's state into a module; what was done to its names, in words."""
    state, notes = _pickled(path) if path.suffix in PICKLED else (_safetensors(path), list[str]())
    names = set(module.state_dict())
    for prefix in PREFIXES:
        if not names & set(state) and state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            notes.append(f"{path.name}: names begin with {prefix}, which was left out")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"--weights {path} does not fit the model: {detail}") from error
    return notes


def _safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--weights {path} can't be read as a safetensors file ({error}). Save the weights with "
            "safetensors.torch.save_file(model.state_dict(), path), or with torch.save as a .pth file."
        ) from error


def _pickled(path: Path) -> tuple[Mapping[str, torch.Tensor], list[str]]:
    """The state in a file of torch.save, of which nothing but tensors and plain values is read."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--weights {path} can't be read ({error.strerror or error}).") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--weights {path} holds more than tensors, or is damaged, and loading it could run its maker's code: it "
            "was not loaded. Save the state alone: torch.save(model.state_dict(), path)."
        ) from error
    except Exception as error:  # whatever the unpickler makes of bytes that are none of its own
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--weights {path} is no file of torch.save, or is cut off ({first_line}).") from error
    notes = []
    if isinstance(found, Mapping) and not _is_state(found):
        for wrapper in WRAPPERS:
            if _is_state(found.get(wrapper)):
                notes.append(f"{path.name}: the weights were taken from its entry {wrapper!r}")
                return found[wrapper], notes
    if not _is_state(found):
        have = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else type(found).__name__
        raise UserError(
            f"--weights {path} holds no state of a module but {have}. Expected names with tensors, or these under one "
            f"of {', '.join(WRAPPERS)}."
        )
    return found, notes


def _is_state(found: object) -> bool:
    import torch

    return (
        isinstance(found, Mapping) and bool(found) and all(isinstance(value, torch.Tensor) for value in found.values())
    )
