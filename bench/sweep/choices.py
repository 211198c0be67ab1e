"""What there is to sweep, and who of it goes on.

Owns the combinations of backend, variant and threads that a bundle and a machine have, and what is decided of each
after a look: to go on, or the reason not to. Knows neither how a look is taken nor what comes of it.

Not everything is looked at. First each file with all threads, on each runtime as it is by default; then with other
threads and with presets what is worth it: what came within half of the best. That neither would make anything twice as
fast is taken for granted: a sweep would else spend most of its time on looking at slow files in every way there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.backends.contract import Options, Profile, file_of
from bench.backends.registry import find_backend, registered
from bench.errors import EXIT_BAD_INPUT, EXIT_UNAVAILABLE, BenchError
from bench.results.queries import emulation_words
from bench.results.schema import Result, SubjectResult
from bench.results.studies import LeftOut
from bench.results.terms import label_of
from bench.run.plan import Choice, check_variants
from bench.sweep.contenders import MARGIN, chances, contenders
from export.bundle import FLOAT32, VARIANTS, Bundle, precision_of

# How far behind the best somebody may be who could be the best with other threads or as a preset.
WORTH_A_LOOK = 0.5
TOO_MANY = (
    "the time is enough for full rounds of {most}, and others came nearer to the best; it reached {reached}. Give it "
    "more with --time-limit"
)
NOT_REACHED = "the time was over before its turn came: give it more with --time-limit"


@dataclass(frozen=True)
class SweepRequest:
    """What was asked for. Nothing named: all that the bundle has, and all that can run here.

    `path` is where the bundle is for who uses it later; where that is a link, `bundle` is what it led to. `fresh`: what
    the folder has is forgotten, once it is known that there is something to measure.
    """

    command: str
    path: Path
    bundle: Bundle
    backends: tuple[str, ...]
    variants: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    threads: tuple[int, ...]
    time_limit_s: float
    timeout_s: float
    fresh: bool = False

    @property
    def most_threads(self) -> int:
        """Those of the reference."""
        return max(self.threads)


def offered(request: SweepRequest, reasons: dict[str, str | None]) -> tuple[list[Choice], list[LeftOut]]:
    """Every choice that was asked for, has a file, and can run here; and the backends that can't, by `reasons`.

    Raises BenchError: usage for a variant that doesn't exist, bad input for one that the bundle has no file of,
    unavailable for a backend that was named and can't run, or where none can.
    """
    check_variants(request.variants)
    backends = request.backends or tuple(name for name in registered() if find_backend(name).formats)
    absent = {name: reason for name in backends if (reason := reasons[name]) is not None}
    if absent and (request.backends or len(absent) == len(backends)):
        reasons_given = " ".join(f"{name} is not available: {reason}" for name, reason in absent.items())
        raise BenchError(reasons_given, EXIT_UNAVAILABLE)
    choices = [
        Choice(name, variant, threads)
        for name in backends
        if name not in absent
        for variant in _variants(name, request)
        if _has_file(request.bundle, name, variant)
        for threads in _threads(name, request)
    ]
    have = {choice.variant for choice in choices}
    missing = [variant for variant in request.variants if variant not in have]
    if missing or not choices:
        kind = f"{missing[0]} file" if missing else "file"
        raise BenchError(
            f"the bundle at {request.bundle.path} has no {kind} that a chosen backend runs ({', '.join(backends)}). "
            "Name other backends with --backend, or export the bundle again with what is missing.",
            EXIT_BAD_INPUT,
        )
    return choices, [LeftOut(what=name, reason=reason, failed=False) for name, reason in absent.items()]


def _has_file(bundle: Bundle, name: str, variant: str) -> bool:
    backend = find_backend(name)
    if backend.reference and variant != FLOAT32:
        return False
    return file_of(backend, bundle, Options(1, Profile.STRICT, not backend.reference, variant)) is not None


def _variants(name: str, request: SweepRequest) -> tuple[str, ...]:
    """What is slow to start takes minutes for every file: it is tried in float32 alone, unless somebody names it."""
    if slow_to_start(name) and name not in request.backends and not request.variants:
        return (FLOAT32,)
    return request.variants or VARIANTS


def _threads(name: str, request: SweepRequest) -> tuple[int, ...]:
    """On a GPU the CPU's threads compute nothing. A preset is a way to use many threads, and what is slow to start
    takes minutes: with few they are tried where somebody names them.
    """
    backend = find_backend(name)
    if backend.device != "cpu" or (backend.on_request and name not in request.backends):
        return (request.most_threads,)
    return request.threads


def waves(choices: Sequence[Choice], most_threads: int) -> tuple[list[Choice], list[Choice]]:
    """Whom to look at first, and whom later: who has a base there, to see whether it is worth it, and who is slow to
    start, so that others don't lose their turn by it.
    """

    def later(choice: Choice) -> bool:
        base = base_of(choice, most_threads)
        return slow_to_start(choice.backend) or (base != choice and base in choices)

    return [choice for choice in choices if not later(choice)], [choice for choice in choices if later(choice)]


def base_of(choice: Choice, most_threads: int) -> Choice:
    """The same file with all threads on the same runtime as it is by default; that may be the choice itself."""
    return Choice(default_of(choice.backend), choice.variant, most_threads)


def default_of(name: str) -> str:
    """The backend that a preset is one of, ``onnx-cpu`` for ``onnx-cpu-parallel``; any other is its own."""
    device = find_backend(name).device
    default = name.partition(f"-{device}")[0] + f"-{device}"
    return default if default in registered() else name


def slow_to_start(name: str) -> bool:
    """Whether a backend runs on request only, and not because it is a preset of another."""
    return find_backend(name).on_request and default_of(name) == name


def worth_a_look(
    second: Sequence[Choice], looks: Sequence[Result], request: SweepRequest
) -> tuple[list[Choice], list[LeftOut]]:
    """Whom of them to look at after the first, and for each of the others why not: its base is not worth it."""
    ruled_out, best = _ruled_out(looks, request), chances(contenders(looks))
    left: list[Choice] = []
    out: list[LeftOut] = []
    for choice in second:
        base = label(base_of(choice, request.most_threads), request.most_threads)
        if base in ruled_out:
            reason = ruled_out[base].reason
        elif base in best and best[base].share < 1 - WORTH_A_LOOK:
            reason = best[base].no_chance_words(WORTH_A_LOOK)
        else:
            left.append(choice)
            continue
        out.append(LeftOut(what=label(choice, request.most_threads), reason=f"as {base}: {reason}", failed=False))
    return left, out


def chosen(
    choices: Sequence[Choice], looks: Sequence[Result], request: SweepRequest, most: int
) -> tuple[list[Choice], list[LeftOut]]:
    """Whom to measure in full after the looks, the nearest to the best first and at most so many, and for each of the
    others why not.
    """
    seen = {subject.label for look in looks for subject in look.subjects}
    absent = {entry.backend: entry.reason for look in looks for entry in look.skipped}
    ruled_out, best = _ruled_out(looks, request), chances(contenders(looks))
    left: list[tuple[float, Choice]] = []
    out: list[LeftOut] = []
    for choice in choices:
        name = label(choice, request.most_threads)
        if name not in seen:
            out.append(LeftOut(what=name, reason=absent.get(name, NOT_REACHED), failed=True))
        elif name in ruled_out:
            out.append(ruled_out[name])
        elif name in best and best[name].share < 1 - MARGIN:
            out.append(LeftOut(what=name, reason=best[name].no_chance_words(MARGIN), failed=False))
        else:
            left.append((best[name].share if name in best else 1.0, choice))
    ranked = [choice for _, choice in sorted(left, key=lambda pair: pair[0], reverse=True)]
    for choice in ranked[most:]:
        name = label(choice, request.most_threads)
        reached = best[name].words if name in best else "nothing that it could be compared with"
        out.append(LeftOut(what=name, reason=TOO_MANY.format(most=most, reached=reached), failed=False))
    return ranked[:most], out


def _ruled_out(looks: Sequence[Result], request: SweepRequest) -> dict[str, LeftOut]:
    """Why those that were looked at go no further, by their labels; who may is not in it."""
    entries = {subject.label: _why_ruled_out(subject, request) for look in looks for subject in look.subjects}
    return {name: entry for name, entry in entries.items() if entry is not None}


def _why_ruled_out(subject: SubjectResult, request: SweepRequest) -> LeftOut | None:
    """A file that a runtime can't load is like a backend that can't run here: an error where somebody named it. One
    whose precision is emulated is measured in full where somebody named its variant, and not recommended even then.
    """
    if subject.failure is not None:
        refused = subject.placement is None and subject.failure.kind == "raised"
        words = "can't load its file here" if refused else "did not finish"
        failed = not refused or subject.backend in request.backends
        return LeftOut(what=subject.label, reason=f"{words}: {subject.failure.message}", failed=failed)
    if subject.parity is not None and not subject.parity.passed:
        reason = f"parity failed: {'; '.join(subject.parity.failures)}"
        return LeftOut(what=subject.label, reason=reason, failed=precision_of(subject.variant) == FLOAT32)
    if subject.variant not in request.variants and (emulated := emulation_words(subject)) is not None:
        return LeftOut(what=subject.label, reason=emulated, failed=False)
    return None


def label(choice: Choice, most_threads: int) -> str:
    """What a choice is called in the runs of a sweep."""
    threads = None if choice.threads == most_threads else choice.threads
    return label_of(choice.backend, choice.variant, threads)
