"""The recipes' numbers are the article's, and are plain numbers."""

from __future__ import annotations

import dataclasses

import pytest

from trainer.recipes import DEFAULT_RECIPE, RECIPES


def test_the_article() -> None:
    recipe = RECIPES["article"]
    assert DEFAULT_RECIPE == "article"
    assert (recipe.batch_size, recipe.iterations, recipe.learning_rate, recipe.weight_decay) == (100, 6000, 3e-4, 1e-3)
    assert (recipe.evaluate_every, recipe.print_every) == (50, 600)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.summary
    # A line is printed from an evaluation, and the whole of the training set fits the batches.
    assert recipe.print_every % recipe.evaluate_every == 0
    assert 60_000 % recipe.batch_size == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[attr-defined]
