"""Files of other precisions and files that take the raw input: what is made, what is refused, what is seen."""

from __future__ import annotations

import copy
import dataclasses
import errno
import shutil
from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from verdicts import judge

from bench.backends.contract import Profile
from export import build, checks, equality, raw_input, variants, writing
from export.build import ExportRefused
from export.bundle import (
    COARSER,
    VARIANTS,
    Bundle,
    FileEntry,
    LeftOut,
    Oracle,
    Output,
    Precision,
    Preprocessing,
    Source,
    TensorSpec,
    Tolerances,
)
from export.bundle.int8 import CPU_KINDS
from export.bundle.verdict import departure
from export.bundle.verdict import judge as contract_judge
from export.checks import Checks
from export.cli import _end_without
from export.effort import usual
from export.fold import fold_batchnorm
from export.formats import aoti, openvino_file
from export.formats.running import run_in_batches
from export.sources import article, data
from export.sources.material import Calibration, Material
from export.variants import File, Plan
from trainer.errors import UserError
from trainer.model import Net

SIDE = 12
EDGES = ("black", "white", "border")
VARIED = ("float16", "float32-raw", "bfloat16-raw", "int8-raw")


class Small(nn.Module):
    """Padded convolutions of three channels, a BatchNorm before and one after pooling and activation, four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.BatchNorm2d(12),
            nn.Flatten(),
            nn.Linear(12 * (SIDE // 2) ** 2, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(x)
        return logits


@pytest.fixture(scope="module")
def material() -> Material:
    """A network with preprocessing of its own for each channel, and the inputs that it is surest of."""
    torch.manual_seed(0)
    module = Small().eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
            assert norm.running_mean is not None
            norm.running_mean.uniform_(-0.5, 0.5)
    shape = ("batch", 3, SIDE, SIDE)
    preprocessing = Preprocessing(
        raw=TensorSpec(name="pixels", dtype="uint8", shape=shape),
        scale=1 / 255,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.25),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 3, SIDE, SIDE), dtype=np.uint8)
    with torch.no_grad():
        logits = copy.deepcopy(module).double()(torch.from_numpy(preprocessing.apply(pixels, shape)).double()).numpy()
    highest = np.sort(logits, axis=1)
    surest = np.argsort(highest[:, -2] - highest[:, -1])
    judged, calibration = surest[:200], surest[600:700]
    return Material(
        module,
        lambda: b"",
        Source(factory="tests:Small", checkpoint_sha256="0" * 64),
        TensorSpec(name="image", dtype="float32", shape=shape),
        Output(name="logits", dtype="float32", shape=("batch", 4)),
        preprocessing,
        pixels[judged],
        logits[judged].argmax(1),
        None,
        Calibration(np.concatenate([edges(), pixels[calibration]]), "some others"),
    )


@pytest.fixture(scope="module")
def bundle(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a variant of every kind: each precision, with and without raw input, each format."""
    plan = variants.plan(VARIED, aoti=False, raw_refusal=None, calibration_refusal=None)
    return build.build(material, tmp_path_factory.mktemp("bundles") / "small", "auto", lambda line: None, plan)


def edges() -> np.ndarray:
    """All black, all white, and white at the border alone, uint8 [3, …]."""
    border = np.full((3, SIDE, SIDE), 255, np.uint8)
    border[:, 1:-1, 1:-1] = 0
    return np.stack([np.zeros_like(border), np.full_like(border, 255), border])


def outputs(bundle: Bundle, entry: FileEntry, raw: np.ndarray) -> np.ndarray:
    manifest = bundle.manifest
    taken = raw if entry.takes == "raw" else manifest.preprocessing.apply(raw, manifest.input.shape)
    (outputs,) = run_in_batches(checks.runner(bundle.path, entry), (taken,), 100)
    return outputs


# -- what is made ----------------------------------------------------------------------------------------------------


