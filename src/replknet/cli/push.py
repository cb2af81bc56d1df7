"""Write a model in timm's Hugging Face format, with a card, and push it to the hub.

    replknet push me/my-replknet --weights runs/flowers/checkpoints/best.ckpt --dry_run true --output my-replknet
    replknet push me/my-replknet --weights runs/flowers/checkpoints/best.ckpt --results '{top-1: 91.2}'

Then anyone loads it by `timm.create_model("hf-hub:me/my-replknet", pretrained=True)` (after `import replknet`), and a
folder by `local-dir:`. Sign in with `hf auth login`; --dry_run writes the folder and uploads nothing.
"""

import tempfile
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from replknet._errors import UsageError
from replknet.cli._model_options import add_model_options, model_from
from replknet.export.hub import check_repo, push_model, save_model
from replknet.models.weights import LICENSE


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with options; those to its right win over it")
    parser.add_argument("REPO", type=str, help="name on the hub, owner/model")
    add_model_options(parser, positional=False)
    parser.add_argument("--merged", type=bool, default=False, help="push the re-parameterised form")
    parser.add_argument("--results", type=dict[str, float] | None, help="measured scores for the card, in per cent")
    parser.add_argument("--trained_on", type=str | None, help="data set, for the card")
    parser.add_argument("--license", type=str, default=LICENSE, help="SPDX identifier of the weights' licence")
    parser.add_argument("--output", type=Path | None, help="keep the folder here; by default only with --dry_run")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace an existing folder")
    parser.add_argument("--private", type=bool, default=False, help="make a new repository private")
    parser.add_argument(
        "--dry_run", "--dry-run", type=bool, nargs="?", const=True, default=False, help="upload nothing"
    )


def run(args: Namespace) -> None:
    check_repo(args.REPO)
    opened = model_from(args, args.model, merged=args.merged)
    if opened.weights == "untrained":
        raise UsageError(f"{opened.name} has no weights; give --weights or --pretrained true")
    mode, percent = opened.image.resolved_crop()
    size = (opened.image.in_chans, opened.image.size, opened.image.size)
    title = args.REPO.rpartition("/")[2]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or (Path(title) if args.dry_run else Path(temporary) / title)
        save_model(
            opened.model,
            folder,
            class_names=opened.own_names,
            data_config={
                "input_size": size,
                "mean": tuple(opened.image.mean),
                "std": tuple(opened.image.std),
                "crop_pct": percent,
                "crop_mode": mode,
            },
            results=args.results,
            trained_on=args.trained_on,
            license=args.license,
            overwrite=args.overwrite,
        )
        if args.dry_run:
            print(
                f"{folder}: load it by timm.create_model('local-dir:{folder}', pretrained=True); nothing was uploaded"
            )
        else:
            print(push_model(folder, args.REPO, private=args.private))
