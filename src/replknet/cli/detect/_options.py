"""Options that the detection commands share."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace


def add_detector_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", type=str | None, help="a checkpoint of `detect train`, official weights' name, or their file")
    add("--config", type=str | None, help="config that the weights were trained with, where they do not know it")
    add("--cfg_options", type=list[str], default=[], help="changes of the config: '[key.of.it=value, ...]'")
    add("--image_size", type=int | None, help="short side to resize pictures to; by default the config's, 800")
    add("--merged", type=bool, default=True, help="re-parameterise first: same boxes, faster")


def add_hardware_options(parser: ArgumentParser, *, default: str | None) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument(
        "--precision",
        type=Literal["fp32", "bf16", "fp16"] | None,
        default=default,
        help="of convolutions and linear layers; boxes stay in float32",
    )


def add_data_options(parser: ArgumentParser, *parts: str) -> None:
    add = parser.add_argument
    add("--data", type=str | None, help="folder with COCO's annotations/, train2017/ and val2017/")
    for part in parts:
        add(f"--{part}_annotations", type=str | None, help=f"your own COCO file, for {_PURPOSE[part]}")
        add(f"--{part}_images", type=str | None, help="folder of its pictures")
    add(
        "--check",
        type=Literal["files", "headers", "full"],
        default="headers",
        help="look at every picture first: that it exists, has the annotated size, decodes to the end",
    )


_PURPOSE = {"train": "learning", "val": "scoring"}


def read_detector_config(args: Namespace) -> Any:
    """The config that `--config` and `--cfg_options` name; None without `--config`."""
    from replknet._errors import UsageError
    from replknet.tasks.openmmlab.configs import parse_options, read_config

    options = parse_options(list(args.cfg_options))
    if args.config is None:
        if options:
            raise UsageError("--cfg_options changes a config: give that with --config")
        return None
    return read_config(args.config, options)


def progress(items: Iterable[Any], what: str) -> Iterator[Any]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, desc=what)


def say(notes: Iterable[str]) -> None:
    """Notes on the data, a line each."""
    for note in notes:
        print(f"replknet: {note}", file=sys.stderr)
