"""ninefold on one network, in a process of its own: a line of JSON.

    python tests/zoo/measure.py COLLECTION NAME
    python tests/zoo/measure.py cost MODEL

Through torch: the network in float64, folded for torch, must equal itself to 1e-9 (relative). Through ONNX: its file in
float32 with every BatchNorm in it, folded; both files are run with optimisations off and held to the float64 network,
where the folded file may be `FILE_LIMIT` off, or four times as far as the file that is not folded, whose error is
float32's own. A mutation control follows on each side: one channel of one fold is made wrong, and must show.
"""

from __future__ import annotations

import collections
import copy
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from models import (
    Network,
    alive,
    batchnorm_nodes,
    build,
    first_line,
    frames,
    largest_difference,
    outputs_of,
    tensors_of,
    write_onnx,
    write_unfolded_onnx,
)

TORCH_LIMIT, FILE_LIMIT, TIMES_FLOAT32 = 1e-9, 2e-5, 4
BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "native_batch_norm")


def measure(collection: str, name: str) -> dict[str, Any]:
    """Both ways through one network; with the collection "exporters", one file of it."""
    import torch

    if collection == "files":
        import package_files

        return package_files.measure(name)
    model_name, _, exporter = name.partition(", ")
    network = alive("torchvision", model_name) if collection == "exporters" else alive(collection, name)
    modules = list(network.model.modules())
    result: dict[str, Any] = {
        "model": name,
        "input": "x".join(map(str, network.shape)),
        "norms": sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in modules),
        "parameters": sum(p.numel() for p in network.model.parameters()),
        "torch_version": torch.__version__,
    }
    if collection == "timm":
        import timm
        import timm_families

        result |= {"family": timm_families.family_of(name), "timm_version": timm.__version__}
    if collection != "exporters":
        result["torch"] = guarded(lambda: through_torch(network))
    result["onnx"] = guarded(lambda: through_onnx(network, exporter if collection == "exporters" else ""))
    return result


