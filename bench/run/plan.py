"""What a run consists of: which backends run which files of which bundles, and how they are measured.

Owns the plan that every run starts from, and how its backends, variants and bundles become subjects: a backend with
the one file that it runs. Starts nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bench.backends.contract import Backend, Device, Options, Profile, file_of
from bench.backends.registry import find_backend, registered
from bench.errors import EXIT_BAD_INPUT, EXIT_USAGE, BenchError
from bench.results.schema import Row, Skipped
from bench.results.terms import CONTROL_SUFFIX, label_of
from export.bundle import FLOAT32, VARIANTS, Bundle, BundleError, FileEntry, Format, Precision

Progress = Callable[[str, float], None]
"""Told what is being done and the share of the run that is done (0 to 1)."""
Note = Callable[[str], None]
"""Told, in a sentence, what is to be known of the run at once."""
Listener = Callable[[Sequence[Row]], None]
"""Told the rows that are known so far."""


SUFFIXES: dict[Format, str] = {"pt2": ".pt2", "torchscript": ".ts", "onnx": ".onnx"}
"""How the files' names end that an export can leave out."""


@dataclass(frozen=True)
class Choice:
    """A backend with the variant of the file that it is to run, and the threads of its pool."""

    backend: str
    variant: str = FLOAT32
    threads: int | None = None
    """None: the plan's."""


@dataclass(frozen=True)
class Selection:
    """What to run, of what there is.

    Attributes:
        bundles: what to run, in the same rounds; the first is what the others are compared with.
        backends: names, or None for all that are available here, but those that run on request only.
        variants: of the files; each backend runs those that the bundle has for it.
        choices: in place of `variants`, and of `backends` where these are None, each combination by itself. Nobody
            named them: one that can't run, or can't load its file, is a finding and not the end of the run.
        device: where no backend is named, only those on this device; None is all of them.
        control: the backends that also run the first bundle's unfolded file, if they run its folded one.
        reference: where no backend is named, whether eager torch, with which the others are compared, runs too.
    """

    bundles: tuple[Path, ...]
    backends: tuple[str, ...] | None = None
    variants: tuple[str, ...] = (FLOAT32,)
    choices: tuple[Choice, ...] | None = None
    device: Device | None = None
    control: tuple[str, ...] = ()
    reference: bool = True


@dataclass(frozen=True)
class Rounds:
    """How everybody is measured: in rounds, nested in processes.

    Attributes:
        batch_sizes: images of a call, each for itself.
        block_s: how long one timed block lasts, in seconds.
        count: how often everybody gets their turn at every batch size, in each process. None: until more rounds would
            tell little more (see `bench.results.derive.enough`), or the process's share of the time is over.
        processes: how often everybody is started anew. None: until the time is over, or `bound` is decided.
        bound: with `processes` None, processes go on until every ratio against the first bundle lies on one side of it
            with its whole interval.
        time_limit_s: no further process or round begins when the run has taken this long; None is no limit.
        fitted: nobody named the batch sizes: where the limit is too short for them, fewer are measured.
        limit_is_default: nobody named the limit either: it may be longer where everything takes long.
        early_rows: warm up for a batch size right before its first round, so that the first rows come early. Else all
            are warm before the first round.
    """

    batch_sizes: tuple[int, ...]
    block_s: float
    count: int | None = None
    processes: int | None = 1
    bound: float | None = None
    time_limit_s: float | None = None
    fitted: bool = False
    limit_is_default: bool = False
    early_rows: bool = False


@dataclass(frozen=True)
class Plan:
    """A run: with nothing else said, the parity alone.

    Attributes:
        timeout_s: how long a worker may take for one answer.
        rounds: how to measure; None leaves the parity.
        survey: also measure the machine's peaks, for the roofline (some seconds).
        parity_inputs: of the oracle, the first so many; None: all, or what there is time for.
        bisect: after which verdicts on an ONNX backend to look for the first node that diverges.
        command: the command line, for the result.
    """

    selection: Selection
    threads: int
    profile: Profile
    timeout_s: float
    rounds: Rounds | None = None
    survey: bool = False
    parity_inputs: int | None = None
    bisect: Literal["never", "failed", "always"] = "never"
    command: str | None = None


