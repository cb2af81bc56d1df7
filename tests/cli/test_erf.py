"""`replknet erf`: files, numbers, warnings, resuming after a kill, and exit codes."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from replknet.analysis.erf import effective_receptive_field
from replknet.analysis.erf_measures import area_ratios
from replknet.analysis.images import PreparedImages, open_pictures
from replknet.cli import main


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / name).mkdir()
        for index in range(3):
            pixels = np.kron(random.integers(0, 255, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save({"model": timm.create_model("replknet_nano").state_dict()}, path)
    return path


def run(*args):
    return main(["erf", *map(str, args)])


def test_one_network(pictures, weights, tmp_path, capsys):
    out = tmp_path / "out"
    code = run(
        f"replknet_nano,weights={weights},label=my net", "--images", pictures, "--size", 64, "--n", 4, "--output", out
    )
    assert code == 0
    expected = {"config.yaml", "my_net.npy", "my_net.json", "my_net.png", "my_net_overlay.png", "profiles.png"}
    assert {path.name for path in out.iterdir()} == expected
    matrix = np.load(out / "my_net.npy", allow_pickle=False)
    model = timm.create_model("replknet_nano")
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    images = PreparedImages(open_pictures(str(pictures)), (64, 64), seed=0)
    direct = effective_receptive_field(model, images, n=4)
    assert np.array_equal(matrix, direct.matrix)
    account = json.loads((out / "my_net.json").read_text())
    for area in area_ratios(matrix):
        assert account["area_ratios"]["raw"][f"{area.threshold:g}"] == {"side": area.side, "ratio": area.ratio}
    assert account["n_images"] == 4
    assert account["images"]["used"] == images.used[:4]
    assert account["model"]["weights_sha256"]
    assert account["theoretical"]["bounded"]
    printed = capsys.readouterr()
    assert "my net" in printed.out
    assert "64 × 64 pixels are few" in printed.err
    assert "log matrix depend on the gradient's scale" in printed.err


def test_config_repeats_the_run(pictures, weights, tmp_path):
    first = tmp_path / "first"
    run(
        f"replknet_nano,weights={weights}",
        "--images",
        pictures,
        "--size",
        "48x64",
        "--n",
        2,
        "--output",
        first,
        "--overlay",
        "false",
    )
    assert yaml.safe_load((first / "config.yaml").read_text())["n"] == 2
    assert run("--config", first / "config.yaml", "--output", tmp_path / "again") == 0
    name = "replknet_nano.npy"
    again = np.load(tmp_path / "again" / name)
    assert again.shape == (48, 64)
    assert np.array_equal(again, np.load(first / name))


def test_several_networks_beside_their_untrained_selves(pictures, weights, tmp_path, capsys):
    out = tmp_path / "out"
    networks = (f"replknet_nano,weights={weights}", f"replknet_nano,weights={weights},merged", "torchvision:resnet18")
    code = run(
        *networks,
        "--images",
        pictures,
        "--size",
        64,
        "--n",
        2,
        "--untrained",
        "true",
        "--output",
        out,
        "--format",
        "svg",
    )
    assert code == 0
    names = {path.stem for path in out.glob("*.npy")}
    assert names == {
        "replknet_nano",
        "replknet_nano_untrained",
        "replknet_nano_merged",
        "replknet_nano_merged_untrained",
        "torchvision_resnet18",
    }
    assert (out / "grid.svg").read_text().count("replknet_nano merged") >= 1
    plain, merged = (np.load(out / f"replknet_nano{suffix}.npy") for suffix in ("", "_merged"))
    assert np.abs(plain - merged).max() / plain.max() < 1e-3
    printed = capsys.readouterr()
    assert (
        "(replknet_nano untrained, replknet_nano merged untrained, torchvision:resnet18): the weights are random"
        in printed.err
    )


def test_stages_on_noise(tmp_path, capsys):
    code = run("replknet_nano", "--images", "noise", "--size", 64, "--n", 1, "--layer", "stages", "--output", tmp_path)
    assert code == 0
    assert len(list(tmp_path.glob("replknet_nano_stages.*.npy"))) == 4
    account = json.loads((tmp_path / "replknet_nano_stages.0.json").read_text())
    assert account["images"]["used"] == ["noise 0/0"]
    assert "folder's order" not in capsys.readouterr().err


def test_the_embedded_data_and_a_grey_network(tmp_path):
    network = "replknet_nano,in_chans:=1,stem_stride:=1"
    assert run(network, "--images", "digits", "--size", 32, "--n", 2, "--output", tmp_path) == 0
    assert (tmp_path / "replknet_nano_overlay.png").is_file()


def test_traps_are_named(pictures, tmp_path, capsys):
    run("resnet18", "--images", pictures, "--size", 64, "--n", 1, "--seed", "null", "--output", tmp_path)
    printed = capsys.readouterr().err
    assert "8 norm or layer scales are zero" in printed
    assert "first ones are all of one class" in printed


def test_broken_pictures_and_too_few(pictures, weights, tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "ant").mkdir(parents=True)
    (folder / "ant" / "a.png").write_bytes((pictures / "ant" / "0.png").read_bytes())
    (folder / "ant" / "b.png").write_bytes((pictures / "ant" / "1.png").read_bytes()[:200])
    command = (f"replknet_nano,weights={weights}", "--images", folder, "--size", 64, "--n", 2, "--output")
    assert run(*command, tmp_path / "out") == 0
    account = json.loads((tmp_path / "out" / "replknet_nano.json").read_text())
    assert (account["n_images"], account["n_asked"], len(account["images"]["unreadable"])) == (1, 2, 1)
    assert run(*command, tmp_path / "strict", "--broken", "fatal") == 1
    assert "b.png" in capsys.readouterr().err
    assert not list((tmp_path / "strict").glob("*.npy"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "name at least one network"),
        (("replknet_nano",), "give --images"),
        (("replknet_nano", "--images", "none"), "none: no such folder"),
        (("replknet_nan", "--images", "noise"), "unknown model 'replknet_nan'"),
        (("replknet_nano", "replknet_nano", "--images", "noise"), "same name"),
        (("replknet_nano", "--images", "noise", "--size", "big"), "--size big"),
        (("replknet_nano", "--images", "noise", "--size", "0"), "--size 0"),
        (("replknet_nano", "--images", "noise", "--device", "gpu"), "--device gpu"),
        (("replknet_nano", "--images", "noise", "--device", "cuda:77"), "CUDA GPUs"),
        (("replknet_nano", "--images", "noise", "--size", "64", "--layer", "stage.0"), "did you mean .*stages.0"),
        (("replknet_nano", "--images", "noise", "--size", "64", "--layer", "head"), "no spatial features"),
        (("vit_tiny_patch16_224,depth:=1", "--images", "noise", "--size", "100"), "use 96 × 96 or 112 × 112"),
        (("mixer_s32_224", "--images", "noise", "--size", "96"), "cannot run on images of 96 × 96"),
        (("replknet_nano", "--images", "noise", "--n", "0"), "at least 1"),
        (("replknet_nano,weights=none.pth", "--images", "noise"), "none.pth"),
    ],
)
def test_wrong_requests(args, message, tmp_path, capsys):
    assert run(*args, "--output", tmp_path / "out") == 2
    printed = capsys.readouterr().err.strip()
    assert len(printed.splitlines()) == 1
    import re

    assert re.search(message, printed), printed
    assert not list(tmp_path.glob("out/*.npy"))


def test_an_empty_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run("replknet_nano", "--images", tmp_path / "empty", "--output", tmp_path / "out") == 2
    assert "no pictures in it" in capsys.readouterr().err


def test_a_file_where_the_output_should_go(pictures, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert run("replknet_nano", "--images", pictures, "--output", tmp_path / "out") == 2
    assert (tmp_path / "out").read_text() == "mine"
    assert "a file, where a folder is needed" in capsys.readouterr().err


def test_help_teaches(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for word in ("--images", "--untrained", "stages", "torchvision:NAME", "weights=FILE"):
        assert word in text


@pytest.mark.slow
def test_killed_and_started_again(pictures, weights, tmp_path):
    """A real process, a real kill: the second run takes up the sums and gives the first run's matrix."""
    code = (
        "import sys, replknet.analysis._accumulate as a; a._SECONDS_BETWEEN_STATES = 0.0\n"
        "from replknet.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    options = ["--images", str(pictures), "--size", "256", "--n", "6"]
    command = [sys.executable, "-c", code, "erf", f"replknet_nano,weights={weights}", *options, "--output"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    state = tmp_path / "killed" / ".replknet_nano.state.npz"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with np.load(state) as stored:
        done = int(stored["count"])
    assert 1 <= done < 6
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    assert not state.exists()
    resumed, whole = (np.load(tmp_path / name / "replknet_nano.npy") for name in ("killed", "whole"))
    assert np.array_equal(resumed, whole)
    used = [
        json.loads((tmp_path / name / "replknet_nano.json").read_text())["images"]["used"]
        for name in ("killed", "whole")
    ]
    assert used[0] == used[1]
