"""Results with figures of one's own, for what is decided by figures; and a machine on which runs take no time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bundles import tamper

from bench.backends.contract import Emulation
from bench.results.schema import BundleFacts, Failure, FileFacts, Percentiles, Ratio, Result, Row
from bench.results.statistics import PairedRatio, Spread
from bench.results.studies import Sweep
from bench.results.terms import label_of
from bench.run.plan import Choice, Plan
from export.bundle import Bundle
from export.bundle.verdict import Flip

MB = 10**6
BOUND = 1.1


@dataclass(frozen=True)
class Figures:
    """What is found for a choice: by batch size, images per second, and p99 in ms with its upper bound, end to end. The
    bound is `BOUND` times the p99 where none is given.
    """

    per_s: Mapping[int, float] = field(default_factory=lambda: {1: 100.0})
    p99_ms: Mapping[int, float] = field(default_factory=dict)
    p99_upper_ms: Mapping[int, float | None] | None = None
    flips: int = 0
    top1_percent: float = 99.0
    file: str = "model.onnx"
    file_bytes: int = 2 * MB
    memory_bytes: int = 200 * MB
    wrong: str | None = None
    failure: Failure | None = None
    loaded: bool = True
    emulated: Emulation | None = None


World = Mapping[Choice, Figures]
TORCH = Choice("torch-cpu", "float32", 2)


def result_of(template: Result, world: World, bundle: Bundle, most_threads: int = 2) -> Result:
    """A result of a run of these, all else as in `template`, which is a real one of onnx-cpu."""
    real, row = template.subjects[0], template.rows[0]
    subjects, rows, ratios = [], [], []
    assert real.placement is not None
    for choice, figures in world.items():
        label = label_of(choice.backend, choice.variant, None if choice.threads == most_threads else choice.threads)
        assert real.parity is not None
        parity = replace(
            real.parity,
            passed=figures.wrong is None,
            failures=() if figures.wrong is None else (figures.wrong,),
            flips=tuple(Flip(place, 1, 1, 2, 0.1) for place in range(figures.flips)),
            top1_percent=figures.top1_percent,
            precision=choice.variant.removesuffix("-raw"),
        )
        changes: dict[str, Any] = {
            "label": label,
            "backend": choice.backend,
            "variant": choice.variant,
            "threads": choice.threads,
            "parity": None if figures.failure else parity,
            "peak_memory_bytes": figures.memory_bytes,
            "failure": figures.failure,
            "placement": replace(real.placement, emulated=figures.emulated) if figures.loaded else None,
            "file": FileFacts(
                path=figures.file,
                sha256="0" * 64,
                folded=True,
                precision=parity.precision,
                opset=None,
                bytes=figures.file_bytes,
            ),
        }
        subjects.append(real.model_copy(update=changes))
        for batch_size, per_s in {} if figures.failure else figures.per_s.items():
            p99_ms = figures.p99_ms.get(batch_size)
            upper_ms = None if p99_ms is None else BOUND * p99_ms
            if figures.p99_upper_ms is not None:
                upper_ms = figures.p99_upper_ms.get(batch_size)
            rows.append(_row(row, label, batch_size, per_s, p99_ms, upper_ms))
            torch = world.get(TORCH)
            if torch is not None and choice != TORCH:
                ratios.append(_ratio(label, batch_size, per_s / torch.per_s[batch_size]))
    facts = BundleFacts(letter=None, path=str(bundle.path), name=bundle.manifest.name, digest=bundle.digest)
    changed = {"subjects": tuple(subjects), "rows": tuple(rows), "ratios": tuple(ratios), "bundles": (facts,)}
    settings = template.settings.model_copy(update={"threads": most_threads})
    return template.model_copy(update=changed | {"settings": settings, "samples": (), "skipped": ()})


def _row(row: Row, label: str, batch_size: int, per_s: float, p99_ms: float | None, p99_upper_ms: float | None) -> Row:
    spread = Spread(per_s, per_s, per_s, per_s * 0.99, per_s * 1.01, 7)
    call_ms = 1e3 * batch_size / per_s
    latency = Percentiles(p50=call_ms, p50_upper=None, p90=None, p90_upper=None, p99=p99_ms, p99_upper=p99_upper_ms)
    return row.model_copy(
        update={
            "subject": label,
            "batch_size": batch_size,
            "device_resident_throughput_images_per_s": spread,
            "end_to_end_throughput_images_per_s": spread,
            "end_to_end_latency_ms": latency,
        }
    )


def _ratio(label: str, batch_size: int, value: float) -> Ratio:
    return Ratio(
        against="torch",
        numerator=label,
        denominator="torch-cpu",
        batch_size=batch_size,
        timing="end_to_end",
        throughput_ratio=PairedRatio(value, value * 0.99, value * 1.01, 0.95, 7),
    )


def sweep_of(template: Result, world: World, bundle: Bundle) -> Sweep:
    """A sweep of one full run."""
    run = result_of(template, world, bundle)
    return Sweep(
        schema_version=1,
        kind="sweep",
        started_at=datetime.now(UTC),
        finished_at=datetime.now(UTC),
        command="bench sweep",
        time_limit_s=60,
        bundle=run.bundles[0],
        input=bundle.manifest.input,
        output=bundle.manifest.output,
        preprocessing=bundle.manifest.preprocessing,
        runs=(run,),
        looks=(),
        skipped=(),
    )


def with_variants(bundle: Path, copy: Path, variants: Sequence[str]) -> Path:
    """A copy whose manifest says that it has ONNX files in these variants, and no others but float32's of each format:
    one file under many names, for who only reads the manifest.
    """

    def change(fields: dict[str, Any]) -> None:
        plain = [entry for entry in fields["files"] if entry["precision"] == "float32" and entry.get("takes") != "raw"]
        kept = [entry for entry in plain if entry["format"] in ("pt2", "torchscript", "onnx")]
        (real,) = [entry for entry in kept if entry["path"] == "model.onnx"]
        for variant in variants:
            precision, _, raw = variant.partition("-")
            kept.append(real | {"precision": precision, "takes": "raw" if raw else "preprocessed"})
        fields["files"] = kept

    return tamper(bundle, copy, manifest=change)


class Machine:
    """Takes the place of `bench.run.rounds.run`: finds what `world` says, or raises what `errors` says for a turn."""

    def __init__(self, template: Result, bundle: Bundle) -> None:
        self.template, self.bundle = template, bundle
        self.plans: list[Plan] = []
        self.errors: dict[int, BaseException] = {}
        self.world: dict[Choice, Figures] = {}

    def __call__(self, plan: Plan, progress: Callable[[str, float], None]) -> Result:
        self.plans.append(plan)
        if (error := self.errors.get(len(self.plans))) is not None:
            raise error
        progress("rounds", 0.5)
        choices, rounds = plan.selection.choices, plan.rounds
        assert choices is not None
        assert rounds is not None
        sizes = rounds.batch_sizes
        world = {choice: self.world.get(choice, Figures(dict.fromkeys(sizes, 100.0))) for choice in choices}
        return result_of(self.template, world, self.bundle, plan.threads)
