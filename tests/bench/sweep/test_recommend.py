"""What is recommended of a sweep, and the programs that run it without ninefold."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from rich.console import Console
from sweeps import MB, TORCH, Figures, result_of, sweep_of

from bench.backends.contract import Runnable
from bench.backends.registry import BACKENDS, find_backend
from bench.cli.main import app
from bench.errors import EXIT_BAD_INPUT, EXIT_NEGATIVE, EXIT_USAGE, BenchError
from bench.report.columns import CANDIDATES, PLACEMENT
from bench.report.terminal.console import WIDE
from bench.report.terminal.sweep import print_recommendation
from bench.results.files import write_result
from bench.results.schema import Failure, Result
from bench.results.studies import Candidate, Recommendation, Sweep
from bench.run.plan import Choice, opened
from bench.sweep.program import snippet
from bench.sweep.recommend import candidates, front, program, recommend
from export.bundle import Bundle, Preprocessing, TensorSpec

ONNX, ONNX_1 = Choice("onnx-cpu", "float32", 2), Choice("onnx-cpu", "float32", 1)
INT8, RAW = Choice("onnx-cpu", "int8", 2), Choice("openvino-cpu", "int8-raw", 2)
BAD, DEAD = Choice("onnx-cpu", "float16", 2), Choice("onnx-cpu", "bfloat16", 2)
WORLD = {
    TORCH: Figures({1: 500, 64: 5000}, {1: 3.0, 64: 20.0}, file="model.unfolded.pt2", memory_bytes=600 * MB),
    ONNX_1: Figures({1: 4000, 64: 9000}, {1: 0.3, 64: 9.0}),
    ONNX: Figures({1: 3500, 64: 15000}, {1: 0.5, 64: 5.0}),
    INT8: Figures({1: 3900, 64: 30000}, {1: 0.4}, flips=4, top1_percent=98.98, file="model.int8.onnx", file_bytes=MB),
    RAW: Figures({1: 3000, 64: 20000}, {1: 0.6, 64: 4.0}, flips=4, file="model.int8.raw.xml", file_bytes=MB),
    BAD: Figures({1: 10**6, 64: 10**6}, {1: 0.01, 64: 0.01}, file_bytes=1, wrong="top-1 is 90 %"),
    DEAD: Figures(failure=Failure(kind="crashed", message="ended by SIGSEGV", trace="")),
}


@pytest.fixture(scope="module")
def bundle(small_bundle: Path) -> Bundle:
    return opened(small_bundle)


@pytest.fixture(scope="module")
def sweep(result: Result, bundle: Bundle) -> Sweep:
    return sweep_of(result, WORLD, bundle)


def named(found: Sequence[Candidate]) -> list[tuple[str, int]]:
    return [(one.label, one.batch_size) for one in found]


def picked(found: Recommendation) -> dict[str, tuple[str, int]]:
    return {pick.respect: (pick.candidate.label, pick.candidate.batch_size) for pick in found.picks}


def test_who_is_wrong_or_did_not_finish_is_no_candidate(sweep: Sweep) -> None:
    labels = {one.label for one in candidates(sweep)}
    assert labels == {"torch-cpu", "onnx-cpu/1", "onnx-cpu", "onnx-cpu:int8", "openvino-cpu:int8-raw"}


def test_the_front_is_whom_nobody_beats(sweep: Sweep) -> None:
    """torch is beaten by onnx-cpu in everything; int8 at batch 64 has no p99, so that it can't win by it."""
    assert named(front(candidates(sweep))) == [
        ("onnx-cpu:int8", 64),
        ("openvino-cpu:int8-raw", 64),
        ("onnx-cpu/1", 1),
        ("onnx-cpu:int8", 1),
        ("openvino-cpu:int8-raw", 1),
    ]


