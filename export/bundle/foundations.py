"""What bench has of trainer, through the contract: errors, exit codes, files replaced whole, which code this is."""

from __future__ import annotations

from trainer.errors import EXIT_BAD_INPUT as EXIT_BAD_INPUT
from trainer.errors import EXIT_INTERRUPTED as EXIT_INTERRUPTED
from trainer.errors import EXIT_NEGATIVE as EXIT_NEGATIVE
from trainer.errors import EXIT_UNAVAILABLE as EXIT_UNAVAILABLE
from trainer.errors import EXIT_USAGE as EXIT_USAGE
from trainer.errors import Terminated as Terminated
from trainer.errors import UserError as UserError
from trainer.errors import run_app as run_app
from trainer.provenance import git_commit as git_commit
from trainer.provenance import installed as installed
from trainer.publish import replace_file as replace_file
