"""What of a run fits into its time, from what an image costs each backend.

Owns the estimate of how long a run takes, and which batch sizes, processes, backends and inputs of the parity are left
out where that is too long. Starts nothing, and knows no runtime.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.run.plan import Plan, Rounds

PARITY_BATCH_SIZE = 192
"""Any size would do; this one doesn't divide the usual counts of images, so that every backend is judged at two batch
sizes at least."""
PARITY_CALL_S = 2.0
"""Where a call with so many images takes longer, fewer are in it: it holds no more memory than the timed ones."""
PARITY_S, PARITY_SHARE = 10.0, 0.25
"""For the parity of all backends together: so long where the time is short, and so much of it anyway."""
COSTLY_TIME_LIMIT_S = 230.0
"""The limit where nobody named one and the plan does not fit into the usual: a run then ends within 5 minutes."""
LEAST_PARITY_INPUTS = 2
COSTLY_PROCESSES = 3
"""What an interval over processes needs."""
CHEAP_S = 30.0
"""Nothing is left out for what takes no longer than this, parity or the calls of a process with one round: the usual
limits are for such."""
LONG_S = 120.0
"""A run that takes longer than this is announced with its length."""
SURVEY_S = 15.0
"""What counting the model's work and measuring the machine's peaks takes, on two cores."""

# What `bench.worker.clock` does, in calls and seconds.
WARM_UP_CALLS, WARM_UP_LIMIT_CALLS, WARM_UP_LIMIT_S, LEAD_IN_CALLS, BLOCKS = 10, 3, 2.0, 2, 2


@dataclass(frozen=True)
class Costs:
    """What was seen: the seconds that an image takes in each subject, by its label, and how long all took to load."""

    image_s: Mapping[str, float]
    start_s: float

    @property
    def all_s(self) -> float:
        """An image in every subject, one after the other."""
        return sum(self.image_s.values())


@dataclass(frozen=True)
class Fitted:
    """What is run. `estimate_s` is how long that will take, all in all; `left_out` says in words what is not run, why,
    and what would bring it back; `dropped` are the labels of subjects that take no part.
    """

    rounds: Rounds | None
    parity_inputs: int
    parity_batch: int
    estimate_s: float
    left_out: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    costly: bool = False


def fit(plan: Plan, costs: Costs, oracle_inputs: int, kept: Sequence[str]) -> Fitted:
    """Fit a run to its time limit, where nobody named its batch sizes. Subjects labelled as in `kept` are not dropped,
    and no others are where somebody named the backends.
    """
    rounds, batch = plan.rounds, _parity_batch(costs)
    proved = min(plan.parity_inputs or oracle_inputs, oracle_inputs)
    if rounds is None or not rounds.fitted or rounds.time_limit_s is None:
        estimate_s = _whole_s(rounds, costs, proved)
        return Fitted(rounds, proved, batch, estimate_s, costly=estimate_s > LONG_S)
    limit = rounds.time_limit_s
    processes = rounds.processes or 1
    share = max(CHEAP_S, limit / processes - costs.start_s)
    enough = process_s(rounds.batch_sizes, rounds.block_s, costs) <= share
    if enough and (plan.parity_inputs or proved * costs.all_s <= max(CHEAP_S, PARITY_SHARE * limit)):
        return Fitted(rounds, proved, batch, limit)
    named = plan.selection.backends is not None
    return _costly(rounds, costs, oracle_inputs, tuple(costs.image_s) if named else kept, plan.parity_inputs)


def _costly(rounds: Rounds, costs: Costs, oracle_inputs: int, kept: Sequence[str], parity_inputs: int | None) -> Fitted:
    limit = COSTLY_TIME_LIMIT_S if rounds.limit_is_default else (rounds.time_limit_s or COSTLY_TIME_LIMIT_S)
    image_s, dropped, smallest = dict(costs.image_s), list[str](), min(rounds.batch_sizes)
    while costs.start_s + process_s((smallest,), rounds.block_s, Costs(image_s, 0.0)) > limit / 2:
        others = [label for label in image_s if label not in kept]
        if len(others) < 2:
            break
        dropped.append(max(others, key=lambda label: image_s[label]))
        del image_s[dropped[-1]]
    costs = Costs(image_s, costs.start_s)
    proved = min(oracle_inputs, parity_inputs or max(LEAST_PARITY_INPUTS, _round(PARITY_S / costs.all_s)))
    left = limit - proved * costs.all_s - SURVEY_S
    wanted_processes = min(COSTLY_PROCESSES, rounds.processes or COSTLY_PROCESSES)
    for processes in range(wanted_processes, 0, -1):
        share = left / processes - costs.start_s
        sizes = _affordable(rounds.batch_sizes, rounds.block_s, costs, share)
        if sizes:
            break
    else:
        processes, sizes = 1, (smallest,)
    number = None if rounds.processes is None else processes
    new = replace(rounds, batch_sizes=sizes, processes=number, time_limit_s=limit, early_rows=True)
    left_out = _left_out(rounds, new, costs, proved, oracle_inputs, dropped)
    estimate = max(limit, _whole_s(new, costs, proved))
    return Fitted(new, proved, _parity_batch(costs), estimate, left_out, tuple(dropped), costly=True)


def process_s(batch_sizes: Sequence[int], block_s: float, costs: Costs) -> float:
    """How long one process of everybody takes, with a single round, loading left out."""
    return sum(_turns_s(image_s * size, block_s) for image_s in costs.image_s.values() for size in batch_sizes)


def _turns_s(call_s: float, block_s: float) -> float:
    """A warm-up and one turn at a batch size."""
    calls = max(WARM_UP_LIMIT_CALLS, min(WARM_UP_CALLS, math.ceil(WARM_UP_LIMIT_S / max(call_s, 1e-9))))
    return (1 + calls) * call_s + BLOCKS * (LEAD_IN_CALLS * call_s + max(block_s, call_s))


def _affordable(wanted: tuple[int, ...], block_s: float, costs: Costs, share_s: float) -> tuple[int, ...]:
    """Of the batch sizes those that fit into a process's share; in place of all others the largest power of two that
    does. Empty where not even the smallest fits.
    """
    smallest, *larger = sorted(wanted)
    taken: tuple[int, ...] = (smallest,)
    if process_s(taken, block_s, costs) > share_s:
        return ()
    for size in larger:
        if process_s((*taken, size), block_s, costs) <= share_s:
            taken = (*taken, size)
    if len(taken) == 1 and larger:
        between = [2**power for power in range(1, 20) if smallest < 2**power < larger[0]]
        fitting = [size for size in between if process_s((smallest, size), block_s, costs) <= share_s]
        taken = (smallest, *fitting[-1:])
    return taken


def _left_out(
    asked: Rounds, taken: Rounds, costs: Costs, proved: int, oracle_inputs: int, dropped: Sequence[str]
) -> tuple[str, ...]:
    said = []
    slowest = max(costs.image_s, key=lambda label: costs.image_s[label])
    image_s = costs.image_s[slowest]
    if gone := [size for size in asked.batch_sizes if size not in taken.batch_sizes]:
        options = " ".join(f"--batch-size {size}" for size in asked.batch_sizes)
        instead = [size for size in taken.batch_sizes if size not in asked.batch_sizes]
        said.append(
            f"batch sizes {', '.join(map(str, gone))}: an image takes {image_s:.2g} s with {slowest}"
            + (f"; batch {instead[0]} in their place" if instead else "")
            + f". {options} measures them"
        )
    if proved < oracle_inputs:
        said.append(
            f"parity on {oracle_inputs - proved} of the {oracle_inputs} inputs: all take "
            f"{oracle_inputs * costs.all_s:.0f} s. --parity-inputs {oracle_inputs}, or bench parity, takes all"
        )
    if asked.processes is not None and taken.processes is not None and taken.processes < asked.processes:
        said.append(
            f"{asked.processes - taken.processes} of {asked.processes} processes: --processes {asked.processes} with a "
            "--time-limit measures them"
        )
    said += [
        f"{label}: too slow to be measured in time. --backend {label.partition(':')[0]} measures it"
        for label in dropped
    ]
    return tuple(said)


def _whole_s(rounds: Rounds | None, costs: Costs, proved: int) -> float:
    parity = costs.start_s + proved * costs.all_s
    if rounds is None:
        return parity
    each = costs.start_s + process_s(rounds.batch_sizes, rounds.block_s, costs)
    processes = rounds.processes or 1
    if rounds.time_limit_s is not None:  # the last one that begins before it is over
        processes = max(1, min(processes, math.ceil((rounds.time_limit_s - parity) / each)))
    return parity + processes * each


def _parity_batch(costs: Costs) -> int:
    slowest = max(costs.image_s.values(), default=0.0)
    return (
        PARITY_BATCH_SIZE if slowest * PARITY_BATCH_SIZE <= PARITY_CALL_S else max(1, _round(PARITY_CALL_S / slowest))
    )


def _round(affordable: float) -> int:
    """The largest round number of at most so many, so that the clock's noise changes little; 1 at least."""
    steps = [int(step * 10**zeros) for zeros in range(10) for step in (1, 1.5, 2, 3, 5, 7)]
    return max(1, *(step for step in steps if step <= max(1.0, affordable)))
