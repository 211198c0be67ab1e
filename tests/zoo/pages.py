"""docs/zoo.md from the results. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import measure
import package_files
import peers
from zoo import OURS, PEERS, ROOT, stored

PAGE = ROOT / "docs" / "zoo.md"
TITLES = {
    "named": "BatchNorm after the activation",
    "timm": "timm: the smallest of every family, and some besides",
    "torchvision": "torchvision",
}
NOT_THERE = "–"


def write() -> None:
    others = stored(PEERS)
    page = ["# BatchNorms left, by tool", "", *explanation(others.values())]
    for collection, title in TITLES.items():
        lines = list(stored(OURS[collection]).values())
        if lines:
            page += [
                "",
                f"## {title}",
                "",
                *networks(lines, {n: others.get(f"{collection}: {n}", {}) for n in names(lines)}),
            ]
    exported = list(stored(OURS["exporters"]).values())
    if exported:
        page += ["", "## One network, each way to write its file", "", *exporters(exported)]
    files = list(stored(OURS["files"]).values())
    if files:
        page += [
            "",
            "## ONNX files in packages of PyPI",
            "",
            *packages(files, {n: others.get(f"files: {n}", {}) for n in names(files)}),
        ]
    page += ["", "Made by `python tests/zoo/zoo.py`, whose docstring says how.", ""]
    PAGE.write_text("\n".join(page))


def names(lines: list[dict[str, Any]]) -> list[str]:
    return [line["model"] for line in lines]


def explanation(others: Iterable[dict[str, Any]]) -> list[str]:
    """What stands in the tables, and whose figures."""
    versions: dict[str, set[str]] = {}
    for line in others:
        for peer, found in line.get("peers", {}).items():
            if "version" in found:
                versions.setdefault(peer.removesuffix(" basic").removesuffix(" extended"), set()).add(found["version"])
    used = ", ".join(f"{peer} {' and '.join(sorted(found))}" for peer, found in sorted(versions.items()))
    return [
        "How many BatchNorms a network has, and how many each tool leaves. Every network has random weights, and "
        "BatchNorms with scales of both signs and a zero, whose statistics were set from data, so that signals stay "
        "alive. torch.fx and MCT work on the module, the others on its ONNX file, in which every BatchNorm is still "
        "there; ninefold does both. *Error* is the largest difference from the network in float64, relative: of the "
        "module folded in float64, and of the folded float32 file, beside that of the file that was not folded, which "
        "is float32's own rounding. A tool's number in brackets is of a result that is wrong or does not run (over "
        "1e-3 off); *no* means that the tool failed, and – that it had nothing to work on or is not installed.",
        "",
        f"Versions: {used}. How each was asked stands in tests/zoo/peers.py.",
    ]


def networks(lines: list[dict[str, Any]], others: dict[str, dict[str, Any]]) -> list[str]:
    """The sentence and the table of one collection."""
    sides = [line[side] for line in lines for side in ("torch", "onnx") if side in line]
    good = [side for side in sides if "failed" not in side]
    failed = [line["model"] for line in lines if "failed" in line]
    wrong = sum(measure.is_wrong(side) for side in good if "error" in side)
    blind = sum(measure.is_blind(side) for side in good)
    behind = [line["model"] for line in lines if is_behind(line, others[line["model"]])]
    with_family = any("family" in line for line in lines)
    page = [
        f"{len(lines)} networks, each through torch and through ONNX: {wrong} results wrong, {len(sides) - len(good)} "
        f"raised{f', and {len(failed)} not measured' if failed else ''}; in {blind} the mutation control did not show. "
        f"ninefold leaves more than another tool, on either side, in {len(behind)}"
        f"{': ' + ', '.join(behind) if behind else ''}.",
        "",
    ]
    heads = [
        *(["family"] if with_family else []),
        "network",
        "input",
        "BatchNorms",
        "ninefold, torch",
        *peers.ON_MODULES,
    ]
    heads += ["in the file", "ninefold, ONNX", *peers.ON_FILES, "error, torch", "error, ONNX", "s"]
    page += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for line in sorted(lines, key=lambda line: (line.get("family", ""), line["model"])):
        other = others[line["model"]]
        module, file = line.get("torch", {}), line.get("onnx", {})
        cells = [*([line.get("family", "")] if with_family else []), line["model"]]
        if "failed" in line:
            page.append(f"| {' | '.join(cells)} | failed: {line['failed'][-80:]} |")
            continue
        cells += [line["input"], str(line["norms"]), left(module)]
        cells += [peer_left(other, peer) for peer in peers.ON_MODULES]
        cells += [str(file.get("in_file", NOT_THERE)), left(file)]
        cells += [peer_left(other, peer) for peer in peers.ON_FILES]
        cells += [number(module, "error"), f"{number(file, 'error')} ({number(file, 'float32_error')})"]
        cells.append(" + ".join(str(side["seconds"]) for side in (module, file) if "seconds" in side))
        page.append(f"| {' | '.join(cells)} |")
    return page


def left(side: dict[str, Any]) -> str:
    return "no" if "failed" in side else str(side.get("left", NOT_THERE))


def number(side: dict[str, Any], key: str) -> str:
    return f"{side[key]:.0e}" if side.get(key) is not None else NOT_THERE


def is_right(found: dict[str, Any]) -> bool:
    """Whether a peer's result is as good as the network; one that could not be compared is taken for it."""
    difference = found.get("difference")
    return difference is None or (isinstance(difference, float) and difference <= 1e-3)


