"""`train` on real digits: what a run leaves behind, exact resumption, fine-tuning, and clear refusals."""

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning
import pytest
import torch
import yaml

from replknet._errors import RunError, UsageError
from replknet.cli import main
from replknet.data import NO_AUGMENTATION
from replknet.tasks import classification
from replknet.tasks.stopping import RunStoppedError
from replknet.tasks.train import TrainConfig, _warn_of_slow_average, train
from replknet.tasks.trainer import Hardware


class SignalAt(lightning.Callback):
    """Sends this process a signal while step `step` runs."""

    def __init__(self, step: int, signum: int = signal.SIGUSR1):
        self.step, self.signum = step, signum

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.signum)


def losses(folder) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]


def scores(folder) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "val/top1" in record]


def state(path) -> dict:
    return torch.load(path, weights_only=True)


def assert_equal_to_the_last_bit(one, other, where=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_to_the_last_bit(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal_to_the_last_bit(a, b, f"{where}/{index}")
    else:
        assert one == other, where


WHAT_COUNTS = ("state_dict", "model_ema", "optimizer_states", "global_step", "run")


def assert_same_run(folder, reference):
    assert losses(folder) == losses(reference)
    assert scores(folder) == scores(reference)
    for name in ("last.ckpt", "best.ckpt"):
        one, other = state(folder / "checkpoints" / name), state(reference / "checkpoints" / name)
        for key in WHAT_COUNTS:
            assert_equal_to_the_last_bit(one[key], other[key], f"{name}/{key}")


@pytest.fixture(scope="module")
def reference(small_config, digits_folder, tmp_path_factory):
    """A run of 24 steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    return train(small_config(digits_folder, folder))


class SeesCheckpointAfter(lightning.Callback):
    """Notes which position last.ckpt holds when step `step` is done."""

    def __init__(self, step: int):
        self.step, self.position = step, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        path = Path(trainer.default_root_dir) / "checkpoints/last.ckpt"
        if trainer.global_step == self.step and path.exists():
            self.position = state(path)["run"]["position"]


def test_sigterm_in_a_slurm_job_saves_and_goes_on(small_config, digits_folder, reference, tmp_path, monkeypatch):
    """It announces the end of a preempted job, which SLURM queues again unless it ends by itself before."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    after = SeesCheckpointAfter(5)
    train(small_config(digits_folder, tmp_path), callbacks=[SignalAt(5, signal.SIGTERM), after])
    assert after.position == {"epoch": 0, "batch": 5, "step": 5}
    assert_same_run(tmp_path, reference.folder)


def test_weights_and_biases_gets_one_run_that_goes_on(small_config, digits_folder, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"epochs": 2, "wandb": "digits", "resume": "auto"}
    with pytest.raises(RunStoppedError):
        train(small_config(digits_folder, tmp_path / "run", **options), callbacks=[SignalAt(3)])
    wandb.finish()
    sent: list[dict] = []
    log = wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", lambda run, data, *a, **k: (sent.append(data), log(run, data)))
    train(small_config(digits_folder, tmp_path / "run", **options))
    assert wandb.run.config["ema_decay"] == 0.9
    assert wandb.run.config["hardware"]["precision"] == "fp32"
    wandb.finish()
    steps = [record["trainer/global_step"] for record in sent if "train/loss" in record]
    assert steps == list(range(4, 17))
    assert [record["trainer/global_step"] for record in sent if "val_ema/top1" in record] == [8, 16]
    runs = [path.name.rpartition("-")[2] for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len(set(runs)) == 1


def test_the_last_epoch_is_scored_whatever_validate_every_is(small_config, digits_folder, tmp_path):
    result = train(small_config(digits_folder, tmp_path / "run", validate_every=2))
    assert [record["step"] for record in scores(tmp_path / "run")] == [16, 24]
    assert result.final == {key: value for key, value in scores(tmp_path / "run")[-1].items() if key[:3] == "val"}


def test_a_run_leaves_everything_behind(reference, digits_folder):
    folder = reference.folder
    assert reference.steps == 24
    assert [step for step, _ in losses(folder)] == list(range(1, 25))
    assert len(scores(folder)) == 3
    assert reference.final == {k: v for k, v in scores(folder)[-1].items() if k.startswith("val")}
    assert set(reference.final) == {f"{a}/{b}" for a in ("val", "val_ema") for b in ("top1", "top5", "loss")}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["model"], config["global_batch"], config["seed"]) == ("test_resnet", 8, 0)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["batch"]["steps_per_epoch"] == 8
    assert len(environment["git"]["commit"]) == 40
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 24 + 3
    assert rows[0].startswith("step,epoch,train/loss,train/lr,")


def test_the_checkpoint_says_what_it_holds(reference):
    checkpoint = state(reference.last)
    description = checkpoint["replknet"]
    assert description["model"] == "test_resnet"
    assert description["class_names"] == [str(digit) for digit in range(10)]
    assert (description["image_size"], description["in_chans"], description["num_classes"]) == (16, 3, 10)
    assert set(checkpoint["model_ema"]) == {key.removeprefix("model.") for key in checkpoint["state_dict"]}
    assert checkpoint["run"]["position"] == {"epoch": 3, "batch": 0, "step": 24}


def test_the_same_configuration_gives_the_same_run(small_config, reference, digits_folder, tmp_path):
    train(small_config(digits_folder, tmp_path))
    assert_same_run(tmp_path, reference.folder)


# 3: first epoch; 8 and 16: last step of an epoch; 9: first of the second; 23: last but one.
@pytest.mark.parametrize("step", [3, 8, 9, 23])
def test_a_stopped_run_goes_on_to_the_last_bit(small_config, reference, digits_folder, tmp_path, step):
    config = small_config(digits_folder, tmp_path, resume="auto")
    with pytest.raises(RunStoppedError, match=f"SIGUSR1 after step {step}"):
        train(config, callbacks=[SignalAt(step)])
    assert state(tmp_path / "checkpoints/last.ckpt")["global_step"] == step
    result = train(config)
    assert result.steps == 24
    assert_same_run(tmp_path, reference.folder)


def test_a_run_stopped_again_and_again_with_accumulation_and_workers(small_config, digits_folder, tmp_path):
    options = {"max_batch_per_device": 2, "log_every": 3, "epochs": 2}
    train(small_config(digits_folder, tmp_path / "whole", **options))
    config = small_config(digits_folder, tmp_path / "parts", resume="auto", **options)
    config = replace(config, loader=replace(config.loader, workers=1))
    for step in (2, 7, 13):
        with pytest.raises(RunStoppedError):
            train(config, callbacks=[SignalAt(step, signal.SIGTERM)])
    train(config)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_signal_handlers_are_put_back(small_config, digits_folder, tmp_path):
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    with pytest.raises(RunStoppedError):
        train(small_config(digits_folder, tmp_path), callbacks=[SignalAt(2, signal.SIGINT)])
    assert {name: signal.getsignal(name) for name in before} == before


def test_auto_looks_into_its_own_folder_only(small_config, reference, digits_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(reference.folder / "checkpoints")
    result = train(small_config(digits_folder, tmp_path / "new", resume="auto", epochs=2, validate=False))
    assert result.steps == 16
    assert losses(tmp_path / "new")[0][0] == 1
    assert result.best is None
    assert result.final == {}


def test_a_checkpoint_elsewhere_and_a_run_folder_can_be_resumed(small_config, reference, digits_folder, tmp_path):
    with pytest.raises(RunStoppedError):
        train(small_config(digits_folder, tmp_path / "first"), callbacks=[SignalAt(11)])
    for name in ("first", "first/checkpoints/last.ckpt"):
        folder = tmp_path / f"from-{name.replace('/', '-')}"
        train(small_config(digits_folder, folder, resume=str(tmp_path / name)))
        assert losses(folder) == losses(reference.folder)[11:]
        assert_equal_to_the_last_bit(
            state(folder / "checkpoints/last.ckpt")["state_dict"], state(reference.last)["state_dict"]
        )


def test_a_finished_run_has_nothing_left_to_do(small_config, digits_folder, tmp_path):
    config = small_config(digits_folder, tmp_path, epochs=2, resume="auto")
    first = train(config)
    again = train(config)
    assert again.steps == first.steps == 16
    assert again.metrics == first.metrics
    assert again.final == first.final


@pytest.mark.parametrize("speed", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_an_optimised_run_goes_on_to_the_last_bit(small_config, reference, digits_folder, tmp_path, speed):
    whole = train(small_config(digits_folder, tmp_path / "whole", speed=speed))
    assert state(whole.last)["state_dict"].keys() == state(reference.last)["state_dict"].keys()
    assert losses(whole.folder)[0][1] == pytest.approx(losses(reference.folder)[0][1], rel=1e-4)
    parts = small_config(digits_folder, tmp_path / "parts", speed=speed, resume="auto")
    with pytest.raises(RunStoppedError):
        train(parts, callbacks=[SignalAt(9)])
    train(parts)
    assert_same_run(tmp_path / "parts", whole.folder)
    # What a run computes does not depend on it: another speed may go on.
    train(replace(parts, resume=str(whole.folder), output=str(tmp_path / "plain"), speed="plain"))


def test_the_automatic_speed_is_said_and_recorded(small_config, digits_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "replknet.tasks.train")
    hardware = Hardware(accelerator="cpu")
    train(small_config(digits_folder, tmp_path, epochs=1, warmup_steps=2, hardware=hardware))
    (said,) = [record.getMessage() for record in caplog.records if "speed auto is" in record.getMessage()]
    recorded = json.loads((tmp_path / "environment.json").read_text())["speed"]
    assert said == f"speed auto is {recorded['name']} here: {recorded['reason']}"
    assert recorded["name"] == "eager"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["speed"] == "auto"
    caplog.clear()
    train(small_config(digits_folder, tmp_path, epochs=1, warmup_steps=2, speed="plain", overwrite=True))
    assert "speed auto" not in caplog.text


def test_the_command_shows_what_the_automatic_speed_came_to(digits_folder, tmp_path):
    words = ["train", "test_resnet", "--data", str(digits_folder), "--output", str(tmp_path / "run"), "--epochs", "1"]
    words += ["--global_batch", "32", "--image_size", "16", "--loader.workers", "0", "--progress", "false"]
    command = [sys.executable, "-m", "replknet", *words, "--hardware.accelerator", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.count("INFO: speed auto is eager here: ") == 1


class Gradients(lightning.Callback):
    """Those of every optimizer step, as one vector each."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.model.parameters()]).double().cpu())


def compiles_for_cuda(test):
    """Lets torch say that it captures an empty graph, to set up memory for others, and that float32 stays float32."""
    for message in ("The CUDA Graph is empty", "TensorFloat32 tensor cores"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


ON_ONE_GPU = {"model": "replknet_nano", "image_size": 64, "hardware": Hardware(accelerator="gpu", devices=1)}


@pytest.mark.gpu
@pytest.mark.slow
@compiles_for_cuda
def test_a_run_with_cuda_graphs_goes_on_as_if_nobody_interrupted_it(small_config, digits_folder, tmp_path, cuda):
    torch._dynamo.reset()
    options = {**ON_ONE_GPU, "speed": "compiled", "max_batch_per_device": 4, "clip_grad": 1.0}
    whole = train(small_config(digits_folder, tmp_path / "whole", **options))
    torch._dynamo.reset()
    parts = small_config(digits_folder, tmp_path / "parts", resume="auto", **options)
    with pytest.raises(RunStoppedError):
        train(parts, callbacks=[SignalAt(9)])
    torch._dynamo.reset()
    train(parts)
    assert losses(tmp_path / "parts") == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in losses(whole.folder)]
    got, want = (state(run / "checkpoints/last.ckpt") for run in (tmp_path / "parts", whole.folder))
    for name in ("state_dict", "model_ema"):
        for key, value in want[name].items():
            torch.testing.assert_close(got[name][key], value, rtol=1e-3, atol=1e-4, msg=f"{name}/{key}")


@pytest.mark.gpu
@pytest.mark.slow
@compiles_for_cuda
@pytest.mark.parametrize(("precision", "largest"), [("fp32", 2), ("fp16", 2), ("bf16", 8)])
def test_cuda_graphs_change_no_gradient(small_config, digits_folder, tmp_path, cuda, monkeypatch, precision, largest):
    """Of steps of four micro-batches, or one; at learning rate 0, so that no difference grows."""
    still = {"epochs": 1, "warmup_steps": 0, "lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0}
    hardware = replace(ON_ONE_GPU["hardware"], precision=precision)
    options = {**ON_ONE_GPU, **still, "speed": "compiled", "max_batch_per_device": largest, "hardware": hardware}
    with_graphs, without = Gradients(), Gradients()
    torch._dynamo.reset()
    train(small_config(digits_folder, tmp_path / "with", **options), callbacks=[with_graphs])
    torch._dynamo.reset()
    monkeypatch.setattr(classification, "takes_cuda_graphs", lambda speed, strategy: False)
    train(small_config(digits_folder, tmp_path / "without", **options), callbacks=[without])
    pairs = list(zip(with_graphs.seen, without.seen, strict=True))
    # Steps whose loss was scaled beyond float16 are skipped by both.
    finite = [(got, want) for got, want in pairs if torch.isfinite(want).all()]
    assert len(finite) >= 4
    for got, want in finite:
        assert float((got - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 4}, "epochs 3 -> 4"),
        ({"model": "test_vit", "drop_path": 0.1}, "model 'test_resnet' -> 'test_vit'"),
        ({"lr": 1e-3, "seed": 1}, "lr 0.002 -> 0.001, seed 0 -> 1"),
        ({"hardware": {"precision": "bf16"}}, "precision 'fp32' -> 'bf16'"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused(small_config, reference, digits_folder, tmp_path, change, words):
    if "hardware" in change:
        change = {"hardware": Hardware(**change["hardware"])}
    with pytest.raises(RunError, match="belongs to another run") as refused:
        train(small_config(digits_folder, tmp_path / "new", resume=str(reference.last), **change))
    assert words in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_damaged_and_foreign_checkpoints_are_refused(small_config, reference, digits_folder, tmp_path):
    whole = reference.last.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    for name in ("half", "text", "weights"):
        with pytest.raises(RunError, match="damaged or no checkpoint"):
            train(small_config(digits_folder, tmp_path / "new", resume=str(tmp_path / f"{name}.ckpt")))
    with pytest.raises(UsageError, match="no such checkpoint"):
        train(small_config(digits_folder, tmp_path / "new", resume=str(tmp_path / "none.ckpt")))
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(small_config, digits_folder, tmp_path):
    class Poison(lightning.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 12:
                next(pl_module.parameters()).grad.fill_(float("nan"))

    for log_every in (1, 5, 100):
        folder = tmp_path / str(log_every)
        config = small_config(digits_folder, folder, log_every=log_every, checkpoint_every=1)
        with pytest.raises(RunError, match=r"not finite|became nan"):
            train(config, callbacks=[Poison()])
        checkpoint = state(folder / "checkpoints/last.ckpt")
        assert checkpoint["global_step"] == 12
        assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": ""}, "no model"),
        ({"data": ""}, "no data"),
        ({"model": "replknet_31bb"}, "replknet_31b"),
        ({"num_classes": 12}, "12 classes were asked for"),
        ({"global_batch": 100}, "fewer than one global batch"),
        ({"global_batch": 7}, "even number"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": -1.0}, "lr must not be negative"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"speed": "fast"}, "auto, plain, eager, compiled"),
        ({"speed": "eager", "hardware": Hardware(strategy="fsdp")}, "speed must be plain"),
        ({"warmup_epochs": 3}, "warm-up of 24 steps"),
        ({"freeze": ["stem"]}, "no module is named 'stem'"),
        ({"model_kwargs": {"depth": 3}}, "does not take"),
        ({"weights": "/nowhere.pth"}, "/nowhere.pth"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"wandb": "project"}, "pip install wandb"),
        ({"hardware": Hardware(accelerator="gpu")}, "cannot run"),
        ({"hardware": Hardware(strategy="fsdp")}, "set ema_decay 0"),
        ({"hardware": Hardware(precision="fp16", accelerator="cpu")}, "fp16"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_met_leaves_nothing_behind(small_config, digits_folder, tmp_path, options, words):
    if options.get("wandb") and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    if "gpu" in str(options) and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UsageError) as refused:
        train(small_config(digits_folder, tmp_path / "run", **options))
    assert words in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("epochs", "steps"), [(1, 2), (3, 6), (4, 8), (300, 8)])
def test_a_short_training_warms_up_for_a_quarter(epochs, steps):
    assert TrainConfig(epochs=epochs).optimization(8).lr.warmup_steps == steps
    assert TrainConfig(epochs=epochs, warmup_epochs=0.5).optimization(8).lr.warmup_steps == 4


def test_compiling_without_a_compiler_is_refused_at_once(small_config, digits_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"C\+\+ compiler on a CPU, .*: install one"):
        train(small_config(digits_folder, tmp_path / "run", speed="compiled", hardware=Hardware(accelerator="cpu")))
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_named(small_config, digits_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write there"):
        train(small_config(digits_folder, tmp_path / "file" / "run"))


def test_fine_tuning_starts_a_new_head_only_for_other_classes(small_config, reference, digits_folder, tmp_path, caplog):
    weights = str(reference.last)
    frozen = {"weights": weights, "epochs": 2, "lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0, "ema_decay": 0.0}
    same = train(small_config(digits_folder, tmp_path / "same", **frozen))
    assert "head starts anew" not in caplog.text
    old, new = state(reference.last)["model_ema"], state(same.last)["state_dict"]
    assert all(
        torch.equal(new[f"model.{key}"], old[key]) for key in old if key.endswith("weight") and old[key].ndim > 1
    )

    two = tmp_path / "two"
    for split in ("train", "val"):
        for label in "01":
            shutil.copytree(digits_folder / split / label, two / split / label)
    options = {"global_batch": 4, "image_size": 24, "in_chans": 1, "mean": [0.5], "std": [0.5]}
    other = train(small_config(two, tmp_path / "other", **frozen | options))
    assert "for 10 classes where the data have 2; the head starts anew" in caplog.text
    assert "first convolution was adapted to 1" in caplog.text
    new = state(other.last)["state_dict"]
    assert new["model.fc.weight"].shape[0] == 2
    first = next(key for key in old if key.startswith("conv1"))
    torch.testing.assert_close(new[f"model.{first}"], old[first].sum(1, keepdim=True))
    assert torch.equal(new["model.layer1.0.conv1.weight"], old["layer1.0.conv1.weight"])
    assert state(other.last)["replknet"]["in_chans"] == 1


def test_frozen_stages_stay(small_config, reference, digits_folder, tmp_path):
    options = {
        "weights": str(reference.last),
        "use_ema_weights": False,
        "freeze": ["conv1", "bn1", "layer1"],
        "epochs": 2,
    }
    tuned = train(small_config(digits_folder, tmp_path, **options))
    old, new = state(reference.last)["state_dict"], state(tuned.last)["state_dict"]
    for key, value in new.items():
        kept = key.startswith(("model.conv1", "model.bn1", "model.layer1"))
        assert torch.equal(value, old[key]) == kept, key


def test_weights_of_another_architecture_are_refused(small_config, reference, digits_folder, tmp_path):
    with pytest.raises(RunError, match="another architecture"):
        train(small_config(digits_folder, tmp_path / "run", model="replknet_nano", weights=str(reference.last)))
    assert not (tmp_path / "run").exists()


def test_bf16_on_a_cpu_learns(small_config, digits_folder, tmp_path):
    # Not 16 pixels: for kernels larger than the map, oneDNN's bfloat16 weight gradient holds garbage in unused taps.
    options = {"hardware": Hardware(precision="bf16"), "mixup": 0.0, "cutmix": 0.0, "drop_path": None, "epochs": 6}
    options |= {"image_size": 64, "augmentation": NO_AUGMENTATION}
    curve = [loss for _, loss in losses(train(small_config(digits_folder, tmp_path, **options)).folder)]
    assert sum(curve[-8:]) < 0.8 * sum(curve[:8])


def test_activation_checkpointing_changes_memory_and_nothing_else(small_config, digits_folder, tmp_path):
    network = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1], "kernel_sizes": [5, 5, 3, 3]}
    options = {"model": "replknet_nano", "model_kwargs": network, "epochs": 1, "warmup_steps": 2}
    runs = [
        train(small_config(digits_folder, tmp_path / str(on), activation_checkpointing=on, **options))
        for on in (False, True)
    ]
    one, other = (state(run.last)["state_dict"] for run in runs)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert all(int(value) == 8 for key, value in other.items() if key.endswith("num_batches_tracked"))
    assert losses(runs[0].folder) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(runs[1].folder)]


def test_the_command_line_trains_and_says_where(digits_folder, tmp_path, capsys):
    options = [
        "--epochs",
        "2",
        "--global_batch",
        "16",
        "--image_size",
        "16",
        "--loader.workers",
        "0",
        "--progress",
        "false",
    ]
    arguments = ["train", "test_resnet", "--data", str(digits_folder), "--output", str(tmp_path / "run"), *options]
    assert main(arguments) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert state(last)["replknet"]["model"] == "test_resnet"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["replknet_nanoo", "--data", "digits"], 2, "replknet_nano"),
        (["test_resnet", "--data", "digits", "--lr", "fast"], 2, "lr"),
        (["test_resnet", "--data", "digits", "--learning_rate", "1"], 2, "learning_rate"),
        (["test_resnet"], 2, "no data was named"),
        (["test_resnet", "--data", "digits", "--resume", "{tmp}/broken.ckpt"], 1, "damaged"),
    ],
    ids=str,
)
def test_exit_codes(tmp_path, capsys, arguments, code, words):
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 nothing")
    given = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    assert main(["train", *given, "--output", str(tmp_path / "run"), "--progress", "false"]) == code
    errors = capsys.readouterr().err
    assert words in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_lost_by_accident(small_config, digits_folder, tmp_path):
    first = train(small_config(digits_folder, tmp_path, epochs=2))
    before = first.last.read_bytes()
    for resume in (None, str(first.last.parent.parent / "elsewhere.ckpt")):
        if resume:
            shutil.copy(first.last, resume)
        other = tmp_path / "sub"
        folder = tmp_path if resume is None else other
        if resume:
            train(small_config(digits_folder, other, epochs=2))
        with pytest.raises(UsageError, match=r"holds a run already: go on with --resume auto"):
            train(small_config(digits_folder, folder, epochs=2, resume=resume))
    assert first.last.read_bytes() == before
    again = train(small_config(digits_folder, tmp_path, epochs=1, warmup_steps=2, overwrite=True))
    assert again.steps == 8
    assert len(losses(tmp_path)) == 8
    assert state(again.best)["global_step"] == 8


def test_a_broken_image_is_counted_and_named_or_fatal(small_config, digits_folder, tmp_path, caplog):
    shutil.copytree(digits_folder, tmp_path / "data")
    victim = next((tmp_path / "data/train/3").glob("*.png"))
    victim.write_bytes(victim.read_bytes()[:60])
    config = small_config(tmp_path / "data", tmp_path / "run", epochs=2)
    with pytest.raises(RunError, match=victim.name):
        train(config)
    skipping = replace(config, loader=replace(config.loader, broken="skip"), output=str(tmp_path / "skip"))
    assert train(skipping).steps == 16
    assert "1 broken images were skipped" in caplog.text
    assert victim.name in caplog.text


@pytest.mark.parametrize(("decay", "said"), [(0.0, False), (0.5, False), (0.9999, True)])
def test_a_slow_average_is_said(caplog, decay, said):
    _warn_of_slow_average(decay, 100)
    assert ("of their start" in caplog.text) == said
    if said:
        assert "hold 99 % of their start" in caplog.text
        assert "0.955 would leave 1 %" in caplog.text
