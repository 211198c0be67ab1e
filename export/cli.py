"""`python -m export`: from a trained model to a bundle; `fold` and `explain` for single files.

Owns the command line. The work is done in `build` and `fold`.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from export.effort import Asked, Files
from export.fold.report import FoldReport, Strategy
from export.sources.framing import Interpolation
from trainer.errors import EXIT_NEGATIVE, EXIT_USAGE, UserError
from trainer.recipes import DEFAULT_RECIPE

if TYPE_CHECKING:
    from export.bundle import Bundle, FileEntry, Format, OutputKind
    from export.sources.ends import Given
    from export.sources.material import Material
    from export.sources.onnx_source import OnnxMaterial
    from export.sources.own import Own
    from export.variants import Plan
    from export.writing import Calibrated

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

StrategyOption = Annotated[
    Strategy,
    typer.Option(
        help="How a shift gets over a border of zeros. auto takes the cheapest way, and keeps a BatchNorm where every "
        "way costs more than it does; all folds those too; none folds nothing."
    ),
]


def _inputs(texts: list[str]) -> tuple[Given, ...]:
    from export.sources.ends import Given

    try:
        return tuple(map(Given.parse, texts))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _outputs(texts: list[str]) -> dict[str, OutputKind]:
    from export.sources.ends import parse_output

    try:
        return dict(map(parse_output, texts))
    except ValueError as error:
        raise typer.BadParameter(f"--output {error}") from None


def _sides(option: str, text: str | None) -> tuple[int, ...] | None:
    """``256`` or ``224x192``: one number of pixels, or height and width."""
    if text is None:
        return None
    try:
        sides = tuple(int(side) for side in text.split("x"))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise typer.BadParameter(f"{option} {text!r}: expected pixels, for example 256, or height x width, 224x224.")
    return sides


def _arguments(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"--model-args {text!r} is no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"--model-args {text!r} names no arguments; expected an object, like '{{\"a\": 1}}'.")
    return found


def _two_sizes(option: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        first, second = (int(part) for part in text.split(","))
    except ValueError:
        first = second = 0
    if min(first, second) < 1 or first == second:
        raise typer.BadParameter(f"{option} {text!r}: expected two different batch sizes, for example 16,3.")
    return first, second


def _say(line: str) -> None:
    """Where the output goes to a file or a pipe, too, as soon as it is said."""
    print(line, flush=True)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise typer.BadParameter(f"{option} {text!r}: expected numbers, for example 0.485,0.456,0.406.")
    return found


@app.callback(invoke_without_command=True)
def export(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Option(help="Whose training folder and bundle are meant by default.")
    ] = DEFAULT_RECIPE,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The weights. Default: artifacts/training/RECIPE/checkpoint.safetensors")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The bundle. Default: artifacts/bundles/RECIPE")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where MNIST lies, or is to be put.")] = Path("data"),
    strategy: StrategyOption = "auto",
    model: Annotated[
        str | None, typer.Option(help="A model of your own: module:factory, timm:NAME or torchvision:NAME.")
    ] = None,
    model_args: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="With --model: what it is made with, e.g. '{\"num_classes\": 37}'."),
    ] = None,
    onnx: Annotated[Path | None, typer.Option(help="An ONNX file, from anywhere, in the place of --model.")] = None,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="With --model: trace it, where torch.export doesn't take it. The ONNX file is then folded."
        ),
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="With --model: a file of its weights, safetensors or of torch.save.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="With timm:NAME or torchvision:NAME: the library's own weights.")
    ] = False,
    input: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SIZES[:DTYPE]",
            help="With --model or --onnx: the shape of one input, e.g. 3x224x224; with --model 3x224?x224? where "
            "height and width may vary. Of several inputs, once for each, in the model's order: image=3x224x224 "
            "mask=16:int64",
        ),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KIND",
            help="With --model or --onnx: what an output is made of: scores (of classes, along the first axis after "
            "the batch), values, choices (whole numbers), boxes, box_scores, box_classes. Default: scores of one row, "
            "else values, or choices. Repeatable.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="With --model or --onnx: inputs to check the files with: an .npz or .safetensors file of `inputs` "
            "and perhaps `labels`; an .npy file; or a folder of images, with a subfolder for each class or flat."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Take so many of --data, drawn evenly, or so many random ones. Default: all, or as many as a "
            "minute allows for.",
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW",
            help="Of images: the shorter side to N pixels, or height and width. Without it and --crop: what timm or "
            "torchvision declares.",
        ),
    ] = None,
    crop: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="Of images: take so many pixels in the centre.")
    ] = None,
    interpolation: Annotated[
        Interpolation | None, typer.Option(help="Of images: how they are resized. Default: bilinear, or as declared.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="With --model or --onnx: inputs are (x * scale - mean) / std.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="With --model or --onnx: one value, or one a channel: 0.485,0.456,0.406")
    ] = None,
    std: Annotated[str | None, typer.Option(help="With --model: as --mean.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="Also make float16, bfloat16 or int8, or these or float32 with -raw, which takes the raw input; 'all' "
            "makes what this machine can. Repeatable. The bundle holds what was asked for, not what it held before."
        ),
    ] = None,
    aoti: Annotated[
        bool, typer.Option("--aoti", help="Also compile the pt2 programs ahead of time, for this kind of machine.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="With --model or --onnx, and int8: other inputs, given like --data, to take ranges from."),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=2, help="Take so many of --calibration at most, drawn evenly. Default: all.")
    ] = None,
    check_batches: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="The two batch sizes at which every file is checked. Default: 500,7, or fewer where the model's "
            "activations are large.",
        ),
    ] = None,
    files: Annotated[
        Files | None,
        typer.Option(
            help="lean: what is deployed, and the reference. full: also the unfolded controls, the folded pt2 and the "
            "checkpoint. Default: full, and lean from 50 MB of weights on."
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With int8: by how many points top-1 may drop. Layers stay in float until it drops by no more, on a "
            "fifth of the calibration inputs, which need `labels`.",
        ),
    ] = None,
) -> None:
    """Export a trained model as TorchScript and ONNX with every BatchNorm folded, and check every file."""
    if context.invoked_subcommand is not None:
        return
    start = time.perf_counter()
    effort = Asked(
        # The article's network is cheap, and whoever says how many inputs are taken means it.
        all_inputs=model is None or samples is not None,
        batches=_two_sizes("--check-batches", check_batches),
        files=files,
    )
    from export import build, variants
    from export.sources import article, own

    asked = variant or []
    if onnx is not None:
        _refuse_with_onnx(
            {
                "--model": model,
                "--model-args": model_args,
                "--weights": weights,
                "--pretrained": pretrained or None,
                "--checkpoint": checkpoint,
                "--aoti": aoti or None,
                "--trace": trace or None,
                "--check-batches": check_batches,
                "--files": files,
            }
        )
    source = model if onnx is None else str(onnx)
    if source is not None:
        said = own.Own(
            source,
            _arguments(model_args),
            weights,
            pretrained,
            _inputs(input or []),
            data,
            calibration,
            scale,
            _numbers("--mean", mean),
            _numbers("--std", std),
            samples,
            calibration_samples,
            _sides("--resize", resize),
            _sides("--crop", crop),
            interpolation,
            _outputs(output or []),
        )
        scratch = Path(context.with_resource(tempfile.TemporaryDirectory(prefix="ninefold-")))
        if onnx is not None:
            target = out or Path("artifacts/bundles") / onnx.stem
            _end_without(_of_onnx(said, target, strategy, asked, max_drop, scratch))
            return
        target = out or Path("artifacts/bundles") / source.rpartition(":")[2]
        material = own.load(said, _say, scratch)
        if trace or isinstance(material.input.shape[0], int):
            if check_batches is not None or files is not None:
                raise UserError("--check-batches and --files are for models that torch.export takes.", EXIT_USAGE)
            _end_without(_of_traced(said, material, target, strategy, asked, max_drop, scratch))
            return
        plan = _plan_of(said, material, asked, aoti, max_drop)
    else:
        for name, given in (
            ("--weights", weights),
            ("--pretrained", pretrained or None),
            ("--trace", trace or None),
            ("--model-args", model_args),
            ("--input", input),
            ("--output", output),
            ("--data", data),
            ("--samples", samples),
            ("--resize", resize),
            ("--crop", crop),
            ("--interpolation", interpolation),
            ("--calibration", calibration),
            ("--calibration-samples", calibration_samples),
            ("--scale", scale),
            ("--mean", mean),
            ("--std", std),
        ):
            if given is not None:
                raise typer.BadParameter(f"{name} goes with --model or --onnx, a model of your own.")
        path = checkpoint or Path("artifacts/training") / recipe / "checkpoint.safetensors"
        target = out or Path("artifacts/bundles") / recipe
        described = article.describe(path)
        plan = variants.plan(asked, aoti, None, None, max_drop)
        fingerprint = build.fingerprint(described, strategy, plan, article.calibration_identity(), effort)
        if (there := build.up_to_date(target, fingerprint)) is not None:
            print(f"nothing changed: {target} is up to date and every file is as it was published")
            _end_without(there)
            return
        material = article.load(path, described, data_dir, calibrated=plan.calibrated)
    for missing in plan.left_out:
        print(f"left out {missing.what}: {missing.reason}")
    bundle = build.build(material, target, strategy, _say, plan, effort)
    _print_files(bundle)
    print(f"published {target} in {time.perf_counter() - start:.1f} s")
    _end_without(bundle)


def _refuse_with_onnx(options: dict[str, object]) -> None:
    """Raises BadParameter for an option that says something of a model of torch."""
    for name, given in options.items():
        if given is not None:
            raise typer.BadParameter(f"{name} is for a model of torch; with --onnx the file is all there is.")


def _plan_of(
    said: Own,
    material: Calibrated,
    asked: list[str],
    aoti: bool,
    max_drop: float | None,
    formats: tuple[Format, ...] | None = None,
) -> Plan:
    """What to make of a user's own model; `formats` are those that it can be written as, None for all."""
    from export import variants

    uncalibrated = None if material.calibration else "int8 needs inputs to take its ranges from: --calibration"
    batch = material.input.shape[0]
    if isinstance(batch, int):
        uncalibrated = f"int8 is calibrated in batches, and this file takes {batch} at a time and no other number"
    raw_refusal = variants.raw_refusal(material.preprocessing)
    if material.more_inputs:
        raw_refusal = "the preprocessing is put before networks of one input alone"
    if material.more_inputs or len(material.outputs) > 1:
        uncalibrated = "int8 is made of networks with one input and one output alone"
    plan = variants.plan(asked, aoti, raw_refusal, uncalibrated, max_drop, formats)
    if max_drop is not None and material.calibration is not None and material.calibration.labels is None:
        raise UserError(f"--max-drop needs `labels` in --calibration {said.calibration}: what drops is top-1.")
    return plan


