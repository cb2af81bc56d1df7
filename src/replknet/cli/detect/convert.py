"""Write a detector's checkpoint together with its config and class names, so that the file alone can be used.

Your own training with MMDetection 2.x and the original RepLKNet; the config in today's form, a recipe for example:

    replknet detect convert epoch_24.pth mine.pth --config recipes/detection/replknet_31b_1k_fcos_2x.py

Official weights, re-parameterised:

    replknet detect convert replknet_31b.in1k_fcos_coco fcos_merged.pth --merged true
"""

from jsonargparse import ArgumentParser, Namespace

from replknet.cli.detect._options import read_detector_config


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("SOURCE", type=str, help="checkpoint of MMDetection 2.x or 3.x, or official weights' name")
    add("TARGET", type=str, help="file to write")
    add("--config", type=str | None, help="config that the weights were trained with, where they do not know it")
    add("--cfg_options", type=list[str], default=[], help="changes of the config: '[key.of.it=value, ...]'")
    add("--classes", type=list[str] | None, help="class names in the order of labels; by default the source's")
    add("--merged", type=bool, default=False, help="re-parameterise the backbone; one way")
    add("--overwrite", type=bool, default=False, help="replace an existing target")


def run(args: Namespace) -> None:
    from replknet.tasks.detection.convert import convert

    print(
        convert(
            args.SOURCE,
            args.TARGET,
            config=read_detector_config(args),
            classes=args.classes,
            merged=args.merged,
            overwrite=args.overwrite,
        )
    )
