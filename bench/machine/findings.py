"""What a check of the machine saw, and how bad it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """Measuring is possible; figures may be low, may scatter, or are not what a reader expects."""
    ERROR = "error"
    """A backend can't run, runs something else than it says, or is stopped in the middle of calls."""


@dataclass(frozen=True)
class Finding:
    """What a check saw. `fix` is what to do about it; None where all is well."""

    severity: Severity
    check: str
    seen: str
    fix: str | None = None
