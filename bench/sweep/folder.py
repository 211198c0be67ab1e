"""The folder of a sweep: what is finished stands in it, so that an interrupted sweep goes on where it was.

Owns the names of the files, and what makes a run in a file the run that is wanted now. Knows nothing of which runs
there are.

A run is a file of its own, whole or absent. Its name holds a hash of all that decides its figures: the bundle, the
machine, the libraries, the choices and the settings. Where one of them has changed, the run is made anew beside the old
one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench.errors import EXIT_BAD_INPUT, BenchError
from bench.machine.environment import describe, fingerprint
from bench.results.files import check_writable, write_result
from bench.results.load import read_fields, read_result
from bench.results.schema import Result
from bench.results.studies import SWEEP_FILE
from bench.run.plan import Plan
from export.bundle.foundations import installed

OPTION = "--out"
RUN_PATTERN = "run-*.json"
# All that a run's figures depend on.
LIBRARIES = ("ninefold", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy")


class SweepFolder:
    """The runs of one bundle in a folder."""

    def __init__(self, path: Path, digest: str) -> None:
        """Makes the folder where there is none. Raises BenchError (bad input) where it can't be written, or holds what
        another bundle left.
        """
        self.path = path
        self.json = path / SWEEP_FILE
        self._digest = digest
        check_writable(self.json, OPTION)
        for file in self._files():
            self._check(file)
        self.machine = describe()
        self._versions = installed(*LIBRARIES)

    def forget(self) -> None:
        """Remove the runs of before."""
        for file in self.path.glob(RUN_PATTERN):
            file.unlink()

    def finished(self) -> int:
        """How many runs there are."""
        return len(list(self.path.glob(RUN_PATTERN)))

    def result(self, stage: str, plan: Plan, make: Callable[[], Result]) -> Result:
        """The run of `plan` from its file, else made now and written."""
        path = self.path / f"run-{stage}-{self._key(plan)}.json"
        if path.exists():
            return read_result(path)
        made = make()
        write_result(made, path, OPTION)
        return made

    def _key(self, plan: Plan) -> str:
        """The hash. The time limit in it is that of the sweep: what is left for a run is other at every start."""
        parts = {
            "bundle": self._digest,
            "machine": fingerprint(self.machine, plan.threads, plan.profile),
            "libraries": self._versions,
            "choices": [asdict(choice) for choice in plan.selection.choices or ()],
            "settings": {"timeout_s": plan.timeout_s, **(asdict(plan.rounds) if plan.rounds else {})},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _files(self) -> list[Path]:
        return [*sorted(self.path.glob(RUN_PATTERN)), *([self.json] if self.json.exists() else [])]

    def _check(self, file: Path) -> None:
        """Raises BenchError (bad input) for a file that is not one of this bundle's."""
        fields = read_fields(file)
        # A run lists its bundles, of which it has one; a sweep has one.
        bundle = fields.get("bundle") if fields.get("kind") == "sweep" else next(iter(fields.get("bundles", ())), None)
        digest = bundle.get("digest") if isinstance(bundle, dict) else None
        if digest != self._digest:
            said = "is no run of a sweep" if digest is None else f"is of another bundle ({str(digest)[:12]})"
            raise BenchError(
                f"{file} {said}, this sweep is of bundle {self._digest[:12]}. Nothing was overwritten: name another "
                f"folder with {OPTION}, or move that one away.",
                EXIT_BAD_INPUT,
            )
