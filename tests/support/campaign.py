"""Thousands of random cases from the command line: in several processes, each case by its seed, and what came of them.

A worker that dies (a crash in a runtime's own code) costs the one case that it died on, which is reported.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, TypeVar

BLOCK = 200
"""Cases that one worker does before another takes its place, so that what libraries keep does not pile up."""

TIME_LIMIT = 120
"""Seconds for one case."""

SPACING = 1_000_000
"""Case `i` of campaign `n` has the seed `n * SPACING + i`."""


@dataclass
class Outcome:
    """What became of one case.

    Attributes:
        verdict: ``"right"``, ``"wrong"``, ``"exception"`` or ``"report"`` (the report is not complete).
        detail: what was found, the first line telling one kind of failure from another.
        folded: how many BatchNorms were folded, by method.
        kept: how many were kept.
        undone: reasons for keeping one that are not the network's but the fold's: it raised, or its own check undid it.
        features: what the case was made of.
        passed_over: how many drawn before it did not count, by reason.
    """

    verdict: str = "right"
    detail: str = ""
    folded: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    undone: list[str] = field(default_factory=list)
    features: list[str] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)


Check = Callable[[int], Outcome]
Subject = TypeVar("Subject")


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def expired(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {TIME_LIMIT} s")

    former = signal.signal(signal.SIGALRM, expired)
    signal.alarm(TIME_LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def checked(check: Check, seed: int) -> Outcome:
    """The outcome, of which an exception that the check did not foresee is one."""
    try:
        with _time_limit():
            return check(seed)
    except Exception as error:  # so that one run shows all of them
        return Outcome("exception", f"{type(error).__name__}: {error}")


def _work(check: Check, seeds: range) -> None:
    for seed in seeds:
        print(json.dumps([seed, asdict(checked(check, seed))]), flush=True)


def _supervise(script: str, seeds: range, tell: Callable[[int, Outcome], None]) -> None:
    """Have workers do the seeds, one block after another."""
    left = seeds
    while left:
        block = left[:BLOCK]
        command = [sys.executable, script, "--worker", str(block.start), str(block.stop), str(block.step)]
        done = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            assert worker.stderr is not None
            last: collections.deque[str] = collections.deque(maxlen=5)
            reader = threading.Thread(target=last.extend, args=(worker.stderr,), daemon=True)
            reader.start()
            for line in worker.stdout:
                with contextlib.suppress(json.JSONDecodeError):  # what a library prints of its own
                    seed, outcome = json.loads(line)
                    tell(seed, Outcome(**outcome))
                    done += 1
            reader.join()
        if done < len(block):
            tell(block[done], Outcome("exception", f"the worker died, exit {worker.returncode}\n{''.join(last)}"))
            done += 1
        left = left[done:]


def kind_of(detail: str) -> str:
    """The first line without its numbers and names: failures of one kind read the same."""
    first = (detail.splitlines() or [""])[0][:160]
    return re.sub(r"v\d+|\d+(\.\d+)?(e[+-]?\d+)?|'[^']*'|\b\w+_\d+\b", "…", first)


def reduced(
    subject: Subject,
    outcome: Outcome,
    without: Callable[[Subject], Iterator[Subject]],
    judge: Callable[[Subject], Outcome],
) -> tuple[Subject, Outcome]:
    """The subject without what its failure does not need, and the failure. `judge` raises where one does not count."""
    kind = kind_of(outcome.detail) if outcome.verdict == "exception" else ""
    again = True
    while again:
        again = False
        for smaller in without(subject):
            try:
                smallers = judge(smaller)
            except Exception:  # it does not run any more, or does not count
                continue
            if smallers.verdict == outcome.verdict and kind_of(smallers.detail).startswith(kind):
                subject, outcome, again = smaller, smallers, True
                break
    return subject, outcome


def print_case(listing: str, outcome: Outcome) -> None:
    """All of one case."""
    print(listing)
    print(f"{outcome.verdict}: {outcome.detail}")
    print(f"folded: {outcome.folded}, kept: {outcome.kept}, undone: {outcome.undone}")
    print(f"not counted, others were drawn: {outcome.passed_over}")


def main(script: str, check: Check, show: Callable[[int, bool], None], what: str) -> int:
    """The command line of `script`; returns the exit code: 1 where something was not right.

    `show` prints all of one case; with True, after cutting it down to what still fails.
    """
    if sys.argv[1:2] == ["--worker"]:
        _work(check, range(*map(int, sys.argv[2:5])))
        return 0
    parser = argparse.ArgumentParser(description=f"Fold random {what} and compare.")
    parser.add_argument("count", type=int, nargs="?", default=100, help=f"how many {what}")
    parser.add_argument("--seed", type=int, default=0, help="another campaign: other cases altogether")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first case's place in the campaign")
    parser.add_argument("--only", type=int, metavar="SEED", help="this one alone, as the summary names it, in full")
    parser.add_argument("--reduce", action="store_true", help="with --only: cut down to the steps that still fail")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if options.only is not None:
        show(options.only, options.reduce)
        return 0

    start = options.seed * SPACING + options.first
    lock, began = threading.Lock(), time.perf_counter()
    outcomes: dict[int, Outcome] = {}

    def tell(seed: int, outcome: Outcome) -> None:
        with lock:
            outcomes[seed] = outcome
            if outcome.verdict != "right":
                print(f"--only {seed}: {outcome.verdict}: {outcome.detail[:600]}", flush=True)
            if len(outcomes) % 500 == 0:
                print(f"… {len(outcomes)} of {options.count}, {time.perf_counter() - began:.0f} s", flush=True)

    threads = [
        threading.Thread(
            target=_supervise, args=(script, range(start + i, start + options.count, options.processes), tell)
        )
        for i in range(options.processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(summary(outcomes, what, time.perf_counter() - began))
    return int(any(outcome.verdict != "right" for outcome in outcomes.values()))


def summary(outcomes: dict[int, Outcome], what: str, seconds: float) -> str:
    folded: collections.Counter[str] = collections.Counter()
    features: collections.Counter[str] = collections.Counter()
    passed_over: collections.Counter[str] = collections.Counter()
    failures: dict[str, list[int]] = collections.defaultdict(list)
    undone: dict[str, list[int]] = collections.defaultdict(list)
    for seed, outcome in sorted(outcomes.items()):
        folded.update(outcome.folded)
        features.update(outcome.features)
        passed_over.update(outcome.passed_over)
        for reason in dict.fromkeys(map(kind_of, outcome.undone)):
            undone[reason].append(seed)
        if outcome.verdict != "right":
            failures[f"{outcome.verdict}: {kind_of(outcome.detail)}"].append(seed)
    verdicts = collections.Counter(outcome.verdict for outcome in outcomes.values())
    kept = sum(outcome.kept for outcome in outcomes.values())

    def counted(counter: collections.Counter[str]) -> str:
        return ", ".join(f"{name} {number}" for name, number in counter.most_common()) or "none"

    lines = [
        "",
        f"made of: {counted(features)}",
        f"not counted, others were drawn: {counted(passed_over)}",
        f"BatchNorms folded: {folded.total()} ({counted(folded)}); kept: {kept}",
        *listed(undone, "kept, since "),
        *listed(failures),
        f"{len(outcomes)} {what} in {seconds:.0f} s: {verdicts['wrong']} wrong, {verdicts['exception']} exceptions, "
        f"{verdicts['report']} incomplete reports",
    ]
    return "\n".join(lines)


def listed(seeds_of: dict[str, list[int]], before: str = "") -> list[str]:
    return [
        f"{len(seeds)} × {before}{kind} ({', '.join(map(str, seeds[:12]))}{', …' if len(seeds) > 12 else ''})"
        for kind, seeds in sorted(seeds_of.items(), key=lambda item: -len(item[1]))
    ]


UNDONE = re.compile(r"(?s).{0,200}(?:so it was undone|\braised [A-Z]\w+[^;]{0,80})")


def account(report: Any) -> dict[str, Any]:
    """What an outcome says of a report."""
    return {
        "folded": dict(collections.Counter(norm.method for norm in report.folded)),
        "kept": len(report.kept),
        "undone": [found[0].strip() for norm in report.kept if (found := UNDONE.search(norm.reason))],
    }
