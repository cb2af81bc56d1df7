"""Export a segmentor to ONNX or torch.export, and hold the written file against the model.

    replknet segment export --weights runs/my/iter_20000.pth --output segmentor.onnx --size 512x512
    replknet segment export --weights replknet_31b.in1k_upernet_ade20k --format torch-export --output segmentor.pt2

The file maps pictures [N, 3, H, W], red first, 0 to 255, to logits [N, classes, H, W]; mean and std are inside.
Windows, sizes and flips of an evaluation are outside. It is checked on real pictures and not kept if it differs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from replknet._errors import UsageError
from replknet.cli._options import parse_size
from replknet.export import Format, Precision, export_model
from replknet.export.formats import SUFFIXES, require_packages


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", type=str | None, help="official weights' name, a 0.x file, or a checkpoint of `segment train`")
    add("--config", type=str | None, help="recipe or MMSegmentation config; by default the weights' own")
    add("--cfg_options", nargs="*", type=str, default=[], help="changes of the config")
    add("--format", type=Format, default="onnx", help="onnx, torch-export, aotinductor or torchscript")
    add("--precision", type=Precision, default="fp32", help="arithmetic inside: fp32, fp16; int8-dynamic for onnx")
    add("--output", type=Path | None, help="file to write; segmentor.onnx and so on by default")
    add("--size", type=str | None, help="height x width; by default the training crop's")
    add("--dynamic_batch", type=bool, default=True, help="leave the batch size open")
    add("--images", type=str, nargs="*", default=[], help="pictures to check on; by default some of matplotlib's")
    add("--tolerance", type=float | None, help="allowed difference, relative to the largest logit")


def run(args: Namespace) -> None:
    from replknet.tasks.openmmlab import require

    require("segmentation")
    require_packages(args.format)
    from replknet.cli.segment._options import config_from
    from replknet.tasks.segmentation.segmentor import LogitsModel, open_segmentor

    opened = open_segmentor(args.weights, config=config_from(args), merged=False)
    size = parse_size(args.size) if args.size else _crop(opened.config)
    report = export_model(
        LogitsModel(opened.model).eval(),
        args.output or Path(f"segmentor{SUFFIXES[args.format]}"),
        _pictures(args.images, size),
        format=args.format,
        precision=args.precision,
        dynamic_batch=args.dynamic_batch,
        tolerance=args.tolerance,
        metadata={"weights": opened.source, "classes": opened.classes, "palette": opened.palette, "size": list(size)},
    )
    print(
        f"{report.path}: {report.bytes / 2**20:.1f} MiB, {report.precision}, differs by {report.max_difference:.1e} of "
        f"{report.scale:.3g} on {report.images} pictures, {100 * report.agreement:.2f} % of the pixels have the same "
        f"label, {report.milliseconds:.1f} ms a picture (model: {report.model_milliseconds:.1f} ms)"
    )


def _crop(config: Any) -> tuple[int, int]:
    size = (config.model.get("data_preprocessor") or {}).get("size")
    if size is None:
        raise UsageError("the config tells no crop size: give --size, for example 512x512")
    return int(size[0]), int(size[1])


def _pictures(arguments: list[str], size: tuple[int, int]) -> Tensor:
    """At least two pictures `[N, 3, H, W]`, float32, 0 to 255, red first."""
    from replknet.data.images import load_image
    from replknet.data.sample_pictures import sample_pictures
    from replknet.tasks.prediction import find_inputs

    height, width = size
    images = [load_image(path) for path in find_inputs(arguments)] if arguments else sample_pictures()
    images = [image.convert("RGB").resize((width, height)) for image in images][:8]
    images += images[:1] if len(images) == 1 else []
    pixels = np.stack([np.asarray(image, np.float32) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
