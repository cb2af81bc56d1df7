"""What stands in the way of the forks is told before anything of them is imported."""

import subprocess
import sys

import pytest

import replknet.tasks.openmmlab as plugin
from replknet import cli
from replknet._errors import UsageError


@pytest.fixture
def installed(monkeypatch):
    """`installed(**changes)` pretends other distributions; None takes one away."""

    def pretend(changes: dict[str, str | None]) -> None:
        real = plugin._version
        monkeypatch.setattr(plugin, "_version", lambda name: changes[name] if name in changes else real(name))

    return pretend


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_everything_is_there(task):
    assert plugin.why_not(task) is None


def test_missing_distributions_are_named_with_the_command(installed):
    installed({"onedl-mmsegmentation": None, "ftfy": None})
    with pytest.raises(UsageError, match=r"segmentation needs onedl-mmsegmentation, ftfy: pip install 'replknet\[seg"):
        plugin.require("segmentation")
    assert plugin.why_not("detection") is None


def test_originals_beside_the_forks_are_refused(installed):
    installed({"mmcv": "2.1.0", "mmengine": "0.10.7"})
    with pytest.raises(UsageError, match=r"mmengine mmcv cannot stand beside.*pip uninstall -y mmengine mmcv onedl-mm"):
        plugin.require("detection")


def test_an_old_version_is_refused(installed):
    installed({"onedl-mmcv": "2.3.1"})
    with pytest.raises(UsageError, match=r"too old for segmentation: onedl-mmcv 2.3.1 \(needs 2.3.6\)"):
        plugin.require("segmentation")


@pytest.mark.parametrize("command", ["train", "eval", "predict", "check", "prepare", "complexity", "export"])
def test_commands_without_the_extra_say_one_line(command, installed, capsys, tmp_path):
    installed({"onedl-mmsegmentation": None})
    given = {
        "train": ["--config", "c.py", "--output", str(tmp_path)],
        "eval": [],
        "predict": ["a.jpg", "--output", str(tmp_path)],
        "check": ["folder", str(tmp_path)],
        "prepare": [str(tmp_path)],
        "complexity": [],
        "export": [],
    }
    assert cli.main(["segment", command, *given[command]]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "pip install 'replknet[segmentation]'" in message


def test_importing_is_quiet_and_knows_the_packages_configs():
    code = (
        "import replknet.tasks.openmmlab\n"
        "import sys; assert not any(m.split('.')[0] in ('mmengine', 'mmcv', 'mmseg') for m in sys.modules)\n"
        "import replknet.tasks.segmentation\n"
        "from mmengine import Config\n"
        "c = Config.fromstring(\"_base_ = ['mmseg::_base_/models/upernet_r50.py']\", '.py')\n"
        "print(c.model.decode_head.type)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "UPerHead\n", "")
