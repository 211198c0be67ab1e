"""How much a bundle is held to: all of it where that is cheap, and what fits into the budgets where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from export.effort import Asked, Cost, Effort, fitted, measured, usual

ARTICLE = Cost(seconds32=2e-4, seconds64=4e-4, activation_bytes=31_360, weight_bytes=2_030_000)
RESNET50 = Cost(seconds32=0.3, seconds64=0.28, activation_bytes=3_211_264, weight_bytes=102_400_000)
IMAGE_BYTES = 3 * 224 * 224


def test_nothing_is_left_out_for_a_cheap_model() -> None:
    found = fitted(ARTICLE, 10_000, 784, Asked())
    assert found == Effort(10_000, 2_500, 100, (500, 7), 50, "full") == usual(10_000)


def test_a_large_model_is_held_to_what_fits() -> None:
    found = fitted(RESNET50, 1_000, IMAGE_BYTES, Asked())
    assert found == Effort(inputs=100, checked=20, compared=3, batches=(10, 3), chunk=5, files="lean")
    seconds = found.inputs * (RESNET50.seconds32 + RESNET50.seconds64)
    assert seconds <= 60
    on_disk = found.inputs * IMAGE_BYTES + 3 * RESNET50.weight_bytes
    assert on_disk <= 4 * RESNET50.weight_bytes


def test_the_clocks_noise_changes_little() -> None:
    noisy = Cost(0.33, 0.31, RESNET50.activation_bytes, RESNET50.weight_bytes)
    noisier = Cost(0.36, 0.35, RESNET50.activation_bytes, RESNET50.weight_bytes)
    assert fitted(noisy, 1_000, IMAGE_BYTES, Asked()).inputs == fitted(noisier, 1_000, IMAGE_BYTES, Asked()).inputs


def test_what_a_user_says_holds() -> None:
    found = fitted(RESNET50, 1_000, IMAGE_BYTES, Asked(all_inputs=True, batches=(32, 5), files="full"))
    assert (found.inputs, found.batches, found.files) == (1_000, (32, 5), "full")
    assert found.checked < found.inputs, "the files' own check still fits its budget"


def test_disk_binds_where_inputs_are_large() -> None:
    quick = Cost(1e-4, 1e-4, 1_000, 60_000_000)
    assert fitted(quick, 1_000, 1_000_000, Asked()).inputs == 50
    assert fitted(quick, 200, 1_000_000, Asked(files="full")).inputs == 200


def test_there_are_always_two_batch_sizes_and_some_inputs() -> None:
    hopeless = Cost(60.0, 120.0, 2_000_000_000, 4_000_000_000)
    found = fitted(hopeless, 500, IMAGE_BYTES, Asked())
    assert found.inputs == found.checked == 10
    assert len(set(found.batches)) == 2
    assert min(found.compared, found.chunk) >= 1
    assert fitted(hopeless, 4, IMAGE_BYTES, Asked()).inputs == 4


def test_the_only_batch_size_that_files_take() -> None:
    found = usual(30, batch=4)
    assert found.batches == (4, None)
    assert found.proof(30).batch_sizes == (4,)
    assert usual(10_000, batch=3).checked % 3 == 0


def test_a_model_is_measured_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 5)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    cost = measured(model, (np.zeros((2, 3, 8, 8), np.float32),))
    assert cost.activation_bytes == 16 * 8 * 8 * 4, "not the weights, which are larger"
    assert cost.weight_bytes == sum(tensor.numel() * 4 for tensor in before.values())
    assert 0 < cost.seconds32 < 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("given", [2, 9, 10, 11, 99, 100, 200])
def test_no_more_than_are_given(given: int) -> None:
    assert fitted(RESNET50, given, IMAGE_BYTES, Asked()).inputs == min(given, 100)
