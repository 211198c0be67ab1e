"""`bench report` as a page, as Markdown and as CSV: what they say, and that no text of a result becomes markup."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import zlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from report_pages import many, with_emulated, with_parity, with_tails

from bench.backends.contract import Profile
from bench.cli.main import app
from bench.errors import EXIT_BAD_INPUT, EXIT_USAGE, BenchError
from bench.report.columns import ratio_text
from bench.report.html.document import html_page
from bench.report.html.markup import Html, element, prose
from bench.report.html.pictures import data_uri
from bench.report.html.plot import batch_axis, log_axis, percent_axis, short
from bench.report.pages import markdown_page
from bench.report.render import csv_lines
from bench.report.sentences import fastest_words
from bench.results.files import write_result
from bench.results.load import Source, results_in
from bench.results.parity import ParityVerdict
from bench.results.queries import champion, right_rows
from bench.results.roofline import Point
from bench.results.schema import BundleFacts, Failure, Result, SubjectResult
from bench.results.studies import LeftOut, Suite, Sweep
from export.bundle import Bundle, FoldReport
from export.bundle.verdict import Flip

EVIL = "<script>alert('x')</script>"
MEGABYTE = 1_000_000


def page_of(*results: Result) -> str:
    return html_page([Source(Path(f"{place}.json"), (result,)) for place, result in enumerate(results)])


def parity_of(subject: SubjectResult) -> ParityVerdict:
    assert subject.parity is not None
    return subject.parity


def section(page: str, title: str) -> str:
    """The part of the page below a title."""
    return page.split(f"<h3>{title}</h3>", 1)[1].split("</section>", 1)[0]


def cells(part: str, table: str) -> list[list[str]]:
    """The words in each row of a table's body."""
    body = part.split(f'id="{table}"', 1)[1].split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]
    return [[re.sub(r"<.*?>", "", cell) for cell in row] for row in rows]


@pytest.fixture
def flipped(result: Result) -> Result:
    """The real result, with 30 predictions of its first subject changed."""
    flips = tuple(Flip(index, 7, 7, 1, 0.01 * index) for index in range(30))
    return with_parity(result, "onnx-cpu", passed=False, failures=("30 flipped",), flips=flips)


def test_the_page_says_what_the_result_says(result: Result) -> None:
    page = page_of(result)
    found = cells(section(page, "Throughput"), "r0-throughput")
    assert [row[:2] for row in found] == [[row.subject, str(row.batch_size)] for row in result.rows]
    for shown, row in zip(found, result.rows, strict=True):
        median = row.end_to_end_throughput_images_per_s.median
        assert float(shown[3].split(" ")[0].replace(",", "")) == pytest.approx(median, rel=1e-2)
    parity = cells(section(page, "Parity"), "r0-parity")
    assert [row[:2] for row in parity] == [["onnx-cpu", "pass"], ["onnx-cpu:unfolded", "pass"]]
    ratio = result.ratios[0].throughput_ratio
    folded = section(page, "Before and after folding")
    assert ratio_text(".3f")(ratio) in folded
    assert result.environment.cpu in section(page, "Environment")
    assert page.count("<svg class") >= page.count('role="img"') > 7


def test_the_verdict_is_the_first_thing(result: Result, flipped: Result) -> None:
    page = page_of(result)
    lead = page.split('class="lead">', 1)[1].split("</p>", 1)[0]
    best = champion([result])
    assert best is not None
    assert f"<code>{best.row.subject}</code> running" in lead
    assert "null" not in lead
    assert "All 2 parity verdicts are good" in page
    worse = page_of(flipped)
    assert "Not all is well: parity of <code>onnx-cpu</code>" in worse
    assert worse.index("Not all is well") < worse.index("<h2")


