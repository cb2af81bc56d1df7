"""Score a segmentor by mIoU.

    replknet segment eval --weights replknet_31b.in1k_upernet_ade20k --config RECIPE.py --data /data/ade
    replknet segment eval --weights runs/my/iter_20000.pth --tta
    replknet segment eval --weights runs/my/iter_20000.pth --mode slide --precision bf16 --out scores.json

Without --config the checkpoint's own config is used. Under torchrun the pictures are shared among the processes.
"""

import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from replknet._files import write_text
from replknet.cli.segment._options import add_segmentor_options, config_from


def add_arguments(parser: ArgumentParser) -> None:
    add_segmentor_options(parser)
    parser.add_argument("--data", type=Path | None, help="folder of the data set; by default the config's")
    parser.add_argument("--output", type=Path, default=Path("runs/segment_eval"), help="folder for logs")
    parser.add_argument("--out", type=Path | None, help="also write the scores to this .json file")


def run(args: Namespace) -> None:
    from replknet.tasks.openmmlab import require

    require("segmentation")
    import torch.distributed as dist

    from replknet.tasks.openmmlab.runner import metrics_line
    from replknet.tasks.segmentation.evaluation import evaluate_segmentor

    scores = evaluate_segmentor(
        args.weights,
        config=config_from(args),
        data=args.data,
        output=args.output,
        mode=args.mode,
        tta=args.tta,
        merged=args.merged,
        device=args.device,
        precision=args.precision,
    )
    if dist.is_torchelastic_launched() and dist.get_node_local_rank():  # pyright: ignore[reportPrivateImportUsage]
        return
    print(metrics_line(scores))
    if args.out:
        described = {"weights": args.weights, "tta": args.tta, "merged": args.merged, "scores": scores}
        write_text(args.out, json.dumps(described, indent=1) + "\n")
