"""The recipes' numbers, the article's above all, and what follows from them for each step."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from trainer.recipes import ARTICLE, DEFAULT_RECIPE, FAST, RECIPES, OneCycle, Settings


def test_the_article() -> None:
    recipe = RECIPES["article"]
    assert DEFAULT_RECIPE == "article"
    assert (recipe.batch_size, recipe.epochs, recipe.learning_rate, recipe.weight_decay) == (100, 10, 3e-4, 1e-3)
    assert (recipe.evaluate_every, recipe.print_every) == (50, 600)
    assert Settings(recipe).steps(60_000) == 6_000
    assert set(recipe.learning_rates(6_000)) == {3e-4}
    assert (recipe.decoupled, recipe.betas, recipe.label_smoothing) == (False, (0.9, 0.999), 0.0)
    assert (recipe.averaging, recipe.augmentation) == (None, None)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.summary
    # A line is printed from an evaluation, and the whole of the training set fits the batches.
    assert recipe.print_every is None or recipe.print_every % (recipe.evaluate_every or 0) == 0
    assert 60_000 % recipe.batch_size == 0
    rates = recipe.learning_rates(1_000)
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert min(rates) > 0, "no step is lost"
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("fall", "three_quarters_down"), [("linear", 0.325), ("cosine", 0.1 + 0.9 * 0.1464466)])
def test_one_cycle(fall: str, three_quarters_down: float) -> None:
    cycle = OneCycle(climb_share=0.2, first_share=0.5, final_share=0.1, fall=fall)  # type: ignore[arg-type]
    at = [cycle.at(progress) for progress in (0, 0.1, 0.2, 0.6, 0.8, 1)]
    assert at == pytest.approx([0.5, 0.75, 1, 0.55, three_quarters_down, 0.1])
    rates = dataclasses.replace(ARTICLE, learning_rate=2.0, one_cycle=cycle).learning_rates(10)
    assert rates[:3] == pytest.approx([1.0, 1.5, 2.0]), "stretched over the run"


def test_averaging_forgets_the_first_weights() -> None:
    weights = dataclasses.replace(ARTICLE, averaging=0.9).averaging_weights(100)
    assert weights[:2] == pytest.approx([1 - 1 / 10, 1 - 2 / 11])
    assert weights[-1] == pytest.approx(0.1)


def test_the_length_of_a_run() -> None:
    recipe = dataclasses.replace(FAST, batch_size=200, epochs=3)
    assert Settings(recipe).steps(60_000) == 900
    assert Settings(recipe).steps(50_199) == 750, "full batches only"
    assert Settings(dataclasses.replace(recipe, epochs=0.8)).steps(60_000) == 240
    assert Settings(recipe, iterations=7).steps(60_000) == 7


def test_recipes_need_no_torch() -> None:
    program = "import sys; import trainer.recipes, trainer.history, trainer.folder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
