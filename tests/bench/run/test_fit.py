"""What of a run fits into its time."""

from __future__ import annotations

from dataclasses import replace

from bench.backends.contract import Profile
from bench.run.fit import CHEAP_S, PARITY_BATCH_SIZE, Costs, fit, process_s
from bench.run.plan import Plan, Rounds, Selection

USUAL = Rounds((1, 64, 256), 0.15, processes=5, time_limit_s=110.0, fitted=True, limit_is_default=True)
ARTICLE = Costs({"torch-cpu": 1.5e-4, "torchscript-cpu": 1.4e-4, "onnx-cpu": 8e-5, "openvino-cpu": 6e-5}, 5.0)
RESNET50 = Costs({"torch-cpu": 0.13, "torchscript-cpu": 0.15, "onnx-cpu": 0.06, "openvino-cpu": 0.04}, 11.0)


def plan(
    rounds: Rounds | None = USUAL, parity_inputs: int | None = None, backends: tuple[str, ...] | None = None
) -> Plan:
    return Plan(Selection((), backends), 2, Profile.STRICT, 120.0, rounds, parity_inputs=parity_inputs)


def test_a_small_model_is_measured_as_ever() -> None:
    found = fit(plan(), ARTICLE, 10_000, ["torch-cpu"])
    assert found.rounds == USUAL
    assert (found.parity_inputs, found.parity_batch) == (10_000, PARITY_BATCH_SIZE)
    assert not found.left_out
    assert not found.costly


def test_a_short_limit_leaves_nothing_out_of_what_is_quick() -> None:
    short = replace(USUAL, time_limit_s=6.0, limit_is_default=False)
    found = fit(plan(short), ARTICLE, 10_000, ["torch-cpu"])
    assert found.rounds == short
    assert found.parity_inputs == 10_000


def test_a_large_model_fits_into_five_minutes() -> None:
    found = fit(plan(), RESNET50, 200, ["torch-cpu"])
    rounds = found.rounds
    assert rounds is not None
    assert rounds.batch_sizes == (1, 8)
    assert rounds.processes == 3
    assert rounds.early_rows
    assert rounds.time_limit_s == 230.0
    spent = found.parity_inputs * RESNET50.all_s + 3 * (RESNET50.start_s + process_s((1, 8), 0.15, RESNET50)) + 15
    assert spent <= 230
    first_row = RESNET50.start_s + found.parity_inputs * RESNET50.all_s + process_s((1,), 0.15, RESNET50)
    assert first_row <= 45
    assert max(RESNET50.image_s.values()) * found.parity_batch <= 2.0
    assert found.costly


def test_what_is_left_out_is_said_with_what_brings_it_back() -> None:
    batches, parity, processes = fit(plan(), RESNET50, 200, ["torch-cpu"]).left_out
    assert batches == (
        "batch sizes 64, 256: an image takes 0.15 s with torchscript-cpu; batch 8 in their place. "
        "--batch-size 1 --batch-size 64 --batch-size 256 measures them"
    )
    assert parity.startswith("parity on 180 of the 200 inputs: all take 76 s. --parity-inputs 200")
    assert processes.startswith("2 of 5 processes: --processes 5")


def test_batch_sizes_that_were_named_stay() -> None:
    named = replace(USUAL, fitted=False)
    found = fit(plan(named), RESNET50, 200, ["torch-cpu"])
    assert found.rounds == named
    assert found.parity_inputs == 200
    assert not found.left_out
    assert found.costly, "it is said how long that takes"
    one = process_s(named.batch_sizes, 0.15, RESNET50)
    assert one < found.estimate_s < 2 * one, "the second process would begin after the limit"
    endless = fit(plan(replace(named, time_limit_s=None, count=1)), RESNET50, 200, ["torch-cpu"])
    assert endless.estimate_s > 5 * one
    assert found.parity_batch < PARITY_BATCH_SIZE, "nobody named that one, and it holds memory"


def test_inputs_of_the_parity_that_were_asked_for_stay() -> None:
    assert fit(plan(parity_inputs=150), RESNET50, 200, ["torch-cpu"]).parity_inputs == 150
    assert fit(plan(parity_inputs=999), ARTICLE, 200, ["torch-cpu"]).parity_inputs == 200


def test_the_parity_alone_takes_all() -> None:
    found = fit(plan(None), RESNET50, 200, ["torch-cpu"])
    assert (found.rounds, found.parity_inputs) == (None, 200)


def test_backends_that_are_too_slow_are_dropped_but_the_reference() -> None:
    slow = Costs({"torch-cpu": 5.0, "torchscript-cpu": 6.0, "onnx-cpu": 2.0, "openvino-cpu": 0.5}, 10.0)
    found = fit(plan(), slow, 200, ["torch-cpu"])
    assert "torchscript-cpu" in found.dropped
    assert "torch-cpu" not in found.dropped
    assert "openvino-cpu" not in found.dropped, "something is compared with the reference"
    assert any("--backend torchscript-cpu" in line for line in found.left_out)
    named = fit(plan(backends=tuple(slow.image_s)), slow, 200, ["torch-cpu"])
    assert not named.dropped


def test_a_process_is_what_a_cheap_one_may_be() -> None:
    """The bound by which a model counts as cheap is above what the article's network takes on a machine ten times as
    slow.
    """
    slower = Costs({label: 10 * each for label, each in ARTICLE.image_s.items()}, 5.0)
    assert process_s(USUAL.batch_sizes, USUAL.block_s, slower) < CHEAP_S
    assert fit(plan(), ARTICLE, 10_000, []).rounds == USUAL
