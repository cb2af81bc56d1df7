"""The `replknet` command. One file a subcommand: `cli/NAME.py` holds `add_arguments(parser)` and `run(args)`.

A command of several words (`replknet bench op`) is a package `cli/bench/` whose `COMMANDS` maps the second word to
`(module, help)`. Only the module of the command that was asked for is imported.
"""

import importlib
import logging
import sys
from collections.abc import Sequence

from replknet._errors import UsageError

COMMANDS: dict[str, str] = {
    "bench": "time the operator and whole models",
    "models": "list the models and all official weights, with costs and scores",
    "info": "show one model part by part",
    "export": "export to ONNX, torch.export, AOTInductor or TorchScript, checked",
    "push": "write a model in timm's Hugging Face format, and upload it",
    "convert": "convert weights between official, timm and mmpretrain, and merge them",
    "train": "train or fine-tune a classifier",
    "curves": "draw how trainings went: loss and accuracy over the steps",
    "submit": "submit a training to SLURM, or run it in the background",
    "predict": "name what is in pictures",
    "demo": "train, score, merge and look into a small network on real pictures, in minutes",
    "eval": "score a classifier on a data set, before and after merging",
    "detect": "find objects and their outlines with FCOS and Cascade Mask R-CNN",
    "complexity": "count parameters, multiply-adds and activations of any network at any size",
    "segment": "semantic segmentation: train, score, predict, prepare data, export",
    "erf": "measure and draw effective receptive fields of any network",
    "shape-bias": "measure whether networks name pictures by shape or by texture, beside humans",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0: done; 1: failed; 2: the command line is wrong; 130: interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return _dispatch("replknet", COMMANDS, "replknet.cli", args)
    except KeyboardInterrupt:
        print("replknet: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"replknet: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _dispatch(prog: str, commands: dict[str, str], package: str, args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_overview(prog, commands))
        return 0 if args else 2
    if args[0] == "--version":
        from replknet import __version__

        print(__version__)
        return 0
    name = args[0]
    if name not in commands:
        import difflib

        near = difflib.get_close_matches(name, commands, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"commands: {', '.join(commands)}"
        raise UsageError(f"{prog}: unknown command {name!r}; {hint}")
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    if nested := getattr(module, "COMMANDS", None):
        return _dispatch(f"{prog} {name}", nested, module.__name__, args[1:])
    return _run(f"{prog} {name}", module, args[1:])


def _run(prog: str, module, args: list[str]) -> int:
    import argparse

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """jsonargparse's, with the examples of a description on lines of their own."""

    parser = ArgumentParser(prog=prog, description=module.__doc__, formatter_class=Formatter)
    module.add_arguments(parser)
    try:
        parsed = parser.parse_args(args)
    except SystemExit as stop:  # --help, or a usage error that argparse has printed
        return stop.code if isinstance(stop.code, int) else 2
    module.run(parsed)
    return 0


def _overview(prog: str, commands: dict[str, str]) -> str:
    width = max((len(name) for name in commands), default=0)
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items())
    footer = f"`{prog} COMMAND --help` teaches a command; --debug shows tracebacks."
    return f"usage: {prog} COMMAND [options]\n\n{rows}\n\n{footer}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: {text}"
