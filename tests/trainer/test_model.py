"""The network is the article's, layer for layer."""

from __future__ import annotations

import torch
from torch import nn

from trainer.model import Net

KEYS = [
    *(f"features.{index}.{name}" for index in (0, 2) for name in ("weight", "bias")),
    *(f"features.5.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    *(f"features.6.{name}" for name in ("weight", "bias")),
    *(f"features.8.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    *(f"features.9.{name}" for name in ("weight", "bias")),
    *(f"features.12.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    *(f"classifier.{index}.{name}" for index in (0, 3, 5) for name in ("weight", "bias")),
]


class ArticleNet(nn.Module):
    """The article's class as its readers have it, written independently of `Net`: weights it saved must load."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, pool, norm in (
            (1, 5, False, False),
            (5, 10, True, True),
            (10, 20, False, True),
            (20, 40, True, True),
        ):
            layers.append(nn.Conv2d(in_channels=inputs, out_channels=outputs, kernel_size=3, stride=1, padding=1))
            if pool:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            layers.append(nn.ReLU())
            if norm:
                layers.append(nn.BatchNorm2d(outputs))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(1960, 200), nn.ReLU(), nn.Dropout(p=0.5), nn.Linear(200, 500), nn.ReLU(), nn.Linear(500, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


def test_parameters_and_keys() -> None:
    net = Net()
    assert sum(parameter.numel() for parameter in net.parameters()) == 507_420
    assert list(net.state_dict()) == KEYS


def test_weights_of_the_articles_own_class_load_and_compute_the_same() -> None:
    theirs = ArticleNet()
    with torch.no_grad():  # statistics that are not the initial ones, so that a BatchNorm left out would show
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(-1, 1)
    net = Net()
    net.load_state_dict(theirs.state_dict())
    image = torch.rand(3, 1, 28, 28) * 2 - 1
    with torch.no_grad():
        assert torch.equal(net.eval()(image), theirs.eval()(image))
        # Dropout stands after the first Linear's ReLU: the same random stream gives the same training-mode output.
        torch.manual_seed(0)
        mine = net.train()(image)
        torch.manual_seed(0)
        assert torch.equal(mine, theirs.train()(image))


def test_any_batch_and_memory_format() -> None:
    net = Net().eval()
    image = torch.rand(5, 1, 28, 28)
    with torch.no_grad():
        logits = net(image)
        assert logits.shape == (5, 10)
        assert net(image[:1]).shape == (1, 10)
        channels_last = net.to(memory_format=torch.channels_last)(image)
    torch.testing.assert_close(channels_last, logits)
