"""The Runner's checkpoints are read whole, also by everything that knows nothing of mmengine; nothing in them runs."""

import numpy as np
import pytest
import torch

from replknet import cli
from replknet._errors import RunError, UsageError
from replknet.models.checkpoints import read_state_dict
from replknet.tasks.openmmlab import require

require("segmentation")
from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.runner.checkpoint import CheckpointLoader  # noqa: E402

from replknet.tasks.openmmlab.checkpoint_files import read_runner_checkpoint  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path):
    """As the Runner writes it, log buffers included."""
    buffer = HistoryBuffer([1.5, 2.5], [1, 1])
    hub = {"log_scalars": {"train/loss": buffer}, "runtime_info": {"iter": np.int64(3)}, "resumed_keys": {}}
    meta = {"iter": 3, "epoch": 0, "seed": np.int64(5), "cfg": "a = 1\n"}
    state = {"backbone.stem.0.conv.weight": torch.ones(4, 3, 3, 3)}
    torch.save({"meta": meta, "state_dict": state, "message_hub": hub}, tmp_path / "iter_3.pth")
    return tmp_path / "iter_3.pth"


def test_log_buffers_come_back(checkpoint):
    buffer = read_runner_checkpoint(checkpoint)["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(buffer, HistoryBuffer)
    assert buffer.mean() == 2.0
    assert CheckpointLoader.load_checkpoint(str(checkpoint))["meta"]["iter"] == 3


def test_weights_are_read_without_mmengine(checkpoint):
    assert next(iter(read_state_dict(checkpoint).values())).sum() == 108


class Hostile:
    def __reduce__(self):
        return print, ("owned",)


class Lookup:
    """What an attacker would do with a free `getattr`."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


@pytest.mark.parametrize("value", [Hostile(), Lookup()], ids=["call", "lookup"])
@pytest.mark.parametrize("read", [read_runner_checkpoint, read_state_dict])
def test_a_file_that_would_run_code_is_refused(value, read, tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": value}, tmp_path / "hostile.pth")
    with pytest.raises(RunError, match=r"hostile.pth"):
        read(tmp_path / "hostile.pth")
    with pytest.raises(RunError):
        CheckpointLoader.load_checkpoint(str(tmp_path / "hostile.pth"))
    assert "owned" not in capsys.readouterr().out


def test_the_old_configs_text_is_not_passed_to_mmengine(tmp_path):
    torch.save(
        {"meta": {"config": "print('owned')", "iter": 1}, "state_dict": {"a": torch.zeros(1)}}, tmp_path / "o.pth"
    )
    assert "config" not in CheckpointLoader.load_checkpoint(str(tmp_path / "o.pth"))["meta"]


def test_a_truncated_file(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    with pytest.raises(RunError, match="is damaged"):
        read_runner_checkpoint(checkpoint)


def test_neither_a_file_nor_a_name(tmp_path):
    with pytest.raises(UsageError, match="neither a file nor the name of official weights"):
        read_runner_checkpoint(tmp_path / "absent.pth")


def test_convert_takes_the_backbone_out(tmp_path, capsys):
    import timm

    network = timm.create_model("replknet_nano", num_classes=0)
    state = {f"backbone.{name}": value for name, value in network.state_dict().items() if not name.startswith("norm.")}
    state["decode_head.conv_seg.weight"] = torch.zeros(2, 2, 1, 1)
    torch.save({"meta": {}, "state_dict": state, "message_hub": {"log_scalars": {"a": HistoryBuffer([1.0], [1])}}},
               tmp_path / "segmentor.pth")  # fmt: skip
    words = [str(tmp_path / "segmentor.pth"), str(tmp_path / "backbone.pth"), "--backbone_only", "true"]
    assert cli.main(["convert", *words]) == 0, capsys.readouterr().err
    written = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert written.keys() == {name.removeprefix("backbone.") for name in state if name.startswith("backbone.")}