def peer_left(other: dict[str, Any], peer: str) -> str:
    found = other.get("peers", {}).get(peer)
    if found is None or found.get("missing"):
        return NOT_THERE
    if "failed" in found:
        return "no"
    return str(found["left"]) if is_right(found) else f"({found['left']})"


def is_behind(line: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a tool, with a right result, leaves fewer than ninefold on the same side."""
    pairs = ((line.get("torch", {}), peers.ON_MODULES), (line.get("onnx", {}), peers.ON_FILES))
    results = other.get("peers", {})
    return any(
        results[peer]["left"] < side["left"]
        for side, names in pairs
        for peer in names
        if "left" in side and "left" in results.get(peer, {}) and is_right(results[peer])
    )


def exporters(lines: list[dict[str, Any]]) -> list[str]:
    page = [
        "Both defaults fold a BatchNorm behind a convolution themselves.",
        "",
        "| network, exporter | in the file | left | error (float32's own) |",
        "|---|---|---|---|",
    ]
    for line in lines:
        file = line.get("onnx", line)
        said = f"{number(file, 'error')} ({number(file, 'float32_error')})" if "failed" not in file else file["failed"]
        page.append(f"| {line['model']} | {file.get('in_file', NOT_THERE)} | {left(file)} | {said} |")
    return page


def packages(lines: list[dict[str, Any]], others: dict[str, dict[str, Any]]) -> list[str]:
    """The sentence and the table of the files."""
    raised = sum("raised" in line or "failed" in line for line in lines)
    refused = sum("refused" in line for line in lines)
    done = [line for line in lines if "left" in line]
    not_compared = [line["model"] for line in done if line["difference"] is None]
    wrong = sum(package_files.is_wrong(line) for line in done)
    behind = [line["model"] for line in done if is_behind({"onnx": line}, others[line["model"]])]
    page = [
        f"{len(lines)} files: {raised} tracebacks, {refused} refused, {len(not_compared)} folded without a comparison, "
        f"{wrong} wrong. ninefold leaves more than another tool in {len(behind)}"
        f"{': ' + ', '.join(behind) if behind else ''}. *Difference* is that of the two files' outputs, relative, as "
        "ninefold found it and as the harness did on other inputs, with float32's rounding on them in brackets.",
        "",
    ]
    heads = [
        "file",
        "IR, opset",
        "MB",
        "BatchNorms",
        "ninefold",
        "other folds",
        *peers.ON_FILES,
        "difference",
        "s",
        "kept because",
    ]
    page += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for line in lines:
        other = others[line["model"]]
        cells = [line["model"]]
        trouble = [f"{key}: {line[key][-120:]}" for key in ("failed", "raised", "refused") if key in line]
        if trouble:
            page.append(f"| {line['model']} | {trouble[0].replace('|', '/')} |")
            continue
        reasons = "; ".join(f"{count} × {reason}" for reason, count in line["kept"].items()).replace("|", "/")
        cells += [f"{line['ir_version']}, {line['opset']}", f"{line['bytes'] / 1e6:.1f}", str(line["norms"])]
        cells += [str(line["left"]), str(line["simplified"]), *(peer_left(other, peer) for peer in peers.ON_FILES)]
        cells.append(f"{number(line, 'difference')}, {number(line, 'checked')} ({number(line, 'float32_noise')})")
        cells += [str(line["seconds"]), reasons[:200]]
        page.append(f"| {' | '.join(cells)} |")
    return page
