"""How near a row comes to the best that this machine was seen to do.

The share that a row reaches of the machine's peaks, in FLOP/s and in bytes/s: the roofline model (Williams, Waterman,
Patterson, CACM 52(4), 2009). Counting the work and measuring the peaks is `bench.worker.peaks`.

The work is that of the unfolded torch.export program. FLOPs are torch's own count, of convolutions and matrix products,
a multiplication and an addition being two. Bytes are what these layers and the pools read and write once, at the width
of the file's precision, weights once per call: what is elementwise is taken as fused away, so that a runtime that fuses
less moves more.

A peak is the best of several probes. A row that is faster than all of them is one more: no share is over 100 %, and
the peak says which row it is from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

RooflineDevice = Literal["cpu", "cuda"]
# Files of before have "launches", which was inferred from the smallest batch; whatever reads a file places it anew.
Binding = Literal["arithmetic", "memory", "copies", "overheads", "launches"]
# From half of its peak on, a resource alone takes most of the time: with all else gone the call would not be twice as
# fast, and nothing else can take more.
BINDS_FROM_PERCENT = 50.0
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Work:
    """What one call of the model has to do, in float32. `weight_bytes` are read once per call, whatever the batch;
    `raw_bytes_per_image` cross to the device end to end (None in files of before).
    """

    flops_per_image: float
    activation_bytes_per_image: float
    weight_bytes: float
    raw_bytes_per_image: float | None = None


@dataclass(frozen=True)
class Peak:
    """The best that a device was seen to do for files of one precision, in that or a wider arithmetic (TF32 where the
    profile allows it).

    Attributes:
        flops_per_s: of products and convolutions.
        copy_bytes_per_s: of copies, reading and writing counted.
        host_to_device_bytes_per_s: of one copy from pinned memory to the device; None where the device is the host.
        flops_probe: what reached `flops_per_s`: a probe, or a row that was faster than all probes. The default is what
            files of before were measured with.
        copy_probe: the same for `copy_bytes_per_s`.
    """

    device: RooflineDevice
    flops_per_s: float
    copy_bytes_per_s: float
    host_to_device_bytes_per_s: float | None = None
    precision: str = "float32"
    flops_probe: str = "torch, one matrix product"
    copy_probe: str = "torch, one copy"


@dataclass(frozen=True)
class Survey:
    """The model's work, and the peaks of the devices that were in use, one for each precision of the bundle's files."""

    work: Work
    peaks: tuple[Peak, ...]


@dataclass(frozen=True)
class Rate:
    """How fast a row is, in images/s: `on_device` device-resident, `end_to_end` from raw input to logits."""

    subject: str
    batch_size: int
    device: RooflineDevice
    precision: str
    on_device: float
    end_to_end: float

    @property
    def words(self) -> str:
        """What a peak that it set is from."""
        return f"the row {self.subject} at batch {self.batch_size:,}, faster than every probe"


@dataclass(frozen=True)
class Point:
    """Where a row lies under the roofline.

    Attributes:
        arithmetic_percent: share of `peak.flops_per_s` that the device-resident throughput amounts to.
        memory_percent: share of `peak.copy_bytes_per_s`, likewise.
        binds: the resource that is used most, where that is at least `BINDS_FROM_PERCENT` of its peak; else overheads:
            launching, waiting, other layouts, kernels that can do no better.
        copies_percent: share of `peak.host_to_device_bytes_per_s` that the raw input takes of the end-to-end
            throughput; None where the device is the host, or the raw input's size is not known.
        peak: what the shares are of: the survey's, or more where a row was faster; None in files of before.
    """

    subject: str
    batch_size: int
    arithmetic_percent: float
    memory_percent: float
    binds: Binding
    copies_percent: float | None = None
    peak: Peak | None = None

    @property
    def accounted_percent(self) -> float:
        """How much of the device-resident time arithmetic or memory, whichever takes longer, would take at its peak."""
        return max(self.arithmetic_percent, self.memory_percent)


def place(rates: Sequence[Rate], survey: Survey) -> tuple[Point, ...]:
    """The place of every row whose device and precision have a peak."""
    work = survey.work
    peaks = {(peak.device, peak.precision): at_least(peak, rates, work) for peak in survey.peaks}
    keys = [(rate, (rate.device, rate.precision)) for rate in rates]
    return tuple(place_row(rate, work, peaks[key]) for rate, key in keys if key in peaks)


def at_least(peak: Peak, rates: Sequence[Rate], work: Work) -> Peak:
    """The peak, raised to what the rows reached that may do the same arithmetic: of its precision, and of float32."""
    for rate in rates:
        if rate.device != peak.device or rate.precision not in ("float32", peak.precision):
            continue
        if (flops := flops_per_s(rate, work)) > peak.flops_per_s:
            peak = replace(peak, flops_per_s=flops, flops_probe=rate.words)
        if (moved := bytes_per_s(rate, work)) > peak.copy_bytes_per_s:
            peak = replace(peak, copy_bytes_per_s=moved, copy_probe=rate.words)
        sent = raw_bytes_per_s(rate, work)
        if sent is not None and peak.host_to_device_bytes_per_s is not None:
            peak = replace(peak, host_to_device_bytes_per_s=max(sent, peak.host_to_device_bytes_per_s))
    return peak


def place_row(rate: Rate, work: Work, peak: Peak) -> Point:
    """The place of one row under a peak."""
    shares: dict[Binding, float] = {
        "arithmetic": 100 * flops_per_s(rate, work) / peak.flops_per_s,
        "memory": 100 * bytes_per_s(rate, work) / peak.copy_bytes_per_s,
    }
    sent, link = raw_bytes_per_s(rate, work), peak.host_to_device_bytes_per_s
    if sent is not None and link is not None:
        shares["copies"] = 100 * sent / link
    most = max(shares, key=lambda resource: shares[resource])
    return Point(
        subject=rate.subject,
        batch_size=rate.batch_size,
        arithmetic_percent=shares["arithmetic"],
        memory_percent=shares["memory"],
        binds=most if shares[most] >= BINDS_FROM_PERCENT else "overheads",
        copies_percent=shares.get("copies"),
        peak=peak,
    )


def flops_per_s(rate: Rate, work: Work) -> float:
    """The arithmetic that a row does on the device."""
    return rate.on_device * work.flops_per_image


def bytes_per_s(rate: Rate, work: Work) -> float:
    """What a row has to move on the device at least, at the width of its precision."""
    width = BYTES[rate.precision] / BYTES["float32"]
    return rate.on_device * width * (work.activation_bytes_per_image + work.weight_bytes / rate.batch_size)


def raw_bytes_per_s(rate: Rate, work: Work) -> float | None:
    """What a row sends to the device, end to end; None where the raw input's size is not known."""
    return None if work.raw_bytes_per_image is None else rate.end_to_end * work.raw_bytes_per_image


def held_to(survey: Survey, points: Sequence[Point]) -> tuple[Peak, ...]:
    """The survey's peaks as the points are held to them: raised where a row was faster."""
    raised = {(point.peak.device, point.peak.precision): point.peak for point in points if point.peak is not None}
    return tuple(raised.get((peak.device, peak.precision), peak) for peak in survey.peaks)