def check(bundle: Bundle, material: Material) -> None:
    """Every file is right, in `bench`'s judgement, which knows nothing of the exporter's, and at the border."""
    bundle.verify()
    truth = bundle.oracle()
    with torch.no_grad():
        model64 = copy.deepcopy(material.module).double()
        bright = raw_input.reference(model64, material.preprocessing, material.input, torch.from_numpy(edges()))
    at_the_border = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.1}
    # How many times coarser than float32's own error: each file is of its own precision, neither finer nor coarser.
    coarseness = {"float32": (0, 4), "float16": (30, 2**13), "bfloat16": (250, 2**16), "int8": (250, 2**17)}
    for entry in bundle.manifest.files:
        assert bool(entry.companions) == (entry.format == "openvino")
        logits = outputs(bundle, entry, material.raw)
        assert logits.dtype == np.float32
        verdict = judge(logits, truth, bundle.manifest.tolerances, Profile.STRICT, entry.precision)
        assert verdict.passed, (entry.path, verdict.failures)
        low, high = coarseness[entry.precision]
        multiple = verdict.rms_error_in_float32_errors
        assert multiple is not None
        assert low <= multiple <= high, (entry.path, multiple)
        # A convolution pads what is zero after the normalisation, which is no pixel: a bright border shows it.
        for edge, found, wanted in zip(EDGES, outputs(bundle, entry, edges()), bright.numpy(), strict=True):
            error = np.abs(found - wanted).max() / bright.abs().max()
            assert error <= at_the_border[entry.precision], (entry.path, edge, error)


def kinds(bundle: Bundle) -> set[tuple[str, str]]:
    return {(entry.format, entry.variant) for entry in bundle.manifest.files}


def makes(precision: str) -> set[str]:
    """The formats that a precision is written in here."""
    formats = set(variants.FORMATS[precision])  # type: ignore[index]
    return formats if openvino_file.missing() is None else formats - {"openvino"}


def test_variants_are_in_the_bundle_and_right(bundle: Bundle, material: Material) -> None:
    made = {(format, name) for name in VARIED for format in makes(name.removesuffix("-raw"))}
    assert made <= kinds(bundle)
    assert {variant for _, variant in kinds(bundle)} == {"float32", *VARIED}
    check(bundle, material)


@pytest.mark.slow
def test_all_variants(material: Material, tmp_path: Path) -> None:
    plan = variants.plan(["all"], aoti=False, raw_refusal=None, calibration_refusal=None)
    bundle = build.build(material, tmp_path / "small", "auto", lambda line: None, plan)
    assert {variant for _, variant in kinds(bundle)} == set(VARIANTS)
    check(bundle, material)


def test_activations_come_before_pooling_to_the_same_bit() -> None:
    torch.manual_seed(0)
    module = Net().eval()
    x = torch.randn(4, 1, 28, 28)
    folded = fold_batchnorm(module, (x,)).module
    moved = writing._activations_first(copy.deepcopy(folded))
    order = [str(node.target) for node in moved.graph.nodes if node.op == "call_function"]
    pools = [place for place, name in enumerate(order) if "max_pool2d" in name]
    assert [("relu" in order[place - 1], "relu" in order[place + 1]) for place in pools] == [(True, False)] * 2
    with torch.no_grad():
        assert torch.equal(moved(x), folded(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's own compiler
def test_programs_compiled_ahead_of_time(material: Material, tmp_path: Path) -> None:
    plan = variants.plan(["float32-raw"], aoti=True, raw_refusal=None, calibration_refusal=None)
    bundle = build.build(material, tmp_path / "small", "auto", lambda line: None, plan)
    for variant in ("float32", "float32-raw"):
        entry = bundle.entry("aoti-cpu", variant)
        found = outputs(bundle, entry, material.raw)
        np.testing.assert_allclose(found, bundle.oracle().logits, atol=1e-3)
        np.testing.assert_allclose(outputs(bundle, entry, material.raw[:3]), found[:3], atol=1e-4)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_asked_for_by_name_and_can_not_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_file, "missing", lambda: "it must be installed: pip install 'ninefold[openvino]'")
    for asked, raw, calibration, code, says in (
        ("int8", None, None, 3, r"ninefold\[openvino\]"),
        ("float16-raw", "no pixels", None, 4, "no pixels"),
        ("int8-raw", None, "--calibration", 4, "--calibration"),
        ("float8", None, None, 2, "float16"),
    ):
        with pytest.raises(UserError, match=says) as refused:
            variants.plan([asked], False, raw, calibration)
        assert refused.value.exit_code == code
    plan = variants.plan(["all"], False, "no pixels", None)
    assert {file.variant for file in plan.files} == {"float16", "bfloat16", "int8"}
    assert File("openvino", "int8") not in plan.files
    assert any("ninefold[openvino]" in each.reason for each in plan.left_out)
    assert any("no pixels" in each.reason for each in plan.left_out)
    uncalibrated = variants.plan(["all"], False, None, "--calibration")
    assert "int8" not in {file.precision for file in uncalibrated.files}


def test_raw_input_that_is_what_the_model_takes() -> None:
    def refusal(dtype: str, scale: float) -> str | None:
        raw = TensorSpec(name="x", dtype=dtype, shape=("batch", 3))
        return variants.raw_refusal(Preprocessing(raw=raw, scale=scale, mean=(0.0,), std=(1.0,)))

    assert refusal("uint8", 1.0) is None
    assert "already is what the model takes" in str(refusal("float32", 1.0))
    assert "float32" in str(refusal("float32", 0.5))


def test_no_compiler() -> None:
    from torch._inductor import config

    # torch's own patch: what monkeypatch puts back stays hidden, and nothing can be compiled any more.
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(UserError, match="g\\+\\+") as refused:
        aoti.devices()
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (np.zeros((0, 3), np.uint8), "N at least 2"),
        (np.zeros((4, 3), np.float32), "float32"),
        (np.array([[1, 2, 3], [9, 9, 9], [7, 8, 9], [5, 5, 5]], np.uint8), "2 of the 4 inputs"),
        (np.zeros((4, 2), np.uint8), "expected an array `inputs`"),
    ],
    ids=["empty", "of another kind", "judged by", "of another shape"],
)
def test_calibration_that_is_no_good(inputs: np.ndarray, says: str, tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    np.savez(path, inputs=inputs)
    judged = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8)
    asked = data.Request(path, "--calibration", (3,), tmp_path)
    with pytest.raises(UserError, match=r"--calibration .*c\.npz") as refused:
        data.calibration(data.read_data(asked, print), judged, f"--calibration {path}")
    assert says in str(refused.value)
    assert refused.value.exit_code == 4


