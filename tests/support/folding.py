"""Folding under scrutiny: networks in one line, and a fold that is held to everything that it promises.

`fold_exactly` folds a model and compares. What it looks at beyond the numbers is what a fold has broken before: who
shares memory with whom, what is left in the inputs and in the model's own state, values that are not finite, and
whether each BatchNorm is reported once.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from export.fold import Folded, fold_batchnorm

BEFORE, AFTER, ONES, MAP, FLOOR = (
    "into the layer before",
    "into the layers after",
    "ones channel",
    "bias map",
    "floor",
)


Program = Callable[..., Any]


class Net(nn.Module):
    """Modules by name and a function of them and the input: a network in one line."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = forward

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


class Pair(Net):
    """The same of two inputs."""

    def forward(self, x: Any, y: Any) -> Any:  # type: ignore[override]
        return self.body(self, x, y)


def conv(i: int, o: int, k: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **({"padding": k // 2} | options))  # type: ignore[arg-type]


def net(program: Program, kind: type[Net] = Net, **modules: nn.Module) -> Net:
    """A convolution `a` from four channels to six, a BatchNorm `n`, a convolution `c`; more by name."""
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {"a": conv(4, 6), "n": nn.BatchNorm2d(6), "c": conv(6, 6), **modules}
    for part in parts.values():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return kind(program, **parts)


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fresh(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, its BatchNorms as they are made: almost the identity, so every ReLU stays one."""
    return model.eval().double()


def fold_exactly(
    model: nn.Module,
    *inputs: Any,
    others: Sequence[tuple[Any, ...]] = (),
    batches: bool = True,
    norms: Iterable[str] | int | None = None,
    tolerance: float = 1e-9,
    **options: Any,
) -> Folded:
    """Fold, and hold the result to the model, each run on copies of its own, one call after another.

    Args:
        model: in eval mode.
        inputs: the example, on which it is compared too; also at three times the values and, where `batches`, at a
            batch of one more.
        others: more inputs to compare on.
        norms: what the report must name, each once, or only how many. Default: the paths of the model's BatchNorms.
        tolerance: largest difference over largest value of each output.
        options: of `fold_batchnorm`.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = _copies(inputs)
    folded = fold_batchnorm(model, given, **options)
    assert _error(given, inputs) == 0, "folding changed the example"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), state[name].nan_to_num()), f"folding changed the model's {name}"

    feeds = [inputs, pytree.tree_map(lambda x: x * 3 if _is_float(x) else x, inputs), *others]
    if batches:
        feeds.append(pytree.tree_map(lambda x: torch.cat([x, x[:1] * 2]) if _is_tensor(x) else x, inputs))
    reference = copy.deepcopy(model)
    for feed in feeds:
        _compare(reference, folded.module, feed, tolerance)
    left = dict(folded.module.state_dict())
    for name, tensor in reference.state_dict().items():
        if not torch.equal(tensor, state[name]) and name in left:
            assert _error(left[name], tensor) <= tolerance, f"{name} is not what the model makes of it"

    # torch.export calls the second call of module `n` "n@1".
    reported = [norm.name.partition("@")[0] for norm in (*folded.report.folded, *folded.report.kept)]
    if isinstance(norms, int):
        assert len(reported) == norms, folded.report
    else:
        assert sorted(reported) == sorted(norm_names(model) if norms is None else norms), folded.report
    assert all(norm.reason for norm in folded.report.kept)
    assert all(norm.error <= 1e-9 for norm in folded.report.folded)
    return folded


def norm_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def assert_all_folded(folded: Folded) -> None:
    """No BatchNorm is left, neither in the report nor in the graph."""
    assert not folded.report.kept, folded.report
    assert not [name for name in operations(folded.module) if "batch_norm" in name]


def operations(module: nn.Module) -> Counter[str]:
    """How often each operation stands in a folded module and its regions, by its name: "conv2d", "mul"."""
    found: Counter[str] = Counter()
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            targets = [node.target for node in part.graph.nodes if node.op == "call_function"]
            found.update(
                target._schema.name.rpartition("::")[2].removesuffix("_")
                for target in targets
                if isinstance(target, torch._ops.OpOverload)
            )
    return found


def weight_bytes(module: nn.Module) -> int:
    """What the module's weights and constants take, each storage once."""
    tensors = [*module.parameters(), *module.buffers(), *_constants(module)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _constants(module: nn.Module) -> list[Tensor]:
    """Tensors that graphs read and that are neither parameter nor buffer."""
    return [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]


def _compare(model: nn.Module, folded: nn.Module, feed: tuple[Any, ...], tolerance: float) -> None:
    of_model, of_folded = _copies(feed), _copies(feed)
    with torch.no_grad():
        # Whoever draws random numbers must draw the same.
        torch.manual_seed(0)
        wanted = model(*of_model)
        torch.manual_seed(0)
        found = folded(*of_folded)
    assert _error(found, wanted) <= tolerance
    assert _error(of_folded, of_model) <= tolerance, "the inputs are not what the model leaves of them"
    more = _shared(folded, of_folded, found) - _shared(model, of_model, wanted)
    assert not more, f"only after folding do these share memory: {more}"


def _shared(model: nn.Module, inputs: Any, outputs: Any) -> set[tuple[str, str]]:
    """Which outputs share memory with which inputs, other outputs, or weights."""
    tensors = [(f"input {i}", x) for i, x in enumerate(pytree.tree_leaves(inputs)) if _is_tensor(x)]
    results = [(f"output {i}", x) for i, x in enumerate(pytree.tree_leaves(outputs)) if _is_tensor(x)]
    weights = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *_constants(model))}
    found = set()
    for index, (name, x) in enumerate(results):
        address = x.untyped_storage().data_ptr()
        if not x.numel():
            continue
        found |= {
            (name, other) for other, y in (*tensors, *results[:index]) if y.untyped_storage().data_ptr() == address
        }
        if address in weights:
            found.add((name, "a weight"))
    return found


def _error(found: Any, wanted: Any) -> float:
    """Largest difference over largest value, of the worst tensor. NaN and infinity must stand where they stood."""
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(wanted)
    assert len(ours) == len(theirs)
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not _is_tensor(b):
            assert a == b
            continue
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        finite = torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), finite), "infinity or NaN where the model has none, or the reverse"
        if not torch.equal(a[~finite].nan_to_num(0.0, 1.0, -1.0), b[~finite].nan_to_num(0.0, 1.0, -1.0)):
            return math.inf
        if finite.any():
            wide = torch.complex128 if b.is_complex() else torch.float64
            a, b = a[finite].to(wide), b[finite].to(wide)
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)))
    return worst


def _copies(values: Any) -> Any:
    """Copies that share memory with nobody, in the same memory format."""
    return pytree.tree_map(lambda x: x.clone() if _is_tensor(x) else x, values)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
