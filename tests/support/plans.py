"""Small plans, told in flat keywords."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.backends.contract import Profile
from bench.run.plan import Plan, Rounds, Selection


def small_plan(*bundles: Path, **changes: Any) -> Plan:
    """onnx-cpu, one thread, batch 1, two rounds of short blocks in one process. Keywords replace what the parts of
    a plan say; `rounds` is their number, and 0 leaves the parity alone.
    """
    flat: dict[str, Any] = {
        "bundles": bundles,
        "backends": ("onnx-cpu",),
        "batch_sizes": (1,),
        "block_s": 0.005,
        "threads": 1,
        "profile": Profile.STRICT,
        "timeout_s": 60.0,
        "rounds": 2,
    } | changes
    flat["count"] = flat.pop("rounds")
    parts = {part: {f.name: flat.pop(f.name) for f in fields(part) if f.name in flat} for part in (Selection, Rounds)}
    measured = Rounds(**parts[Rounds]) if parts[Rounds]["count"] != 0 else None
    return Plan(selection=Selection(**parts[Selection]), rounds=measured, **flat)
