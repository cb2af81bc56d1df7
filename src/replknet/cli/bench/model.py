"""Time whole networks, for inference and training, against any timm models in the same run.

    replknet bench model replknet_31b convnext_base swin_base_patch4_window7_224 --batches '[1,16,64]' --out m.csv
    replknet bench model replknet_31b --modes '[training]' --dtypes '[bfloat16]' --executions '[eager,compile]'
    replknet bench model replknet_nano resnet18 --batches '[1,8]' --device cpu --figure speed.png

Named comparisons, whose settings other options override:

    replknet bench model --suites '[inference,training,latency]' --out results/models.csv --figure results/models.png
    replknet bench model --suites '[inference]' --formats '[cnhw,contiguous]' --executions '[autotune]'

Where the time goes, kernel by kernel, in categories:

    replknet bench model --suites '[training]' --timeline results/timeline.csv

Everything that is listed is combined with everything: merged or not; convolutions of torch, of this package, or all
that `replknet.optimize` does; eager, compiled, compiled with timed matrix products (autotune), or each as a CUDA
graph. Modes: inference; training (a step of AdamW, under autocast for half precision); features (all feature maps);
erf (the gradient of the centre of the last map with respect to the images). Before a time is told the outputs, and in
training the gradients, are held against the eager float32 network's. Median, 20th and 80th percentile.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from replknet._errors import RunError, UsageError
from replknet._files import write_text
from replknet.benchmark.depthwise_conv2d import machine
from replknet.benchmark.model import TOLERANCE, ModelRow, ModelSettings, measure_models, timelines_to_csv, to_csv
from replknet.benchmark.model_runs import Convolution, Execution, Format, Mode
from replknet.benchmark.model_suites import SUITES, Entry
from replknet.benchmark.timeline import by_category
from replknet.cli._options import DTYPES, parse_device, parse_size

_DEFAULTS: dict[str, Any] = {
    "batches": [1, 16],
    "modes": ["inference"],
    "executions": ["eager"],
    "convolutions": ["replknet"],
    "merged": [False, True],
    "formats": ["contiguous"],
    "checkpointing": [False],
}


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", action="config", help="YAML file with options; those to its right win over it")
    add("MODEL", nargs="*", help="timm models; the same as --models", default=[])
    add("--models", type=list[str], default=[], help="timm models, for use in a YAML file")
    add("--suites", type=list[str], default=[], help=f"named comparisons: {', '.join(SUITES)}")
    add("--batches", type=list[int] | None, default=None, help="batch sizes; by default 1 and 16")
    add(
        "--size", type=str | int | None, default=None, help="image size, 224 or 512x2048; by default each network's own"
    )
    add("--modes", type=list[Mode] | None, default=None, help="inference, training, features, erf")
    add(
        "--executions",
        type=list[Execution] | None,
        default=None,
        help="eager, compile, autotune, and as CUDA graphs graph, compile_graph, autotune_graph; onnxruntime on a CPU",
    )
    add("--convolutions", type=list[Convolution] | None, default=None, help="torch, replknet, optimize")
    add("--merged", type=list[bool] | None, default=None, help="training form, re-parameterised form; both by default")
    add("--dtypes", type=list[str] | None, default=None, help="float32, float16, bfloat16; float16 on GPUs by default")
    add("--formats", type=list[Format] | None, default=None, help="contiguous, channels_last, cnhw (optimize only)")
    add("--checkpointing", type=list[bool] | None, default=None, help="recompute activations in training")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")
    add("--seconds", type=float, default=1.0, help="time spent on one measurement")
    add("--threads", type=int | None, default=None, help="CPU threads; torch's default otherwise")
    add("--tf32", type=bool, default=False, help="let float32 use TF32 on GPUs")
    add("--out", type=Path | None, default=None, help="CSV file to write")
    add("--timeline", type=Path | None, default=None, help="CSV file of where the time goes")
    add("--figure", type=Path | None, default=None, help="figure to write: png, svg or pdf")


def run(args: Namespace) -> None:
    device = parse_device(args.device)
    _check(args)
    work = [(entry.models, _settings(entry, args, device)) for entry in _entries(args, device)]
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "tf32" if args.tf32 else "ieee"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = "tf32" if args.tf32 else "ieee"
    head = machine(device) + (", TF32" if args.tf32 else "")
    print(head)
    rows: list[ModelRow] = []
    for row in (row for names, settings in work for row in measure_models(names, settings)):
        print("\n".join(_lines(row)), flush=True)
        rows.append(row)
        if args.out:
            write_text(args.out, to_csv(rows, head))
        if args.timeline:
            write_text(args.timeline, timelines_to_csv(rows, head))
    if args.figure:
        from replknet.plotting._figures import save
        from replknet.plotting.model_speed import model_speed_figure

        save(model_speed_figure(rows, head), args.figure)
    if wrong := [row for row in rows if row.status == "wrong"]:
        raise RunError(f"the results of {len(wrong)} configurations are wrong, first {next(_lines(wrong[0]))}")


def _check(args: Namespace) -> None:
    if unknown := [name for name in args.suites if name not in SUITES]:
        raise UsageError(f"--suites {unknown[0]}: known are {', '.join(SUITES)}")
    if args.suites and (args.MODEL or args.models):
        raise UsageError("give either models or --suites, which name theirs")
    allowed = [name for name in DTYPES if DTYPES[name] in TOLERANCE]
    if unknown := [name for name in args.dtypes or () if name not in allowed]:
        raise UsageError(f"--dtypes {unknown[0]}: known are {', '.join(allowed)}")
    positive = args.seconds > 0 and (args.threads is None or args.threads > 0)
    if not positive or (args.batches is not None and (not args.batches or min(args.batches) < 1)):
        raise UsageError("--batches, --seconds and --threads take positive numbers")


def _entries(args: Namespace, device: torch.device) -> list[Entry]:
    if args.suites:
        return [entry for suite in args.suites for entry in SUITES[suite]]
    names = (*args.MODEL, *args.models) or ("replknet_31b" if device.type == "cuda" else "replknet_nano",)
    return [Entry(names)]


def _settings(entry: Entry, args: Namespace, device: torch.device) -> ModelSettings:
    given = {name: getattr(args, name) for name in (*_DEFAULTS, "dtypes") if getattr(args, name) is not None}
    chosen = {"dtypes": ["float16" if device.type == "cuda" else "float32"], **_DEFAULTS, **entry.options, **given}
    size = chosen.pop("size", None) if args.size is None else parse_size(args.size)
    chosen.pop("size", None)
    dtypes = tuple(DTYPES[name] for name in chosen.pop("dtypes"))
    lists = {name: tuple(values) for name, values in chosen.items()}
    timeline = args.timeline is not None
    return ModelSettings(**lists, dtypes=dtypes, device=device, size=size, seconds=args.seconds, timeline=timeline)


def _lines(row: ModelRow) -> Iterator[str]:
    form = "merged" if row.merged else "plain"
    what = f"{row.model} {row.height}x{row.width} batch {row.batch}, {row.mode}, {form}, {row.convolution}, "
    what += f"{row.execution}, {row.dtype}, {row.format}" + (", checkpointing" if row.checkpointing else "")
    errors = {"error": row.error, "gradient error": row.gradient_error}
    told = "".join(f", {name} {value:.0e}" for name, value in errors.items() if value is not None)
    if row.median_ms is None:
        yield f"{what}: {row.status} {row.note}".rstrip() + told
        return
    memory = f", {row.peak_mib:.0f} MiB" if row.peak_mib is not None else ""
    times = f"{row.median_ms:.2f} ms [{row.p20_ms:.2f}, {row.p80_ms:.2f}]"
    yield f"{what}: {times}, {row.images_per_second:.1f} images/s{memory}{told}"
    for category, milliseconds, count in by_category(row.timeline):
        yield f"  {category:<20}{milliseconds:9.3f} ms  {count:5d} kernels"
