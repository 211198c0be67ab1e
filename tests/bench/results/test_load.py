"""Files that an earlier bench wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_pages import with_emulated

from bench.errors import BenchError
from bench.report.pages import markdown_page
from bench.results.compare import Limits, compare
from bench.results.files import write_result
from bench.results.load import read_result, results_in
from bench.results.schema import Result

KEPT = Path(__file__).parents[3] / "docs" / "results"
ONE_PROCESS = KEPT / "one-process"


@pytest.mark.parametrize("name", ["one-process/bench-cpu.json", "h100/suite.json"])
def test_results_of_before_still_read(name: str) -> None:
    """Of version 2, which knew one process alone: rows and ratios are derived of its samples."""
    source = results_in(KEPT / name)
    for result in source.results:
        assert result.schema_version == 3
        assert {sample.process for sample in result.samples} == {0}
        assert result.rows
        assert all(row.end_to_end_throughput_images_per_s.processes == 1 for row in result.rows)
        assert all(row.system_share_percent is None for row in result.rows)
        assert result.settings.processes == 1
        assert len(result.cpu_busy_percents) == 1
        assert {subject.emulated for subject in result.subjects} == {None}, "nobody had asked"
    assert markdown_page([source])


def test_one_process_each_is_no_reason_for_an_alarm() -> None:
    """Two files of one machine and one torch: torch-cpu at batch 256 was at 0.78 of the other, with tight intervals."""
    base, head = (results_in(ONE_PROCESS / f"{name}-cpu.json").results[0] for name in ("bench", "fastest"))
    comparison = compare(base, head, Limits())
    (found,) = (
        compared
        for compared in comparison.found
        if (compared.subject, compared.batch_size, compared.timing) == ("torch-cpu", 256, "device_resident")
    )
    assert found.throughput_ratio.median < 0.9
    assert found.decision == "inconclusive"
    assert not comparison.slower


def test_why_a_precision_is_emulated_is_one_of_few_words(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(with_emulated(result, "onnx-cpu", "no kernels", "float16"), path)
    assert [subject.emulated for subject in read_result(path).subjects] == ["no kernels", None, None]
    path.write_text(path.read_text().replace("no kernels", "no idea"))
    with pytest.raises(BenchError, match=r"not a whole result: subjects\.0\.placement\.emulated"):
        read_result(path)