@pytest.mark.parametrize(
    ("change", "there"),
    [
        ({}, False),
        ({"per_s": {1: 3901}}, True),
        ({"p99_ms": {1: 0.29}}, True),
        ({"top1_percent": 99.01}, True),
        ({"file_bytes": 2 * MB - 1}, True),
        ({"memory_bytes": 180 * MB}, True),
        ({"memory_bytes": 200 * MB - 1000}, False),
    ],
)
def test_one_respect_is_enough(result: Result, bundle: Bundle, change: dict[str, Any], there: bool) -> None:
    """Where two are alike both are on the front; memory counts in steps."""
    good = Figures({1: 3900}, {1: 0.3})
    other = replace(Figures({1: 3800}, {1: 0.4}), **change)
    found = front(candidates(sweep_of(result, {TORCH: good, ONNX: other}, bundle)))
    assert (("onnx-cpu", 1) in named(found)) == there
    assert named(front(candidates(sweep_of(result, {TORCH: good, ONNX: good}, bundle)))) == [
        ("torch-cpu", 1),
        ("onnx-cpu", 1),
    ]


def test_the_picks(sweep: Sweep) -> None:
    assert picked(recommend(sweep, None, None)) == {
        "largest throughput": ("onnx-cpu:int8", 64),
        "lowest p99": ("onnx-cpu/1", 1),
        "smallest file": ("onnx-cpu:int8", 64),
        "as exact as float32 (no flips)": ("onnx-cpu", 64),
    }
    bounded = picked(recommend(sweep, 4.5, None))
    assert bounded["largest throughput with a p99 of at most 4.5 ms"] == ("openvino-cpu:int8-raw", 64)
    single = picked(recommend(sweep, None, 1))
    assert single["largest throughput"] == ("onnx-cpu/1", 1)
    assert single["smallest file"] == ("onnx-cpu:int8", 1)


def test_a_respect_that_nobody_is_good_in_is_said(result: Result, bundle: Bundle) -> None:
    figures = Figures({1: 10}, {}, flips=1)
    found = recommend(sweep_of(result, {TORCH: figures, INT8: figures}, bundle), None, None)
    assert found.lacking == ("lowest p99", "as exact as float32 (no flips)")


@pytest.mark.parametrize(
    ("bound", "size", "words", "code"),
    [
        (0.2, None, r"at most 0.2 ms; the lowest bound is 0.33 ms, of onnx-cpu/1 at batch 1", EXIT_NEGATIVE),
        (4.1, 64, r"the lowest bound is 4.4 ms, of openvino-cpu:int8-raw at batch 64", EXIT_NEGATIVE),
        (None, 8, r"--batch-size 8 is not in this sweep; it has 1, 64", EXIT_USAGE),
    ],
)
def test_what_nothing_holds_is_an_error(
    sweep: Sweep, bound: float | None, size: int | None, words: str, code: int
) -> None:
    with pytest.raises(BenchError, match=words) as caught:
        recommend(sweep, bound, size)
    assert caught.value.exit_code == code


def test_a_bound_is_held_with_confidence(result: Result, bundle: Bundle) -> None:
    """By the upper bound of the p99, not by the p99; who has none doesn't hold it, however fast."""
    world = {
        TORCH: Figures({1: 10}, {1: 2.0}),
        ONNX: Figures({1: 30}, {1: 0.9}, {1: 1.2}),
        ONNX_1: Figures({1: 20}, {1: 0.8}, {1: 0.95}),
        INT8: Figures({1: 40}, {1: 0.1}, {1: None}),
    }
    found = picked(recommend(sweep_of(result, world, bundle), 1.0, None))
    assert found["largest throughput with a p99 of at most 1 ms"] == ("onnx-cpu/1", 1)
    with pytest.raises(BenchError, match="no upper bound of a p99 is known: too few calls were made"):
        recommend(sweep_of(result, {TORCH: Figures({1: 10}), INT8: world[INT8]}, bundle), 1.0, None)


def test_where_nothing_is_right_nothing_is_recommended(result: Result, bundle: Bundle) -> None:
    with pytest.raises(BenchError, match="no file in this sweep is right") as caught:
        recommend(sweep_of(result, {BAD: WORLD[BAD], DEAD: WORLD[DEAD]}, bundle), None, None)
    assert caught.value.exit_code == EXIT_NEGATIVE