def test_limits_that_are_laxer_are_told_where_parity_holds_too(result: Result) -> None:
    told = with_parity(result, "onnx-cpu", laxer=("strict_rms_factor is 40, the project's 4",))
    assert "was held to a laxer limit: strict_rms_factor is 40" in section(page_of(told), "Parity")
    assert "laxer" not in page_of(result)


def test_what_is_wrong_or_computes_nothing_is_never_the_fastest(result: Result, flipped: Result) -> None:
    assert {row.subject for row in right_rows(result)} == {"onnx-cpu", "onnx-cpu:unfolded"}
    assert {row.subject for row in right_rows(flipped)} == {"onnx-cpu:unfolded"}
    assert fastest_words([flipped]).startswith("`onnx-cpu:unfolded` running `model.unfolded.onnx` is the fastest:")


def test_what_is_emulated_is_said_everywhere_and_never_the_fastest(result: Result) -> None:
    """In each form once, with advice, and in each of its rows; on the chart no frontier goes through it."""
    told = with_emulated(with_tails(result), "onnx-cpu", "no instructions", "bfloat16")
    source = Source(Path("told.json"), (told,))
    words = "bfloat16 is emulated, that is, computed in float32: the CPU has no instructions for it"
    page, markdown = html_page([source]), markdown_page([source])
    for text in (page, markdown):
        assert text.count(words) == 1
        assert "take the float32 or an int8 file" in text
    found = cells(section(page, "Throughput"), "r0-throughput")
    assert {row[0]: row[1] for row in found} == {"onnx-cpu": "in float32", "onnx-cpu:unfolded": "–", "null": "–"}
    assert {row["subject"]: row["emulated"] for row in csv.DictReader(io.StringIO(csv_lines([source])))} == {
        "onnx-cpu": "no instructions",
        "onnx-cpu:unfolded": "",
        "null": "",
    }
    assert {row.subject for row in right_rows(told)} == {"onnx-cpu:unfolded"}
    assert fastest_words([told]).startswith("`onnx-cpu:unfolded` running")
    trade_off = section(page, "Throughput against latency")
    assert trade_off.count('class="emulated"') == len({row.batch_size for row in told.rows})
    assert {row[0] for row in cells(trade_off, "r0-pareto") if row[-1] == "yes"} == {"onnx-cpu:unfolded"}
    frontier = re.findall(r'class="frontier" points="([^"]*)"', trade_off)
    lone = with_parity(told, "onnx-cpu", passed=False)
    assert frontier == re.findall(
        r'class="frontier" points="([^"]*)"', section(page_of(lone), "Throughput against latency")
    )
    only = with_emulated(told, "onnx-cpu:unfolded", "no instructions", "bfloat16")
    assert fastest_words([only]) == "Nothing that is right was measured, but what is emulated."
    assert "emulated" not in fastest_words([result]) + markdown_page([Source(Path("quiet.json"), (result,))])


@pytest.mark.parametrize(("low", "words"), [(101.0, "is the fastest: "), (99.0, "but not shown to be faster than")])
def test_faster_is_said_to_be_shown_only_where_the_intervals_are_apart(low: float, words: str, result: Result) -> None:
    rows = []
    for subject, median, interval in (("onnx-cpu", 110.0, (low, 120.0)), ("onnx-cpu:unfolded", 90.0, (80.0, 100.0))):
        spread = replace(result.rows[0].end_to_end_throughput_images_per_s, median=median)
        spread = replace(spread, low=interval[0], high=interval[1])
        changes = {"subject": subject, "end_to_end_throughput_images_per_s": spread}
        rows.append(result.rows[0].model_copy(update=changes))
    assert words in fastest_words([result.model_copy(update={"rows": tuple(rows)})])


