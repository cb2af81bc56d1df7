"""Train or fine-tune a classifier.

Learn the embedded digits with a small network, in about a minute on two cores:

    replknet train replknet_nano --data digits --image_size 32 --epochs 5 --output runs/digits

Run a recipe, go on after an interruption, and change options of it (those after --config win):

    replknet train --config recipes/classification/replknet_31b_1k_224.yaml --data /data/imagenet
    replknet train --config recipes/classification/replknet_31b_1k_224.yaml --data /data/imagenet --resume auto
    torchrun --nproc_per_node 8 -m replknet train --config RECIPE.yaml --data /data/imagenet --lr 2e-3

docs/training.md explains the options that belong together.
"""

import logging
from dataclasses import replace
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from replknet import _env
from replknet.tasks.train import TrainConfig, train


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with options; those to its right win over it")
    # Not named "model": a configuration file to the right would silently replace it.
    parser.add_argument("MODEL", nargs="?", help="model name, the same as --model")
    parser.add_class_arguments(TrainConfig)


def run(args: Namespace) -> None:
    # What --speed auto came to.
    logging.getLogger("replknet.tasks.train").setLevel(logging.INFO)
    result = train(config_from(args))
    if not _env.is_first_process():
        return
    scores = ", ".join(f"{name} {value:.2f}" for name, value in result.final.items())
    print(f"{result.steps} steps in {result.seconds:.0f} s" + (f"; {scores}" if scores else ""))
    print(result.best or result.last)


def config_from(args: Namespace) -> TrainConfig:
    """The configuration in parsed arguments; the positional MODEL wins over `model`."""
    parser = ArgumentParser()
    parser.add_class_arguments(TrainConfig)
    names = set(TrainConfig.__dataclass_fields__)
    values: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    # jsonargparse before 4.49 knows the method by another name only.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    config = TrainConfig(**vars(instantiate(Namespace(**values))))
    return replace(config, model=args.MODEL or config.model)