def test_what_is_emulated_is_never_picked(result: Result, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """The fastest, with the lowest p99, the smallest file and no flip: all that there is to win."""
    best = Figures({1: 10**5, 64: 10**5}, {1: 0.01, 64: 0.01}, file="model.float16.onnx", file_bytes=1)
    half = Choice("onnx-cpu", "float16", 2)
    told = recommend(sweep_of(result, {**WORLD, half: replace(best, emulated="no kernels")}, bundle), None, None)
    without = recommend(
        sweep_of(result, {choice: WORLD[choice] for choice in WORLD if choice != half}, bundle), None, None
    )
    assert (picked(told), told.front, told.candidates) == (picked(without), without.front, without.candidates)
    assert without.left_out == ()
    (left,) = told.left_out
    assert left.what == "onnx-cpu:float16"
    assert left.reason.startswith("float16 is emulated, that is, computed in float32: the runtime has no kernels")
    native = picked(recommend(sweep_of(result, {**WORLD, half: best}, bundle), None, None))
    assert {label for label, _ in native.values()} == {"onnx-cpu:float16"}, "where it is not emulated it wins it all"
    sweep = sweep_of(result, {**WORLD, half: replace(best, emulated="no kernels")}, bundle)
    print_recommendation(told, sweep, Console(width=WIDE))
    assert f"not recommended: onnx-cpu:float16: {left.reason}" in capsys.readouterr().out


def test_what_a_look_saw_emulated_is_said_too(sweep: Sweep, result: Result, bundle: Bundle) -> None:
    half = Choice("compile-cpu", "bfloat16", 2)
    look = result_of(
        result, {half: Figures(emulated="no instructions"), BAD: replace(WORLD[BAD], emulated="no kernels")}, bundle
    )
    found = recommend(sweep.model_copy(update={"looks": (look,)}), None, None)
    assert [(entry.what, entry.failed) for entry in found.left_out] == [("compile-cpu:bfloat16", False)]


def test_where_all_is_emulated_the_error_says_so(result: Result, bundle: Bundle) -> None:
    only = sweep_of(result, {Choice("onnx-cpu", "float16", 2): Figures(emulated="no kernels")}, bundle)
    with pytest.raises(
        BenchError, match=r"nothing can be recommended.*onnx-cpu:float16: float16 is emulated"
    ) as caught:
        recommend(only, None, None)
    assert caught.value.exit_code == EXIT_NEGATIVE


def test_the_command_measures_that_number_again(sweep: Sweep, bundle: Bundle) -> None:
    commands = {pick.respect: pick.command for pick in recommend(sweep, None, None).picks}
    start = f"bench run --bundle {bundle.path} --backend onnx-cpu"
    torch = "--backend torch-cpu"
    assert commands["largest throughput"] == f"{start} {torch} --variant int8 --threads 2 --batch-size 64"
    assert commands["lowest p99"] == f"{start} --threads 1 --batch-size 1", "its ratio is to torch with all threads"


def test_the_command_shows_the_front_and_the_picks(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_result(sweep, tmp_path / "sweep.json")
    out = tmp_path / "recommendation.json"
    app(["recommend", str(tmp_path), "--json", str(out)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "the Pareto front of 10 measured candidates" in printed
    assert (
        "largest throughput, smallest file: model.int8.onnx on onnx-cpu, threads 2, batch 64; 30,000 ±1.0%" in printed
    )
    assert "× torch 6 (5.94…6.06); top-1 98.98 %, 4 flips; 1.00 MB; memory of its process 191 MiB" in printed
    assert "p99 0.3 ms, at most 0.33; " in printed
    assert printed.count("import onnxruntime") == 3, "a program for each candidate, not for each respect"
    found = Recommendation.model_validate_json(out.read_text())
    assert found == recommend(sweep, None, None)


def test_without_an_argument_the_bundles_own_sweep_is_taken(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the README has it: where `bench sweep` writes without `--out`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        BenchError, match=r"no sweep of .*article at artifacts/results/article-sweep.*bench sweep"
    ) as no:
        app(["recommend", "--max-p99-ms", "5"], standalone_mode=False)
    assert no.value.exit_code == EXIT_BAD_INPUT
    for folder in ("article-sweep", "other-sweep"):
        place = tmp_path / "artifacts" / "results" / folder
        place.mkdir(parents=True)
        write_result(sweep.model_copy(update={"command": folder}), place / "sweep.json")
    asked = []
    monkeypatch.setattr("bench.report.terminal.sweep.print_recommendation", lambda _, swept, out: asked.append(swept))
    app(["recommend", "--max-p99-ms", "5"], standalone_mode=False)
    app(["recommend", "--bundle", "artifacts/bundles/other"], standalone_mode=False)
    app(["recommend", str(tmp_path / "artifacts/results/other-sweep")], standalone_mode=False)
    assert [swept.command for swept in asked] == ["article-sweep", "other-sweep", "other-sweep"]


def runnable(path: Path, bundle: Bundle, raw: bool = False, threads: int = 1) -> Runnable:
    manifest = bundle.manifest
    return Runnable(
        device="cpu",
        path=str(path),
        threads=threads,
        input=manifest.preprocessing.raw if raw else manifest.input,
        output=manifest.output,
        preprocessing=manifest.preprocessing,
    )


def with_preprocessing_inside(model: Path, target: Path, bundle: Bundle) -> Path:
    """The ONNX file, but for the raw pixels."""
    loaded = onnx.load(str(model))
    graph, preprocessing = loaded.graph, bundle.manifest.preprocessing
    (given,) = graph.input
    constants = {
        "scale": preprocessing.scale,
        "mean": preprocessing.mean[0],
        "std": preprocessing.std[0],
    }
    for name, value in constants.items():
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    graph.initializer.append(helper.make_tensor("channel", TensorProto.INT64, [1], [1]))
    steps = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "channel"], [given.name]),
    ]
    for place, node in enumerate(steps):
        graph.node.insert(place, node)
    graph.input.remove(given)
    graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 28, 28]))
    onnx.save(loaded, str(target))
    return target


