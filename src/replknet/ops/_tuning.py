"""Measured preferences: what this machine has tuned, and opt-in tuning itself.

Candidates are the backends and the tiles of this project's CUDA kernels: "torch", "cuda" with its default tile,
"cuda images=8 tiles=2 ..." with another.

One JSON file a measurement, named by the hash of everything the result depends on, written atomically. An entry that
cannot be read or that names another key counts as absent. Tuning runs where `REPLKNET_AUTOTUNE` is set or inside
`autotune()`; results are read always.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
# Calls in one CUDA graph at most.
_CALLS = 20
# Largest difference between two tiles over the largest value: one rounding of either, or the order of a long sum.
_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-4, torch.float64: 1e-10}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The median time of each candidate, one at least, in microseconds."""

    microseconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """The fastest candidate."""
        return min(self.microseconds, key=self.microseconds.__getitem__)

    @property
    def backend(self) -> str:
        """The backend of the fastest candidate."""
        return _split(self.fastest)[0]

    @property
    def tile(self) -> str | None:
        """The tile of the fastest candidate; None for the default one."""
        return _split(self.fastest)[1]

    def __str__(self) -> str:
        """The fastest candidate, and every backend with its default tile."""
        shown = {name: time for name, time in self.microseconds.items() if " " not in name or name == self.fastest}
        return ", ".join(f"{name} {time:.1f} us" for name, time in sorted(shown.items(), key=_by_time))


def _split(candidate: str) -> tuple[str, str | None]:
    """Backend and tile of a candidate."""
    backend, _, tile = candidate.partition(" ")
    return backend, tile or None


def _by_time(item: tuple[str, float]) -> float:
    return item[1]


@contextlib.contextmanager
def autotune() -> Iterator[None]:
    """Inside, a problem's first call measures every backend and tile that can run it and keeps the result on disk."""
    global _inside
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1


def enabled() -> bool:
    """Whether problems without a measurement are measured now."""
    return _inside > 0 or _env.autotune()


def fastest(pass_: Pass, problem: Problem, backends: tuple[str, ...], *, measure: bool) -> Measurement | None:
    """The measurement of a problem, made now if there is none and `measure` says so.

    A measurement that prefers a backend or a tile that is no longer among the candidates counts as absent.
    """
    key = key_of(pass_, problem)
    found = read(key)
    if found and (found.fastest in backends or found.fastest in _candidates(pass_, problem, backends)):
        return found
    if not measure or 0 in problem.x_shape or _capturing(problem.device):
        return None
    candidates = _candidates(pass_, problem, backends)
    found = measure_problem(pass_, problem, candidates) if len(candidates) > 1 else None
    if found:
        write(key, found)
    return found


def _candidates(pass_: Pass, problem: Problem, backends: tuple[str, ...]) -> tuple[str, ...]:
    """The backends, and behind them the tiles of each."""
    from replknet.ops._dispatch import tiles_of

    tiles = (f"{backend} {tile}" for backend in backends for tile in tiles_of(backend, pass_, problem))
    return (*backends, *tiles)


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
        if not times:
            raise ValueError("no times")
        return Measurement(times)
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


def measure_problem(pass_: Pass, problem: Problem, candidates: tuple[str, ...]) -> Measurement | None:
    """Median time of each candidate on random data of the problem's shape; None if none runs.

    Candidates that fail are left out, and so are tiles whose result is not that of their backend's default.
    """
    from replknet.ops._dispatch import compile_tiles, implementation

    x, grad, weight = _inputs(problem)
    arguments = {
        "forward": (x, weight, None, None),
        "input_grad": (grad, weight),
        "weight_grad": (grad, x, *problem.kernel),
    }[pass_]
    if any(_split(name)[1] for name in candidates):
        compile_tiles(pass_, problem)
    times: dict[str, float] = {}
    results: dict[str, torch.Tensor] = {}
    for name in candidates:
        backend, tile = _split(name)
        options = {} if tile is None else {"tile": tile}
        run = functools.partial(getattr(implementation(backend), pass_), *arguments, **options)
        try:
            with torch.no_grad():
                result = run()
                if not _agree(result, results.setdefault(backend, result)):
                    raise RuntimeError("its result differs from the default tile's")
                times[name] = _median_microseconds(run, problem.device)
        except (RuntimeError, NotImplementedError) as error:
            _log.warning("%s cannot be tuned for %s: %s", name, problem, error)
    return Measurement(times) if times else None


def _agree(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two sums of the same terms in another order, rounded to the same dtype, are near; NaN never is."""
    scale = expected.abs().amax().double()
    return bool((result.double() - expected.double()).abs().amax() <= _TOLERANCE[expected.dtype] * scale)


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
    def seconds(call: Callable[[], object], count: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        _synchronize(device)
        return (time.perf_counter() - start) / count

    def count(call: Callable[[], object], most: int) -> int:
        return max(1, min(most, int(_MINIMUM_SECONDS / max(seconds(call, 1), 1e-6))))

    run()
    many, calls = _recorded(run, count(run, _CALLS), device)
    repeats = count(many, 1000)
    return statistics.median(seconds(many, repeats) for _ in range(_REPEATS)) * 1e6 / calls


def _recorded(run: Callable[[], object], calls: int, device: torch.device) -> tuple[Callable[[], object], int]:
    """On a GPU, so many calls in one CUDA graph, where launching takes no time; elsewhere the call itself; how many."""
    if device.type != "cuda":
        return run, 1
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as those that pin memory for a loader, may go on as they please.
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(calls):
                run()
    except RuntimeError as error:
        _log.info("timed without a CUDA graph: %s", error)
        return run, 1
    return graph.replay, calls


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
