"""Backends that misbehave, for what a healthy machine can't show. Worker processes import this file by its name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.backends.contract import Options, Placement, Runnable, Session, Setting
from bench.backends.onnx import CPU, CpuSession, Onnx, open_session, read_placement
from export.bundle import Arrays, Bundle


@dataclass(frozen=True)
class Faulty:
    """onnx-cpu, wrapped in a session that does what the name says."""

    name: str
    device: str = "cpu"
    formats: tuple[str, ...] = ("onnx",)
    on_request: bool = False
    reference: bool = False
    shows_fold: bool = False
    server: None = None
    reason: str | None = None

    def unavailable_reason(self) -> str | None:
        return self.reason

    def program(self, file: Runnable) -> None:
        return None

    def load(self, bundle: Bundle, options: Options) -> Session:
        return FaultySession(self.name, CPU.load(bundle, options))


class FaultySession:
    def __init__(self, fault: str, session: Session) -> None:
        self._fault, self._session = fault, session

    def prepare(self, raw: np.ndarray) -> Any:
        if self._fault == "transposed":
            raw = np.ascontiguousarray(np.swapaxes(raw, -1, -2))
        return self._session.prepare(raw)

    def run(self, prepared: Any) -> Any:
        if self._fault == "crashing":
            print("the last words of a library", flush=True)
            os.kill(os.getpid(), signal.SIGABRT)
        if self._fault == "hanging":
            time.sleep(600)
        if self._fault == "hungry":
            import torch

            torch.empty(2**40, device="cuda")
        if self._fault == "raising":
            raise RuntimeError("no kernel for this operator")
        return self._session.run(prepared)

    def fetch(self, output: Any) -> Arrays:
        (logits,) = self._session.fetch(output)
        return (logits[::-1] if self._fault == "eight" and len(logits) == 8 else logits,)

    def gpu_ns(self, call: Callable[[], object]) -> int | None:
        return self._session.gpu_ns(call)

    def placement(self) -> Placement:
        return self._session.placement()

    def settings(self) -> dict[str, Setting]:
        return self._session.settings()

    def close(self) -> None:
        self._session.close()


class Unloadable(Faulty):
    def load(self, bundle: Bundle, options: Options) -> Session:
        raise RuntimeError("opset 99 is not supported")


class DyingAtLoad(Faulty):
    def load(self, bundle: Bundle, options: Options) -> Session:
        os._exit(7)


class Fatal(Faulty):
    def unavailable_reason(self) -> str | None:
        os._exit(7)


class Lying(Onnx):
    """onnx-cuda that says it is available, as onnxruntime's own list of providers does, and runs what it was given."""

    @property
    def name(self) -> str:
        return "lying"

    def unavailable_reason(self) -> str | None:
        return None

    def load(self, bundle: Bundle, options: Options) -> Session:
        path = bundle.locate(bundle.entry("onnx", folded=options.folded))
        session = open_session(str(path), "cuda", options)
        return CpuSession(session, bundle, options, read_placement(session, "cuda", path), {})


CRASHING = Faulty("crashing")
HANGING = Faulty("hanging")
RAISING = Faulty("raising")
HUNGRY = Faulty("hungry")
TRANSPOSED = Faulty("transposed")
EIGHT = Faulty("eight")
UNAVAILABLE = Faulty("unavailable", reason="there is no such accelerator. Plug one in.")
UNLOADABLE = Unloadable("unloadable")
DYING = DyingAtLoad("dying")
LYING = Lying("cuda")
FATAL = Fatal("fatal")