def test_the_trade_off_leaves_out_what_computes_nothing_and_marks_what_is_unbeaten(result: Result) -> None:
    timed = with_tails(result)
    oracle = parity_of(result.subjects[0]).oracle_top1_percent
    assert oracle is not None
    worse = with_parity(timed, "onnx-cpu:unfolded", top1_percent=oracle - 1)
    part = section(page_of(worse), "Throughput against latency")
    shown = cells(part, "r0-pareto")
    assert sorted((row[0], row[1]) for row in shown) == sorted(
        (row.subject, str(row.batch_size)) for row in result.rows if row.subject != "null"
    )
    points = {
        (row.subject, str(row.batch_size)): (
            row.end_to_end_throughput_images_per_s.median,
            -(row.end_to_end_latency_ms.p99 or 0),
        )
        for row in timed.rows
        if row.subject != "null"
    }
    for name, size, *_, unbeaten in shown:
        mine = points[name, size]
        beaten = any(its != mine and its[0] >= mine[0] and its[1] >= mine[1] for its in points.values())
        assert (unbeaten == "yes") is not beaten
    assert part.count('class="ring"') == 2


def test_every_text_of_a_result_is_escaped(result: Result) -> None:
    fold = FoldReport.model_validate(
        {
            "folded": ({"name": EVIL, "method": EVIL, "into": (EVIL,), "error": 0.0},),
            "kept": ({"name": EVIL, "reason": EVIL},),
        }
    )
    bundle = BundleFacts(letter=None, path=EVIL, name=EVIL, digest=EVIL, fold=fold)
    first, control, null = result.subjects
    parity = replace(parity_of(first), passed=False, failures=(EVIL,), flips=(Flip(0, 7, 7, 1, 0.1),))
    renamed = {"label": EVIL, "backend": EVIL, "parity": parity}
    failure = Failure(kind="crashed", message=EVIL, trace=EVIL)
    subjects = (first.model_copy(update=renamed), control.model_copy(update={"failure": failure}), null)
    rows = tuple(row.model_copy(update={"subject": EVIL}) for row in result.rows if row.subject == first.label)
    machine = replace(result.environment, cpu=EVIL, platform=EVIL, git_commit=EVIL, versions={EVIL: EVIL})
    changes = {"bundles": (bundle,), "subjects": subjects, "rows": rows, "environment": machine, "command": EVIL}
    changes |= {"ratios": (), "roofline": ()}
    evil = result.model_copy(update=changes)
    page = html_page([Source(Path(EVIL), (evil,)), Source(Path(EVIL), (evil,))])
    packed = page.split('id="packed">', 1)[1].split("</script>", 1)[0]
    sections = json.loads(zlib.decompress(base64.b64decode(packed)))
    for part in (page, "".join(section for (section,) in sections)):
        assert "<script>alert" not in part
        assert "&lt;script&gt;alert(&#x27;x&#x27;)" in part
    told = markdown_page([Source(Path("a.json"), (evil,))])
    assert [line for line in told.splitlines() if "<script" in line] == [f"    {EVIL}"], "the command, which is code"


def test_the_page_asks_for_nothing(result: Result, flipped: Result) -> None:
    page = page_of(result, flipped)
    assert "http:" not in page
    assert "https:" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src &#x27;none&#x27;; script-src &#x27;sha256-")


def test_the_command_stands_beside_its_figures(result: Result) -> None:
    known = result.model_copy(update={"command": "bench run --backend onnx-cpu"})
    assert "<code>bench run --backend onnx-cpu</code>" in page_of(known)
    assert "The command was not recorded" in page_of(result.model_copy(update={"command": None}))


def test_changed_digits_are_pictures_where_the_bundle_is_still_here(flipped: Result, small_bundle: Path) -> None:
    part = section(page_of(flipped), "Parity")
    assert part.count("<img ") == 24, "the widest margins alone"
    assert "30 of 300 predictions changed" in part
    oracle = Bundle.open(small_bundle).oracle()
    assert f'src="{data_uri(oracle.raw[29])}"' in part
    assert "<dt>margin</dt><dd>0.29</dd>" in part


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"digest": "0" * 64}, "is another one by now"), ({"path": "/nowhere"}, "the bundle is not at <code>/nowhere")],
)
def test_where_the_bundle_is_gone_that_is_said(changes: dict[str, str], reason: str, flipped: Result) -> None:
    bundle = flipped.bundles[0].model_copy(update=changes)
    part = section(page_of(flipped.model_copy(update={"bundles": (bundle,)})), "Parity")
    assert reason in part
    assert "<img" not in part
    assert "<dt>margin</dt>" in part


