"""What else bench has of trainer, through the contract: files replaced whole, and which code this is."""

from __future__ import annotations

from trainer.provenance import git_commit as git_commit
from trainer.provenance import installed as installed
from trainer.publish import replace_file as replace_file
