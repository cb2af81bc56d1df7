"""Options that several `replknet segment` commands read the same way."""

from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace


def add_segmentor_options(parser: ArgumentParser) -> None:
    """Which segmentor, and how it runs."""
    add = parser.add_argument
    add("--weights", type=str | None, help="official weights' name, a 0.x file, or a checkpoint of `segment train`")
    add("--config", type=str | None, help="recipe or MMSegmentation config; by default the weights' own")
    add("--cfg_options", nargs="*", type=str, default=[], help="changes of the config: model.test_cfg.mode=slide")
    add("--mode", type=Literal["whole", "slide"] | None, help="whole pictures, or overlapping windows")
    add("--tta", type=bool, nargs="?", const=True, default=False, help="average six sizes and their mirror images")
    add("--merged", type=bool, default=True, help="re-parameterise first: same labels, faster")
    add("--precision", type=Literal["fp32", "fp16", "bf16"], default="fp32", help="of the network, under autocast")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")


def config_from(args: Namespace) -> Any:
    """The config that `--config` names with the changes of `--cfg_options`; None where there is no `--config`."""
    from replknet._errors import UsageError
    from replknet.tasks.openmmlab.configs import parse_options, read_config

    if args.config is None:
        if args.cfg_options:
            raise UsageError("--cfg_options change a config: give it by --config")
        return None
    return read_config(args.config, parse_options(args.cfg_options))
