"""The result file: it survives a round trip, and is written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from bench.errors import EXIT_BAD_INPUT, BenchError
from bench.results.files import check_writable, indented_json, write_result
from bench.results.load import read_result
from bench.results.schema import SCHEMA_VERSION, Result

UNITS = (
    "seconds",
    "_per_image",
    "_s",
    "_ms",
    "_ns",
    "_bytes",
    "_percent",
    "_w",
    "_watts",
    "_mhz",
    "_celsius",
    "_j",
    "_1min",
    "_at_end",
)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_round_trip_changes_nothing(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(result, path)
    assert Result.model_validate_json(path.read_bytes()) == result
    assert leftovers(tmp_path) == ["result.json"]
    assert not path.stat().st_mode & stat.S_IXUSR


def test_a_list_of_numbers_stands_on_one_line(result: Result, tmp_path: Path) -> None:
    """Each duration had a line of its own once: 195,000 lines for one file."""
    path = tmp_path / "result.json"
    write_result(result, path)
    lines = path.read_text().splitlines()
    durations = [line for line in lines if '"durations_ns"' in line]
    assert len(durations) == len(result.samples)
    first = durations[0].strip()
    assert first == f'"durations_ns": {json.dumps(result.samples[0].durations_ns, separators=(",", ":"))},'
    assert len(lines) < 60 * len(result.samples)
    assert json.loads(path.read_text()) == json.loads(result.model_dump_json())


def test_a_file_with_a_line_for_each_number_is_read_too(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(result.model_dump_json(indent=1))
    assert read_result(path) == result


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "{}"),
        ([], "[]"),
        ([1, 2.5], "[1,2.5]"),
        ([[1], []], "[\n [1],\n []\n]"),
        ({"a": {"b": [1, None]}}, '{\n "a": {\n  "b": [\n   1,\n   null\n  ]\n }\n}'),
        ({"µs": "×"}, '{\n "µs": "×"\n}'),
    ],
)
def test_the_form_of_the_file(value: object, text: str) -> None:
    assert indented_json(value) == text
    assert json.loads(text) == value


def test_an_unknown_field_or_version_is_refused(result: Result) -> None:
    fields = json.loads(result.model_dump_json())
    for change in ({"colour": "red"}, {"schema_version": 1}):
        with pytest.raises(ValueError, match="validation error"):
            Result.model_validate(fields | change)


def test_every_measured_number_has_its_unit_in_its_name() -> None:
    """Every float field of the schema, at any depth: in its own name, or in the name of the field that holds it."""
    schema = Result.model_json_schema()
    definitions = schema["$defs"]
    without = {"Spread", "Percentiles"}  # the unit stands in the name of the field that holds them
    dimensionless = {"McNemar", "Divergence", "PairedRatio", "Flip", "ErrorHistogram", "FoldedNorm"}
    verdict = {"max_abs_error", "rms_error", "rms_error_in_float32_errors"}  # in logits
    for name, definition in definitions.items():
        if name in without | dimensionless:
            continue
        for field, kind in definition.get("properties", {}).items():
            if "number" in json.dumps(kind) and "object" not in json.dumps(kind) and field not in verdict:
                assert field.endswith(UNITS), f"{name}.{field}"
    for holder in ("Spread", "Percentiles"):
        fields = [
            field
            for definition in definitions.values()
            for field, kind in definition.get("properties", {}).items()
            if kind.get("$ref", "").endswith("/" + holder)
        ]
        assert fields
        assert all(field.endswith(UNITS) for field in fields)


def test_what_is_derived_can_be_derived_again_from_the_file(result: Result) -> None:
    from bench.results.derive import ratios, rows

    again = Result.model_validate_json(result.model_dump_json())
    assert rows(again.samples, again.subjects) == result.rows
    assert ratios(again.samples, again.subjects) == result.ratios


def test_an_interrupted_write_leaves_the_old_file(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    path.write_text("the old one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BenchError, match="No space left on device") as caught:
        write_result(result, path)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert path.read_text() == "the old one"
    assert leftovers(tmp_path) == ["result.json"]


def test_a_link_is_followed_not_replaced(result: Result, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "result.json")
    check_writable(link)
    write_result(result, link)
    assert link.is_symlink()
    assert (tmp_path / "real" / "result.json").is_file()


def place(kind: str, folder: Path) -> Path:
    (folder / "file").write_text("")
    (folder / "folder.json").mkdir()
    return {
        "under a file": folder / "file" / "result.json",
        "a folder": folder / "folder.json",
        "a device": Path("/dev/null"),
        "nowhere": Path("/proc/nowhere/result.json"),
    }[kind]


@pytest.mark.parametrize("kind", ["under a file", "a folder", "a device", "nowhere"])
def test_an_unwritable_place_is_told_beforehand(kind: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="--json") as caught:
        check_writable(place(kind, tmp_path))
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode), "a device was not replaced"


def test_a_writable_place_is_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "result.json")
    assert leftovers(tmp_path / "new") == []


def spoilt(kind: str, result: Result, path: Path) -> Path:
    write_result(result, path)
    content = path.read_text()
    fields = json.loads(content)
    fields["settings"].pop("threads")
    match kind:
        case "missing":
            path.unlink()
        case "a folder":
            return path.parent
        case "cut off":
            path.write_text(content[: len(content) // 2])
        case "empty":
            path.write_text("")
        case "binary":
            path.write_bytes(bytes(range(256)))
        case "a list":
            path.write_text("[1, 2]")
        case "another file":
            path.write_text('{"name": "article"}')
        case "a scenario":
            path.write_text('{"schema_version": 1, "kind": "scenario"}')
        case "a suite":
            path.write_text('{"schema_version": 1, "kind": "suite"}')
        case "another version":
            path.write_text(json.dumps(fields | {"schema_version": 17}))
        case "a field is missing":
            path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no result can be read at .*No such file"),
        ("a folder", "no result can be read at .*Is a directory"),
        ("cut off", "is not JSON, or only the beginning of it: .*line [0-9]{2,}"),
        ("empty", "is not JSON, or only the beginning of it"),
        ("binary", "is not JSON, or only the beginning of it"),
        ("a list", "no result: it has no schema_version"),
        ("another file", "no result: it has no schema_version"),
        ("a scenario", "found in a scenario: it has no rounds.*without --scenario"),
        ("a suite", "is a suite of several runs: bench report shows it"),
        ("another version", f"has schema version 17; this bench reads version {SCHEMA_VERSION}"),
        ("a field is missing", "is not a whole result: settings.threads: Field required"),
    ],
)
def test_what_is_no_result_is_refused_by_name(kind: str, words: str, result: Result, tmp_path: Path) -> None:
    path = spoilt(kind, result, tmp_path / "result.json")
    with pytest.raises(BenchError, match=words) as caught:
        read_result(path)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert str(path) in str(caught.value)


def test_a_result_is_read_back(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(result, path)
    assert read_result(path) == result
