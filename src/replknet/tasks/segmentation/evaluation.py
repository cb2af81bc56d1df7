"""mIoU of a segmentor on the data that its config, or another, describes."""

import copy
from pathlib import Path

from mmengine.config import Config
from torch import nn

from replknet._errors import UsageError
from replknet.tasks.openmmlab import runner
from replknet.tasks.openmmlab.runner import Precision, load_weights
from replknet.tasks.segmentation.segmentor import Mode, inference_cfg, prepare_for_inference, resolve_config
from replknet.tasks.segmentation.training import use_data


def evaluate_segmentor(
    weights: str | Path | None,
    *,
    config: Config | None = None,
    data: str | Path | None = None,
    output: str | Path,
    mode: Mode | None = None,
    tta: bool = False,
    merged: bool = True,
    device: str = "auto",
    precision: Precision = "fp32",
) -> dict[str, float]:
    """Scores of the config's evaluator, in per cent: aAcc, mIoU, mAcc.

    Args:
        weights, config, mode, tta, merged, precision: as for `open_segmentor`; the config needs a test data set.
        data: folder of the data set; None as in the config.
        output: folder for logs.
        device: "auto", "cpu", "cuda".

    Raises:
        UsageError: no data set in the config, missing data, or classes that differ from the model's.
        RunError: weights or label maps that do not fit.
    """
    config, weights = resolve_config(weights, config)
    config = copy.deepcopy(config)
    if "test_dataloader" not in config or "test_evaluator" not in config:
        raise UsageError("the config describes no data set to score on; give a recipe by --config")
    for key in ("train_dataloader", "val_dataloader", "val_evaluator", "val_cfg"):
        config.pop(key, None)
    use_data(config, data)
    config.model = inference_cfg(config.model, mode)
    if tta:
        _augment(config)

    def prepare(model: nn.Module) -> None:
        segmentor = model.module if tta else model
        if weights is not None:
            load_weights(segmentor, weights)  # type: ignore[arg-type]
        prepare_for_inference(segmentor, merged=merged)  # type: ignore[arg-type]

    return runner.evaluate(config, output=output, prepare=prepare, device=device, precision=precision)


def _augment(config: Config) -> None:
    if "tta_pipeline" not in config:
        raise UsageError("--tta: the config has no tta_pipeline")
    config.test_dataloader.dataset.pipeline = config.tta_pipeline
    config.model = {**config.get("tta_model", {"type": "SegTTAModel"}), "module": config.model}
