"""Score a classifier: top-1, top-5, ReaL labels, before and after merging.

A trained run, which knows its architecture, classes and input format:

    replknet eval --weights runs/digits/checkpoints/best.ckpt --data digits --merged compare

ImageNet's validation pictures in class folders, or in one flat folder with a list of labels:

    replknet eval replknet_31b --weights RepLKNet-31B_ImageNet-1K_224.pth --data /data/imagenet
    replknet eval replknet_31b --weights FILE --data /data/val --labels val.txt --real_labels real.json

Several test sets after each other, as JSON and as a table (classes of ImageNet-A and -R are matched and only those may
win; folders of ImageNet-V2 are taken by number):

    replknet eval replknet_xl --weights FILE --image_size 320 --data '[/data/v2, /data/a, /data/r]' --output xl.json

On several GPUs, every picture once:

    torchrun --nproc_per_node 8 -m replknet eval replknet_31l --weights FILE --data /data/imagenet
"""

import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser, Namespace

from replknet._errors import UsageError
from replknet.cli._model_options import add_model_options, model_from
from replknet.data import LoaderConfig, evaluation_loader, open_dataset
from replknet.data.class_matching import ClassMatch, match_classes, read_real_labels
from replknet.data.sampler import world
from replknet.data.samples import BrokenReport
from replknet.data.transforms import DeviceTransform
from replknet.tasks.evaluation import (
    MARKDOWN_HEAD,
    EvaluationResult,
    MergeComparison,
    compare_merged,
    evaluate,
    markdown_row,
    write_result,
)
from replknet.tasks.opened_model import OpenedModel
from replknet.tasks.processes import process_device


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with options; those to its right win over it")
    add_model_options(parser, positional=True)
    parser.add_argument("--data", type=str | list[str], help="a data source, or several in brackets; docs/data.md")
    parser.add_argument("--split", type=str, default="validation", help="split of the data")
    parser.add_argument("--labels", type=str | None, help="label list of a flat folder: `NAME LABEL` lines, or labels")
    parser.add_argument("--real_labels", type=str | None, help="real.json of ReaL labels, for ImageNet's own pictures")
    parser.add_argument("--data_root", type=str | None, help="where torchvision, Hugging Face and TensorFlow sets lie")
    parser.add_argument("--download", type=bool, default=False, help="let those sets download")
    parser.add_argument("--num_samples", type=int | None, help="length of a stream that does not tell it")
    parser.add_argument(
        "--classes",
        type=Literal["auto", "all"],
        default="auto",
        help="auto: where the data have fewer classes than the network, only those may win",
    )
    parser.add_argument(
        "--merged",
        type=Literal["no", "yes", "compare"],
        default="no",
        help="re-parameterise first (yes), or score both forms and compare their outputs (compare)",
    )
    parser.add_argument("--confusion", type=bool, default=False, help="count labels against answers, in the JSON")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time, per process")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float64", "bfloat16", "float16"],
        default="float32",
        help="bfloat16 and float16 run under autocast",
    )
    parser.add_class_arguments(LoaderConfig, "loader")
    parser.add_argument("--output", type=str | None, help="JSON file for the results")
    parser.add_argument("--markdown", type=str | None, help="file for the results as a Markdown table")


def run(args: Namespace) -> None:
    sources = [args.data] if isinstance(args.data, str) else list(args.data or [])
    if not sources:
        raise UsageError("no data were named; for example: replknet eval replknet_31b --weights FILE --data /data/val")
    if args.batch_size < 1:
        raise UsageError(f"batch size {args.batch_size}: give 1 or more")
    with process_device(args.device) as device:
        opened = model_from(args, args.MODEL, merged=args.merged == "yes")
        if opened.weights == "untrained":
            print(f"replknet: {opened.name} has no weights: chance level is all it can reach", file=sys.stderr)
        records = [_score(args, opened, source, device) for source in sources]
        if world()[0] == 0:
            _report(args, records)


