"""One run of MLPerf LoadGen against a callable, and what LoadGen itself wrote about it.

Owns the translation to and from LoadGen: its settings, the queries that it issues, its logs. Knows neither backends nor
bundles, and judges nothing: whether a run is valid is read from LoadGen's own summary. `drive` runs inside a worker;
everything else only reads files.

LoadGen: https://github.com/mlcommons/inference/tree/master/loadgen, package ``mlcommons-loadgen``.
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.results.terms import Scenario
from export.bundle.detections import joined
from export.bundle.manifest import BOX_KINDS

if TYPE_CHECKING:
    import numpy as np

    from export.bundle import Arrays, Output

# The rules of MLPerf Inference, from LoadGen's mlperf.conf (version 6.0), where it sets them for every model.
PERCENTILES = {"single-stream": 0.90, "multi-stream": 0.99, "server": 0.99}
SEEDS = {
    "qsl_rng_seed": 2085463073848966840,
    "sample_index_rng_seed": 2747215439041700203,
    "schedule_rng_seed": 16159082839903944936,
}
# So many queries let a 99th percentile hold with LoadGen's confidence of 99 %, one outlier discarded.
P99_MIN_QUERIES = 662
OFFLINE_MIN_IMAGES = 24_576
# LoadGen makes its queries beforehand. No more are asked for than one in this time, or one image of many: a query that
# computes nothing was seen to take 1.5e-5 s through LoadGen and Python, and an image of many 5e-6 s.
SHORTEST_QUERY_S, SHORTEST_IMAGE_S = 1e-5, 2e-6
# A server run that is this much behind its schedule has long broken any bound; the backlog need not be worked off.
SERVER_OVERRUN = 1.5


@dataclass(frozen=True)
class Load:
    """One run of LoadGen.

    Attributes:
        accuracy: collect the output of every image once, instead of measuring.
        min_duration_s: LoadGen goes on at least this long, if the queries that it made suffice.
        images_per_call: the most images that the callable is given at once.
        queries_per_s: server: the rate at which queries arrive; else how many at most are expected to be answered
            (offline: images), from which LoadGen knows how many to make.
        latency_bound_s: server: what the 99th percentile must not exceed; None elsewhere.
    """

    scenario: Scenario
    accuracy: bool
    min_duration_s: float
    images_per_call: int
    queries_per_s: float
    latency_bound_s: float | None = None


@dataclass(frozen=True)
class Driven:
    """What the callable saw of a run: queries, images, and the seconds that all of it took."""

    queries: int
    images: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What LoadGen says of a run that measured.

    Attributes:
        valid: its verdict.
        unmet: the constraints that it calls not satisfied, in its words.
        latency_ns: percentile (50, 90, 95, 97, 99, 99.9) to latency; of a query, in multi-stream too.
        images_per_s: offline and server: what was completed in a second; None elsewhere.
    """

    valid: bool
    unmet: tuple[str, ...]
    latency_ns: dict[float, int]
    images_per_s: float | None


def drive(call: Callable[..., Arrays], raw: Arrays, load: Load, folder: Path) -> Driven:
    """Let LoadGen issue queries to `call` until it has enough, its logs going to `folder` (made here).

    `call` turns each of the model's inputs, [n, …], into its outputs, [n, …]; `raw` are all inputs that there are.
    Every query is answered before LoadGen issues the next, in the order in which they arrive.

    Raises whatever `call` raises, once LoadGen has come to an end: it does not survive an exception from within, so
    that every query after that one is answered with nothing.
    """
    import mlperf_loadgen
    import numpy as np

    folder.mkdir(parents=True)
    inputs = tuple(np.array(array, order="C") for array in raw)  # writable, as sessions expect their input
    images = len(inputs[0])
    answers = _Answers(call, inputs, load)
    system = mlperf_loadgen.ConstructFastSUT(answers.issue, _nothing)
    library = mlperf_loadgen.ConstructQSL(images, images, _nothing, _nothing)
    started = time.perf_counter()
    gc.disable()  # as in a timed block: a collection of the harness's own garbage would land in somebody's p99
    try:
        # The last argument is the name of a file that would override the settings; the default is one in the current
        # folder.
        mlperf_loadgen.StartTestWithLogSettings(system, library, _settings(load, images), _log_settings(folder), "")
    finally:
        gc.enable()
        mlperf_loadgen.DestroyQSL(library)
        mlperf_loadgen.DestroyFastSUT(system)
    if answers.failure is not None:
        raise answers.failure
    return Driven(answers.queries, answers.images, time.perf_counter() - started)


