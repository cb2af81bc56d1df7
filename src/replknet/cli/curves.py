"""Draw how trainings went: loss and accuracy over the steps, from the logs that they left.

    replknet curves runs/digits
    replknet curves runs/small_kernels runs/large_kernels --output figures/kernels.svg

Each RUN is the output folder of `replknet train`, finished or under way. One run: the figure goes into its folder, as
curves.png. Several share one figure, a colour each.
"""

import os
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from replknet._errors import UsageError
from replknet.plotting._figures import FORMATS, save
from replknet.plotting.classification import training_curve
from replknet.tasks.logs import read_metrics


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("RUN", nargs="+", help="output folders of trainings")
    parser.add_argument(
        "--output", type=str | None, default=None, help=f"the figure: {', '.join(FORMATS)} (default: RUN/curves.png)"
    )
    parser.add_argument("--target", type=float | None, default=None, help="accuracy to mark with a line, in percent")


def run(args: Namespace) -> None:
    folders = [Path(folder).expanduser() for folder in args.RUN]
    if len(folders) > 1 and args.output is None:
        raise UsageError("several runs share one figure: name it with --output FILE.png")
    records = {name: _records(folder) for name, folder in zip(_names(folders), folders, strict=True)}
    output = Path(args.output).expanduser() if args.output else folders[0] / "curves.png"
    print(save(training_curve(records, target=args.target), output))


def _records(folder: Path) -> list[dict]:
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(f"{folder}: no metrics.jsonl in it; give the output folder of a `replknet train`")
    try:
        return read_metrics(folder)
    except ValueError as error:
        raise UsageError(f"{folder / 'metrics.jsonl'}: damaged ({error})") from error


def _names(folders: list[Path]) -> list[str]:
    """Names of the folders; where two would be called the same, their paths below the folder that holds all."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    root = os.path.commonpath([folder.resolve() for folder in folders])
    return [os.path.relpath(folder.resolve(), root) for folder in folders]