def _score(args: Namespace, opened: OpenedModel, source: str, device: torch.device) -> dict[str, Any]:
    images: Any = open_dataset(
        source,
        split=args.split,
        labels=args.labels,
        root=args.data_root,
        num_classes=opened.outputs,
        class_names=opened.own_names,
        num_samples=args.num_samples,
        training=False,
        batch_size=args.batch_size,
        download=args.download,
    )
    match = match_classes(images.class_names, opened.outputs, own_names=opened.own_names)
    real = None
    if args.real_labels is not None:
        real = read_real_labels(Path(args.real_labels), [Path(images.name(i)).name for i in range(len(images))])
    config = LoaderConfig(**vars(args.loader))
    loader, broken = evaluation_loader(
        images,
        opened.image,
        batch_size=args.batch_size,
        loader=config,
        targets=match.targets,
        with_index=real is not None,
    )
    outputs = match.targets if args.classes == "auto" and match.is_subset else None
    with _Progress(len(images)) as progress:
        result = (compare_merged if args.merged == "compare" else evaluate)(
            opened.model,
            loader,
            device=device,
            dtype=getattr(torch, args.dtype),
            outputs=outputs,
            real_labels=real,
            confusion=args.confusion,
            channels_last=config.channels_last,
            on_batch=progress.update,
            on_device=DeviceTransform(opened.image),
        )
    return _record(args, opened, source, match, result, _gather(broken))


def _record(
    args: Namespace,
    opened: OpenedModel,
    source: str,
    match: ClassMatch,
    result: EvaluationResult | MergeComparison,
    broken: list[str],
) -> dict[str, Any]:
    pair = isinstance(result, MergeComparison)
    forms = {"as trained": result.before, "merged": result.after} if pair else {_form(opened): result}
    return {
        "model": opened.name,
        "weights": opened.weights,
        "data": source,
        "split": args.split,
        "image_size": opened.image.size,
        "crop": list(opened.image.resolved_crop()),
        "mean": list(opened.image.mean),
        "std": list(opened.image.std),
        "dtype": args.dtype,
        "classes_matched_by": match.rule,
        "broken": broken,
        "results": {form: scores.as_dict() for form, scores in forms.items()},
        "rows": [
            markdown_row(opened.name, opened.weights, source, opened.image.size, form, scores)
            for form, scores in forms.items()
        ],
        "merging": {key: value for key, value in result.as_dict().items() if key not in ("before", "after")}
        if pair
        else None,
    }


def _report(args: Namespace, records: list[dict[str, Any]]) -> None:
    rows = [row for record in records for row in record.pop("rows")]
    print("\n".join([MARKDOWN_HEAD, *rows]))
    for record in records:
        last = list(record["results"].values())[-1]
        print(
            f"{record['data']}: {last['images_per_second']:.1f} images/s, {100 * last['wait_share']:.0f} % of the time "
            f"waiting for data"
        )
        if (merging := record["merging"]) is not None:
            print(
                f"merging: largest logit difference {merging['largest_logit_difference']:.2e} "
                f"({merging['relative_difference']:.1e} of the largest logit), {merging['changed']} answers changed"
            )
        if broken := record["broken"]:
            print(
                f"{len(broken)} pictures could not be read and were left out: {'; '.join(broken[:3])}", file=sys.stderr
            )
    if args.output is not None:
        write_result(Path(args.output), records[0] if isinstance(args.data, str) else {"evaluations": records})
    if args.markdown is not None:
        from replknet._files import write_text

        write_text(Path(args.markdown), "\n".join([MARKDOWN_HEAD, *rows]) + "\n")


def _form(opened: OpenedModel) -> str:
    return "merged" if opened.merged else "as trained"


def _gather(report: BrokenReport) -> list[str]:
    messages = report.messages()
    if world()[1] == 1:
        return messages
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, messages)
    return sorted({message for part in parts for message in part})


class _Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int):
        self._shown, self._total, self._bar = sys.stderr.isatty() and world()[0] == 0, total, None

    def __enter__(self) -> "_Progress":
        if self._shown:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="img")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, images: int) -> None:
        if self._bar is not None:
            self._bar.update(images)