def _of_onnx(
    said: Own, target: Path, strategy: Strategy, asked: list[str], max_drop: float | None, scratch: Path
) -> Bundle:
    """The bundle of an ONNX file, published at `target`."""
    from export.bundle import MANIFEST_NAME
    from export.sources import onnx_source
    from trainer.publish import refuse_foreign

    refuse_foreign(target, MANIFEST_NAME)  # before anything slow
    return _published(said, onnx_source.load(said, _say, scratch), target, strategy, asked, max_drop)


def _of_traced(
    said: Own,
    material: Material,
    target: Path,
    strategy: Strategy,
    asked: list[str],
    max_drop: float | None,
    scratch: Path,
) -> Bundle:
    """The bundle of a model that is traced, published at `target`."""
    from export.sources.traced import traced

    if material.more_inputs:
        raise UserError("A model that is traced takes one input; this one takes several.")
    print("tracing the model, to ONNX and TorchScript: what its code decides by its numbers stays as it is decided now")
    return _published(said, traced(material, scratch), target, strategy, asked, max_drop)


def _published(
    said: Own, material: OnnxMaterial, target: Path, strategy: Strategy, asked: list[str], max_drop: float | None
) -> Bundle:
    """The bundle of an ONNX file, published at `target`."""
    start = time.perf_counter()
    from export.sources import onnx_source

    plan = _plan_of(said, material, asked, False, max_drop, onnx_source.FORMATS)
    for missing in plan.left_out:
        print(f"left out {missing.what}: {missing.reason}")
    from export import onnx_build  # imports torch, for which nobody should wait to learn of a mistake

    bundle = onnx_build.build(material, target, strategy, _say, plan)
    _print_files(bundle)
    print(f"published {target} in {time.perf_counter() - start:.1f} s")
    return bundle


