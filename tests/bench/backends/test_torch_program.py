"""Where the nodes of an exported program are."""

from __future__ import annotations

import torch

from bench.backends.torch_program import _placement


class MakesATensor(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.arange(3, device=x.device)


def test_weights_and_device_arguments_elsewhere_are_refused() -> None:
    module = torch.export.export(MakesATensor().eval(), (torch.zeros(2, 3),)).module(check_guards=False)
    assert _placement(module, "cpu").stray == ()
    stray = _placement(module, "cuda").stray
    assert "linear.weight is on cpu" in stray
    assert any("makes a tensor on cpu" in line for line in stray)


def test_a_device_may_be_named_by_a_string() -> None:
    module = torch.export.export(MakesATensor().eval(), (torch.zeros(2, 3),)).module(check_guards=False)
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": "cpu"}
    assert _placement(module, "cpu").stray == ()
    assert any("makes a tensor on cpu" in line for line in _placement(module, "cuda").stray)