class _Answers:
    """What answers the queries, and counts them. `failure` is the first exception of the callable.

    What happens here between a query and its answer counts as latency. Code and objects that the model has driven from
    the caches while it ran are slow: reading an array's address and making a response took 20 µs, of a call's 300 (two
    cores at 2.5 GHz), and no more than 1 µs when nothing ran in between. So outputs are handed over only where LoadGen
    looks at them, which is in its accuracy mode, and one image is answered with what is at hand.
    """

    def __init__(self, call: Callable[..., Arrays], inputs: Arrays, load: Load) -> None:
        import mlperf_loadgen

        self._call, self._pool, self._accuracy = call, inputs, load.accuracy
        self._size = load.images_per_call
        self._response = mlperf_loadgen.QuerySampleResponse
        self._complete = mlperf_loadgen.QuerySamplesComplete
        self._one = self._response(0, 0, 0)
        self._only_one = [self._one]
        self.queries = self.images = 0
        self.failure: Exception | None = None

    def issue(self, ids: list[int], indices: list[int]) -> None:
        """Answer one query; LoadGen's callback."""
        self.queries += 1
        self.images += len(ids)
        if len(ids) == 1 and not self._accuracy and self.failure is None:
            index = indices[0]
            try:
                # A view: no copy that a caller with an image in hand would not make.
                self._call(*[array[index : index + 1] for array in self._pool])
            except Exception as error:  # whatever a runtime raises
                self.failure = error
            self._one.id = ids[0]
            self._complete(self._only_one)
            return
        for start in range(0, len(ids), self._size):
            self._answer(ids[start : start + self._size], indices[start : start + self._size])

    def _answer(self, ids: list[int], indices: list[int]) -> None:
        address = each = 0
        if self.failure is None:
            try:
                outputs = self._call(*[array[indices] for array in self._pool])
                if self._accuracy:
                    packed = pack(outputs)
                    address, each = packed.__array_interface__["data"][0], packed.nbytes // len(ids)
            except Exception as error:  # whatever a runtime raises
                self.failure = error
        self._complete([self._response(id_, address + place * each, each) for place, id_ in enumerate(ids)])


def pack(outputs: Arrays) -> np.ndarray:
    """Outputs [n, …] as one array of bytes, uint8 [n, bytes of an image]: each image's, one output after the other."""
    import numpy as np

    return np.concatenate(
        [np.ascontiguousarray(each).reshape(len(each), -1).view(np.uint8) for each in outputs], axis=1
    )


def _nothing(*_: object) -> None:
    """The images are in memory all the time, and no query waits to be flushed."""


def _settings(load: Load, images: int) -> Any:
    import mlperf_loadgen

    kinds, modes = mlperf_loadgen.TestScenario, mlperf_loadgen.TestMode
    settings = mlperf_loadgen.TestSettings()
    settings.mode = modes.AccuracyOnly if load.accuracy else modes.PerformanceOnly
    settings.min_duration_ms = round(load.min_duration_s * 1000)
    for name, seed in SEEDS.items():
        setattr(settings, name, seed)
    expected_ns = round(1e9 / load.queries_per_s)
    if load.scenario is Scenario.SINGLE_STREAM:
        settings.scenario = kinds.SingleStream
        settings.single_stream_expected_latency_ns = expected_ns
        settings.single_stream_target_latency_percentile = PERCENTILES[load.scenario]
    elif load.scenario is Scenario.MULTI_STREAM:
        settings.scenario = kinds.MultiStream
        settings.multi_stream_expected_latency_ns = expected_ns
        settings.multi_stream_samples_per_query = load.images_per_call
        settings.multi_stream_target_latency_percentile = PERCENTILES[load.scenario]
        settings.min_query_count = P99_MIN_QUERIES
    elif load.scenario is Scenario.OFFLINE:
        settings.scenario = kinds.Offline
        settings.offline_expected_qps = load.queries_per_s
        settings.min_query_count = min(OFFLINE_MIN_IMAGES, images)
    else:
        settings.scenario = kinds.Server
        settings.server_target_qps = load.queries_per_s
        settings.server_target_latency_percentile = PERCENTILES[load.scenario]
        if load.latency_bound_s is not None:
            settings.server_target_latency_ns = round(load.latency_bound_s * 1e9)
        settings.min_query_count = P99_MIN_QUERIES
        if not load.accuracy:
            settings.max_duration_ms = round(1000 * longest_s(load))
    return settings


def _log_settings(folder: Path) -> Any:
    import mlperf_loadgen

    settings, output = mlperf_loadgen.LogSettings(), mlperf_loadgen.LogOutputSettings()
    output.outdir = str(folder)
    settings.log_output = output
    settings.enable_trace = False  # an event for every image, written while the backend is measured
    return settings


def longest_s(load: Load) -> float:
    """When a server run is given up, in seconds. On schedule it takes the shortest duration, or more for enough
    queries."""
    scheduled_s = max(load.min_duration_s, P99_MIN_QUERIES / load.queries_per_s)
    return SERVER_OVERRUN * scheduled_s + (load.latency_bound_s or 0.0)


def read_summary(folder: Path) -> Summary:
    """The verdict and the figures of a run that measured, from the summary that LoadGen wrote to `folder`.

    Raises:
        ValueError: there is no verdict in it, because the run did not get to its end.
    """
    text = (folder / "mlperf_log_summary.txt").read_text()
    verdict = re.search(r"^Result is : (VALID|INVALID)$", text, re.MULTILINE)
    if verdict is None:
        raise ValueError(f"LoadGen's summary has no verdict, it reads: {text.strip() or '(nothing)'}")
    rate = re.search(r"^(?:Completed samples|Samples) per second\s*: *(\S+)$", text, re.MULTILINE)
    return Summary(
        valid=verdict[1] == "VALID",
        unmet=tuple(re.findall(r"^  (\S.*?) satisfied *: NO$", text, re.MULTILINE)),
        latency_ns={
            float(percent): int(latency)
            for percent, latency in re.findall(r"^([\d.]+) percentile latency \(ns\) *: (\d+)$", text, re.MULTILINE)
        },
        images_per_s=None if rate is None else float(rate[1]),
    )


def read_outputs(folder: Path, like: Arrays, specs: Sequence[Output]) -> Arrays:
    """The outputs that LoadGen collected in accuracy mode, in the order of the images: each of the shape [N, …] of that
    of `like`, in float32 where that has floats, else in its type; lists of boxes as long as the longest.

    Raises:
        ValueError: an image is missing, or its outputs have another size.
    """
    import numpy as np

    images: list[Arrays | None] = [None] * len(like[0])
    types = [np.dtype(np.float32) if each.dtype.kind == "f" else each.dtype for each in like]
    lists = [spec.kind in BOX_KINDS for spec in specs]
    # Of an image's numbers, or of those of one box where they are in a list.
    sizes = [
        np.prod(each.shape[2 if listed else 1 :], dtype=int) * type_.itemsize
        for each, type_, listed in zip(like, types, lists, strict=True)
    ]
    fixed = sum(size for size, listed in zip(sizes, lists, strict=True) if not listed)
    of_a_box = sum(sizes) - fixed
    for entry in json.loads((folder / "mlperf_log_accuracy.json").read_text()):
        place, data = entry["qsl_idx"], bytes.fromhex(entry["data"])
        boxes, rest = divmod(len(data) - fixed, of_a_box) if of_a_box else (0, len(data) - fixed)
        if rest or boxes < 0:
            raise ValueError(f"LoadGen collected {len(data)} bytes of image {place}, expected {fixed}")
        parts, end = [], 0
        for each, type_, size, listed in zip(like, types, sizes, lists, strict=True):
            begin, end = end, end + size * (boxes if listed else 1)
            shape = (boxes, *each.shape[2:]) if listed else (1, *each.shape[1:])
            parts.append(np.frombuffer(data[begin:end], type_).reshape(shape))
        images[place] = tuple(parts)
    collected = [image for image in images if image is not None]
    if len(collected) < len(images):
        raise ValueError(f"LoadGen collected the outputs of {len(collected)} of {len(images)} images")
    return joined(collected, specs)


def read_version(folder: Path) -> str:
    """LoadGen's version and commit, from its detailed log."""
    match = re.search(r'"key": "loadgen_version", "value": "([^"]+)"', (folder / "mlperf_log_detail.txt").read_text())
    return match[1] if match else "unknown"
