"""The step on the CPU, compiled.

Owns calling torch.compile so that it leaves no trace but speed. Knows nothing of when that pays.
"""

from __future__ import annotations

import logging

import torch

from trainer.layers import rewritten
from trainer.step import EVALUATION_BATCH, Images, Step


def compile_step(step: Step, evaluation: Images) -> None:
    """Compile the step's two functions, now rather than at their first call.

    A function is compiled when it first runs (its backward at the first backward), and once for each shape; so both run
    here, on the shapes that they will get.
    """
    eager = step.loss_of, step.correct_of
    log = logging.getLogger("torch.utils.cpp_extension")  # it warns of CUDA's absence where nobody asked for CUDA
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        # Without the option cpp_wrapper: it gained nothing (38 ms a step against 35) and took longer to compile.
        step.loss_of = torch.compile(step.loss_of, dynamic=False)
        step.correct_of = torch.compile(step.correct_of, dynamic=False)
        with rewritten(step.model), step.unchanged():
            step()
            step.correct(evaluation[: EVALUATION_BATCH + len(evaluation) % EVALUATION_BATCH])
    except BaseException:
        step.loss_of, step.correct_of = eager
        raise
    finally:
        log.setLevel(level)