def test_a_picture_has_the_pixels_of_its_input() -> None:
    from PIL import Image

    grey = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    for raw, expected in (
        (grey, grey),
        (grey[None], grey),
        (grey[..., None], grey),
        (np.stack([grey] * 3), np.stack([grey] * 3, -1)),
    ):
        uri = data_uri(raw)
        assert uri is not None
        shown = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
        np.testing.assert_array_equal(np.asarray(shown), expected)
    large = data_uri(np.zeros((3, 200, 300), np.uint8))
    assert large is not None
    assert Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))).size == (60, 40)
    assert data_uri(grey.astype(np.float32)) is None
    assert data_uri(np.zeros((28, 28, 7), np.uint8)) is None


def test_the_fold_of_every_norm_is_told(result: Result, small_bundle: Path) -> None:
    fold = Bundle.open(small_bundle).manifest.fold
    assert fold.folded
    bundle = result.bundles[0].model_copy(update={"fold": fold})
    part = section(page_of(result.model_copy(update={"bundles": (bundle,)})), "Before and after folding")
    assert f"{len(fold.folded)} of {len(fold.folded)} BatchNorms are folded away" in part
    for norm, shown in zip(fold.folded, cells(part, "r0-norms0"), strict=True):
        assert shown[:3] == [norm.name, norm.method, ", ".join(norm.into)]
    unknown = result.bundles[0].model_copy(update={"fold": None})
    assert "does not say what was folded" in page_of(result.model_copy(update={"bundles": (unknown,)}))


def test_the_errors_are_drawn_and_told(result: Result) -> None:
    part = section(page_of(result), "Parity")
    errors = parity_of(result.subjects[0]).errors
    assert errors is not None
    assert part.count("<rect ") == sum(
        bool(count) for s in result.subjects[:2] if (e := parity_of(s).errors) for count in e.counts
    )
    shown = cells(part, "r0-errors")
    assert sum(int(row[1].replace(",", "")) for row in shown) == sum(errors.counts) == 300
    old = with_parity(result, "onnx-cpu", errors=None)
    assert part.count("<figure") > section(page_of(old), "Parity").count("<figure")


def test_a_result_without_any_speed_is_shown(result: Result) -> None:
    """A parity alone, and a run in which everything broke."""
    page = page_of(result.model_copy(update={"rows": (), "ratios": (), "samples": ()}))
    assert "<h3>Throughput</h3>" not in page
    assert "<h3>Parity</h3>" in page
    assert "Nothing that is right was measured." in page


def test_a_suite_is_one_page_with_what_it_could_not_measure(result: Result, tmp_path: Path) -> None:
    left_out = LeftOut(what="profile fast on the GPU", reason="the driver is gone", failed=True)
    suite = Suite(
        schema_version=1,
        kind="suite",
        started_at=result.started_at,
        finished_at=datetime.now(UTC),
        time_limit_s=60,
        raw_bytes_per_image=784,
        findings=(),
        runs=(
            result,
            result.model_copy(update={"settings": result.settings.model_copy(update={"profile": Profile.FAST})}),
        ),
        left_out=(left_out,),
    )
    path = tmp_path / "suite.json"
    write_result(suite, path)
    source = results_in(path)
    assert source.names == (f"{path} · profile strict on the CPU", f"{path} · profile fast on the CPU")
    assert source.results == suite.runs
    page = html_page([source])
    assert "<h2>2 results</h2>" in page
    assert page.count("<option") == 2
    assert "profile fast on the GPU could not be measured" in page
    assert "Profile fast on the GPU: the driver is gone" in page
    told = markdown_page([source])
    assert "- profile fast on the GPU: the driver is gone" in told
    assert told.count("### Parity") == 2


