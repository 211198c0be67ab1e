"""Run `python -m export`."""

from export.cli import app
from trainer.errors import run_app

run_app(app, "python -m export")
