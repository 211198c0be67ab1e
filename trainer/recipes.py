"""How to train: every number that decides what comes out of a training run.

Owns the recipes. Knows neither torch nor the data: a recipe is plain numbers, read by `trainer.train`. To add one,
write it here and add it to `RECIPES`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run; pixels, loss and optimizer (Adam) are the same for all recipes.

    Images are sent through in batches of `batch_size`, in a fresh order every epoch. `weight_decay` is Adam's L2 term
    (added to the gradient, not decoupled). Every `evaluate_every` iterations the batch's loss and the accuracy on all
    test images are recorded, every `print_every` iterations a line is printed; the last iteration gets both.
    """

    name: str
    summary: str
    batch_size: int
    iterations: int
    learning_rate: float
    weight_decay: float
    evaluate_every: int
    print_every: int


ARTICLE = Recipe(
    name="article",
    summary="the article's ten epochs of Adam at a constant learning rate",
    batch_size=100,
    iterations=6_000,
    learning_rate=3e-4,
    weight_decay=1e-3,
    evaluate_every=50,
    print_every=600,
)
"""The article's training: pixels to [-1, 1], batch 100, cross-entropy, Adam, 6,000 iterations = 10 epochs.

One thing is done differently. The article's listing evaluates in training mode: dropout stays on, the test images move
BatchNorm's running statistics (so that the test set takes part in the training), and a gradient graph is built for
every test batch. Here an evaluation is in evaluation mode, without gradients, and leaves no trace in the training.
"""

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (ARTICLE,)}

DEFAULT_RECIPE = ARTICLE.name
