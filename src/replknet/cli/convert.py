"""Convert weights between the official release, timm and mmpretrain, and from the training form to the merged one.

    replknet convert RepLKNet-31B_ImageNet-1K_224.pth replknet_31b.safetensors --layout timm
    replknet convert replknet-31B_3rdparty_in1k_20221118-fd08e268.pth official.pth
    replknet convert runs/cifar/checkpoints/best.ckpt deploy.pth --form merged
    replknet convert upernet_ade20k.pth backbone.safetensors --layout timm --backbone_only

The source may be wrapped in any way that is met in the wild; names ending in .safetensors are written as such.
"""

import json
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from replknet.models.convert import Layout, convert_checkpoint
from replknet.models.replknet import Form


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with options; those to its right win over it")
    parser.add_argument("SOURCE", type=Path, help="checkpoint file: torch or safetensors, of any known layout")
    parser.add_argument("TARGET", type=Path, help="file to write; the ending .safetensors chooses that container")
    parser.add_argument("--layout", type=Layout, help="names and wrapping of the target", default="official")
    parser.add_argument(
        "--form",
        type=Form | None,
        help="train; merged: small kernels and their norms inside the large kernels, as the release deploys; fused: "
        "every norm folded (layout timm). Default: as the source. One way",
        default=None,
    )
    flags = {
        "backbone_only": "leave out the head, and what surrounds the backbone of a segmentation or detection network",
        "overwrite": "replace an existing target",
        "json": "print the report as JSON",
    }
    for name, text in flags.items():
        parser.add_argument(f"--{name}", type=bool, nargs="?", const=True, help=text, default=False)
    parser.add_argument("--ema", type=bool, help="prefer the moving average where the source has one", default=True)


def run(args: Namespace) -> None:
    report = convert_checkpoint(
        args.SOURCE,
        args.TARGET,
        layout=args.layout,
        form=args.form,
        backbone_only=args.backbone_only,
        use_ema=args.ema,
        overwrite=args.overwrite,
    )
    print(json.dumps(asdict(report), indent=2) if args.json else report)