def test_a_sweep_is_read_like_any_other_file(result: Result, small_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(small_bundle).manifest
    skipped = LeftOut(what="onnx-cpu:int8 with 2 threads", reason="it can't win anything", failed=False)
    sweep = Sweep(
        schema_version=1,
        kind="sweep",
        started_at=result.started_at,
        finished_at=datetime.now(UTC),
        command="bench sweep",
        time_limit_s=60,
        bundle=result.bundles[0],
        input=manifest.input,
        output=manifest.output,
        preprocessing=manifest.preprocessing,
        runs=(result, result),
        looks=(),
        skipped=(skipped,),
    )
    path = tmp_path / "sweep.json"
    write_result(sweep, path)
    source = results_in(path)
    assert source.names == tuple(f"{path} · profile strict on the CPU, run {run}" for run in (1, 2))
    assert source.results == sweep.runs
    assert "Onnx-cpu:int8 with 2 threads: it can&#x27;t win anything" in html_page([source])


def test_200_results_are_small(result: Result) -> None:
    """Each with figures of its own, so that nothing shrinks because it repeats."""
    page = html_page(many(result, 200))
    assert page.count("<option") == 200
    assert len(page.encode()) < 3 * MEGABYTE


def test_csv_has_a_line_for_each_subject_batch_size_and_timing(result: Result) -> None:
    place = {"roofline": (Point("onnx-cpu", 1, 10.0, 20.0, "memory"),)}
    found = result.model_copy(update=place)
    lines = list(csv.DictReader(io.StringIO(csv_lines([Source(Path("a.json"), (found,))]))))
    assert [line["binds"] for line in lines[:2]] == ["memory", ""], "the roofline is of the time on the device"
    assert len(lines) == 2 * len(result.rows)
    first, row = lines[1], result.rows[0]
    assert (first["subject"], first["batch_size"], first["timing"]) == ("onnx-cpu", "1", "end_to_end")
    assert float(first["throughput_images_per_s"]) == row.end_to_end_throughput_images_per_s.median
    assert float(first["latency_p50_ms"]) == row.end_to_end_latency_ms.p50
    assert float(first["rms_error"]) == parity_of(result.subjects[0]).rms_error
    assert first["command"] == ""
    assert lines[0]["throughput_ratio_to_control"]
    measured = [name for name in lines[0] if "throughput" in name or "latency" in name]
    assert all(re.search(r"_images_per_s$|_ms$|_ratio_to_", name) for name in measured)


def test_csv_keeps_the_judged_and_the_broken_and_no_formula(result: Result) -> None:
    failure = Failure(kind="crashed", message="out of memory", trace="")
    first, control, null = result.subjects
    broken = (first.model_copy(update={"failure": failure}), control, null)
    bundle = result.bundles[0].model_copy(update={"name": "=1+1"})
    found = result.model_copy(update={"subjects": broken, "bundles": (bundle,)})
    lines = list(csv.DictReader(io.StringIO(csv_lines([Source(Path("a.json"), (found,))]))))
    assert [line["failure"] for line in lines if line["subject"] == "onnx-cpu"] == ["crashed: out of memory"]
    assert lines[0]["throughput_images_per_s"] == ""
    assert {line["bundle"] for line in lines} == {"'=1+1"}


def test_the_markdown_is_short_and_whole(result: Result) -> None:
    told = markdown_page([Source(Path("a.json"), (result,))])
    assert told.startswith("**`onnx-cpu")
    for words in ("All 2 parity verdicts are good", "| backend | verdict |", "| backend | batch |", "| versions |"):
        assert words in told


@pytest.fixture
def kept(result: Result, tmp_path: Path) -> Path:
    path = tmp_path / "result.json"
    write_result(result, path)
    return path


def report(*arguments: str | Path) -> None:
    app(["report", *map(str, arguments)], standalone_mode=False)


@pytest.mark.parametrize(
    ("name", "named", "begins"),
    [
        ("new/report.html", [], "<!doctype html>"),
        ("report.md", [], "**`onnx-cpu"),
        ("report.csv", [], "result,"),
        ("report.txt", [], "article"),
        ("report", ["--format", "csv"], "result,"),
    ],
)
def test_the_ending_says_the_form(name: str, named: list[str], begins: str, kept: Path, tmp_path: Path) -> None:
    report(kept, "-o", tmp_path / name, *named)
    assert (tmp_path / name).read_text().startswith(begins)


def test_markdown_and_csv_go_to_stdout(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(kept, "--format", "markdown")
    assert capsys.readouterr().out == markdown_page([results_in(kept)])
    report(kept, "--format", "csv")
    assert capsys.readouterr().out == csv_lines([results_in(kept)])
    report(kept, kept)
    assert capsys.readouterr().out.count("images/s: median ±") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "html"], "Name its file: -o report.html"),
        (["-o", "report.pdf"], "ends in none of .html"),
        (["--format", "html", "-o", "{result.parent}/new/../{result.name}"], "would overwrite the result"),
    ],
)
def test_a_wrong_use_is_told(arguments: list[str], words: str, kept: Path) -> None:
    before = kept.read_bytes()
    with pytest.raises(BenchError, match=re.escape(words)) as caught:
        report(kept, *(argument.format(result=kept) for argument in arguments))
    assert caught.value.exit_code == EXIT_USAGE
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no result can be read at"),
        ("{", "is not JSON, or only the beginning of it"),
        ("[1]", "is JSON, but no result"),
        ('{"schema_version": 99}', "has schema version 99"),
        ('{"schema_version": 2}', "is not a whole result"),
    ],
)
def test_bad_input_overwrites_nothing(content: str | None, words: str, tmp_path: Path) -> None:
    bad, out = tmp_path / "bad.json", tmp_path / "report.html"
    if content is not None:
        bad.write_text(content)
    out.write_text("what was there")
    with pytest.raises(BenchError, match=re.escape(words)) as caught:
        report(bad, "-o", out)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert out.read_text() == "what was there"


