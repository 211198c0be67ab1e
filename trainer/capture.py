"""Work for a GPU, recorded once and replayed: a CUDA graph.

Owns the recording. Knows neither network nor data: it takes a function without arguments, and a step whose tensors are
what they were afterwards. A step of this network is some eighty kernels of a few microseconds each; launched one by one
from Python, the GPU would wait for the host most of the time.

Source: PyTorch's notes on CUDA semantics, section CUDA Graphs: a few runs on a side stream come first, so that
libraries choose their kernels and allocate before the recording.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainer.step import Step

WARM_UPS = 3


def capture(function: Callable[[], torch.Tensor], step: Step) -> Callable[[], torch.Tensor]:
    """A function that replays `function`, whose result is always the same tensor, written anew by each replay.

    A replay returns before it is done: what reads the result waits for it. Random numbers go on from replay to replay
    as they would from call to call.
    """
    with step.unchanged():
        side = torch.cuda.Stream(step.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(step.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream(step.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads of this process do meanwhile is no error.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            result = function()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay
