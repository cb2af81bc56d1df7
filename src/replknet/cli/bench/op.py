"""Time the depthwise convolution against torch's own, and check every result before its time is told.

The layers that matter most, on the first GPU (or the CPU where there is none), with a CSV and a figure:

    replknet bench op --out results/op.csv --figure results/op.png

One network at two image sizes and batch 1; the paper's 24 layers; one case of your own:

    replknet bench op convnext_b --sizes 224,384 --batch 1
    replknet bench op paper --dtypes bfloat16
    replknet bench op 8,128,56x56,31x31 --device cpu

Which kernel the automatic choice takes, and why, without timing:

    replknet bench op replknet_31b --explain true

Suites: large, paper, cpu, networks, or the name of a network. Each row shows the median and the 20th and 80th
percentile of one call, and how far the median is from the floor: the larger of bytes over the copy bandwidth and
in-image operations over the matrix-product rate, both measured in the same run. Small tensors stay in caches between
calls and can beat that floor. A result that differs from float64 by more than its type allows is shown as wrong,
without a time.
"""

from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from replknet._errors import RunError, UsageError
from replknet._files import write_text
from replknet.benchmark.depthwise_conv2d import Row, Settings, explanation, machine, measure, to_csv
from replknet.benchmark.methods import DEFAULT_METHODS, METHODS, PASSES
from replknet.benchmark.suites import Case, cases_of
from replknet.benchmark.timing import roofline
from replknet.cli._options import DTYPES, parse_device

FORMATS = ("contiguous", "channels_last")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", action="config", help="YAML file with options")
    add("SUITE", nargs="*", help="suites, networks or cases N,C,HxW,KhxKw; the same as --suites")
    add("--suites", type=list[str], default=[], help="suites, for use in a YAML file; large, or cpu on a CPU")
    add("--sizes", type=str, default="224", help="image sizes of networks: 224, 384, ade20k, cityscapes, coco, HxW")
    add("--batch", type=str | int, default="64", help="batch sizes of networks, such as 1,16,64,256")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")
    add(
        "--dtypes",
        type=str | None,
        default=None,
        help="float16,bfloat16,float32,float64; float16 on GPUs, else float32",
    )
    add("--formats", type=str, default=",".join(FORMATS), help="memory formats of the input")
    add("--passes", type=str, default=",".join(PASSES), help="passes to time")
    add("--methods", type=str | None, default=None, help=f"methods to time: {', '.join(METHODS)}")
    add("--seconds", type=float, default=0.3, help="time spent on one measurement")
    add("--threads", type=int | None, default=None, help="CPU threads; torch's default otherwise")
    add("--graph", type=bool, default=True, help="on GPUs, time CUDA graphs, which leaves the host's launch time out")
    add("--tf32", type=bool, default=False, help="let float32 use TF32 on GPUs")
    add("--explain", type=bool, default=False, help="say which kernel is chosen and why; time nothing")
    add("--out", type=Path | None, default=None, help="CSV file to write")
    add("--figure", type=Path | None, default=None, help="figure to write: png, svg or pdf")


def run(args: Namespace) -> None:
    device = parse_device(args.device)
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads {args.threads}: give at least 1")
        torch.set_num_threads(args.threads)
    suites = [*args.SUITE, *args.suites] or ["large" if device.type == "cuda" else "cpu"]
    cases = cases_of(suites, _split(args.sizes), _batches(args.batch))
    settings = _settings(args, device)
    if args.explain:
        return _explain(cases, settings)
    if device.type == "cuda":
        precision = "tf32" if args.tf32 else "ieee"
        torch.backends.cudnn.conv.fp32_precision = precision  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.cuda.matmul.fp32_precision = precision
    _measure(cases, settings, args)


def _measure(cases: list[Case], settings: Settings, args: Namespace) -> None:
    head = machine(settings.device)
    print(head)
    rooflines = {dtype: roofline(settings.device, dtype) for dtype in settings.dtypes}
    for dtype, limits in rooflines.items():
        copy, product = limits.copy_bytes_per_second / 1e9, limits.matmul_flops_per_second / 1e12
        head += f"; {_name(dtype)} copy {copy:.0f} GB/s, matmul {product:.2f} TFLOP/s"
        print(f"{_name(dtype)}: copy {copy:.0f} GB/s, matmul {product:.2f} TFLOP/s")
    rows: list[Row] = []
    last = None
    for row in measure(cases, settings, rooflines):
        group = (str(row.case), row.dtype, row.format, row.pass_)
        if group != last:
            print(f"\n{row.where}: {row.case}, {row.dtype}, {row.format}, {row.pass_}; floor {row.floor_us:.1f} us")
            last = group
        print(_line(row))
        rows.append(row)
        if args.out:
            write_text(args.out, to_csv(rows, head))
    if args.figure and rows:
        from replknet.plotting._figures import save
        from replknet.plotting.op_speed import op_speed_figure

        save(op_speed_figure(rows, head), args.figure)
    if wrong := [row for row in rows if row.status in ("wrong", "failed") and row.method.startswith("replknet")]:
        raise RunError(f"{len(wrong)} results of ours are wrong or failed, first {wrong[0].case}: {wrong[0].note}")


def _line(row: Row) -> str:
    if row.median_us is None:
        return f"  {row.method:<20} {row.status}: {row.note}"
    times = f"{row.median_us:10.1f} us  [{row.p20_us:.1f}, {row.p80_us:.1f}]"
    note = f"  {row.note}" if row.note else ""
    return f"  {row.method:<20}{times}  {row.median_us / row.floor_us:6.1f} x floor  error {row.error:.0e}{note}"


def _explain(cases: list[Case], settings: Settings) -> None:
    for case in cases:
        for dtype in settings.dtypes:
            for form in settings.formats:
                print(f"{case.where}: {case}, {_name(dtype)}, {form}")
                text = str(explanation(case, dtype, form, settings.device))
                print("  " + text.replace("\n", "\n  "))


def _settings(args: Namespace, device: torch.device) -> Settings:
    names = _split(args.dtypes) if args.dtypes else ["float16" if device.type == "cuda" else "float32"]
    methods = _split(args.methods) if args.methods else DEFAULT_METHODS.get(device.type, DEFAULT_METHODS["cpu"])
    formats, passes = _split(args.formats), _split(args.passes)
    for option, given, known in (
        ("--dtypes", names, DTYPES),
        ("--methods", methods, METHODS),
        ("--formats", formats, FORMATS),
        ("--passes", passes, PASSES),
    ):
        if unknown := [name for name in given if name not in known]:
            raise UsageError(f"{option} {unknown[0]}: known are {', '.join(known)}")
    if args.seconds <= 0:
        raise UsageError(f"--seconds {args.seconds}: give a positive time")
    dtypes = tuple(DTYPES[name] for name in names)
    return Settings(dtypes, tuple(formats), tuple(passes), tuple(methods), args.seconds, args.graph, device)


def _batches(text: str | int) -> list[int]:
    parts = _split(str(text))
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text}: give positive numbers such as 1,64")
    return [int(part) for part in parts]


def _split(text: str) -> list[str]:
    return [part.strip() for part in str(text).split(",") if part.strip()]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