def test_calibration_with_training_images_leaves_test_images_out(data_dir: Path) -> None:
    from trainer import mnist

    digits = mnist.load(data_dir)
    train = digits.train_images.copy()
    train[::2] = digits.test_images[0]  # as if half of the pool were a test image
    chosen = article.calibration_images(dataclasses.replace(digits, train_images=train))
    known = {image.tobytes() for image in digits.test_images}
    assert not any(image.tobytes() in known for image in chosen.raw)
    assert len(chosen.raw) > 300
    again = article.calibration_images(dataclasses.replace(digits, train_images=train))
    assert np.array_equal(chosen.raw, again.raw)
    whole = article.calibration_images(digits)
    assert len(whole.raw) == article.CALIBRATION_IMAGES
    assert whole.labels is not None
    place = next(i for i, image in enumerate(digits.train_images) if np.array_equal(image, whole.raw[0]))
    assert whole.labels[0] == digits.train_labels[place]


def test_a_bundle_of_other_options_is_another(material: Material) -> None:
    prints = [
        build.fingerprint(material.source, "auto", *rest)
        for rest in (
            (),
            (Plan((File("onnx", "float16"),)),),
            (Plan((File("onnx", "int8"),)), "a"),
            (Plan((File("onnx", "int8"),)), "b"),
            (Plan((File("aoti-cpu", "float32"),)),),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert build.fingerprint(material.source, "auto", Plan(), "a") == prints[0]  # calibrates nothing


# -- each verdict can fail -------------------------------------------------------------------------------------------

IMAGES = 10_000
TOLERANCES = Tolerances(float32_rms_error=1e-6)


def failure(logits: np.ndarray, judged: Oracle, tolerances: Tolerances, precision: Precision) -> str | None:
    verdict = contract_judge(logits, judged, tolerances, precision)
    return None if verdict.passed else "; ".join(verdict.failures)


def scores(labels: np.ndarray) -> np.ndarray:
    return np.eye(10)[labels] * 8.0


@pytest.mark.parametrize(
    ("precision", "margin", "lost", "says"),
    [
        ("float16", 1e-5, 4, None),
        ("float16", 1e-5, 5, "top-1"),
        ("float16", 2.0, 1, "margin"),
        ("bfloat16", 1e-5, 16, None),
        ("bfloat16", 1e-5, 17, "top-1"),
        ("int8", 1e-5, 38, None),
        ("int8", 1e-5, 41, "top-1"),
        ("int8", 4.0, 1, "margin"),
    ],
)
def test_the_limits_of_each_precision(precision: Precision, margin: float, lost: int, says: str | None) -> None:
    """At the limit a file passes, an image further it does not; `bench` says the same of the same logits."""
    labels = np.arange(IMAGES) % 10
    truth = scores(labels)
    close = np.arange(200)
    truth[close, (labels[close] + 1) % 10] = 8 - margin
    found = truth.copy()
    found[close[:lost], (labels[close[:lost]] + 1) % 10] = 8 + 1e-5
    judged = Oracle(np.zeros((IMAGES, 1), np.uint8), labels, truth)
    problem = failure(found, judged, TOLERANCES, precision)
    verdict = judge(found, judged, TOLERANCES, Profile.STRICT, precision)
    assert (problem is None) == (says is None) == verdict.passed, (problem, verdict.failures)
    assert says is None or says in str(problem)


def test_logits_that_are_none() -> None:
    truth = scores(np.arange(20) % 10)
    judged = Oracle(np.zeros((20, 1), np.uint8), None, truth)
    assert failure(truth, judged, TOLERANCES, "int8") is None
    assert "shape" in str(failure(truth[:, :4], judged, TOLERANCES, "int8"))
    assert "NaN" in str(failure(np.where(truth > 0, np.nan, truth), judged, TOLERANCES, "float16"))
    assert "shape" in str(departure((truth[:3, :2],), (truth,), judged))
    assert departure((truth[:3],), (truth + 0.1,), judged) is None
    assert "another batch size" in str(departure((truth[:3] + 0.3,), (truth + 0.1,), judged))


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_outputs_that_are_no_scores_of_classes(precision: str) -> None:
    truth = np.random.default_rng(0).standard_normal((6, 2, 3, 3))
    judged = Oracle(np.zeros((6, 1), np.uint8), None, truth)
    limit = TOLERANCES.strict_rms_factor * COARSER[precision] * TOLERANCES.float32_rms_error  # type: ignore[index]
    for share, right in ((0.99, True), (1.01, False)):
        found = truth + share * limit
        problem = failure(found, judged, TOLERANCES, precision)  # type: ignore[arg-type]
        assert (problem is None) == right == judge(found, judged, TOLERANCES, Profile.STRICT, precision).passed


@pytest.mark.parametrize(
    "victim", ["model.float16.onnx", "model.int8-raw.onnx", "model.int8-raw.xml", "model.float32-raw.pt2"]
)
def test_a_file_of_another_network_is_not_right(
    victim: str, bundle: Bundle, material: Material, tmp_path: Path
) -> None:
    """The last layer's weights negated, or in disorder."""
    if victim not in {entry.path for entry in bundle.manifest.files}:
        pytest.skip(str(openvino_file.missing()))
    folder = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    kept = {"onnxruntime": 0, "torch": 0}
    oracle, tolerances = bundle.oracle(), bundle.manifest.tolerances
    effort = usual(len(oracle.logits))
    held_to = Checks(folder, oracle, material.inputs, material.outputs, kept, tolerances, effort)  # type: ignore[arg-type]
    (entry,) = (entry for entry in bundle.manifest.files if entry.path == victim)
    assert held_to.check(entry).problem is None
    _spoil(folder / victim)
    assert held_to.check(entry).problem is not None


def _spoil(path: Path) -> None:
    """Make another network of a file."""
    if path.suffix == ".onnx":
        import onnx
        from onnx import numpy_helper

        model = onnx.load(str(path))
        (weight,) = [w for w in model.graph.initializer if w.dims and sorted(w.dims)[:1] == [4] and len(w.dims) == 2]
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
        onnx.save(model, str(path))
    elif path.suffix == ".xml":
        weights = openvino_file.weights(path)
        content = bytearray(weights.read_bytes())
        (last,) = (data for data in ElementTree.parse(path).iter("data") if data.get("shape", "").startswith("4, "))
        start = int(last.attrib["offset"])
        whole = slice(start, start + int(last.attrib["size"]))
        content[whole] = content[whole][::-1]
        weights.write_bytes(bytes(content))
    else:
        from export.formats import pt2

        program = torch.export.load(str(path))
        for tensor in program.state_dict.values():
            if tensor.shape[:1] == (4,):
                tensor.data.neg_()
        pt2.write(program, path)


def test_a_wrong_file_is_left_out_and_the_others_are_published(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of it is left in the folder; the reason stands in the manifest, and names the layers."""
    from export.formats import onnx_int8

    write = onnx_int8.Quantiser.write

    def spoiled(self: onnx_int8.Quantiser, path: Path, in_float: Collection[str] = ()) -> int:
        opset = write(self, path, in_float)
        if path.name == "int8.onnx":
            _spoil(path)
        return opset

    monkeypatch.setattr(onnx_int8.Quantiser, "write", spoiled)
    files = (File("onnx", "float16"), File("onnx", "int8"), File("openvino", "int8"))
    said: list[str] = []
    plan = Plan(files, by_name=frozenset({"model.int8.onnx"}))
    bundle = build.build(material, tmp_path / "small", "auto", said.append, plan)
    assert {entry.path for entry in bundle.manifest.files if entry.precision != "float32"} == {"model.float16.onnx"}
    assert [(each.what, each.asked_for) for each in bundle.manifest.left_out] == [
        ("model.int8.onnx", True),
        ("model.int8.xml", False),
    ]
    assert "RMS error" in bundle.manifest.left_out[0].reason
    assert any(line.startswith("left out model.int8.onnx: ") for line in said)
    assert not list(bundle.path.glob("model.int8*"))
    bundle.verify()
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def test_a_format_that_fails_does_not_take_others_with_it(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.formats import onnx_int8

    def broken(*rest: object) -> None:
        raise AssertionError("scale issue")

    monkeypatch.setattr(onnx_int8, "layers_of", broken)
    plan = Plan((File("onnx", "int8"), File("onnx", "float16")))
    bundle = build.build(material, tmp_path / "small", "auto", lambda line: None, plan)
    assert bundle.find("onnx", "float16") is not None
    (missing,) = bundle.manifest.left_out
    assert "AssertionError: scale issue" in missing.reason


def test_a_full_disk_is_no_fault_of_a_file(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every file would be left out for it, nothing is published."""
    from export.formats import onnx_int8

    def full(*rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_int8, "layers_of", full)
    with pytest.raises(UserError, match="Free some space"):
        build.build(material, tmp_path / "small", "auto", lambda line: None, Plan((File("onnx", "int8"),)))
    assert not (tmp_path / "small").exists()


def test_what_was_asked_for_by_name_and_is_wrong_is_an_error(bundle: Bundle) -> None:
    """After the others were published, and again when nothing has changed."""
    _end_without(bundle)
    missing = LeftOut(what="model.int8.onnx", reason="its RMS error is large", asked_for=False)
    in_all = bundle.manifest.model_copy(update={"left_out": (missing,)})
    _end_without(dataclasses.replace(bundle, manifest=in_all))
    named = bundle.manifest.model_copy(update={"left_out": (missing.model_copy(update={"asked_for": True}),)})
    with pytest.raises(UserError, match=r"model\.int8\.onnx is not right: its RMS error is large\.") as refused:
        _end_without(dataclasses.replace(bundle, manifest=named))
    assert refused.value.exit_code == 1


def test_max_drop_without_int8() -> None:
    with pytest.raises(UserError, match="--max-drop") as refused:
        variants.plan(["float16"], False, None, None, 1.0)
    assert refused.value.exit_code == 2


def test_int8_files_say_on_which_cpus_they_are_right(bundle: Bundle) -> None:
    entry = bundle.entry("onnx", "int8-raw")
    assert {verdict.cpu: verdict.passed for verdict in entry.cpus} == dict.fromkeys(CPU_KINDS, True)
    assert {"run", "same integers"} >= {verdict.proof for verdict in entry.cpus}
    assert entry.int8 is not None
    assert entry.int8.inputs == 21
    assert [layer.weights for layer in entry.int8.layers]
    if (ir := bundle.find("openvino", "int8-raw")) is not None:
        assert {verdict.cpu: verdict.passed for verdict in ir.cpus} == {"avx2": True, "vnni": True, "arm-dot": None}
    assert not bundle.entry("onnx", "float16").cpus


def test_preprocessing_that_is_half_a_grey_level_off(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in float64 before a file is written."""

    class Off(raw_input.FromRaw):
        def __init__(self, model: nn.Module, preprocessing: Preprocessing, *rest: object) -> None:
            mean = tuple(value + 0.5 / 255 for value in preprocessing.mean)
            super().__init__(model, preprocessing.model_copy(update={"mean": mean}), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(equality, "FromRaw", Off)
    with pytest.raises(ExportRefused, match="on real raw inputs"):
        build.build(material, tmp_path / "b", "auto", lambda line: None, Plan((File("pt2", "float32-raw"),)))


def test_a_border_that_is_padded_before_the_normalisation(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """The obvious way to put a normalisation into a padded convolution is wrong at the border, which must be seen."""

    class PadsPixels(raw_input.FromRaw):
        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            padded = nn.functional.pad(raw.to(self.dtype), (1, 1, 1, 1))
            first, *others = self.model.layers  # type: ignore[union-attr]
            x = nn.functional.conv2d(padded * self.factor - self.offset, first.weight, first.bias)
            output: torch.Tensor = nn.Sequential(*others)(x)
            return output

    model64 = copy.deepcopy(material.module).double()
    equality.require_equal_from_raw(model64, {"torch": model64}, material, 100, 50)
    monkeypatch.setattr(equality, "FromRaw", PadsPixels)
    with pytest.raises(ExportRefused, match="raw inputs"):
        equality.require_equal_from_raw(model64, {"torch": model64}, material, 100, 50)
