"""Measured preferences: what ships with the package, what this machine has tuned, and opt-in tuning itself.

One JSON file a measurement, named by the hash of everything the result depends on, written atomically. An entry that
cannot be read or that names another key counts as absent. Tuning runs where `REPLKNET_AUTOTUNE` is set or inside
`autotune()`; results are read always.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from replknet import _env
from replknet.ops._problem import Pass, Problem, tf32_allowed

_log = logging.getLogger(__name__)
_inside = 0
_MINIMUM_SECONDS = 0.02
_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The fastest backend of a problem and the median time of each candidate, in microseconds."""

    backend: str
    microseconds: dict[str, float]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.0f} us" for name, value in sorted(self.microseconds.items(), key=_by_time))


def _by_time(item: tuple[str, float]) -> float:
    return item[1]


@contextlib.contextmanager
def autotune() -> Iterator[None]:
    """Inside, the first call of a problem measures every backend that can run it and keeps the result on disk."""
    global _inside
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1


def enabled() -> bool:
    """Whether problems without a measurement are measured now."""
    return _inside > 0 or _env.autotune()


def fastest(pass_: Pass, problem: Problem, candidates: tuple[str, ...], *, measure: bool) -> Measurement | None:
    """The measurement of a problem, made now if there is none and `measure` says so.

    A measurement that prefers a backend that is no longer among the candidates counts as absent.
    """
    key = key_of(pass_, problem)
    found = read(key)
    if found and found.backend in candidates:
        return found
    if not measure or len(candidates) < 2 or _capturing(problem.device):
        return None
    found = measure_problem(pass_, problem, candidates)
    write(key, found)
    return found


def key_of(pass_: Pass, problem: Problem) -> dict[str, object]:
    """Everything that a measurement depends on."""
    from replknet import __version__

    cuda = problem.device.type == "cuda"
    return {
        "pass": pass_,
        "x": list(problem.x_shape),
        "kernel": list(problem.kernel),
        "dtype": str(problem.dtype),
        "channels_last": problem.channels_last,
        "device": torch.cuda.get_device_name(problem.device) if cuda else f"{problem.device.type} {_cpu_name()}",
        "threads": 0 if cuda else torch.get_num_threads(),
        "tf32": cuda and problem.dtype == torch.float32 and tf32_allowed(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else 0,
        "replknet": __version__,
    }


def read(key: dict[str, object]) -> Measurement | None:
    """The stored measurement of a key; None if there is none or it is not readable."""
    path = _path(key)
    try:
        entry = json.loads(path.read_text())
        if entry["key"] != key:
            return None
        times = {str(name): float(value) for name, value in entry["microseconds"].items()}
        return Measurement(min(times, key=times.__getitem__), times)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("tuning entry %s is not readable (%s) and is ignored", path, error)
        return None


def write(key: dict[str, object], measurement: Measurement) -> None:
    """Store a measurement; a folder that cannot be written costs a warning, not the call."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump({"key": key, "microseconds": measurement.microseconds}, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("tuning entry %s cannot be written: %s", path, error)


def measure_problem(pass_: Pass, problem: Problem, candidates: tuple[str, ...]) -> Measurement:
    """Median time of each candidate on random data of the problem's shape; candidates that fail are left out."""
    from replknet.ops._dispatch import implementation

    x, grad, weight = _inputs(problem)
    times: dict[str, float] = {}
    for name in candidates:
        run = getattr(implementation(name), pass_)
        arguments = {
            "forward": (x, weight, None, None),
            "input_grad": (grad, weight),
            "weight_grad": (grad, x, *problem.kernel),
        }[pass_]
        try:
            times[name] = _median_microseconds(lambda run=run, args=arguments: run(*args), problem.device)
        except (RuntimeError, NotImplementedError) as error:
            _log.warning("%s cannot be tuned for %s: %s", name, problem, error)
    return Measurement(min(times, key=times.__getitem__), times)


def _inputs(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(problem.device).manual_seed(0)
    form = torch.channels_last if problem.channels_last else torch.contiguous_format
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=problem.device, dtype=wide).to(problem.dtype)

    with torch.no_grad():
        x, grad = (draw(problem.x_shape).contiguous(memory_format=form) for _ in range(2))
        return x, grad, draw(problem.weight_shape)


def _median_microseconds(run: Callable[[], object], device: torch.device) -> float:
    def seconds(count: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        _synchronize(device)
        return (time.perf_counter() - start) / count

    with torch.no_grad():
        run()
        count = max(1, min(1000, int(_MINIMUM_SECONDS / max(seconds(1), 1e-6))))
        return statistics.median(seconds(count) for _ in range(_REPEATS)) * 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _path(key: dict[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return _env.cache_dir() / "tuning" / f"{digest[:32]}.json"


def _cpu_name() -> str:
    return torch.backends.cpu.get_cpu_capability()
