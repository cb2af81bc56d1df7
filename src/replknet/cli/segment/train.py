"""Train a segmentor: a recipe, any config of MMSegmentation 1.x with our backbone, or on one's own folder.

    replknet segment train --config recipes/segmentation/replknet_tiny_upernet_folder.py --data photos --output runs/my
    replknet segment train --config RECIPE.py --data /data/ADEChallengeData2016 --output runs/ade --resume true
    torchrun --nproc_per_node 8 -m replknet segment train --config RECIPE.py --data /data/cityscapes --output runs/city

The folder for one's own data holds images/{train,val}, labels/{train,val} and classes.txt; docs/segmentation.md tells
more.
--resume true goes on from the last checkpoint in the output folder, and starts anew where there is none.
"""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from replknet._errors import UsageError


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=str, required=True, help="recipe or MMSegmentation config")
    add("--data", type=Path | None, help="folder of the data set; by default the config's")
    add("--output", type=Path, required=True, help="folder for checkpoints and logs")
    add("--weights", type=str | None, help="start the whole model from these: official weights' name, or a file")
    add("--may_differ", nargs="*", type=str, default=[], help="parts in which --weights may differ: decode_head")
    add("--resume", type=bool, nargs="?", const=True, default=False, help="go on from the last checkpoint in --output")
    add("--cfg_options", nargs="*", type=str, default=[], help="changes of the config: train_cfg.max_iters=2000")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")
    add("--precision", type=Literal["fp32", "fp16", "bf16"] | None, help="by default the config's")
    add("--seed", type=int | None, help="of all random numbers")


def run(args: Namespace) -> None:
    from replknet.tasks.openmmlab import require

    require("segmentation")
    from replknet.tasks.openmmlab import runner
    from replknet.tasks.openmmlab.configs import parse_options, read_config
    from replknet.tasks.segmentation.training import check_ready

    config = read_config(args.config, parse_options(args.cfg_options))
    if args.may_differ and args.weights is None:
        raise UsageError("--may_differ belongs to --weights")
    check_ready(config, args.data, args.device)
    runner.train(
        config,
        output=args.output,
        weights=args.weights,
        may_differ=tuple(args.may_differ),
        resume=args.resume,
        device=args.device,
        precision=args.precision,
        seed=args.seed,
    )
    print(args.output)
