"""Both detectors learn two real photographs by heart; a killed training ends with the same bits."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_iou

from replknet._errors import RunError, UsageError
from replknet.tasks.detection.detector import build_detector, open_detector
from replknet.tasks.detection.evaluation import evaluate
from replknet.tasks.detection.training import (
    DataPaths,
    class_layers,
    set_schedule,
    train_detector,
    use_scoring_data,
    use_training_data,
)
from replknet.tasks.openmmlab.configs import read_config
from replknet.tasks.openmmlab.runner import load_weights

from .conftest import RECIPES


def paths(folder: Path, **options) -> DataPaths:
    file = str(folder / "all.json")
    return DataPaths(
        train_annotations=file, train_images=str(folder), val_annotations=file, val_images=str(folder), **options
    )


def start(method: str, folder: Path, output: Path, *options: str) -> subprocess.Popen:
    """`replknet detect train` in a process of its own, on one thread, without loader workers."""
    file = str(folder / "all.json")
    data = [
        f"--{part}_{what}={value}"
        for part in ("train", "val")
        for what, value in (("annotations", file), ("images", str(folder)))
    ]
    words = ["--config", str(RECIPES / f"replknet_nano_{method}.py"), "--output", str(output), *data]
    words += ["--batch_size", "2", "--workers", "0", "--device", "cpu", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "replknet", "detect", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    try:
        text, _ = process.communicate(timeout=550)
    finally:
        process.kill()
    assert process.returncode == 0, text
    return text


# Epochs, short side, least AP50. Of the chairs a few slivers show, 2 to 9 % of their boxes, which are thin for masks of
# 28 x 28: the other 11 of 12 classes alone make 0.917.
LEARNING = {
    "fcos": ("160", "256", {"bbox": 0.9}),
    "cascade_mask_rcnn": ("120", "256", {"bbox": 0.9, "segm": 0.8}),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", LEARNING)
def test_a_detector_finds_its_training_objects_again(method, coco_folder, tmp_path):
    epochs, size, least = LEARNING[method]
    options = ("--epochs", epochs, "--image_size", size, "--warmup", "10", "--validate_every", epochs)
    # An epoch is a step here: writing a checkpoint after each would take a third of the time.
    options += ("--cfg_options", f"[default_hooks.checkpoint.interval={epochs}]")
    finish(start(method, coco_folder, tmp_path / "run", *options))
    weights = tmp_path / "run" / f"epoch_{epochs}.pth"
    scores = {}
    for evaluator in ("pycocotools", "faster-coco-eval"):
        for merged in (False, True):
            scores[evaluator, merged], notes = evaluate(
                weights, paths(coco_folder), merged=merged, workers=0, evaluator=evaluator, output=tmp_path / "eval"
            )
            assert notes == []
    first = scores["pycocotools", False]
    for kind, score in least.items():
        assert first[f"{kind}_AP50"] >= score
    for merged in (False, True):
        assert scores["pycocotools", merged] == pytest.approx(scores["faster-coco-eval", merged], abs=1e-12)
    assert first == pytest.approx(scores["pycocotools", True], abs=0.02)
    opened = open_detector(weights)
    assert set(opened.classes) >= {"person", "chair", "bottle", "diningtable"}
    truth = json.loads((coco_folder / "all.json").read_text())
    ids = {category["name"]: category["id"] for category in truth["categories"]}
    assert dict(zip(opened.classes, opened.category_ids, strict=True)) == ids
    # How sure the network is of it depends on the processor's rounding: its best answer is held against the truth.
    found = opened.detect(coco_folder / "voc.png", threshold=0.05, classes=["bottle"])
    assert len(found) > 0
    assert {opened.classes[label] for label in found.labels} == {"bottle"}
    # The bottle's corners; found means what it means for AP50.
    bottle = torch.tensor([[220.0, 255, 260, 345]])
    best = torch.from_numpy(found.boxes[found.scores.argmax()])[None]
    assert box_iou(best, bottle).item() > 0.5


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_bits(coco_folder, tmp_path):
    options = ("--epochs", "5", "--image_size", "96", "--warmup", "2", "--seed", "3")
    finish(start("fcos", coco_folder, tmp_path / "whole", *options))
    process = start("fcos", coco_folder, tmp_path / "killed", *options)
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed" / "epoch_2.pth").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    refused = start("fcos", coco_folder, tmp_path / "killed", *options)
    text, _ = refused.communicate(timeout=200)
    assert refused.returncode == 2
    assert "holds a run already: go on with --resume true" in text
    finish(start("fcos", coco_folder, tmp_path / "killed", *options, "--resume", "true"))
    states = [
        torch.load(tmp_path / name / "epoch_5.pth", weights_only=False)["state_dict"] for name in ("whole", "killed")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def trained_config(small_config, method: str = "fcos"):
    return copy.deepcopy(small_config(method))


def test_the_data_set_the_classes(small_config, coco_folder):
    config = trained_config(small_config, "cascade_mask_rcnn")
    assert use_training_data(config, paths(coco_folder)) == []
    assert config.model.roi_head.bbox_head[2].num_classes == config.model.roi_head.mask_head.num_classes == 12
    assert config.val_evaluator.ann_file == str(coco_folder / "all.json")
    assert config.train_dataloader.dataset.metainfo.classes == config.val_dataloader.dataset.metainfo.classes
    config = trained_config(small_config)
    notes = use_training_data(config, paths(coco_folder, classes=["chair", "person"]))
    assert config.model.bbox_head.num_classes == 2
    assert any("left out" in note for note in notes)


def test_without_validation_data_nothing_is_scored(small_config, coco_folder):
    config = trained_config(small_config)
    use_training_data(config, DataPaths(train_annotations=str(coco_folder / "all.json"), train_images=str(coco_folder)))
    assert "val_dataloader" not in config
    assert "val_evaluator" not in config
    assert "save_best" not in config.default_hooks.checkpoint


def test_cocos_folders(small_config, coco_folder, tmp_path):
    config = trained_config(small_config)
    with pytest.raises(UsageError, match=r"there is no data folder .*nowhere; give COCO's folder with --data"):
        use_training_data(config, DataPaths(root=str(tmp_path / "nowhere")))
    with pytest.raises(UsageError, match=r"no annotation file .*annotations/instances_train2017\.json"):
        use_training_data(config, DataPaths(root=str(tmp_path)))
    with pytest.raises(UsageError, match="belong together"):
        use_training_data(config, DataPaths(train_annotations=str(coco_folder / "all.json")))
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        (tmp_path / f"annotations/instances_{part}2017.json").write_text((coco_folder / "all.json").read_text())
        (tmp_path / f"{part}2017").symlink_to(coco_folder)
    assert use_training_data(config, DataPaths(root=str(tmp_path))) == []
    assert Path(config.val_dataloader.dataset.data_prefix.img) == tmp_path / "val2017"


def test_validation_data_of_other_classes(small_config, coco_folder, dataset, written):
    dataset["categories"][0]["name"] = "flask"
    config = trained_config(small_config)
    other = DataPaths(
        train_annotations=str(coco_folder / "all.json"),
        train_images=str(coco_folder),
        val_annotations=str(written(dataset)),
        val_images=str(coco_folder),
    )
    with pytest.raises(UsageError, match=r"has no category bottle, which the training set has; its own are .*"):
        use_training_data(config, other)


def test_masks_are_asked_for_by_cascade_only(small_config, coco_folder, dataset, written):
    for annotation in dataset["annotations"]:
        del annotation["segmentation"]
    file = str(written(dataset))
    bare = DataPaths(train_annotations=file, train_images=str(coco_folder))
    use_training_data(trained_config(small_config), bare)
    with pytest.raises(RunError, match=r"27 of 27 annotations have no usable segmentation .*FCOS needs boxes only"):
        use_training_data(trained_config(small_config, "cascade_mask_rcnn"), bare)


def test_sets_without_objects_or_with_tiny_pictures(small_config, coco_folder, dataset, written):
    empty = written({**dataset, "annotations": []}, "empty.json")
    with pytest.raises(UsageError, match="has no boxes of the classes"):
        use_training_data(
            trained_config(small_config), DataPaths(train_annotations=str(empty), train_images=str(coco_folder))
        )
    config = trained_config(small_config)
    config.train_dataloader.dataset.filter_cfg.min_size = 400
    notes = use_training_data(
        config, DataPaths(train_annotations=str(coco_folder / "all.json"), train_images=str(coco_folder))
    )
    assert any("1 pictures smaller than 400 pixels" in note for note in notes)
    config.train_dataloader.dataset.filter_cfg.min_size = 4000
    with pytest.raises(RunError, match="every picture is smaller"):
        use_training_data(
            config, DataPaths(train_annotations=str(coco_folder / "all.json"), train_images=str(coco_folder))
        )


def test_schedules_keep_their_shape():
    config = read_config(RECIPES / "replknet_31b_1k_cascade_mask_rcnn_3x.py")
    set_schedule(config, epochs=12, warmup=100, lr=1e-4, batch_size=3, workers=0, image_size=400, validate_every=2)
    warmup, decay = config.param_scheduler
    assert (config.train_cfg.max_epochs, config.train_cfg.val_interval) == (12, 2)
    assert (decay.end, decay.milestones, warmup.end) == (12, [9, 11], 101)
    assert (config.optim_wrapper.optimizer.lr, config.train_dataloader.batch_size) == (1e-4, 3)
    assert not config.val_dataloader.persistent_workers
    steps = config.train_dataloader.dataset.pipeline[3].transforms
    assert steps[0][0].scales[0] == (240, 666)
    assert steps[1][1].crop_size == (192, 300)
    assert config.val_dataloader.dataset.pipeline[1].scale == (666, 400)
    for wrong in ({"epochs": 0}, {"batch_size": 0}, {"workers": -1}, {"image_size": 4}):
        with pytest.raises(UsageError):
            set_schedule(config, **wrong)


def test_fine_tuning_to_other_classes(small_config, coco_folder, tmp_path):
    """Weights of 80 classes start a detector of 12: what does not depend on the classes is taken over."""
    torch.manual_seed(5)
    source = open_detector(config=trained_config(small_config), merged=False).model
    torch.save({"state_dict": source.state_dict()}, tmp_path / "eighty.pth")
    config = trained_config(small_config)
    set_schedule(config, epochs=1, warmup=0, lr=0.0, batch_size=2, workers=0, image_size=64)
    config.optim_wrapper.optimizer.weight_decay = 0.0
    train_detector(
        config,
        DataPaths(train_annotations=str(coco_folder / "all.json"), train_images=str(coco_folder)),
        output=tmp_path / "run",
        weights=tmp_path / "eighty.pth",
        device="cpu",
    )
    learned = open_detector(tmp_path / "run" / "epoch_1.pth", merged=False).model.state_dict()
    for key, value in source.state_dict().items():
        if key.startswith("bbox_head.conv_cls"):
            assert learned[key].shape[0] == 12
        elif "running" not in key and "tracked" not in key:
            assert torch.equal(value, learned[key]), key
    with pytest.raises(RunError, match=r"conv_cls.weight is .80, 64, 3, 3., the model needs .12"):
        load_weights(open_detector(tmp_path / "run" / "epoch_1.pth", merged=False).model, tmp_path / "eighty.pth")
    assert "bbox_head.conv_cls" in class_layers(config)


def test_broken_pictures_stop_before_training(small_config, coco_folder, tmp_path):
    for name in ("voc.png", "arc2017.png", "all.json"):
        (tmp_path / name).write_bytes((coco_folder / name).read_bytes()[: 20000 if name == "voc.png" else None])
    config = trained_config(small_config)
    set_schedule(config, epochs=1, batch_size=2, workers=0, image_size=64)
    with pytest.raises(RunError, match=r"cannot read .*voc\.png"):
        train_detector(config, paths(tmp_path, check="full"), output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    # Unnoticed by the quick check, it stops the training with the same line.
    with pytest.raises(RunError, match=r"cannot read .*voc\.png") as caught:
        train_detector(config, paths(tmp_path), output=tmp_path / "run", device="cpu")
    assert "\n" not in str(caught.value)


def test_scoring_data_need_the_models_classes(small_config, coco_folder):
    config = trained_config(small_config)
    with pytest.raises(UsageError, match=r"has no category zebra, which the model has"):
        use_scoring_data(config, "test", paths(coco_folder), ["zebra", "person"])


@pytest.mark.slow
def test_two_processes_score_every_picture_once(small_config, coco_folder, dataset, tmp_path):
    """Three pictures among two processes: the one that is handed out twice counts once."""
    third = {**dataset["images"][0], "id": 3}
    copies = [{**a, "id": a["id"] + 100, "image_id": 3} for a in dataset["annotations"] if a["image_id"] == 1]
    dataset["images"].append(third)
    dataset["annotations"] += copies
    (tmp_path / "three.json").write_text(json.dumps(dataset))
    config = trained_config(small_config)
    use_training_data(config, paths(coco_folder))
    torch.manual_seed(0)
    state = build_detector(config).state_dict()
    meta = {"dataset_meta": {"classes": config.train_dataloader.dataset.metainfo.classes}}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "some.pth")
    words = ["-m", "replknet", "detect", "eval", "--weights", str(tmp_path / "some.pth")]
    words += ["--config", str(RECIPES / "replknet_nano_fcos.py"), "--image_size", "64", "--device", "cpu"]
    words += ["--cfg_options", "[model.test_cfg.score_thr=0.0]", "--workers", "0"]
    words += ["--val_annotations", str(tmp_path / "three.json"), "--val_images", str(coco_folder)]
    found = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node", "2"]):
        file = tmp_path / f"{len(launcher)}.json"
        run = [
            sys.executable,
            *launcher,
            *words,
            "--save_predictions",
            str(file),
            "--log_folder",
            str(tmp_path / "log"),
        ]
        done = subprocess.run(
            run, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        results = json.loads(file.read_text())
        assert {result["image_id"] for result in results} == {1, 2, 3}
        found.append(sorted(json.dumps(result, sort_keys=True) for result in results))
    assert found[0] == found[1]
