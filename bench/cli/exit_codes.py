"""From a result to an exit code."""

from __future__ import annotations

from collections.abc import Iterable

from bench.errors import EXIT_INCONCLUSIVE, EXIT_INTERRUPTED, EXIT_NEGATIVE
from bench.results.derive import verdicts
from bench.results.queries import noisy
from bench.results.scenario import ScenarioResult
from bench.results.schema import Result
from bench.results.studies import Suite, Sweep
from export.bundle import CpuVerdict


def exit_code(result: Result, noise_percent: float | None = None) -> int:
    """0, 1 when a parity failed or a backend did not finish, or when a throughput scatters by more than
    `noise_percent`; 130 when the run was interrupted.
    """
    if result.interrupted:
        return EXIT_INTERRUPTED
    failed = any(subject.failure or (subject.parity and not subject.parity.passed) for subject in result.subjects)
    return EXIT_NEGATIVE if failed or (noise_percent is not None and noisy(result, noise_percent)) else 0


def cpus_exit_code(verdicts: Iterable[CpuVerdict]) -> int:
    """0; 1 when an int8 file is wrong on a kind of CPU; 5 when it is not known whether it is right."""
    passed = {verdict.passed for verdict in verdicts}
    return EXIT_NEGATIVE if False in passed else EXIT_INCONCLUSIVE if None in passed else 0


def comparison_exit_code(result: Result, threshold_percent: float, allow_inconclusive: bool) -> int:
    """As `exit_code`; 1 when a bundle is slower than the first; 5 when something could not be decided."""
    if code := exit_code(result):
        return code
    decisions = {decision for _, decision in verdicts(result, threshold_percent)}
    if "slower" in decisions:
        return EXIT_NEGATIVE
    return EXIT_INCONCLUSIVE if "inconclusive" in decisions and not allow_inconclusive else 0


def scenario_exit_code(result: ScenarioResult) -> int:
    """0, or 1 when a parity failed, a backend did not finish, or LoadGen calls what counts INVALID."""
    for row in result.rows:
        parity = row.subject.parity
        if row.subject.failure or (parity and not parity.passed):
            return EXIT_NEGATIVE
        if row.reported is None or row.runs[row.reported].verdict == "INVALID":
            return EXIT_NEGATIVE
    return 0


def suite_exit_code(suite: Suite) -> int:
    """0, or 1 when a parity failed, a backend did not finish, or a whole run could not be made."""
    failed = any(entry.failed for entry in suite.left_out)
    return EXIT_NEGATIVE if failed else max(exit_code(result) for result in suite.runs)


def sweep_exit_code(sweep: Sweep) -> int:
    """0, or 1 when a float32 file is wrong, or something that was due could not be measured."""
    failed = any(entry.failed for entry in sweep.skipped)
    return EXIT_NEGATIVE if failed else max(exit_code(result) for result in sweep.runs)
