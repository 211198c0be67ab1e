"""Networks and files from elsewhere, folded; and what other tools leave of their BatchNorms.

    python tests/zoo/zoo.py named [NAME…]         the networks of tests/support/after_activation.py
    python tests/zoo/zoo.py torchvision [MODEL…]  every torchvision classification model
    python tests/zoo/zoo.py timm [MODEL…]         the smallest of every timm family with BatchNorms, and some besides
    python tests/zoo/zoo.py files [FILE…]         ONNX files in packages of PyPI
    python tests/zoo/zoo.py exporters [MODEL…]    torchvision models through every way to write their ONNX file
    python tests/zoo/zoo.py peers [COLLECTION [NAME…]] --peers FOLDER    the other tools on all of these: see peers.py
    python tests/zoo/zoo.py cost MODEL            time and memory of folding a torchvision model, float32
    python tests/zoo/zoo.py families              the smallest model of every timm family
    python tests/zoo/zoo.py table                 docs/zoo.md from what all of them wrote

Each command adds lines of JSON to a file of docs/results, one for each model, and measures those that are not there
yet; a model that is named is measured again. Each is measured in a process of its own with a limit of time. What is
done with a network stands in measure.py, with a file in package_files.py. timm is needed for its models alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import peers
import timm_families
from models import EXPORTERS, ROOT, without_folders

RESULTS = ROOT / "docs" / "results"
OURS = {
    "named": RESULTS / "after-activation.jsonl",
    "torchvision": RESULTS / "zoo.jsonl",
    "timm": RESULTS / "zoo-timm.jsonl",
    "files": RESULTS / "zoo-files.jsonl",
    "exporters": RESULTS / "zoo-exporters.jsonl",
}
PEERS = RESULTS / "zoo-peers.jsonl"
LIMIT_S, PEER_LIMIT_S = 900, 300
MEASURE = (sys.executable, "-W", "ignore", str(Path(__file__).parent / "measure.py"))


def names_of(collection: str) -> list[str]:
    """All models of a collection."""
    match collection:
        case "named":
            from after_activation import NETWORKS

            return list(NETWORKS)
        case "torchvision":
            import torchvision

            return list(torchvision.models.list_models(module=torchvision.models))
        case "timm":
            return [*timm_families.FAMILIES.values(), *timm_families.BESIDES]
        case "exporters":
            return [f"{model}, {exporter}" for model in ("densenet121", "resnet18") for exporter in EXPORTERS]
        case "files":
            import package_files

            return list(package_files.found())
    raise SystemExit(f"no collection {collection!r}: expected one of {', '.join(OURS)}")


def stored(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a result file by model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key_of(line): line for line in map(json.loads, lines)}


def key_of(line: dict[str, Any]) -> str:
    return f"{line['collection']}: {line['model']}" if "collection" in line else line["model"]


def store(path: Path, line: dict[str, Any]) -> None:
    """Add or replace one model's line."""
    have = stored(path) | {key_of(line): line}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(have[key], sort_keys=True) + "\n" for key in sorted(have)))
    print(json.dumps(line, sort_keys=True), flush=True)


def run(collection: str, names: list[str]) -> None:
    """Each model in a process of its own; results are stored as they come."""
    have = stored(OURS[collection])
    for name in names or [name for name in names_of(collection) if name not in have]:
        try:
            command = [*MEASURE, collection, name]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
            last = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
            line = (
                json.loads(last[0]) if last else {"model": name, "failed": without_folders(done.stderr.strip())[-400:]}
            )
        except subprocess.TimeoutExpired:
            line = {"model": name, "failed": f"over {LIMIT_S} s"}
        store(OURS[collection], line)


def run_peers(folder: Path, collection: str | None, names: list[str]) -> None:
    """The peers on each model; those that are not installed leave no result."""
    have = stored(PEERS)
    for each in [collection] if collection else ["timm", "named", "torchvision", "files"]:
        for name in names or [name for name in names_of(each) if f"{each}: {name}" not in have]:
            if each != "torchvision" or torchvision_batchnorms(name):
                store(PEERS, peers_on(folder / "bin" / "python", each, name))


def torchvision_batchnorms(name: str) -> int:
    """How many BatchNorms a model has."""
    import torch
    import torchvision

    try:
        with torch.device("meta"):  # no weights are made
            model = torchvision.models.get_model(name, weights=None)
    except NotImplementedError:  # RegNets compute their widths with tensors
        model = torchvision.models.get_model(name, weights=None)
    return sum(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())


def peers_on(python: Path, collection: str, name: str) -> dict[str, Any]:
    if collection == "files":
        import package_files

        return package_files.peers_on(python, name, PEER_LIMIT_S)
    return peers.measure(python, collection, name, (*peers.ON_MODULES, *peers.ON_FILES), PEER_LIMIT_S)


def option(arguments: list[str], name: str) -> tuple[Path | None, list[str]]:
    """The value behind an option, and the other arguments."""
    if name not in arguments:
        return None, arguments
    place = arguments.index(name)
    return Path(arguments[place + 1]).absolute(), arguments[:place] + arguments[place + 2 :]


def main(arguments: list[str]) -> None:
    folder, arguments = option(arguments, "--peers")
    match arguments:
        case [("named" | "torchvision" | "timm" | "files" | "exporters") as collection, *names]:
            run(collection, names)
        case ["peers", *rest] if folder is not None:
            run_peers(folder, rest[0] if rest else None, rest[1:])
        case ["cost", name]:
            subprocess.run([*MEASURE, "cost", name], check=True)
        case ["families"]:
            for family, model in timm_families.smallest_of_each_family().items():
                print(f'    "{family}": "{model}",')
        case ["table"]:
            import pages

            pages.write()
        case _:
            print(__doc__)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
