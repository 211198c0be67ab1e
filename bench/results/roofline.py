"""How near a row comes to what the machine could do at best.

The share that a row reaches of the machine's two peaks, one matrix product and one copy: the roofline model (Williams,
Waterman, Patterson, CACM 52(4), 2009). Counting and measuring is `bench.worker.peaks`.

The work is that of the unfolded torch.export program. FLOPs are torch's own count, of convolutions and matrix products,
a multiplication and an addition being two. Bytes are what these layers and the pools read and write once, in float32,
weights once per call: what is elementwise is taken as fused away, so that a runtime that fuses less moves more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RooflineDevice = Literal["cpu", "cuda"]
Binding = Literal["arithmetic", "memory", "copies", "launches"]


@dataclass(frozen=True)
class Work:
    """What one call of the model has to do. `weight_bytes` are read once per call, whatever the batch."""

    flops_per_image: float
    activation_bytes_per_image: float
    weight_bytes: float


@dataclass(frozen=True)
class Peak:
    """The best that a device was seen to do: `flops_per_s` of one float32 matrix product (TF32 where the profile allows
    it), `copy_bytes_per_s` of one copy, reading and writing counted, `host_to_device_bytes_per_s` of one copy from
    pinned memory to the device; None where the device is the host.
    """

    device: RooflineDevice
    flops_per_s: float
    copy_bytes_per_s: float
    host_to_device_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Survey:
    """The model's work, and the peaks of the devices that were in use."""

    work: Work
    peaks: tuple[Peak, ...]


@dataclass(frozen=True)
class Point:
    """Where a row lies under the roofline.

    `arithmetic_percent` and `memory_percent` are the shares of the two peaks that the device-resident time reaches.
    `binds` is what takes the time: the copies, where moving the data to and from the device is most of the end-to-end
    time; the launches of operators, where what a call takes at the smallest batch, beyond the ideal, is most of it;
    else the peak that is reached further.
    """

    subject: str
    batch_size: int
    arithmetic_percent: float
    memory_percent: float
    binds: Binding


def place_row(
    subject: str,
    batch_size: int,
    device_images_per_s: float,
    whole_images_per_s: float,
    launch_seconds: float,
    work: Work,
    peak: Peak,
) -> Point:
    """The place of one row, from its throughputs device-resident and end to end, and its backend's launches."""
    seconds = batch_size / device_images_per_s
    arithmetic, memory = (100 * ideal / seconds for ideal in ideal_seconds(batch_size, work, peak))
    binds: Binding = "arithmetic" if arithmetic >= memory else "memory"
    if launch_seconds > 0.5 * seconds:
        binds = "launches"
    if whole_images_per_s < 0.5 * device_images_per_s:
        binds = "copies"
    return Point(subject, batch_size, arithmetic, memory, binds)


def ideal_seconds(batch_size: int, work: Work, peak: Peak) -> tuple[float, float]:
    """What a call would take if arithmetic alone, and if memory alone, limited it."""
    moved = batch_size * work.activation_bytes_per_image + work.weight_bytes
    return batch_size * work.flops_per_image / peak.flops_per_s, moved / peak.copy_bytes_per_s


def launch_seconds(smallest_batch: int, device_images_per_s: float, work: Work, peak: Peak) -> float:
    """What a call at the smallest batch takes beyond the ideal: what every call takes, whatever the batch."""
    return max(0.0, smallest_batch / device_images_per_s - max(ideal_seconds(smallest_batch, work, peak)))
