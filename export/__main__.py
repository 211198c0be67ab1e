"""Run `python -m export`."""

from export.cli import app
from trainer.errors import run_app

if __name__ == "__main__":  # the process that computes the oracle imports this file again
    run_app(app, "python -m export")