def test_a_place_that_cannot_be_written_is_told(kept: Path) -> None:
    with pytest.raises(BenchError, match="another place with -o") as caught:
        report(kept, "-o", "/dev/null/report.html")
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_markup_escapes_all_but_markup() -> None:
    assert element("p", "a < b", Html("<b>c</b>"), ["&"], class_='"', data_x=None, hidden=True) == (
        '<p class="&quot;" hidden>a &lt; b<b>c</b>&amp;</p>'
    )
    assert prose("`a<b` is & stays") == "<code>a&lt;b</code> is &amp; stays"
    assert element("rect", x=1.04, y=2.0) == '<rect x="1.0" y="2"/>'.replace("1.0", "1")


def test_axes_hold_their_values_and_say_them() -> None:
    axis = log_axis("ms", [13_000, 14_500])
    assert axis.low < 13_000 < 14_500 < axis.high
    assert axis.high / axis.low >= 3.99
    assert [word for _, word in log_axis("ms", [0.0012, 450]).ticks] == ["0.01", "0.1", "1", "10", "100"]
    assert [word for _, word in batch_axis([1, 64, 16384]).ticks] == ["1", "64", "16,384"]
    assert percent_axis("%", [20.0]).high == 100
    assert percent_axis("%", [180.0]).high == pytest.approx(189)
    assert [short(value) for value in (0.02, 5, 5000, 20_000, 2e6)] == ["0.02", "5", "5,000", "20k", "2M"]
