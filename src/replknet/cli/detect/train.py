"""Train FCOS or Cascade Mask R-CNN.

COCO 2017, as a recipe says, on 8 GPUs; add --resume true to go on after an interruption:

    torchrun --nproc_per_node 8 -m replknet detect train --config RECIPE --data /data/coco --output runs/fcos

Your own data in COCO's format, a small network; the classes are the file's. Without --val_*, nothing is scored:

    replknet detect train --config recipes/detection/replknet_tiny_fcos.py --output runs/mine
        --train_annotations train.json --train_images pictures --val_annotations val.json --val_images pictures

Fine-tune official weights; layers of other classes start anew:

    replknet detect train --config RECIPE --weights replknet_31b.in1k_fcos_coco --train_annotations train.json ...

docs/detection.md tells more.
"""

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.utilities import rank_zero_only

from replknet._errors import UsageError
from replknet.cli.detect._options import add_data_options, add_hardware_options, progress, say

_SCHEDULE = ("epochs", "warmup", "lr", "batch_size", "workers", "image_size", "validate_every")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=str | None, help="recipe: a config of MMDetection 3.x, recipes/detection/ for example")
    add("--cfg_options", type=list[str], default=[], help="changes of the config: '[key.of.it=value, ...]'")
    add_data_options(parser, "train", "val")
    add("--classes", type=list[str] | None, help="classes to learn; by default all categories of the training file")
    add("--keep_empty", type=bool, default=False, help="learn from pictures without boxes too")
    add("--output", type=str, default="runs/detect", help="folder for checkpoints and logs")
    add("--weights", type=str | None, help="detector to start from: official weights' name, or a file")
    add("--backbone", type=str | None, help="backbone to start from instead of the recipe's: a name, a file, or none")
    add("--resume", type=bool, default=False, help="go on from the last checkpoint in --output")
    add("--epochs", type=int | None, help="in all; steps of the learning rate move in proportion")
    add("--warmup", type=int | None, help="iterations over which the learning rate rises")
    add("--lr", type=float | None, help="learning rate; not scaled with the batch")
    add("--batch_size", type=int | None, help="pictures a step and process")
    add("--workers", type=int | None, help="processes that load pictures, per process")
    add("--image_size", type=int | None, help="short side in tests; sizes and crops of training change in proportion")
    add("--validate_every", type=int | None, help="epochs between two scorings")
    add("--seed", type=int, default=0, help="of all random numbers")
    add_hardware_options(parser, default=None)


def run(args: Namespace) -> None:
    if args.config is None:
        raise UsageError("name a recipe: replknet detect train --config recipes/detection/NAME.py")
    from replknet.tasks.detection.training import DataPaths, set_schedule, train_detector
    from replknet.tasks.openmmlab.configs import parse_options, read_config

    config = read_config(args.config, parse_options(list(args.cfg_options)))
    set_schedule(config, **{name: getattr(args, name) for name in _SCHEDULE})
    paths = DataPaths(
        root=args.data,
        train_annotations=args.train_annotations,
        train_images=args.train_images,
        val_annotations=args.val_annotations,
        val_images=args.val_images,
        classes=args.classes,
        keep_empty=args.keep_empty,
        check=args.check,
    )
    train_detector(
        config,
        paths,
        output=args.output,
        weights=args.weights,
        backbone=args.backbone,
        resume=args.resume,
        seed=args.seed,
        device=args.device,
        precision=args.precision,
        on_notes=say if rank_zero_only.rank == 0 else None,  # type: ignore[attr-defined]
        progress=progress,
    )
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(args.output)