@app.command()
def fold(
    file: Annotated[Path, typer.Argument(help="An ONNX file, from anywhere.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folded file.")],
    strategy: StrategyOption = "auto",
    unchecked: Annotated[
        bool,
        typer.Option("--unchecked", help="Write the file where the two can't be compared; the exit code is then 1."),
    ] = False,
) -> None:
    """Fold the BatchNorms of an ONNX file; everything else in it stays as it was."""
    from export.fold.onnx_model import fold_onnx

    result = fold_onnx(file, out, strategy, unchecked=unchecked)
    _print_report(result.report)
    if result.difference is not None:
        print(f"outputs of the two files differ by {result.difference:.1e} (relative, optimisations off)")
    print(f"wrote {out}")
    if result.difference is None:
        print(f"the outputs were not compared: {result.not_run}")
        raise typer.Exit(EXIT_NEGATIVE)


@app.command()
def explain(
    place: Annotated[Path, typer.Argument(metavar="BUNDLE_OR_FILE", help="A bundle, or an ONNX file.")],
    strategy: StrategyOption = "auto",
) -> None:
    """Say of each BatchNorm where it stood and what became of it, or, for an ONNX file, would become of it.

    Of int8, which layers its error comes from, and which kinds of CPU it is right on.
    """
    if place.is_dir():
        from export.bundle import Bundle

        manifest = Bundle.open(place).manifest
        _print_report(manifest.fold)
        if manifest.fold_for_torch is not None:
            print("in the files that torch runs:")
            _print_report(manifest.fold_for_torch)
        for entry in manifest.files:
            _print_int8(entry)
        for missing in manifest.left_out:
            print(f"left out {missing.what}: {missing.reason}")
        return
    from export.fold.onnx_model import explain_onnx

    _print_report(explain_onnx(place, strategy))
    _print_saturating(place)