@dataclass(frozen=True)
class Subject:
    """A backend with the file it runs. `letter` tells the bundles of a run apart; None where there is but one."""

    backend: Backend
    bundle: Bundle
    letter: str | None
    options: Options
    label: str
    control: bool = False

    @property
    def entry(self) -> FileEntry | None:
        """The file; None for the backend that computes nothing."""
        return file_of(self.backend, self.bundle, self.options)

    @property
    def precision(self) -> Precision:
        """That of the file, which decides what its logits are held to."""
        return FLOAT32 if self.entry is None else self.entry.precision


def opened(path: Path, *, verified: bool = True) -> Bundle:
    """The bundle with every hash checked, or left to who reads the files. Raises BenchError (bad input)."""
    try:
        bundle = Bundle.open(path.resolve())
        if verified:
            bundle.verify()
    except BundleError as error:
        raise BenchError(str(error), EXIT_BAD_INPUT) from None
    return bundle


def batch_sizes(bundles: Sequence[Path], given: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes to measure, each once: those given, else the default ones, else the one that a bundle takes.

    Raises BenchError: bad input for bundles that take no common one, usage for one given that a bundle does not take.
    """
    fixed = {path: batch for path in bundles if (batch := opened(path, verified=False).manifest.fixed_batch)}
    if not fixed:
        return tuple(sorted(set(given or default)))
    path, only = next(iter(fixed.items()))
    if len(set(fixed.values())) > 1:
        words = ", ".join(f"{each} {batch}" for each, batch in fixed.items())
        raise BenchError(f"these bundles take no common batch size: {words}. Compare others.", EXIT_BAD_INPUT)
    if refused := sorted(set(given or ()) - {only}):
        raise BenchError(
            f"the files of the bundle at {path} take {only} inputs at a time and no other number; --batch-size "
            f"{refused[0]} is another. Leave it out, or export the model with a batch that is not fixed.",
            EXIT_USAGE,
        )
    return (only,)


def lettered(bundles: list[Bundle]) -> list[tuple[str | None, Bundle]]:
    """A, B, C … before each bundle, None where there is but one."""
    return [(chr(ord("A") + place) if len(bundles) > 1 else None, bundle) for place, bundle in enumerate(bundles)]


def select(bundles: list[tuple[str | None, Bundle]], plan: Plan) -> tuple[list[Subject], list[Skipped]]:
    """The subjects of a run, and the backends that nobody named and a bundle has no file for. Raises BenchError."""
    selection = plan.selection
    choices = selection.choices or _choices(selection)
    subjects: list[Subject] = []
    skipped: list[Skipped] = []
    for (name, chosen), (letter, bundle) in itertools.product(_by_backend(choices).items(), bundles):
        backend = find_backend(name)
        first = letter == bundles[0][0]
        if not backend.formats:
            if first:
                subjects.append(_subject(chosen[0], bundle, None, plan, folded=False))
            continue
        with_files = [subject for choice in chosen for subject in _with_file(choice, bundle, letter, plan)]
        made = list({subject.label: subject for subject in with_files}.values())
        if not made:
            wanted = ", ".join(dict.fromkeys(choice.variant for choice in chosen))
            reason = _of_a_file(backend, bundle) or (
                f"the bundle at {bundle.path} has no {' or '.join(backend.formats)} file ({wanted}). Export it again: "
                f"python -m export --help says which options make one.{_left_out_of(bundle, backend)}"
            )
            if selection.backends is not None:
                raise BenchError(f"{name}: {reason}", EXIT_BAD_INPUT)
            skipped.append(Skipped(backend=name, reason=reason))
        subjects += made
        control = _control(made, plan) if name in selection.control and first else None
        if control is not None:
            subjects.append(control)
    _require_variants(selection, subjects)
    if selection.control and not any(subject.control for subject in subjects):
        names = ", ".join(_by_backend(choices))
        raise BenchError(
            f"--control measures a folded file against its unfolded one, but none of the chosen backends ({names}) "
            f"has both in this bundle. Choose onnx-cpu, for example.{_left_out_of(bundles[0][1])}",
            EXIT_USAGE,
        )
    return subjects, skipped


def has_torch_program(bundle: Bundle) -> bool:
    """Whether there is a model of torch in it: a bundle that was made of an ONNX file has none."""
    return bundle.find("pt2", folded=False) is not None


def _of_a_file(backend: Backend, bundle: Bundle) -> str | None:
    """Why a bundle can have no file for a backend, in words, where it was made of an ONNX file; else None."""
    if has_torch_program(bundle) or {"onnx", "openvino"}.intersection(backend.formats):
        return None
    return f"it runs programs of torch.export, and the bundle of {bundle.manifest.source.factory} has none"


def _left_out_of(bundle: Bundle, backend: Backend | None = None) -> str:
    """What the export left out, that is of a format that the backend runs, and why; else nothing."""
    suffixes = SUFFIXES.values() if backend is None else [SUFFIXES.get(each, each) for each in backend.formats]
    said = [entry for entry in bundle.manifest.left_out if any(suffix in entry.what for suffix in suffixes)]
    return "".join(f" The export left out {entry.what}: {entry.reason}." for entry in said)


def check_variants(variants: Sequence[str]) -> None:
    """Raises BenchError (usage) for a name that is no variant."""
    if unknown := [variant for variant in variants if variant not in VARIANTS]:
        raise BenchError(f"unknown variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}.", EXIT_USAGE)


def _choices(selection: Selection) -> tuple[Choice, ...]:
    """Every backend that was named, or that runs without being named, with every variant."""
    check_variants(selection.variants)
    unasked = (name for name in registered() if _runs_unasked(find_backend(name), selection))
    return tuple(Choice(name, variant) for name in selection.backends or unasked for variant in selection.variants)


def _runs_unasked(backend: Backend, selection: Selection) -> bool:
    if backend.on_request or selection.device not in (None, backend.device):
        return False
    return selection.reference or not backend.reference


def _by_backend(choices: Sequence[Choice]) -> dict[str, list[Choice]]:
    grouped: dict[str, list[Choice]] = {}
    for choice in dict.fromkeys(choices):
        grouped.setdefault(choice.backend, []).append(choice)
    return grouped


def _with_file(choice: Choice, bundle: Bundle, letter: str | None, plan: Plan) -> list[Subject]:
    """The subject of a choice, none where the bundle has no such file. The reference runs but its one file."""
    backend = find_backend(choice.backend)
    if backend.reference:
        choice = replace(choice, variant=FLOAT32)
    kinds = [False] if backend.reference else [True, False]
    made = [_subject(choice, bundle, letter, plan, folded) for folded in kinds]
    return [subject for subject in made if subject.entry is not None][:1]


def _subject(choice: Choice, bundle: Bundle, letter: str | None, plan: Plan, folded: bool) -> Subject:
    options = Options(choice.threads or plan.threads, plan.profile, folded, choice.variant)
    other_threads = None if options.threads == plan.threads else options.threads
    label = label_of(choice.backend, choice.variant, other_threads, letter)
    return Subject(find_backend(choice.backend), bundle, letter, options, label)


def _control(made: Sequence[Subject], plan: Plan) -> Subject | None:
    """The float32 file's unfolded twin, where both are there."""
    for subject in made:
        options = replace(subject.options, folded=False)
        if subject.options.folded and subject.options.variant == FLOAT32:
            twin = replace(subject, options=options, label=subject.label + CONTROL_SUFFIX, control=True)
            return twin if twin.entry is not None else None
    return None


def _require_variants(selection: Selection, subjects: Sequence[Subject]) -> None:
    """Raises BenchError (bad input) for a variant that was asked for and that no backend has a file of."""
    have = {subject.options.variant for subject in subjects}
    missing = [variant for variant in selection.variants if variant not in have]
    if missing and selection.choices is None and selection.variants != (FLOAT32,):
        raise BenchError(
            f"no backend that was chosen has a {missing[0]} file in this bundle. Export it again with --variant "
            f"{missing[0]}, or name a backend that runs such files with --backend.",
            EXIT_BAD_INPUT,
        )
