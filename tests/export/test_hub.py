import json
import os
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch

from replknet import reparameterize
from replknet._errors import RunError, UsageError
from replknet.cli import main
from replknet.export.hub import model_card, push_model, save_model
from replknet.tasks.opened_model import open_model


def images(chans: int = 3) -> torch.Tensor:
    return torch.rand(2, chans, 32, 32, generator=torch.Generator().manual_seed(0))


def unusual(**kwargs) -> Any:
    torch.manual_seed(6)
    model = timm.create_model("replknet_nano", **kwargs).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
    return model


@pytest.mark.parametrize("form", ["train", "merged", "fused"])
@torch.no_grad()
def test_a_folder_gives_the_same_model_back(tmp_path, form):
    model = unusual(num_classes=4, in_chans=1, layers=(1, 1, 1, 1), small_kernel=5)
    if form != "train":
        reparameterize(model, fold_norms=form == "fused")
    want = model(images(1))
    save_model(model, tmp_path / "m", class_names=["a", "b", "c", "d"], data_config={"mean": (0.1,), "std": (0.2,)})
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again: Any = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert torch.equal(again(images(1)), want)
    assert again.form == form
    assert again.pretrained_cfg["label_names"] == ["a", "b", "c", "d"]
    assert list(again.pretrained_cfg["mean"]) == [0.1]


def test_card_and_configuration_state_the_pictures_the_model_takes(tmp_path):
    wanted = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0, "crop_mode": "squash"}
    folder = save_model(unusual(num_classes=4), tmp_path / "replknet-flowers", data_config=wanted)
    assert "- input: 3x64x64, mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)\n" in (folder / "README.md").read_text()
    stated = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in stated.items() if key in wanted} == wanted
    assert "tag" not in stated, "the tag is that of the architecture's own weights"
    image = open_model(f"local-dir:{folder}").image
    assert (image.size, image.mean, image.resolved_crop()) == (64, (0.5,) * 3, ("squash", 1.0))


def test_everyone_may_read_the_folder(tmp_path):
    folder = save_model(unusual(num_classes=4), tmp_path / "m")
    (tmp_path / "usual").write_text("")
    assert {oct(file.stat().st_mode) for file in folder.iterdir()} == {oct((tmp_path / "usual").stat().st_mode)}


@torch.no_grad()
def test_features_and_a_new_head_from_a_folder(tmp_path):
    model = unusual(num_classes=4)
    save_model(model, tmp_path / "m")
    features: Any = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, features_only=True).eval()
    assert torch.equal(features(images())[-1], model.forward_features(images()))
    other: Any = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, num_classes=9)
    assert torch.equal(other.stem[0].conv.weight, model.stem[0].conv.weight)


@torch.no_grad()
def test_a_fresh_process_loads_the_folder(tmp_path):
    model = unusual(num_classes=4)
    save_model(model, tmp_path / "m")
    torch.save(images(), tmp_path / "x.pt")
    code = "import replknet, timm, torch; m = timm.create_model('local-dir:m', pretrained=True).eval();"
    code += "torch.save(m(torch.load('x.pt')).detach(), 'y.pt')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(images()))


def test_models_of_others_are_saved_too(tmp_path):
    save_model(timm.create_model("test_resnet", num_classes=3), tmp_path / "m")
    assert timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).num_classes == 3
    card = (tmp_path / "m" / "README.md").read_text()
    assert "replknet" not in card.lower()


def test_card(tmp_path):
    card = model_card(unusual(), "flowers", {"top-1 on Flowers": 91.234}, "Flowers", "mit")
    assert card.startswith("---\ntags:")
    assert "license: mit\n" in card
    assert "| top-1 on Flowers | 91.23 |" in card
    assert "trained on: Flowers" in card
    assert "@inproceedings{ding2022replknet" in card
    assert "None were measured" in model_card(unusual(), "x", None, None, "mit")


