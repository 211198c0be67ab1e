"""What is known of a run: its evaluations, how far it has come, and what came out.

Owns these three values. Knows neither how they come about nor where they are written. Importing this imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Evaluation:
    """One line of the history: after `iteration` steps, the last batch's loss and the accuracy.

    `loss` is the mean cross-entropy of that batch, in training mode; `top1` is in percent, on the validation images
    where some are held out and else on the test images; `seconds` since the first iteration, compilation not included.
    """

    iteration: int
    loss: float
    top1: float
    seconds: float


@dataclass
class Progress:
    """How far a run has come, in whole steps. `best` holds the weights of the best evaluation, under early stopping.

    `seconds` is how long it had trained when it was last saved, `evaluation_seconds` what of it all evaluations took.
    """

    iteration: int = 0
    history: list[Evaluation] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    evaluation_seconds: float = 0.0

    def best_evaluation(self) -> Evaluation:
        """The first of the evaluations that are not surpassed."""
        return max(self.history, key=lambda evaluation: evaluation.top1)

    def without_a_new_best(self) -> int:
        """How many evaluations came after the best."""
        return len(self.history) - 1 - self.history.index(self.best_evaluation()) if self.history else 0


@dataclass(frozen=True)
class Trained:
    """What a run came to: the weights by `state_dict` key, the steps behind them, and every evaluation on the way.

    `test_top1` is these weights' accuracy on all test images, in percent. `execution` tells how it ran (eager, compiled
    or captured), `compile_seconds` what that took beforehand; `seconds` is the training with its evaluations.
    """

    weights: dict[str, torch.Tensor]
    history: tuple[Evaluation, ...]
    steps: int
    test_top1: float
    execution: str
    compile_seconds: float
    seconds: float
    evaluation_seconds: float