def guarded(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part's result, or what it raised."""
    try:
        return part()
    except Exception as error:  # whatever it is, it is the result
        return {"failed": first_line(error), "traceback": frames(error)}


def through_torch(network: Network) -> dict[str, Any]:
    import torch

    from export.fold import fold_batchnorm

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    folded = fold_batchnorm(network.model, (network.x,), runtime="torch")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with torch.no_grad():
        spread = max(float(t.std()) for t in tensors_of(network.model(network.x.clone())))
    result = {
        **of_report(folded.report),
        "in_graph": norms_of(folded.module),
        "seconds": round(seconds, 2),
        "peak_mb_above_before": peak // 1024,
        "error": max(module_difference(network.model, folded.module, x) for x in (network.x, network.other)),
        "output_spread": spread,
    }
    if folded.report.folded:
        # One output channel of a layer in the middle of the folds gets another bias, large enough to get through any
        # ReLU behind it.
        layers = [norm.into[-1] for norm in folded.report.folded if norm.into]
        wrong = copy.deepcopy(folded.module)
        biases = {n: p for n, p in wrong.named_parameters() if n.endswith("bias") and p.dim() == 1}
        if biases:
            chosen = biases.get(f"{layers[len(layers) // 2]}.bias", list(biases.values())[len(biases) // 2])
            chosen.data[0] += 1 + 10 * chosen.abs().max()  # not the fourth: `enliven` gives it a scale of zero
            result["mutation"] = module_difference(network.model, wrong, network.x)
    return result


def through_onnx(network: Network, exporter: str = "") -> dict[str, Any]:
    import onnx
    import torch

    from export.fold.onnx_model import fold_onnx

    with torch.no_grad():
        truth = [t.numpy() for t in tensors_of(network.model(network.x.clone()))]
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "model.onnx", Path(name) / "folded.onnx"
        model, x = copy.deepcopy(network.model).float(), network.x.float()
        if exporter:
            write_onnx(model, x, source, exporter)
        else:
            exporter = write_unfolded_onnx(model, x, source)
        proto = onnx.load(source)
        feeds = {proto.graph.input[0].name: x.numpy()}
        unfolded = outputs_of(source, feeds)
        start = time.perf_counter()
        folded = fold_onnx(source, target)
        seconds = time.perf_counter() - start
        outputs = outputs_of(target, feeds)
        after = onnx.load(target)
        result = {
            **of_report(folded.report),
            "exporter": exporter,
            "in_file": len(batchnorm_nodes(proto.graph)),
            "in_folded_file": len(batchnorm_nodes(after.graph)),
            "compared": folded.difference is not None,
            "seconds": round(seconds, 2),
            "error": largest_difference(truth, outputs),
            "float32_error": largest_difference(truth, unfolded),
        }
        layers = [norm.into[-1] for norm in folded.report.folded if norm.into]
        if folded.report.folded and make_wrong(after, layers[len(layers) // 2] if layers else ""):
            result["mutation"] = largest_difference(truth, outputs_of(after.SerializeToString(), feeds))
    return result


def make_wrong(model: Any, layer: str) -> bool:
    """Add to one channel of the bias of that layer, or of another where it has none; whether there was any."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm")]
    with_bias = [node for node in nodes if len(node.input) > 2 and node.input[2] in weights]
    if not with_bias:
        return False
    chosen = next((node for node in with_bias if node.name == layer), with_bias[len(with_bias) // 2])
    tensor = weights[chosen.input[2]]
    bias = numpy_helper.to_array(tensor).copy()
    bias.flat[0] += 1 + 10 * abs(bias).max()
    tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    return True


def of_report(report: Any) -> dict[str, Any]:
    """What became of the BatchNorms."""
    reasons = collections.Counter(norm.reason for norm in report.kept)
    return {
        "left": len(report.kept),
        "kept": {reason[:300]: count for reason, count in reasons.most_common(3)},
        "methods": dict(collections.Counter(norm.method for norm in report.folded)),
        "simplified": len(getattr(report, "simplified", ())),
    }


def norms_of(module: Any) -> int:
    """BatchNorms in the graph of an exported module."""
    targets = [getattr(node.target, "_opname", "") for node in module.graph.nodes if node.op == "call_function"]
    return sum(target in BATCH_NORMS for target in targets)


def module_difference(model: Any, folded: Any, x: Any) -> float:
    import torch

    with torch.no_grad():
        before, after = ([t.numpy() for t in tensors_of(module(x.clone()))] for module in (model, folded))
    return largest_difference(before, after)


def is_wrong(side: dict[str, Any]) -> bool:
    """Whether the result of one side is further off than may be."""
    if "float32_error" in side:
        return not side["error"] <= max(FILE_LIMIT, TIMES_FLOAT32 * side["float32_error"])
    return not side["error"] <= TORCH_LIMIT


def is_blind(side: dict[str, Any]) -> bool:
    """Whether the comparison did not see the mutation."""
    return "mutation" in side and not is_wrong({**side, "error": side["mutation"]})


def cost(name: str) -> dict[str, Any]:
    """Time and memory of folding alone, in this process, which has imported everything and made nothing yet."""
    import torch

    from export.fold import fold_batchnorm

    def resident() -> int:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024

    tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    fold_batchnorm(tiny, (torch.zeros(2, 3, 8, 8),))  # what is imported and compiled at the first use
    imports = resident()
    model, shape = build("torchvision", name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # in place: no second copy of the model may count
            torch.nn.init.uniform_(module.weight, -1.5, 1.5)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, *shape)
    before = resident()
    start = time.perf_counter()
    folded = fold_batchnorm(model, (x,))
    seconds = time.perf_counter() - start
    peak = resident()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return {
        "model": name,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "model_bytes": size,
        "peak_above_imports_bytes": peak - imports,
        "peak_above_imports_models": round((peak - imports) / size, 2),
        "peak_before_folding_models": round((before - imports) / size, 2),
        "folded": len(folded.report.folded),
        "kept": len(folded.report.kept),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    match sys.argv[1:]:
        case ["cost", name]:
            print(json.dumps(cost(name)))
        case [collection, name]:
            print(json.dumps(measure(collection, name)))
        case _:
            print(__doc__)
