"""What a result says, in sentences: the same ones on every page.

Names stand between backquotes, as in Markdown. Which rows may be called the best is `bench.results.queries`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bench.machine.sensors import Reading
from bench.report.wording import TIMING_WORDS, milliseconds, number, per_s, spread_words
from bench.results.queries import champion, right_rows, subject_of
from bench.results.roofline import BINDS_FROM_PERCENT, Point, Survey, held_to
from bench.results.schema import Result, SubjectResult
from bench.results.studies import LeftOut, suite_run_of
from bench.results.terms import TIMINGS

# What a runtime says of itself in its settings and a reader wants to know of a machine.
VERSIONS = ("torch", "cuda", "cudnn", "onnxruntime", "openvino")


def fastest_words(results: Sequence[Result]) -> str:
    """Which file on which runtime is the fastest, and whether that is shown."""
    best = champion(results)
    if best is None:
        emulated = any(subject.emulated for result in results for subject in result.subjects)
        return f"Nothing that is right was measured{', but what is emulated' if emulated else ''}."
    row, subject = best.row, subject_of(best.result, best.row.subject)
    file = "" if subject.file is None else f" running `{subject.file.path}`"
    claim = f"`{row.subject}`{file} is the fastest"
    if best.next is not None and not best.shown:
        claim += f", but not shown to be faster than `{best.next.subject}` at batch {best.next.batch_size:,}"
    where = "" if len(results) == 1 else f" ({suite_run_of(best.result).words}, {machine_name(best.result)})"
    speed = spread_words(row.end_to_end_throughput_images_per_s)
    return f"{claim}: {speed} images/s end to end, in batches of {row.batch_size:,}{where}."


def verdict(results: Sequence[Result], left_out: Sequence[LeftOut]) -> str:
    """Whether all is well, or what is not, in one sentence."""
    judged = sum(subject.parity is not None for result in results for subject in result.subjects)
    wrong = [*problems(results), *(f"{entry.what} could not be measured" for entry in left_out if entry.failed)]
    if wrong:
        return f"Not all is well: {'; '.join(wrong)}. {judged} parity verdicts were made."
    return f"All {judged} parity verdicts are good, and every backend that can run here finished."


def problems(results: Iterable[Result]) -> list[str]:
    """What failed: parities first, then what did not finish."""
    subjects = [(subject, result) for result in results for subject in result.subjects]
    failed = [f"parity of {named(s, r)} failed" for s, r in subjects if s.parity is not None and not s.parity.passed]
    return failed + [f"{named(s, r)} did not finish" for s, r in subjects if s.failure is not None]


def named(subject: SubjectResult, result: Result) -> str:
    """A subject with the run that it is of."""
    return f"`{subject.label}` ({suite_run_of(result).words})"


def best(result: Result) -> Iterator[str]:
    """The lowest latency at the smallest batch and the highest throughput, of those that finished and are right."""
    rows = right_rows(result)
    if not rows:
        return
    smallest = min(row.batch_size for row in rows)
    timed = [row for row in rows if row.batch_size == smallest and row.device_resident_latency_ms.p50 is not None]
    if timed:
        quickest = min(timed, key=lambda row: row.device_resident_latency_ms.p50 or 0.0)
        yield (
            f"batch {smallest}: `{quickest.subject}` is the quickest, with a p50 of "
            f"{milliseconds(quickest.device_resident_latency_ms.p50)} ms on the device and "
            f"{milliseconds(quickest.end_to_end_latency_ms.p50)} ms end to end"
        )
    for timing in TIMINGS:
        _, place = max((row.throughput(timing).median, place) for place, row in enumerate(rows))
        row = rows[place]
        yield (
            f"highest throughput {TIMING_WORDS[timing]}: {spread_words(row.throughput(timing))} images/s, "
            f"`{row.subject}` at batch {row.batch_size:,}"
        )


def machine(results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """What was measured on what: the machine of the first, the versions and bundles of all."""
    environment = results[0].environment
    for gpu in environment.gpus:
        limit = "" if gpu.power_limit_w is None else f", may draw {gpu.power_limit_w:.0f} W"
        yield "GPU", f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB, driver {gpu.driver}{limit}"
    yield "CPU", f"{environment.cpu}, {environment.usable_cpus} of {environment.logical_cpus} usable"
    yield "memory", f"{environment.memory_bytes / 2**30:.0f} GiB"
    versions = {name: version for result in results for name, version in _runtimes(result)}
    versions = {"Python": environment.python} | versions | environment.versions
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "system", environment.platform
    yield "commit", environment.git_commit or "unknown (no git checkout)"
    for name, digest in dict.fromkeys((bundle.name, bundle.digest) for result in results for bundle in result.bundles):
        yield "bundle", f"{name}, manifest's SHA-256 {digest}"


def machine_name(result: Result) -> str:
    """The machine in a few words: its GPUs, or its CPU."""
    return ", ".join(gpu.name for gpu in result.environment.gpus) or result.environment.cpu


def _runtimes(result: Result) -> Iterator[tuple[str, str]]:
    for subject in result.subjects:
        yield from ((name, str(subject.settings[name])) for name in VERSIONS if name in subject.settings)


def peaks(survey: Survey, points: Sequence[Point], raw_bytes_per_image: int | None) -> Iterator[str]:
    """What the shares are shares of, and what reached it; what binding means; and, where the raw input's size is known,
    what end-to-end rows can't exceed.
    """
    work = survey.work
    yield (
        f"the model's work: {work.flops_per_image * 1e-6:,.3g} MFLOP and {work.activation_bytes_per_image * 1e-3:,.3g} "
        f"kB an image, {work.weight_bytes * 1e-6:,.3g} MB of weights a call, in float32"
    )
    for peak in held_to(survey, points):
        unit = "Gop/s" if peak.precision == "int8" else "GFLOP/s"
        yield (
            f"the peak of {peak.device} for {peak.precision} files, of which % of arithmetic and % of memory are "
            f"shares: {peak.flops_per_s * 1e-9:,.0f} {unit} ({peak.flops_probe}) and "
            f"{peak.copy_bytes_per_s * 1e-9:,.3g} GB/s, reading and writing counted ({peak.copy_probe})"
        )
        if peak.host_to_device_bytes_per_s is not None and raw_bytes_per_image is not None:
            yield (
                f"the limit of end-to-end rows: an image is {raw_bytes_per_image:,} bytes of raw input, and one copy "
                f"to the device was measured at {peak.host_to_device_bytes_per_s * 1e-9:,.3g} GB/s, which is "
                f"{per_s(peak.host_to_device_bytes_per_s / raw_bytes_per_image)} images/s for the copy alone"
            )
    yield (
        f"what binds is the resource that a row uses most, if that is at least {BINDS_FROM_PERCENT:g} % of its peak; "
        "else overheads, and how much of the time on the device arithmetic or memory accounts for"
    )


def readings(series: Sequence[Reading]) -> Iterator[str]:
    """The sensors before the first round and after the last."""
    for when, reading in (("before", series[0]), ("after", series[-1])):
        facts = [f"CPU at {number(reading.cpu_frequency_mhz, ',.0f')} MHz"]
        for gpu in reading.gpus:
            throttled = f", slowed down by: {', '.join(gpu.throttled_by)}" if gpu.throttled_by else ""
            facts.append(
                f"{gpu.name} at {number(gpu.sm_clock_mhz, ',')} MHz (memory {number(gpu.memory_clock_mhz, ',')}), "
                f"{number(gpu.temperature_celsius, '')} °C, {number(gpu.power_watts, '.0f')} W{throttled}"
            )
        yield f"{when} the rounds: {'; '.join(facts)}"


def not_measured(results: Iterable[Result], left_out: Iterable[LeftOut]) -> Iterator[str]:
    """What was left out, what can't run here, and what did not finish, each with its reason."""
    for entry in left_out:
        yield f"{entry.what}: {entry.reason}"
    for result in results:
        yield from (f"for lack of time, {line}" for line in result.settings.left_out)
        by_reason: dict[str, list[str]] = {}
        for skipped in result.skipped:
            by_reason.setdefault(skipped.reason, []).append(f"`{skipped.backend}`")
        for reason, backends in by_reason.items():
            yield f"{', '.join(backends)} ({suite_run_of(result).words}): {reason}"
        for subject in result.subjects:
            if subject.failure is not None:
                yield f"{named(subject, result)} {subject.failure.kind}: {subject.failure.message}"
