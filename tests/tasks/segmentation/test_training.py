"""Real trainings in processes of their own: fit, independent score, kill and resume, two processes, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix

from replknet.tasks.openmmlab import require

require("segmentation")
import replknet.tasks.segmentation  # noqa: E402, F401
from replknet.tasks.openmmlab.checkpoint_files import read_runner_checkpoint  # noqa: E402
from replknet.tasks.segmentation.evaluation import evaluate_segmentor  # noqa: E402
from replknet.tasks.segmentation.labels import read_labels  # noqa: E402
from replknet.tasks.segmentation.segmentor import open_segmentor, resolve_config  # noqa: E402

from .conftest import RECIPES, one_thread, save  # noqa: E402

# The first test that asks for the trained network waits for a minute or two of training.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def last(output: Path) -> Path:
    return Path((output / "last_checkpoint").read_text())


@pytest.fixture(scope="module")
def segmented(trained_run, crops) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels found by the trained network, merged, and the true ones, of every crop."""
    opened = open_segmentor(last(trained_run))
    pictures = sorted((crops / "images").iterdir())
    return [(opened.segment(path), read_labels(crops / "labels" / path.name)) for path in pictures]


def test_progress_is_shown_and_the_fit_is_nearly_perfect(trained_run):
    shown = (trained_run / "stdout.txt").read_text()
    assert len(re.findall(r"Iter\(train\) \[ *\d+/\d+\].*eta: .*loss: ", shown)) >= 10
    assert "Saving checkpoint at" in shown
    assert "Config:" not in shown
    miou = float(re.findall(r"mIoU: ([\d.]+)", shown)[-1])
    assert miou > 90, shown[-2000:]


@pytest.mark.parametrize("merged", [False, True])
def test_miou_equals_an_independent_count(merged, trained_run, segmented, tmp_path):
    found = evaluate_segmentor(last(trained_run), output=tmp_path, merged=merged, device="cpu")
    matrix = MulticlassConfusionMatrix(10, ignore_index=255)
    for got, want in segmented:
        matrix.update(torch.from_numpy(got), torch.from_numpy(want.astype(np.int64)))
    counts = matrix.compute().double()
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    # mmseg rounds to two decimals; merging may move single pixels on an edge.
    assert found["mIoU"] == pytest.approx(100 * float(iou.nanmean()), abs=0.006 if merged else 0.02)
    assert found["aAcc"] == pytest.approx(
        100 * float(counts.diag().sum() / counts.sum()), abs=0.006 if merged else 0.02
    )


def test_merged_labels_are_the_same(trained_run, segmented, crops):
    plain = open_segmentor(last(trained_run), merged=False)
    pictures = sorted((crops / "images").iterdir())
    wrong = sum(int((plain.segment(path) != got).sum()) for path, (got, _) in zip(pictures, segmented, strict=True))
    assert wrong <= 2


