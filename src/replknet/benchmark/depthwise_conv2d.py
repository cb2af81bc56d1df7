"""Measure the depthwise convolution case by case, method by method, and refuse to time what is wrong."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields

import torch

from replknet.benchmark.methods import TF32_TOLERANCE, TOLERANCE, Oracle, Tensors, draw, prepare
from replknet.benchmark.suites import Case
from replknet.benchmark.timing import Roofline, Timed
from replknet.ops import Explanation, explain
from replknet.ops._problem import tf32_allowed


@dataclass(frozen=True)
class Row:
    """One measurement; times in microseconds of one call, empty unless `status` is "ok"."""

    where: str
    n: int
    c: int
    h: int
    w: int
    kh: int
    kw: int
    dtype: str
    format: str
    pass_: str
    method: str
    status: str
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    samples: int
    error: float | None
    floor_us: float
    bound: str
    note: str

    @property
    def case(self) -> Case:
        """The convolution that was measured."""
        return Case(self.n, self.c, self.h, self.w, self.kh, self.kw, self.where)


@dataclass(frozen=True)
class Settings:
    """What is measured: element types, formats, passes and methods by name, seconds a measurement, CUDA graphs."""

    dtypes: tuple[torch.dtype, ...]
    formats: tuple[str, ...]
    passes: tuple[str, ...]
    methods: tuple[str, ...]
    seconds: float
    graph: bool
    device: torch.device


def measure(cases: Iterable[Case], settings: Settings, rooflines: dict[torch.dtype, Roofline]) -> Iterator[Row]:
    """Yield a row for every case, dtype, format, pass and method."""
    with torch.no_grad():
        for case in cases:
            for dtype in settings.dtypes:
                for form in settings.formats:
                    try:
                        tensors = draw(case, dtype, form == "channels_last", settings.device)
                    except torch.OutOfMemoryError:
                        torch.cuda.empty_cache()
                        continue
                    for pass_ in settings.passes:
                        yield from _measure_pass(case, form, pass_, tensors, settings, rooflines[dtype])


def floor_of(case: Case, dtype: torch.dtype, pass_: str, limits: Roofline) -> tuple[float, str]:
    """The roofline's floor: every input and output moved once, and two operations a tap inside the image."""
    image = case.n * case.c * case.h * case.w * dtype.itemsize
    weight = case.c * case.kh * case.kw * dtype.itemsize
    return limits.floor(2 * image + weight, 2 * case.n * case.c * taps_inside(case))


def taps_inside(case: Case) -> int:
    """Multiply-adds of one channel of one image whose input pixel lies inside the image."""

    def along(size: int, kernel: int) -> int:
        half = kernel // 2
        return sum(min(size - 1, at + half) - max(0, at - half) + 1 for at in range(size))

    return along(case.h, case.kh) * along(case.w, case.kw)


def explanation(case: Case, dtype: torch.dtype, form: str, device: torch.device) -> Explanation:
    """What the automatic choice runs for a case, and why; tensors are described, not filled."""
    tensors = draw(Case(case.n, case.c, case.h, case.w, case.kh, case.kw), dtype, form == "channels_last", device)
    return explain(tensors.x, tensors.weight)


def _measure_pass(
    case: Case, form: str, pass_: str, tensors: Tensors, settings: Settings, limits: Roofline
) -> Iterator[Row]:
    oracle = Oracle(case, tensors, pass_)
    for method in settings.methods:
        yield _measure_one(case, form, pass_, method, tensors, oracle, settings, limits)


def _measure_one(
    case: Case,
    form: str,
    pass_: str,
    method: str,
    tensors: Tensors,
    oracle: Oracle,
    settings: Settings,
    limits: Roofline,
) -> Row:
    dtype = tensors.x.dtype
    floor_us, bound = floor_of(case, dtype, pass_, limits)
    shape = (case.where, case.n, case.c, case.h, case.w, case.kh, case.kw)
    head = (*shape, str(dtype).removeprefix("torch."), form, pass_, method)
    tail = (floor_us, bound)

    def without_time(status: str, note: str, error: float | None = None) -> Row:
        return Row(*head, status, None, None, None, 0, error, *tail, " ".join(note.split())[:200])

    try:
        timed = Timed(prepare(method, pass_, tensors), settings.device, graph=settings.graph)
        error = oracle.error(timed.once())
        if error > _tolerance(dtype, settings.device):
            return without_time("wrong", f"relative error {error:.1e}", error)
        times = timed.times(settings.seconds)
        error = max(error, oracle.error(timed.once()))
        if error > _tolerance(dtype, settings.device):
            return without_time("wrong", f"relative error {error:.1e} after timing", error)
    except NotImplementedError as reason:
        return without_time("cannot run", str(reason))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return without_time("out of memory", "")
    except RuntimeError as reason:
        return without_time("failed", str(reason))
    note = getattr(explain(tensors.x, tensors.weight), pass_).backend if method == "replknet" else ""
    return Row(*head, "ok", times.median, times.p20, times.p80, times.samples, error, *tail, note)


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    tf32 = device.type == "cuda" and dtype == torch.float32 and tf32_allowed()
    return TF32_TOLERANCE if tf32 else TOLERANCE[dtype]


def machine(device: torch.device) -> str:
    """Name of the device and the versions that a measurement depends on, in one line."""
    from replknet import __version__

    versions = f"torch {torch.__version__}, replknet {__version__}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {versions}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability}, {torch.get_num_threads()} threads, {versions}"


def to_csv(rows: Iterable[Row], head: str) -> str:
    """Rows as CSV under a comment line that says where they were measured."""
    file = io.StringIO()
    file.write(f"# {head}\n")
    writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _short(value) for name, value in asdict(row).items()})
    return file.getvalue()


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
