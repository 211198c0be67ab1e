"""Tables as CSV, for whatever reads tables: values as they are, under names that say the unit."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from bench.report.table import Column, Scalar, T

# What a spreadsheet would take for a formula, were it the first character of a text.
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")


def table(columns: Sequence[Column[T]], items: Iterable[T]) -> str:
    """A header, and the items' lines."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(name for column in columns for name in column.fields)
    for item in items:
        writer.writerow(_no_formula(cell) for column in columns for cell in _cells(column, item))
    return out.getvalue()


def _cells(column: Column[T], item: T) -> list[Scalar]:
    value = column.value(item)
    return [None if value is None else part(value) for part in column.fields.values()]


def _no_formula(cell: Scalar) -> Scalar:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_SIGNS) else cell
