"""Options that name a network and its input, shared by the commands that use one."""

from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from replknet.tasks.opened_model import OpenedModel, open_model

# Options that go to open_model as they are.
_OPEN = {"weights", "pretrained", "use_ema", "num_classes", "in_chans"} | {
    "image_size",
    "mean",
    "std",
    "crop_mode",
    "crop_pct",
}


def add_model_options(parser: ArgumentParser, *, positional: bool) -> None:
    name = "MODEL" if positional else "--model"
    extra: dict[str, Any] = {"nargs": "?"} if positional else {"default": None}
    parser.add_argument(name, help="model name (any timm model); may be left out where the weights know it", **extra)
    parser.add_argument("--weights", type=str | None, help="checkpoint file of any kind (ours, official, timm's)")
    parser.add_argument(
        "--pretrained",
        type=bool | None,
        help="load the weights that the name stands for; by default for hf-hub:OWNER/NAME and local-dir:FOLDER",
    )
    parser.add_argument("--use_ema", type=bool, default=True, help="of a checkpoint with both, take averaged weights")
    parser.add_argument("--model_kwargs", type=dict[str, Any], default={}, help="constructor arguments of the model")
    parser.add_argument("--num_classes", type=int | None, help="outputs; by default the weights' own")
    parser.add_argument("--in_chans", type=int | None, help="input channels, 3 or 1; by default the weights' own")
    parser.add_argument("--image_size", type=int | None, help="side of the square input; by default the weights' own")
    parser.add_argument("--mean", type=list[float] | None, help="per-channel mean, pixels in [0, 1]")
    parser.add_argument("--std", type=list[float] | None, help="per-channel standard deviation")
    parser.add_argument(
        "--crop_mode",
        type=Literal["auto", "center", "squash", "border"] | None,
        help="auto: warp to the square from 384 on, below it resize and crop the centre",
    )
    parser.add_argument("--crop_pct", type=float | None, help="share that a centre crop keeps; 0.875 in the release")


def model_from(args: Namespace, name: str | None, *, merged: bool = False) -> OpenedModel:
    options = {key: value for key, value in vars(args).items() if key in _OPEN}
    return open_model(name, merged=merged, **options, **args.model_kwargs)
