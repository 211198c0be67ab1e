"""`python -m export`: from a trained checkpoint to a bundle.

Owns the command line. The work is done in `build`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from trainer.recipes import DEFAULT_RECIPE

from export.fold.report import Strategy

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def export(
    recipe: Annotated[
        str, typer.Option(help="Whose training folder and bundle are meant by default.")
    ] = DEFAULT_RECIPE,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The weights. Default: artifacts/training/RECIPE/checkpoint.safetensors")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The bundle. Default: artifacts/bundles/RECIPE")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where MNIST lies, or is to be put.")] = Path("data"),
    strategy: Annotated[Strategy, typer.Option(help="How a shift gets over a border of zeros.")] = "auto",
) -> None:
    """Export a trained checkpoint as TorchScript and ONNX with every BatchNorm folded, and check every file."""
    start = time.perf_counter()
    weights = checkpoint or Path("artifacts/training") / recipe / "checkpoint.safetensors"
    target = out or Path("artifacts/bundles") / recipe

    from export import build, source

    described = source.describe(weights)
    current = build.up_to_date(target, build.fingerprint(described, strategy))
    if current is not None:
        print(f"nothing changed: {target} is up to date and every file is as it was published")
        return
    material = source.load(weights, described, data_dir)
    bundle = build.build(material, weights, target, strategy, print)
    for entry in bundle.manifest.files:
        print(
            f"  {entry.path:<20} {entry.bytes:>9,} bytes  "
            f"{entry.format}, {'folded' if entry.folded else 'unfolded control'}"
        )
    print(f"published {target} in {time.perf_counter() - start:.1f} s")
