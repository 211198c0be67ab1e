"""An interrupt ends what it was sent to, whatever a library in between makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from export.fold import fold_batchnorm
from trainer.errors import EXIT_INTERRUPTED, no_interrupt_lost
from trainer.publish import building

ROOT = Path(__file__).parents[2]


def swallowed(into: type[Exception] | None) -> None:
    """What C++ between two pieces of Python may do with an interrupt."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        if into is not None:
            raise into("argument 'size' failed to unpack") from None


class InterruptedWhileTraced(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        swallowed(TypeError)
        return x


@pytest.mark.parametrize("into", [None, TypeError])
def test_an_interrupt_that_was_made_into_something_else(into: type[Exception] | None) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), no_interrupt_lost():
        swallowed(into)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_acts_at_once() -> None:
    went_on = []
    with pytest.raises(KeyboardInterrupt), no_interrupt_lost():
        went_on.extend([signal.raise_signal(signal.SIGINT)])
    assert not went_on


def test_other_exceptions_pass() -> None:
    with pytest.raises(ValueError, match="its own"), no_interrupt_lost():
        raise ValueError("its own")


def test_folding_does_not_blame_the_model_for_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        fold_batchnorm(InterruptedWhileTraced().eval(), (torch.zeros(2, 3),))


def test_nothing_is_published_after_an_interrupt(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "out", "marker"):
        swallowed(None)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_where_nothing_can_be_raised_arrives_again(tmp_path: Path) -> None:
    """Python would print it, with a traceback, and go on: the command would run to its end."""
    (tmp_path / "swallowing.py").write_text(
        "import signal, time, typer, weakref\n"
        "from trainer.errors import run_app\n"
        "class Thing: pass\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def work() -> None:\n"
        "    thing = Thing()\n"
        "    kept = weakref.ref(thing, lambda reference: signal.raise_signal(signal.SIGINT))\n"
        "    del thing\n"
        "    time.sleep(30)\n"
        "run_app(app, prog_name='swallowing')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "swallowing"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=25, check=False)
    assert done.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in done.stderr


def test_an_interrupt_within_exec_does_not_change_the_exit_code(tmp_path: Path) -> None:
    """CPython would end `python -m` by the signal; a shell sees 130 either way, a parent process -2."""
    (tmp_path / "interrupted.py").write_text(
        "import typer\n"
        "from trainer.errors import run_app\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def work() -> None:\n"
        "    exec('raise KeyboardInterrupt')\n"
        "run_app(app, prog_name='interrupted')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    assert subprocess.run([sys.executable, "-m", "interrupted"], env=environment).returncode == EXIT_INTERRUPTED
