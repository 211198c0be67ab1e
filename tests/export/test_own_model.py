"""A model that is not this project's own: `--model`, `--weights`, `--input`, `--data`, and its bundle in `bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plans import small_plan
from safetensors.torch import save_file

from bench.cli.exit_codes import exit_code
from bench.results.schema import Result
from bench.run.rounds import run as run_plan
from export.build import build
from export.bundle import Bundle, BundleError
from export.sources.ends import Given
from export.sources.material import Material
from export.sources.own import Own, load
from trainer.errors import UserError

NETS = '''
import torch
from torch import nn


class Net(nn.Module):
    """BatchNorm after the activation, on the input, and before a 1x1 convolution; classes at the end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.SiLU(), nn.BatchNorm2d(12))
        self.head = nn.Linear(12, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()


def segmenter():
    """An output that is no row of class scores, and a model that comes in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)).train()


def breaks():
    raise RuntimeError("no such disk")


def no_module():
    return "a string"


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def branching():
    return Branching()


class Two(nn.Module):
    def forward(self, x):
        return x, x


two = Two


def nan():
    made = net()
    made.head.weight.data[0, 0] = float("nan")
    return made
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: their package, inputs and labels."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nets.py").write_text(NETS)
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((40, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "inputs.npz", inputs=inputs, labels=generator.integers(0, 4, 40))
    return tmp_path


@pytest.fixture
def importable(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder as the current one, whose modules this process imports and then forgets."""
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    for name in ("mine", "mine.nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return project


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def measured(bundle: Bundle, backend: str) -> Result:
    """A short run of the bundle on one backend, in its worker process."""
    plan = small_plan(bundle.path, backends=(backend,), batch_sizes=(4,), rounds=1, block_s=0.001)
    return run_plan(plan, lambda what, done: None)


def test_from_a_factory_to_a_benchmark(project: Path) -> None:
    """Other weights than the factory's, a user's inputs and labels; the bundle runs in `bench` and passes there."""
    torch.manual_seed(1)
    namespace: dict[str, object] = {}
    exec(NETS, namespace)
    model = namespace["Net"]().eval()  # type: ignore[operator]
    save_file(model.state_dict(), project / "w.safetensors")
    arguments = ["export", "--model", "mine.nets:net", "--weights", "w.safetensors", "--input", "3x16x16"]
    # Its random scales of both signs before pooling take two comparisons each, which `auto` holds for too dear.
    done = run(project, *arguments, "--data", "inputs.npz", "--strategy", "all")
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(project / "artifacts" / "bundles" / "net")
    bundle.verify()
    assert bundle.manifest.source.factory == "mine.nets:net"
    assert not bundle.manifest.fold.kept
    assert len(bundle.manifest.fold.folded) == 3
    inputs = np.load(project / "inputs.npz")["inputs"]
    with torch.no_grad():
        wanted = model.double()(torch.from_numpy(inputs).double()).numpy()
    np.testing.assert_allclose(bundle.oracle().logits, wanted, rtol=1e-10)

    place = str(bundle.path)
    explained = run(project, "export", "explain", place)
    assert explained.returncode == 0, explained.stderr
    assert "3 BatchNorms folded, 0 kept" in explained.stdout
    assert measured(bundle, "onnx-cpu").rows
    (subject,) = measured(bundle, "torchscript-cpu").subjects
    assert subject.parity is not None
    assert subject.parity.passed
    assert subject.parity.flips == ()
    assert subject.parity.images == 40
    assert subject.parity.top1_percent is not None


def test_without_inputs_and_without_classes(importable: Path) -> None:
    """Random inputs stand in, there is no top-1, and parity speaks of the output alone."""
    material = loaded("mine.nets:segmenter")
    bundle = build(material, importable / "seg", "auto", lambda what: None)
    assert bundle.oracle().labels is None
    assert bundle.oracle().logits.shape[1:] == (2, 16, 16)
    assert not bundle.manifest.fold.kept
    assert exit_code(measured(bundle, "onnx-cpu")) == 0


def loaded(model: str, **more: Any) -> Material:
    """With inputs of 3×16×16 unless told otherwise; what has to be stored lies in the user's folder."""
    return load(Own(model, **{"inputs": (Given((3, 16, 16), (False,) * 3),), **more}), NOTES.append, Path())


NOTES: list[str] = []
REFUSED = {
    "no such module": ("elsewhere.nets:net", "module:factory"),
    "no such factory": ("mine.nets:other", "module:factory"),
    "not a path": ("mine.nets", "module:factory"),
    "raises": ("mine.nets:breaks", "no such disk"),
    "no module": ("mine.nets:no_module", "torch.nn.Module"),
    "not finite": ("mine.nets:nan", "head.weight"),
}


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("what", REFUSED)
def test_a_factory_that_is_no_good(what: str) -> None:
    model, says = REFUSED[what]
    with pytest.raises(UserError, match=says) as refused:
        loaded(model)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == (2 if "module:factory" in says else 4)


@pytest.mark.parametrize("what", ["missing", "not safetensors", "do not fit", "not finite"])
def test_weights_that_are_no_good(what: str, importable: Path) -> None:
    path = importable / "w.safetensors"
    tensors = {"head.weight": torch.zeros(4, 12)}
    if what == "not finite":
        from mine.nets import net  # type: ignore[import-not-found]

        tensors = net().state_dict()
        tensors["head.bias"][0] = torch.inf
    if what == "not safetensors":
        path.write_bytes(b"PK these are none")
    elif what != "missing":
        save_file(tensors, path)
    with pytest.raises(UserError, match=r"w\.safetensors") as refused:
        loaded("mine.nets:net", weights=path)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    "arrays",
    [
        None,
        {"images": np.zeros((4, 3, 16, 16), np.float32)},
        {"inputs": np.zeros((4, 3, 8, 8), np.float32)},
        {"inputs": np.zeros((0, 3, 16, 16), np.float32)},
        {"inputs": np.full((4, 3, 16, 16), np.nan, np.float32)},
        {"inputs": np.zeros((4, 3, 16, 16), np.complex64)},
        {"inputs": np.zeros((4, 3, 16, 16), np.float32), "labels": np.zeros(3, int)},
        {"inputs": np.zeros((4, 3, 16, 16), np.float32), "labels": np.zeros(4)},
        {"inputs": np.zeros((4, 3, 16, 16), np.float32), "labels": np.array([0, 1, 2, 4])},
        {"inputs": np.zeros((4, 3, 16, 16), np.float32), "labels": np.array([0, 1, -1, 3])},
    ],
    ids=[
        "no npz",
        "other name",
        "other shape",
        "empty",
        "not finite",
        "complex",
        "too few labels",
        "labels no integers",
        "a label too large",
        "a label of -1",
    ],
)
def test_data_that_is_no_good(arrays: dict[str, np.ndarray] | None, importable: Path) -> None:
    path = importable / "d.npz"
    if arrays is None:
        path.write_text("no numbers")
    else:
        np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--data .*d\.npz") as refused:
        loaded("mine.nets:net", data=path)
    assert refused.value.exit_code == 4


@pytest.mark.usefixtures("importable")
def test_an_input_the_model_does_not_take() -> None:
    with pytest.raises(UserError, match="--input") as refused:
        loaded("mine.nets:net", inputs=(Given((1, 16, 16), (False,) * 3),))
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "mine.nets:branching", "--input", "3x16x16"], 4, "torch.export"),
        (["--model", "mine.nets:net", "--input", "3x0"], 2, "3x224x224"),
        (["--model", "mine.nets:net"], 2, "--input"),
        (["--weights", "w.safetensors"], 2, "--model"),
        (["explain", "nowhere.onnx"], 4, "nowhere.onnx"),
        (["fold", "mine/nets.py", "-o", "folded.onnx"], 4, "nets.py"),
    ],
    ids=["control flow", "no shape", "no input", "weights alone", "explain", "fold"],
)
def test_refused_commands(
    arguments: list[str],
    code: int,
    says: str,
    importable: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One paragraph, the exit code, and nothing is published."""
    from export.cli import app
    from trainer.errors import run_app

    before = sorted(importable.iterdir())
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_app(app, "python -m export")
    assert ended.value.code == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert [path for path in sorted(importable.iterdir()) if path.name != "artifacts"] == before
    with pytest.raises(BundleError):
        Bundle.open(importable / "artifacts" / "bundles" / "branching")