def test_requests_that_are_refused(tmp_path):
    model = unusual(num_classes=4)
    with pytest.raises(UsageError, match="2 class names for 4 outputs"):
        save_model(model, tmp_path / "m", class_names=["a", "b"])
    with pytest.raises(UsageError, match="was not built by timm"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "m")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    with pytest.raises(UsageError, match="exists"):
        save_model(model, tmp_path / "m")
    with pytest.raises(UsageError, match=r"holds other things than a model \(precious\)"):
        save_model(model, tmp_path / "m", overwrite=True)
    (tmp_path / "m" / "precious").unlink()
    save_model(model, tmp_path / "m")
    save_model(model, tmp_path / "m", overwrite=True)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"other things than a model \(notes.txt\)"):
        save_model(model, tmp_path / "m", overwrite=True)
    (tmp_path / "m" / "notes.txt").unlink()
    with pytest.raises(UsageError, match="no model folder"):
        push_model(tmp_path, "me/m")
    with pytest.raises(UsageError, match="no name on the hub"):
        push_model(tmp_path / "m", "me/m/x")


def test_a_hub_out_of_reach_is_a_clear_failure(tmp_path):
    save_model(unusual(), tmp_path / "m")
    with pytest.raises(RunError, match="the hub did not take me/m"):
        push_model(tmp_path / "m", "me/m")


def test_a_network_that_is_down_is_a_clear_failure(tmp_path):
    save_model(unusual(), tmp_path / "m")
    code = "from replknet.export.hub import push_model; push_model('m', 'me/m')"
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    message = done.stderr.strip().splitlines()[-1]
    assert "RunError: the hub at http://127.0.0.1:9 could not be reached for me/m: " in message


def test_push_sends_the_whole_folder(tmp_path, monkeypatch):
    calls: list = []

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo, **kwargs):
            calls.append(("create", repo, kwargs))
            return type("Url", (str,), {"repo_id": repo})(f"https://hub/{repo}")

        def upload_folder(self, **kwargs):
            calls.append(("upload", kwargs["repo_id"], sorted(p.name for p in kwargs["folder_path"].iterdir())))

    monkeypatch.setattr("replknet.export.hub.HfApi", Api)
    save_model(unusual(), tmp_path / "m")
    assert push_model(tmp_path / "m", "me/m", private=True) == "https://hub/me/m"
    assert calls == [
        ("create", "me/m", {"private": True, "exist_ok": True}),
        ("upload", "me/m", ["README.md", "config.json", "model.safetensors"]),
    ]


@pytest.mark.slow
@torch.no_grad()
def test_one_process_pushes_and_others_load(tmp_path, hub):
    """Through huggingface_hub's own client and a server on this machine."""
    model = unusual(num_classes=4)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    torch.save(images(), tmp_path / "x.pt")
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret"}
    env = os.environ | settings | {"HF_HOME": str(tmp_path / "cache")}

    def run(*command: str, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    weights = ("--model", "replknet_nano", "--weights", "w.pth", "--results", "{top-1: 91.5}")
    pushed = run("-m", "replknet", "push", "me/flowers", *weights)
    assert pushed.stdout.strip() == f"{hub.url}/me/flowers"
    assert hub.authorisations == {"Bearer hf_secret"}
    assert set(hub.repositories["me/flowers"]) == {"README.md", "config.json", "model.safetensors"}
    assert b"| top-1 | 91.50 |" in hub.repositories["me/flowers"]["README.md"]
    code = "import replknet, timm, torch; m = timm.create_model('hf-hub:me/flowers', pretrained=True).eval();"
    run("-c", code + "torch.save(m(torch.load('x.pt')).detach(), 'y.pt')")
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(images()))
    missing = run("-m", "replknet", "eval", "hf-hub:me/nothing", "--data", "digits", code=1)
    assert "Repository Not Found" in missing.stderr


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(unusual(num_classes=4).state_dict(), "w.pth")
    arguments = ["push", "me/flowers", "--model", "replknet_nano", "--weights", "w.pth", "--dry-run"]
    assert main([*arguments, "--results", "{top-1: 91.5}", "--merged", "true"]) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    config = json.loads((tmp_path / "flowers" / "config.json").read_text())
    assert config["architecture"] == "replknet_nano"
    assert config["num_classes"] == 4
    assert "| top-1 | 91.50 |" in (tmp_path / "flowers" / "README.md").read_text()
    assert main(arguments) == 2
    assert main(["push", "me/flowers", "--model", "replknet_nano", "--dry-run"]) == 2
    assert main(["push", "not a name", "--model", "replknet_nano", "--weights", "w.pth"]) == 2