def execute(programs: Sequence[str], bundle: Bundle, folder: Path) -> list[np.ndarray]:
    """The logits that each program makes of the oracle's inputs, in a process that can't import ninefold."""
    np.save(folder / "raw.npy", bundle.oracle().raw)
    for place, text in enumerate(programs):
        (folder / f"program_{place}.py").write_text(text)
    runner = (
        "import runpy, sys\n"
        "import numpy as np\n"
        "assert all(name not in sys.modules for name in ('bench', 'export', 'trainer'))\n"
        "raw = np.load('raw.npy')\n"
        f"for place in range({len(programs)}):\n"
        "    program = runpy.run_path(f'program_{place}.py')\n"
        "    halves = [program['logits'](part) for part in (raw[:100], raw[100:])]\n"
        "    np.save(f'logits_{place}.npy', np.concatenate(halves))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", runner]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [np.load(folder / f"logits_{place}.npy") for place in range(len(programs))]


def check(programs: Sequence[str], bundle: Bundle, folder: Path) -> None:
    truth = bundle.oracle().logits
    for text, found in zip(programs, execute(programs, bundle, folder), strict=True):
        assert "ninefold" not in text
        assert len(text.splitlines()) <= 65
        assert found.dtype == np.float32
        assert np.abs(found - truth).max() < 1e-4, text


def test_each_program_makes_the_oracles_logits(bundle: Bundle, tmp_path: Path) -> None:
    """Real files, of a bundle and with the preprocessing inside, at two batch sizes."""
    raw = with_preprocessing_inside(bundle.path / "model.onnx", tmp_path / "raw.onnx", bundle)
    check(
        [
            snippet("onnx-cpu", runnable(bundle.path / "model.onnx", bundle)),
            snippet("onnx-cpu", runnable(raw, bundle, raw=True)),
            snippet("onnx-cpu-basic", runnable(raw, bundle, raw=True)),
            snippet("onnx-cpu-spinless", runnable(raw, bundle, raw=True)),
            snippet("onnx-cpu-parallel", runnable(bundle.path / "model.onnx", bundle, threads=2)),
            snippet("torch-cpu", runnable(bundle.path / "model.unfolded.pt2", bundle)),
            snippet("torchscript-cpu", runnable(bundle.path / "model.ts", bundle)),
        ],
        bundle,
        tmp_path,
    )