def _end_without(bundle: Bundle) -> None:
    """Raises UserError where a file was asked for by name and is not right; the others are published."""
    lacking = [missing for missing in bundle.manifest.left_out if missing.asked_for]
    if lacking:
        raise UserError(
            " ".join(f"{missing.what} is not right: {missing.reason}." for missing in lacking)
            + f" The other files are published in {bundle.path}.",
            EXIT_NEGATIVE,
        )


def _print_files(bundle: Bundle) -> None:
    width = max(len(entry.path) for entry in bundle.manifest.files)
    for entry in bundle.manifest.files:
        kind = "folded" if entry.folded else "unfolded control"
        size = entry.bytes + sum(companion.bytes for companion in entry.companions)
        print(f"  {entry.path:<{width}} {size:>9,} bytes  {entry.format}, {entry.variant}, {kind}")


def _print_int8(entry: FileEntry) -> None:
    """Of an int8 file: its layers, first those that its error comes from, and a verdict for each kind of CPU."""
    from export.bundle.int8 import CPU_WORDS

    if entry.int8 is not None and entry.format == "onnx":  # OpenVINO's is made from it
        found = entry.int8
        named = {layer.name: f"{layer.name} ({layer.weights})" for layer in found.layers}
        width = max(map(len, named.values()), default=0)
        print(f"{entry.path}: RMS error {found.error_percent:.2f} % of the outputs' spread ({found.inputs} inputs)")
        for layer in found.layers:
            kept = ", and so it is" if layer.in_float else ""
            print(
                f"  {named[layer.name]:<{width}}  {layer.multiply_adds_percent:5.1f} % of the products; "
                f"in float the error would be {layer.error_percent:.2f} %{kept}"
            )
    for cpu in entry.cpus:
        verdict = {True: "right", False: "wrong", None: "not known"}[cpu.passed]
        error = "" if cpu.rms_error_percent is None else f", RMS error {cpu.rms_error_percent:.2f} %"
        flips = "" if cpu.flips is None else f", {cpu.flips} flips of {cpu.images}"
        layers = f"; can saturate: {', '.join(cpu.layers)}" if cpu.layers else ""
        print(f"{entry.path} on {CPU_WORDS[cpu.cpu]}: {verdict} ({cpu.proof}{error}{flips}){layers}")


def _print_saturating(file: Path) -> None:
    """Of an ONNX file from anywhere: the integer layers whose sums of two products can leave 16 bits."""
    from export.int8.layers import integer_layers, optimised

    for layer in integer_layers(optimised(file)):
        if layer.saturating.any():
            print(
                f"saturates {layer.name}: on x86 without VNNI {int(layer.saturating.sum())} of "
                f"{layer.saturating.size} pairs of products can leave 16 bits"
            )


def _print_report(report: FoldReport) -> None:
    for norm in report.folded:
        print(f"folded {norm.name}: {norm.method}, into {', '.join(norm.into)}; off by {norm.error:.1e} (float64)")
    for kept in report.kept:
        print(f"kept   {kept.name}: {kept.reason}")
    for other in report.simplified:
        print(f"simplified {other.name}: {other.method}, into {', '.join(other.into)}")
    print(f"{len(report.folded)} BatchNorms folded, {len(report.kept)} kept")
