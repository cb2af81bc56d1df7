"""Configs: clear errors for old forms and misspelt options; a checkpoint's config is data."""

import gc

import pytest

from replknet._errors import UsageError
from replknet.tasks.openmmlab import require

require("segmentation")
from replknet.tasks.openmmlab.configs import config_of_checkpoint, parse_options, read_config  # noqa: E402


def written(folder, text, name="config.py"):
    (folder / name).write_text(text)
    return folder / name


def test_bases_of_the_package_and_options(tmp_path):
    path = written(tmp_path, "_base_ = ['mmseg::_base_/models/upernet_r50.py']\nsteps = [dict(a=1)]\n")
    options = parse_options(["model.decode_head.num_classes=7", "steps.0.a=(2, 3)", "model.test_cfg.mode=slide"])
    config = read_config(path, options)
    assert config.model.decode_head.num_classes == 7
    assert config.steps[0].a == (2, 3)
    assert config.model.test_cfg.mode == "slide"


# mmengine leaves a temporary file open where a base is missing.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "_base_ = ['../_base_/runtime.py']\nlr_config = dict(policy='poly')\ndata = dict(samples_per_gpu=2)",
            "0.x.*data is now train_dataloader.*lr_config is now param_scheduler",
        ),
        ("runner = dict(type='IterBasedRunner', max_iters=1)", "runner is now train_cfg"),
        ("evaluation = dict(interval=1)", "val_evaluator"),
        ("a = (", "is not Python"),
        ("_base_ = 'absent.py'", "absent.py"),
        ("_base_ = 'mmseg::absent/absent.py'", "absent"),
        ("a = 1 / 0", "ZeroDivisionError"),
    ],
    ids=range(7),
)
def test_what_is_not_a_config(text, message, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        read_config(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    # The file that mmengine leaves open goes here, not in some later test.
    del caught
    gc.collect()


def test_missing_and_misnamed_files(tmp_path):
    with pytest.raises(UsageError, match="there is no config"):
        read_config(tmp_path / "absent.py")
    with pytest.raises(UsageError, match="must end in"):
        read_config(written(tmp_path, "a = 1", "config.txt"))


@pytest.mark.parametrize("option", ["optim_wraper.lr=1", "model.decode_heads.num_classes=3", "model.backbone.type.x=1"])
def test_an_option_that_leads_nowhere(option, tmp_path):
    path = written(tmp_path, "model = dict(decode_head=dict(num_classes=2), backbone=dict(type='RepLKNet'))")
    with pytest.raises(UsageError, match=r"--cfg_options.*(the config has no|cannot inherit)"):
        read_config(path, parse_options([option]))


def test_an_option_without_value():
    with pytest.raises(UsageError, match="write key=value"):
        parse_options(["train_cfg.max_iters"])


def test_the_config_in_a_checkpoint_is_read_back(tmp_path):
    config = read_config(written(tmp_path, "_base_ = 'mmseg::_base_/models/upernet_r50.py'\nx = [(1, -2.5), None]\n"))
    again = config_of_checkpoint({"meta": {"cfg": config.pretty_text}}, "a.pth")
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("text", ["import os", "a = __import__('os')", "a = [x for x in ()]", "a = dict(**b)", "a ="])
def test_the_config_in_a_checkpoint_is_not_executed(text):
    with pytest.raises(UsageError, match="not plain data"):
        config_of_checkpoint({"meta": {"cfg": text}}, "a.pth")


def test_a_checkpoint_without_config():
    with pytest.raises(UsageError, match="does not hold its config"):
        config_of_checkpoint({"state_dict": {}}, "a.pth")
