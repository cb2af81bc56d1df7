"""Time whole segmentors, from pixels to logits; a time is told only where the logits are right.

    replknet bench segmentor --weights runs/photos/iter_20000.pth --size 512x512
    replknet bench segmentor --weights replknet_31b.in22k_upernet_ade20k --batches '[1,4]' --dtypes '[float16,bfloat16]'
    replknet bench segmentor --config recipes/segmentation/replknet_31b_1k_upernet_ade20k_512.py --device cuda

Without --weights the network is untrained, which does not change its speed. Half precision is autocast's. Before a time
is told the logits are held against the unmerged float32 network's. Median, 20th and 80th percentile.
"""

import torch
from jsonargparse import ArgumentParser, Namespace

from replknet._errors import RunError, UsageError
from replknet.benchmark.depthwise_conv2d import machine
from replknet.benchmark.segmentor import TOLERANCE, Measured, measure_network
from replknet.cli._options import DTYPES, parse_device, parse_size


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", type=str | None, help="official weights' name, a 0.x file, or a checkpoint of `segment train`")
    add("--config", type=str | None, help="recipe or MMSegmentation config; by default the weights' own")
    add("--cfg_options", nargs="*", type=str, default=[], help="changes of the config")
    add("--size", type=str, default="512x512", help="height x width of the input")
    add("--batches", type=list[int], default=[1], help="batch sizes")
    add("--merged", type=list[bool], default=[False, True], help="training form, re-parameterised form")
    add("--dtypes", type=list[str] | None, default=None, help="float32, float16, bfloat16; float16 on GPUs by default")
    add("--channels_last", type=list[bool], default=[False], help="memory format of images and weights")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")
    add("--seconds", type=float, default=1.0, help="time spent on one measurement")


def run(args: Namespace) -> None:
    from replknet.tasks.openmmlab import require

    require("segmentation")
    from replknet.cli.segment._options import config_from
    from replknet.tasks.segmentation.segmentor import LogitsModel, open_segmentor

    device, size = parse_device(args.device), parse_size(args.size)
    dtypes = _dtypes(args, device)
    opened = open_segmentor(args.weights, config=config_from(args), merged=False, device=device)
    network = LogitsModel(opened.model).eval().to(device)
    print(f"{machine(device)}; {opened.source}, {size[0]}x{size[1]}")
    wrong = 0
    for batch in args.batches:
        pictures = 255 * torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
        for measured in measure_network(
            network,
            pictures,
            merged=tuple(args.merged),
            dtypes=dtypes,
            channels_last=tuple(args.channels_last),
            seconds=args.seconds,
        ):
            print(_line(measured), flush=True)
            wrong += measured.times is None
    if wrong:
        raise RunError(f"the logits of {wrong} combinations are wrong")


def _dtypes(args: Namespace, device: torch.device) -> tuple[torch.dtype, ...]:
    names = args.dtypes or ["float16" if device.type == "cuda" else "float32"]
    known = [name for name in DTYPES if DTYPES[name] in TOLERANCE]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--dtypes {unknown[0]}: known are {', '.join(known)}")
    if not args.batches or min(args.batches) < 1 or args.seconds <= 0:
        raise UsageError("--batches and --seconds take positive numbers")
    return tuple(DTYPES[name] for name in names)


def _line(row: Measured) -> str:
    form = "merged" if row.merged else "plain"
    layout = "channels_last" if row.channels_last else "contiguous"
    what = f"batch {row.batch}, {form}, {str(row.dtype).removeprefix('torch.')}, {layout}"
    if row.times is None:
        return f"{what}: wrong, {row.error:.0e} off"
    median, p20, p80 = (value / 1e3 for value in (row.times.median, row.times.p20, row.times.p80))
    return (
        f"{what}: {median:.1f} ms [{p20:.1f}, {p80:.1f}], {row.pictures_per_second:.2f} pictures/s, "
        f"error {row.error:.0e}"
    )