def test_the_program_for_openvino_makes_the_oracles_logits(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    raw = with_preprocessing_inside(bundle.path / "model.onnx", tmp_path / "raw.onnx", bundle)
    check(
        [
            snippet("openvino-cpu", runnable(bundle.path / "model.onnx", bundle)),
            snippet("openvino-cpu", runnable(raw, bundle, raw=True)),
            snippet("openvino-cpu-throughput", runnable(raw, bundle, raw=True, threads=2)),
        ],
        bundle,
        tmp_path,
    )


@pytest.mark.slow
def test_the_programs_that_compile_make_the_oracles_logits(bundle: Bundle, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "torch._inductor.aoti_compile_and_package(torch.export.load(sys.argv[1]), package_path=sys.argv[2])\n"
    )
    package, program = tmp_path / "model.aoti.pt2", bundle.path / "model.pt2"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, program, package], check=True, timeout=300)
    check(
        [
            snippet("aoti-cpu", runnable(package, bundle)),
            snippet("compile-cpu", runnable(program, bundle)),
        ],
        bundle,
        tmp_path,
    )


def test_the_program_preprocesses_as_the_bundle_says(tmp_path: Path) -> None:
    """Three channels with a mean each, sizes that vary, and an axis that the raw input lacks."""
    cases = [
        (("batch", 3, "height", "width"), ("batch", 3, "height", "width"), (0.1, 0.2, 0.3), (2, 3, 5, 7)),
        (("batch", 1, "height", "width"), ("batch", "height", "width"), (0.1,), (2, 5, 7)),
        (("batch", 3, 5, 7), ("batch", 105), (0.1, 0.2, 0.3), (2, 105)),
        (("batch", 4), ("batch", 4), (0.1, 0.2, 0.3, 0.4), (2, 4)),
    ]
    for taken, given, mean, shape in cases:
        preprocessing = Preprocessing(
            raw=TensorSpec(name="raw", dtype="uint8", shape=given), scale=1 / 255, mean=mean, std=(0.5,)
        )
        spec = TensorSpec(name="image", dtype="float32", shape=taken)
        raw = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        for backend in ("onnx-cpu", "torch-cpu"):
            text = snippet(backend, Runnable("cpu", "nowhere", 1, spec, spec, preprocessing))
            lines = [line.strip() for line in text.splitlines() if re.match(r" *(x|scale|mean|std) = ", line)]
            namespace: dict[str, Any] = {"np": np, "torch": torch, "raw": raw}
            exec("\n".join(lines), namespace)
            np.testing.assert_array_equal(np.asarray(namespace["x"]), preprocessing.apply(raw, taken))


