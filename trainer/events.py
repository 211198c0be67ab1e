"""The history as TensorBoard shows it.

Owns the event file. Knows nothing of the run; the package `tensorboard` is an extra.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import EXIT_UNAVAILABLE, UserError

if TYPE_CHECKING:
    from trainer.history import Evaluation


def require() -> None:
    """UserError (exit 3) where TensorBoard is not installed."""
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard: the package tensorboard is not installed. Install it with pip install "
            "'ninefold[tensorboard]', or train without --tensorboard: history.jsonl has the same figures.",
            EXIT_UNAVAILABLE,
        )


def write(history: Sequence[Evaluation], evaluated: str, folder: Path) -> None:
    """One event file with loss and accuracy over the iterations, each at the time when it was known."""
    from torch.utils import tensorboard

    began = time.time() - history[-1].seconds
    summary_writer: Any = tensorboard.SummaryWriter
    with summary_writer(str(folder)) as writer:
        for point in history:
            for name, value in (("loss", point.loss), (f"{evaluated}_top1", point.top1)):
                writer.add_scalar(name, value, point.iteration, began + point.seconds)
