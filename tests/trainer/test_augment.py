"""Bent digits: each number does what it says, and no more."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from trainer import mnist
from trainer.augment import Augment
from trainer.recipes import AUGMENTED, Augmentation

CPU = torch.device("cpu")
NOTHING = Augmentation(rotation_degrees=0, shear=0, scale=0, shift_pixels=0)


def bent(images: torch.Tensor, seed: int = 0, **numbers: float) -> torch.Tensor:
    torch.manual_seed(seed)
    return Augment(dataclasses.replace(NOTHING, **numbers), CPU)(images)


@pytest.fixture(scope="module")
def digits(data: mnist.Mnist) -> torch.Tensor:
    return torch.from_numpy(data.train_images[:200].astype(np.float32) / 255)[:, None]


def centre(images: torch.Tensor) -> torch.Tensor:
    """Where the ink's centre is, [n, 2] in pixels, x and y."""
    along = torch.arange(28.0)
    ink = images.sum((1, 2, 3))
    return torch.stack(((images.sum((1, 2)) * along).sum(1) / ink, (images.sum((1, 3)) * along).sum(1) / ink), 1)


def spread(images: torch.Tensor) -> torch.Tensor:
    """The covariance of the ink around its centre, [n, 2, 2]."""
    grid = torch.stack(torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="xy"), -1)
    away = grid[None] - centre(images)[:, None, None]
    weight = (images / images.sum((1, 2, 3), keepdim=True))[:, 0]
    return torch.einsum("nhw,nhwi,nhwj->nij", weight, away, away)


def test_no_bending_changes_nothing(digits: torch.Tensor) -> None:
    torch.testing.assert_close(bent(digits), digits, atol=1e-5, rtol=0)


def test_shifts(digits: torch.Tensor) -> None:
    moved = centre(bent(digits, shift_pixels=3)) - centre(digits)
    assert moved.abs().max() <= 3.05
    for axis in (0, 1):
        assert moved[:, axis].min() < -2.5
        assert moved[:, axis].max() > 2.5
    assert np.corrcoef(moved.T)[0, 1] == pytest.approx(0, abs=0.25), "the axes are drawn apart"


def test_rotation_turns_by_so_many_degrees() -> None:
    """A bar through the centre: the direction of its spread is its angle."""
    bar = torch.zeros(300, 1, 28, 28)
    bar[:, :, 13:15, 4:24] = 1
    found = spread(bent(bar, rotation_degrees=20))
    angles = torch.rad2deg(torch.atan2(2 * found[:, 0, 1], found[:, 0, 0] - found[:, 1, 1]) / 2)
    assert angles.abs().max() == pytest.approx(20, abs=1)
    assert angles.min() < -15
    assert angles.max() > 15
    lengths = found.diagonal(dim1=1, dim2=2).sum(1)
    assert lengths.std() / lengths.mean() < 0.03, "turned, not stretched"


def test_scale_stretches_each_axis_by_itself() -> None:
    square = torch.zeros(300, 1, 28, 28)
    square[:, :, 9:19, 9:19] = 1
    found = spread(bent(square, scale=0.2)).diagonal(dim1=1, dim2=2).sqrt()
    ratio = (found / spread(square)[0, 0, 0].sqrt()).log()
    for axis in (0, 1):
        assert ratio[:, axis].abs().max() == pytest.approx(0.2, abs=0.03)
    assert np.corrcoef(ratio.T)[0, 1] == pytest.approx(0, abs=0.2)


def test_shear_slants() -> None:
    square = torch.zeros(300, 1, 28, 28)
    square[:, :, 9:19, 9:19] = 1
    found = spread(bent(square, shear=0.3))
    slant = found[:, 0, 1] / found[:, 1, 1]
    assert slant.abs().max() == pytest.approx(0.3, abs=0.03)
    assert found[:, 1, 1].std() < 0.1, "rows stay where they are"


def test_elastic_displacements_are_smooth_and_of_the_size_that_follows(digits: torch.Tensor) -> None:
    """Uniform noise has deviation 1/√3, a Gaussian of σ pixels leaves 1/(2√π σ) of it, α multiplies it."""
    numbers = dataclasses.replace(NOTHING, elastic_pixels=30.0, elastic_sigma_pixels=3.0)
    augment = Augment(numbers, CPU)
    assert augment.kernel is not None
    torch.manual_seed(0)
    field = augment._displacements(digits, augment.kernel)
    inside = field[:, 9:19, 9:19]  # beyond the border there is no noise
    assert float(inside.std()) == pytest.approx(30 / 3**0.5 / (2 * np.pi**0.5 * 3), rel=0.12)
    assert float((inside[:, 1:] - inside[:, :-1]).std()) < float(inside.std()) / 3
    assert not torch.equal(bent(digits, elastic_pixels=30.0), digits)


def test_every_image_and_every_time_is_bent_anew_from_torchs_stream(digits: torch.Tensor) -> None:
    assert AUGMENTED.augmentation is not None
    augment = Augment(AUGMENTED.augmentation, CPU)
    same_digit = digits[:1].expand(5, -1, -1, -1)
    torch.manual_seed(3)
    one, two = augment(same_digit), augment(same_digit)
    assert len({image.numpy().tobytes() for image in (*one, *two)}) == 10
    torch.manual_seed(3)
    assert torch.equal(augment(same_digit), one)
    assert one.min() >= 0
    assert one.max() <= 1