@pytest.mark.parametrize("takes_raw", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_a_program(name: str, takes_raw: bool) -> None:
    """Python in which every name is there and every import is used: those for a GPU can't run everywhere."""
    raw = TensorSpec(name="raw", dtype="uint8", shape=("batch", 4))
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
    backend = find_backend(name)
    taken = raw if takes_raw else spec
    file = Runnable(backend.device, "model", 1, taken, spec, Preprocessing(raw=raw, scale=1.0, mean=(0.0,), std=(1.0,)))
    assert (backend.program(file) is not None) == bool(backend.formats)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F", "-"]
    done = subprocess.run(command, input=snippet(name, file), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# In place of what a program takes of CUDA: the CPU. A graph that was captured computes anew what it was captured of.
ON_CPU = {
    'device="cuda"': 'device="cpu"',
    ', "cuda")': ', "cpu")',
    '"cuda", 0': '"cpu", 0',
    'map_location="cuda"': 'map_location="cpu"',
    ", pin_memory=True": "",
    "torch.cuda.synchronize()": "",
    "torch.cuda.Stream()": "Stream()",
    "torch.cuda.stream(stream)": "contextlib.nullcontext()",
    "stream.synchronize()": "",
    "return graph.replay, made": "return lambda: made.copy_(call()), made",
    "    graph = torch.cuda.CUDAGraph()\n": "",
    "with torch.cuda.graph(graph, stream=stream):": "with contextlib.nullcontext():",
    "onnxruntime.preload_dlls()": "",
    '("CUDAExecutionProvider", settings), ': "",
}
STREAM = "import contextlib\n\n\nclass Stream:\n    cuda_stream = 1\n\n\n"


def test_the_programs_for_a_gpu_make_the_oracles_logits_on_a_cpu(bundle: Bundle, tmp_path: Path) -> None:
    """All but CUDA itself: memory for each shape, replays that read and write it, bindings, two batch sizes."""
    raw = with_preprocessing_inside(bundle.path / "model.onnx", tmp_path / "raw.onnx", bundle)
    files = {
        "torch-cuda": bundle.path / "model.unfolded.pt2",
        "graph-cuda": bundle.path / "model.pt2",
        "torchscript-cuda": bundle.path / "model.ts",
        "onnx-cuda": bundle.path / "model.onnx",
        "onnx-cuda-nhwc": raw,
    }
    programs = []
    for name, path in files.items():
        text = snippet(name, replace(runnable(path, bundle, raw=path == raw), device="cuda"))
        assert "cuda.stream(stream)" in text
        for there, here in ON_CPU.items():
            text = text.replace(there, here)
        programs.append(STREAM + text)
    check(programs, bundle, tmp_path)


def test_the_program_is_what_was_measured(bundle: Bundle) -> None:
    """Options that the sessions set; a graph where one was captured."""

    def text_of(name: str, **settings: bool) -> str:
        device = find_backend(name).device
        file = replace(runnable(Path("model"), bundle, threads=2), device=device, settings=settings)
        return snippet(name, file)

    graph, torch_cuda = text_of("graph-cuda"), text_of("torch-cuda")
    assert "torch.cuda.graph(graph" in graph
    assert "captured(lambda: module(x))" in graph
    assert "captured(lambda: module(x))" not in torch_cuda
    assert "cudnn.benchmark = True" in graph
    assert "benchmark" not in torch_cuda
    assert all("waits for the GPU once more" in text for text in (graph, torch_cuda))
    assert "torch.compile(module)" in text_of("compile-cuda")
    for name, captures in {"onnx-cuda": True, "onnx-cuda-nhwc": True, "onnx-cuda-eager": False}.items():
        text = text_of(name)
        assert "run_with_iobinding(binding" in text
        assert ('"enable_cuda_graph": "1"' in text) == captures
        assert '"cudnn_conv_algo_search": "HEURISTIC"' in text
        assert '"use_tf32": "0"' in text
    assert "enable_cuda_graph" not in text_of("onnx-cuda", cuda_graph=False), "onnxruntime refused to capture it"
    fixed = text_of("openvino-cpu")
    assert "model.reshape(list(shape))" in fixed
    assert '"INFERENCE_PRECISION_HINT": "f32"' in fixed
    assert '"ENABLE_CPU_PINNING": False' in fixed
    assert "check_guards=False" in text_of("torch-cpu")
    assert "at every call" in fixed, "what the session does otherwise is said"
    assert "malloc" in text_of("torch-cpu").splitlines()[0], "and what may differ from process to process"


def test_a_candidates_program_has_the_settings_of_its_session(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = sweep.runs[0].subjects[1]
    (candidate, *_) = (one for one in candidates(sweep) if one.label == subject.label)
    monkeypatch.setattr("bench.sweep.recommend.snippet", lambda backend, file: file.settings)
    assert program(sweep, candidate) == subject.settings != {}


def test_memory_is_said_to_be_the_processs() -> None:
    names = [column.name for column in (*CANDIDATES, *PLACEMENT) if "memory" in column.name]
    assert names == [
        "memory of its process, MiB",
        "peak host memory of its process, MiB",
        "peak GPU memory of its process, MiB",
    ]