def test_eval_command_under_torchrun_scores_the_same(trained_run, replknet, tmp_path):
    words = ["segment", "eval", "--weights", last(trained_run), "--device", "cpu", "--output", tmp_path / "logs"]
    one = replknet(*words, "--out", tmp_path / "one.json").stdout
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    command = [*launch, "-m", "replknet", *map(str, words), "--out", str(tmp_path / "two.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread())
    assert done.returncode == 0, done.stderr
    assert "mIoU" in one
    scores = [json.loads((tmp_path / name).read_text())["scores"] for name in ("one.json", "two.json")]
    assert scores[0] == scores[1]
    assert done.stdout.count("mIoU ") == 1


def test_predict_and_export_of_the_trained_network(trained_run, crops, segmented, replknet, tmp_path):
    said = replknet(
        "segment", "predict", crops / "images", "--weights", last(trained_run), "--output", tmp_path / "out",
    )  # fmt: skip
    assert f"6/6 {sorted((crops / 'images').iterdir())[-1]}" in said.stdout
    path = sorted((crops / "images").iterdir())[0]
    with Image.open(tmp_path / "out" / f"{path.stem}.labels.png") as image:
        assert np.array_equal(np.asarray(image), segmented[0][0])
    file = tmp_path / "segmentor.onnx"
    replknet("segment", "export", "--weights", last(trained_run), "--output", file, "--images", crops / "images")
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1)[None]
    (logits,) = session.run(None, {"images": pixels})
    assert logits.shape == (1, 10, 96, 96)
    assert np.mean(logits[0].argmax(0) == segmented[0][0]) > 0.999


def start(config: Path, output: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "replknet", "segment", "train", "--config", str(config), "--output", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, "--seed", "0", "--device", "cpu", *words], env=one_thread(), **pipes)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_killed_and_resumed_ends_as_if_nothing_had_happened(small_config, tmp_path):
    """Weights, optimizer, schedule and order of the pictures; random flips, which mmengine draws anew, are off."""
    config = small_config(12, 4)
    same = ["--cfg_options", "train_dataloader.dataset.pipeline.2.prob=0.0", "train_dataloader.batch_size=2"]
    finish(start(config, tmp_path / "whole", *same))
    killed = start(config, tmp_path / "killed", *same)
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed" / "iter_4.pth").exists() or not (tmp_path / "killed" / "last_checkpoint").exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "iter_12.pth").exists()
    assert "Auto resumed" in finish(start(config, tmp_path / "killed", "--resume", "true", *same))
    states = [read_runner_checkpoint(tmp_path / run / "iter_12.pth")["state_dict"] for run in ("whole", "killed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_output_that_holds_a_run_is_not_overwritten(trained_run, small_config, replknet):
    done = replknet("segment", "train", "--config", small_config(), "--output", trained_run, code=2)
    assert "holds a run already: go on with --resume true" in done.stderr


def test_two_processes_on_a_cpu_say_that_norms_are_not_synchronised(small_config, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29534"]
    words = ["segment", "train", "--config", small_config(4, 4), "--output", tmp_path / "ddp", "--device", "cpu"]
    command = [*launch, "-m", "replknet", *map(str, words), "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=one_thread())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SyncBN needs GPUs") == 1
    assert "Iter(val) [3/3]" in done.stdout
    two = read_runner_checkpoint(tmp_path / "ddp" / "iter_4.pth")
    finish(start(small_config(4, 4), tmp_path / "one"))
    one = read_runner_checkpoint(tmp_path / "one" / "iter_4.pth")
    assert two["state_dict"].keys() == one["state_dict"].keys()
    changed = [k for k in one["state_dict"] if not torch.equal(one["state_dict"][k], two["state_dict"][k])]
    assert len(changed) > 100


def test_starting_from_weights_of_other_classes(trained_run, small_config, replknet, tmp_path, crops):
    options = ["--cfg_options", "train_cfg.max_iters=1", "train_cfg.val_interval=10"]
    words = [
        "segment",
        "train",
        "--config",
        small_config(),
        "--weights",
        last(trained_run),
        "--device",
        "cpu",
        *options,
    ]
    other = tmp_path / "other"
    other.mkdir()
    for kind in ("images", "labels"):
        (other / kind).symlink_to(crops / kind)
    names = (crops / "classes.txt").read_text() + "one more\n"
    (other / "classes.txt").write_text(names)
    failed = replknet(*words, "--data", other, "--output", tmp_path / "a", code=1)
    assert re.search(r"decode_head.conv_seg.weight is \[10, 32, 1, 1\], the model needs \[11", failed.stderr)
    heads = ["decode_head.conv_seg", "auxiliary_head.conv_seg"]
    replknet(*words, "--data", other, "--output", tmp_path / "b", "--may_differ", *heads)
    old, new = (read_runner_checkpoint(last(run))["state_dict"] for run in (trained_run, tmp_path / "b"))
    assert new["decode_head.conv_seg.weight"].shape[0] == 11
    assert torch.allclose(old["backbone.stem.0.conv.weight"], new["backbone.stem.0.conv.weight"], atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(precision, small_config, replknet, tmp_path, cuda):
    words = ["segment", "train", "--config", small_config(2, 2), "--output", tmp_path / "run", "--device", cuda]
    replknet(*words, "--precision", precision)
    config = (tmp_path / "run" / "small.py").read_text()
    assert "AmpOptimWrapper" in config
    assert {"bf16": "bfloat16", "fp16": "float16"}[precision] in config


def test_mixed_precision_on_a_cpu_is_refused(small_config, replknet, tmp_path):
    words = ["segment", "train", "--config", small_config(), "--output", tmp_path / "run", "--device", "cpu"]
    assert "needs a GPU" in replknet(*words, "--precision", "bf16", code=2).stderr


def test_a_label_that_a_worker_finds_wrong_ends_the_training_with_one_line(small_config, crops, replknet, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for path in (crops / kind).iterdir():
            (tmp_path / "data" / kind / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "classes.txt").write_text((crops / "classes.txt").read_text())
    for path in (tmp_path / "data" / "labels").iterdir():
        labels = read_labels(path)
        Image.fromarray(np.where(labels == 255, 255, labels + 1).astype(np.uint8)).save(path)
    words = ["segment", "train", "--config", small_config(), "--data", tmp_path / "data", "--output", tmp_path / "run"]
    options = ["train_dataloader.num_workers=1", "train_cfg.max_iters=2"]
    failed = replknet(*words, "--device", "cpu", "--cfg_options", *options, code=1)
    lines = [line for line in failed.stderr.splitlines() if line.startswith("replknet: ")]
    assert len(lines) == 1
    assert re.search(r"label map .*\.png holds 10, the class list has 10 .*labels start at 1", lines[0])
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes"])
def test_the_releases_pipelines_run(kind, crops, replknet, tmp_path):
    """One step and one score of a release's recipe, with a small backbone, on data in the original's layout."""
    for number, path in enumerate(sorted((crops / "images").iterdir())[:2]):
        labels = read_labels(crops / "labels" / path.name)
        for split, ade in (("train", "training"), ("val", "validation")):
            with Image.open(path) as picture:
                if kind == "ade20k":
                    save(tmp_path / "images" / ade / f"{number}.jpg", np.asarray(picture))
                    save(
                        tmp_path / "annotations" / ade / f"{number}.png",
                        np.where(labels == 255, 0, labels + 1).astype(np.uint8),
                    )
                else:
                    save(tmp_path / f"leftImg8bit/{split}/a/{number}_leftImg8bit.png", np.asarray(picture))
                    save(tmp_path / f"gtFine/{split}/a/{number}_gtFine_labelTrainIds.png", labels)
    recipe = {"ade20k": "replknet_31b_1k_upernet_ade20k_512", "cityscapes": "replknet_31b_1k_upernet_cityscapes_769"}
    options = ["model.backbone.model=replknet_nano", "model.backbone.stem_stride=4", "model.backbone.init_cfg=None"]
    options += ["model.decode_head.in_channels=[24, 48, 96, 192]", "model.decode_head.channels=16"]
    options += ["model.auxiliary_head.in_channels=96", "model.backbone.grad_checkpointing=False"]
    options += ["train_cfg.max_iters=1", "optim_wrapper.constructor=RepLKNetLayerDecay"]
    options += ["optim_wrapper.paramwise_cfg={'_delete_': True, 'decay_rate': 0.7}", "model.backbone.frozen_stages=1"]
    for loader in ("train", "val", "test"):
        options += [f"{loader}_dataloader.num_workers=0", f"{loader}_dataloader.persistent_workers=False"]
    words = ["--config", RECIPES / f"{recipe[kind]}.py", "--data", tmp_path, "--output", tmp_path / "run"]
    done = replknet("segment", "train", *words, "--device", "cpu", "--cfg_options", *options)
    assert re.search(r"Iter\(val\) \[2/2\] +aAcc: [\d.]+ +mIoU", done.stdout)


def test_sizes_and_mirrors_are_scored_as_they_are_predicted(trained_run, crops, tmp_path):
    """`--tta` of eval and predict agree; sizes here are those of the crops, not the recipe's."""
    weights = last(trained_run)
    config = resolve_config(weights, None)[0]
    for resize in config.tta_pipeline[1]["transforms"][0]:
        resize["scale"] = tuple(side // 8 for side in resize["scale"])
    opened = open_segmentor(weights, config=config, tta=True)
    matrix = MulticlassConfusionMatrix(10, ignore_index=255)
    for path in sorted((crops / "images").iterdir()):
        want = read_labels(crops / "labels" / path.name)
        matrix.update(torch.from_numpy(opened.segment(path)), torch.from_numpy(want.astype(np.int64)))
    counts = matrix.compute().double()
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    found = evaluate_segmentor(weights, config=config, output=tmp_path, tta=True, device="cpu")
    assert found["mIoU"] == pytest.approx(100 * float(iou.nanmean()), abs=0.006)
