"""The runs of a sweep on one device, and how they share its time.

Owns how long the rounds are, who starts together, and what is shown of the progress. Knows nothing of who is worth
measuring.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.backends.contract import Profile
from bench.machine.environment import usable_cpus
from bench.results.schema import Result
from bench.run.plan import Choice, Plan, Progress, Rounds, Selection
from bench.run.rounds import run
from bench.sweep.choices import SweepRequest, slow_to_start
from bench.sweep.folder import SweepFolder

# Three rounds have a middle one. A block has at least one call.
LOOK_ROUNDS, LOOK_BLOCK_S = 3, 0.02
FULL_PROCESSES, FULL_BLOCK_S = 3, 0.05
# No look begins after this share of the time: what is known by then is worth full rounds.
LOOKS_SHARE = 0.65
# What a choice takes of a full run: three processes, which an interval needs, of 4 s each to start, parity and warming
# up, and some rounds (13 took 119 s with one process of six, on two cores that had other work too). So many are
# measured whatever the time.
FULL_S, FEWEST = 18.0, 8
# What the workers of a run need each, the largest of torch's 860 MB, most of the others 200; together they get half of
# the memory. In a round of more of them, the last is too far from the first.
WORKER_BYTES, LARGEST_RUN = 400 * 2**20, 32
# How many may start on one CPU: a worker's imports take some seconds of it, and its patience ends with `timeout_s`. One
# that compiles does so for half a minute and more.
STARTING_PER_CPU, COMPILING_PER_CPU = 8, 2


@dataclass(frozen=True)
class Clock:
    """The time of the `place`-th device of `devices`, which share it evenly; `began` is on the clock of
    `time.monotonic`.
    """

    began: float
    limit_s: float
    place: int
    devices: int

    def share(self, of_device: float) -> float:
        """Where a share of the device's time is in the whole sweep (0 to 1)."""
        return (self.place + of_device) / self.devices

    @property
    def room(self) -> int:
        """How many choices there is time for in full rounds. It depends on the limit alone, not on what is left of it:
        a sweep that goes on later has the same.
        """
        return max(FEWEST, int((1 - LOOKS_SHARE) * self.limit_s / self.devices / FULL_S))

    def left_s(self, of_device: float) -> float:
        """Seconds until that share of the device's time is over; 0 when it is."""
        return max(0.0, self.began + self.share(of_device) * self.limit_s - time.monotonic())


@dataclass(frozen=True)
class DeviceRuns:
    """The runs on one device: a ratio is formed on one device only. The reference is in all of them, unless it can't
    run here.
    """

    reference: Choice | None
    batch_sizes: tuple[int, ...]
    request: SweepRequest
    folder: SweepFolder
    progress: Progress
    clock: Clock

    def looks(self, choices: Sequence[Choice], begin: float, end: float) -> Iterator[Result]:
        """Parity and a few short rounds of all, in as many runs as it takes, until the looks' time is over. `begin` and
        `end` are shares of the device's time, for the progress.
        """
        others = [choice for choice in choices if choice != self.reference]
        groups = grouped(others, usable_cpus(), self.folder.machine.memory_bytes)
        if choices and not groups:
            groups = [[]]  # the reference by itself
        for place, group in enumerate(groups):
            here, there = (begin + (end - begin) * at / len(groups) for at in (place, place + 1))
            if here and not self.clock.left_s(LOOKS_SHARE):
                return
            yield self._run("look", self._plan(group, LOOK_ROUNDS, LOOK_BLOCK_S), here, there)

    def full_runs(self, choices: Sequence[Choice]) -> Iterator[Result]:
        """Rounds of these and of the reference, until more would tell little more or the time is over."""
        groups = _split(choices, _room(self.folder.machine.memory_bytes))
        if not groups and self.reference is not None:
            groups = [[]]
        for place, group in enumerate(groups):
            begin, end = (LOOKS_SHARE + (1 - LOOKS_SHARE) * at / len(groups) for at in (place, place + 1))
            yield self._run("full", self._plan(group, None, FULL_BLOCK_S), begin, end)

    def _plan(self, group: Sequence[Choice], count: int | None, block_s: float) -> Plan:
        choices = tuple(choice for choice in (self.reference, *group) if choice is not None)
        full = count is None
        return Plan(
            selection=Selection(bundles=(self.request.bundle.path,), choices=choices),
            threads=self.request.most_threads,
            profile=Profile.STRICT,
            timeout_s=self.request.timeout_s,
            rounds=Rounds(
                batch_sizes=self.batch_sizes,
                block_s=block_s,
                count=count,
                processes=FULL_PROCESSES if full else 1,
                time_limit_s=self.request.time_limit_s if full else None,
            ),
            command=self.request.command,
        )

    def _run(self, stage: str, plan: Plan, begin: float, end: float) -> Result:
        """The run from `begin` to `end`, as shares of the device's time. One that may take long gets what is left of
        the time.
        """

        def shown(what: str, done: float) -> None:
            self.progress(f"{stage}: {what}", self.clock.share(begin + done * (end - begin)))

        def make() -> Result:
            rounds = plan.rounds
            if rounds is not None and rounds.time_limit_s is not None:
                rounds = replace(rounds, time_limit_s=self.clock.left_s(end))
            return run(replace(plan, rounds=rounds), shown)

        return self.folder.result(stage, plan, make)


def grouped(choices: Sequence[Choice], cpus: int, memory_bytes: int) -> list[list[Choice]]:
    """Groups that can start at the same time; those that are slow to start by themselves, at the end.

    Nothing that changes from start to start decides, such as what memory is free: the same sweep has the same groups.
    """
    slow = [choice for choice in choices if slow_to_start(choice.backend)]
    quick = [choice for choice in choices if choice not in slow]
    room = _room(memory_bytes)
    return _split(quick, min(room, STARTING_PER_CPU * cpus)) + _split(slow, min(room, COMPILING_PER_CPU * cpus))


def _room(memory_bytes: int) -> int:
    """How many workers fit beside the reference."""
    return max(1, min(LARGEST_RUN, memory_bytes // 2 // WORKER_BYTES) - 1)


def _split(choices: Sequence[Choice], most: int) -> list[list[Choice]]:
    """In as few groups as it takes, as even as they can be."""
    count = -(-len(choices) // most)
    ends = [round(place * len(choices) / count) for place in range(count + 1)] if count else []
    return [list(choices[start:end]) for start, end in itertools.pairwise(ends)]
