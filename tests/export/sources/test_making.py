"""Models by name, and weights as they lie around."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export.sources import making, own
from export.sources.ends import Given
from export.sources.making import make
from export.sources.own import Own, load
from trainer.errors import UserError

STATE = {name: tensor + 1 for name, tensor in nn.Linear(3, 2).state_dict().items()}
Saved = Callable[[Any], Path]


def linear(outputs: int = 2) -> nn.Module:
    return nn.Linear(3, outputs)


def half() -> nn.Module:
    return nn.Linear(3, 2).half()


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("made_here")
    module.linear, module.half = linear, half  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_here", module)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    def save(what: Any) -> Path:
        path = tmp_path / "w.pth"
        torch.save(what, path)
        return path

    return save


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda state: state, None),
        (lambda state: {"state_dict": state, "epoch": 3}, "'state_dict'"),
        (lambda state: {"model": state, "optimizer": {"lr": 0.1}}, "'model'"),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, "module."),
        (lambda state: {"state_dict": {f"_orig_mod.{name}": v for name, v in state.items()}}, "_orig_mod."),
        (lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()}, "_orig_mod."),
    ],
    ids=["plain", "state_dict", "model", "DataParallel", "compiled in a wrapper", "both"],
)
def test_weights_as_trainings_save_them(wrap: Callable[[Any], Any], says: str | None, saved: Saved) -> None:
    made = make("made_here:linear", {}, saved(wrap(STATE)), pretrained=False)
    for name, tensor in made.module.state_dict().items():
        assert torch.equal(tensor, STATE[name])
    assert (says is None) == (made.notes == ())
    assert says is None or any(says in note for note in made.notes)


class Runs:
    """A pickle that runs its maker's code where it is loaded without care."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_a_pickle_with_code_is_not_loaded(saved: Saved, tmp_path: Path) -> None:
    path = saved({"state_dict": STATE, "extra": Runs(tmp_path / "canary")})
    with pytest.raises(UserError, match="run its maker's code") as refused:
        make("made_here:linear", {}, path, pretrained=False)
    assert refused.value.exit_code == 4
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("what", ["missing", "cut off", "text", "a number", "another model", "a whole module"])
def test_files_that_are_no_weights(what: str, saved: Saved) -> None:
    contents = {"a number": 3, "another model": nn.Linear(4, 4).state_dict(), "a whole module": nn.Linear(3, 2)}
    path = saved(contents.get(what, STATE))
    if what == "missing":
        path.unlink()
    elif what == "cut off":
        path.write_bytes(path.read_bytes()[:700])
    elif what == "text":
        path.write_text("these are none")
    with pytest.raises(UserError, match=r"w\.pth") as refused:
        make("made_here:linear", {}, path, pretrained=False)
    assert refused.value.exit_code == 4
    assert "\n" not in str(refused.value)


def test_arguments_and_a_half_module() -> None:
    assert make("made_here:linear", {"outputs": 7}, None, pretrained=False).module.out_features == 7
    made = make("made_here:half", {}, None, pretrained=False)
    assert made.module.weight.dtype == torch.float32
    assert "float16" in made.notes[0]
    with pytest.raises(UserError, match="--model-args"):
        make("made_here:linear", {"wrong": 7}, None, pretrained=False)
    with pytest.raises(UserError, match="--pretrained goes with") as refused:
        make("made_here:linear", {}, None, pretrained=True)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("model", ["torchvision:squeezenet1_1", "timm:test_convnext"])
def test_models_of_libraries_declare_their_input(model: str) -> None:
    made = make(model, {"num_classes": 5}, None, pretrained=False)
    assert made.declared is not None
    assert len(made.declared.mean) == len(made.declared.std) == 3
    with torch.no_grad():
        assert made.module(torch.zeros(1, *made.declared.shape)).shape == (1, 5)


def test_names_that_libraries_don_t_know() -> None:
    for model, says in (("torchvision:resnet_18", "resnet18"), ("timm:test_convnex", "test_convnext")):
        with pytest.raises(UserError, match=f"did you mean .*{says}") as refused:
            make(model, {}, None, pretrained=False)
        assert refused.value.exit_code == 2


def test_pretrained_weights_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*rest: object, **more: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="pretrained weights can't be had") as refused:
        make("torchvision:squeezenet1_1", {}, None, pretrained=True)
    assert refused.value.exit_code == 3


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm") as refused:
        make("timm:resnet18", {}, None, pretrained=False)
    assert refused.value.exit_code == 3


# -- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    path = tmp_path / "d.npz"
    np.savez(path, inputs=np.random.default_rng(0).integers(0, 256, (4, 3, 224, 224), dtype=np.uint8))
    return path


def loaded(said: Own) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return load(said, notes.append, Path("nothing is stored")).preprocessing, notes


def test_pixels_are_taken_as_the_library_declares(pixels: Path) -> None:
    model = "torchvision:squeezenet1_1"
    found, notes = loaded(Own(model, data=pixels))
    assert (found.scale, found.mean, found.std) == (1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert "declared" in notes[0]
    found, notes = loaded(Own(model, data=pixels, scale=0.5))
    assert (found.scale, found.mean, found.std, notes) == (0.5, (0.0,), (1.0,), [])


def test_what_the_user_says_of_the_inputs(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, inputs=np.zeros((4, 3), np.uint8))
    shape = {"inputs": (Given((3,), (False,)),), "data": path}
    found, notes = loaded(Own("made_here:linear", **shape))  # type: ignore[arg-type]
    assert found.scale == 1
    assert "0 to 255" in notes[0]
    found, notes = loaded(Own("made_here:linear", **shape, scale=0.5, mean=(1, 2, 3), std=(4,)))  # type: ignore[arg-type]
    assert (found.scale, found.mean, found.std, notes) == (0.5, (1, 2, 3), (4,), [])
    for wrong, says in (({"mean": (1, 2)}, "--mean has 2 values"), ({"std": (1, 0, 1)}, "--std divides")):
        with pytest.raises(UserError, match=says) as refused:
            loaded(Own("made_here:linear", **shape, **wrong))  # type: ignore[arg-type]
        assert refused.value.exit_code == 2
    with pytest.raises(UserError, match="--input"):
        loaded(Own("made_here:linear"))


def test_neither_library_is_imported_before_it_is_named() -> None:
    import subprocess
    import sys

    program = f"import sys, {making.__name__}; assert not {{'torch', 'timm', 'torchvision'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert own.PIXELS * 255 == 1
