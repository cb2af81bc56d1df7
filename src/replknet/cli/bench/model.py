"""Time whole networks, for inference and training, against any timm models in the same run.

    replknet bench model replknet_31b convnext_base swin_base_patch4_window7_224 --batches '[1,16,64]' --out m.csv
    replknet bench model replknet_31b --modes '[training]' --dtypes '[bfloat16]' --executions '[eager,compile]'
    replknet bench model replknet_nano resnet18 --batches '[1,8]' --device cpu --figure speed.png

Everything that is listed is combined with everything: merged or not, with this package's convolution or torch's, eager,
compiled or as a CUDA graph. Before a time is told the logits are held against the eager float32 network's. A training
step is forward (under autocast for half precision), backward and AdamW. Median, 20th and 80th percentile.
"""

from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from replknet._errors import RunError, UsageError
from replknet._files import write_text
from replknet.benchmark.depthwise_conv2d import machine
from replknet.benchmark.model import (
    TOLERANCE,
    Convolution,
    Execution,
    Mode,
    ModelRow,
    ModelSettings,
    measure_models,
    to_csv,
)
from replknet.cli._options import DTYPES, parse_device


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", action="config", help="YAML file with options; those to its right win over it")
    add("MODEL", nargs="*", help="timm models; the same as --models", default=[])
    add("--models", type=list[str], default=[], help="timm models, for use in a YAML file")
    add("--batches", type=list[int], default=[1, 16], help="batch sizes")
    add("--size", type=int | None, default=None, help="side of the images; by default each network's own")
    add("--modes", type=list[Mode], default=["inference"], help="inference, training")
    add("--executions", type=list[Execution], default=["eager"], help="eager, compile, graph (CUDA graph)")
    add("--convolutions", type=list[Convolution], default=["replknet"], help="replknet, torch: who convolves depthwise")
    add("--merged", type=list[bool], default=[False, True], help="training form, re-parameterised form")
    add("--dtypes", type=list[str] | None, default=None, help="float32, float16, bfloat16; float16 on GPUs by default")
    add("--channels_last", type=list[bool], default=[False], help="memory format of images and weights")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")
    add("--seconds", type=float, default=1.0, help="time spent on one measurement")
    add("--threads", type=int | None, default=None, help="CPU threads; torch's default otherwise")
    add("--tf32", type=bool, default=False, help="let float32 use TF32 on GPUs")
    add("--out", type=Path | None, default=None, help="CSV file to write")
    add("--figure", type=Path | None, default=None, help="figure to write: png, svg or pdf")


def run(args: Namespace) -> None:
    device = parse_device(args.device)
    names = [*args.MODEL, *args.models] or ["replknet_31b" if device.type == "cuda" else "replknet_nano"]
    settings = _settings(args, device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "tf32" if args.tf32 else "ieee"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = "tf32" if args.tf32 else "ieee"
    head = machine(device) + (", TF32" if args.tf32 else "")
    print(head)
    rows: list[ModelRow] = []
    for row in measure_models(names, settings):
        print(_line(row), flush=True)
        rows.append(row)
        if args.out:
            write_text(args.out, to_csv(rows, head))
    if args.figure:
        from replknet.plotting._figures import save
        from replknet.plotting.model_speed import model_speed_figure

        save(model_speed_figure(rows, head), args.figure)
    if wrong := [row for row in rows if row.status == "wrong"]:
        raise RunError(f"the outputs of {len(wrong)} configurations are wrong, first {_line(wrong[0]).strip()}")


def _settings(args: Namespace, device: torch.device) -> ModelSettings:
    names = args.dtypes or ["float16" if device.type == "cuda" else "float32"]
    allowed = [name for name in DTYPES if DTYPES[name] in TOLERANCE]
    if unknown := [name for name in names if name not in allowed]:
        raise UsageError(f"--dtypes {unknown[0]}: known are {', '.join(allowed)}")
    sizes = (args.size is None or args.size > 0) and args.seconds > 0 and (args.threads is None or args.threads > 0)
    if not sizes or not args.batches or min(args.batches) < 1:
        raise UsageError("--batches, --size, --seconds and --threads take positive numbers")
    return ModelSettings(
        batches=tuple(args.batches),
        modes=tuple(args.modes),
        executions=tuple(args.executions),
        convolutions=tuple(args.convolutions),
        merged=tuple(args.merged),
        dtypes=tuple(DTYPES[name] for name in names),
        channels_last=tuple(args.channels_last),
        device=device,
        size=args.size,
        seconds=args.seconds,
    )


def _line(row: ModelRow) -> str:
    form = "merged" if row.merged else "plain"
    what = f"{row.model} {row.size} batch {row.batch}, {row.mode}, {form}, {row.convolution}, {row.execution}, "
    what += f"{row.dtype}, {row.format}"
    if row.median_ms is None:
        return f"{what}: {row.status} {row.note}".rstrip()
    memory = f", {row.peak_mib:.0f} MiB" if row.peak_mib is not None else ""
    times = f"{row.median_ms:.2f} ms [{row.p20_ms:.2f}, {row.p80_ms:.2f}]"
    return f"{what}: {times}, {row.images_per_second:.1f} images/s{memory}, error {row.error:.0e}"
