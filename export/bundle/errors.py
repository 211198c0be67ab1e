"""What bench has of `trainer.errors`, through the contract. Costs nothing: every `--help` imports it."""

from __future__ import annotations

from trainer.errors import EXIT_BAD_INPUT as EXIT_BAD_INPUT
from trainer.errors import EXIT_INCONCLUSIVE as EXIT_INCONCLUSIVE
from trainer.errors import EXIT_INTERRUPTED as EXIT_INTERRUPTED
from trainer.errors import EXIT_NEGATIVE as EXIT_NEGATIVE
from trainer.errors import EXIT_UNAVAILABLE as EXIT_UNAVAILABLE
from trainer.errors import EXIT_USAGE as EXIT_USAGE
from trainer.errors import Terminated as Terminated
from trainer.errors import UserError as UserError
from trainer.errors import run_app as run_app
