"""Training arithmetic against a loop and an AdamW written out by hand, in float64."""

import copy
import math

import lightning
import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from replknet.data import IGNORE
from replknet.layers import PointwiseConv2d
from replknet.tasks import classification
from replknet.tasks.classification import Classification, ModelDescription, OptimizationConfig, count_correct
from replknet.tasks.mixing import MixingConfig
from replknet.tasks.schedules import WarmupCosine
from replknet.tasks.trainer import quiet

CLASSES = 4


class Net(nn.Module):
    """Three layers for layer decay, batch norm for buffers; no bias under a norm, whose gradient is rounding noise."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.GELU())
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.GELU())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))

    def group_matcher(self, coarse=False):
        return lambda name: ("stem", "body", "head").index(name.split(".")[0])


def data(batches=8, size=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batches * size, 3, 9, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (batches * size,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def trainer_for(folder, **options):
    defaults = {"precision": "64-true", "num_sanity_val_steps": 0, "logger": False, "enable_checkpointing": False}
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | options),
    )


def run(tmp_path, module, loader, **options):
    trainer = trainer_for(tmp_path, **options)
    with quiet():
        trainer.fit(module, loader)
    return trainer


def make(model, *, total, warmup=2, layer_decay=0.6, ema_decay=0.9, wd_end=0.3, **options):
    optimization = OptimizationConfig(
        lr=WarmupCosine(0.05, 0.001, total, warmup),
        weight_decay=WarmupCosine(0.1, wd_end, total),
        layer_decay=layer_decay,
        betas=(0.9, 0.95),
        eps=1e-7,
    )
    description = ModelDescription(model="net", num_classes=CLASSES)
    mixing = MixingConfig(label_smoothing=0.1)
    return Classification(model, description, optimization, mixing, ema_decay=ema_decay, **options)


def by_hand(model, loader, epochs, accumulate, clip):
    """The same training with every formula written out; returns the model and the averaged state."""
    total = epochs * len(loader) // accumulate
    average = {key: value.clone() for key, value in model.state_dict().items()}
    moments = {key: (torch.zeros_like(p), torch.zeros_like(p)) for key, p in model.named_parameters()}
    step = 0
    model.train()
    for _ in range(epochs):
        for index, (images, labels) in enumerate(loader):
            smoothed = torch.full((len(labels), CLASSES), 0.1 / CLASSES, dtype=torch.float64)
            smoothed[torch.arange(len(labels)), labels] += 0.9
            (cross_entropy(model(images), smoothed) / accumulate).backward()
            if (index + 1) % accumulate:
                continue
            gradients = {key: p.grad for key, p in model.named_parameters()}
            if clip:
                norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
                gradients = {key: g * min(1.0, clip / (norm + 1e-6)) for key, g in gradients.items()}
            lr = 0.05 * step if step < 2 else 0.001 + 0.0245 * (1 + math.cos(math.pi * (step - 2) / (total - 2)))
            decay = 0.3 - 0.1 * (1 + math.cos(math.pi * step / total))
            for key, p in model.named_parameters():
                rate = lr * 0.6 ** {"stem": 2, "body": 1, "head": 0}[key.split(".")[0]]
                first, second = moments[key]
                g = gradients[key]
                with torch.no_grad():
                    if p.ndim > 1:
                        p *= 1 - rate * decay
                    first += 0.1 * (g - first)
                    second += 0.05 * (g**2 - second)
                    p -= rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-7)
                p.grad = None
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    average[key] = 0.9 * average[key] + 0.1 * value
            step += 1
    return model, average


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_equals_a_training_written_out_by_hand(tmp_path, accumulate, clip):
    torch.manual_seed(0)
    model = Net().double()
    expected, average = by_hand(copy.deepcopy(model), data(), 3, accumulate, clip)
    module = make(model, total=3 * 8 // accumulate)
    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer = run(tmp_path, module, data(), **options)
    assert trainer.global_step == 24 // accumulate
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[key], value, atol=1e-11, rtol=1e-9, msg=key)
    for key, value in module.ema.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, average[key], atol=1e-11, rtol=1e-9, msg=key)


def test_averaged_weights_start_as_the_model_and_are_a_copy():
    model = Net()
    module = make(model, total=8)
    for key, value in model.state_dict().items():
        assert torch.equal(module.ema.state_dict()[key], value)
    with torch.no_grad():
        model.head.weight += 1
    assert not torch.equal(module.ema.head.weight, model.head.weight)
    assert not any(p.requires_grad for p in module.ema.parameters())
    assert all(key.startswith("model.") for key in module.state_dict())
    assert make(model, total=8, ema_decay=0).ema is None


class Addresses(lightning.Callback):
    """Where the gradients of each micro-batch will be added."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append([p.grad if p.grad is None else p.grad.data_ptr() for p in pl_module.parameters()])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_that_add_up_beside_cuda_graphs_have_memory_of_their_own(tmp_path, monkeypatch, accumulate):
    """Without a GPU: the training that goes with CUDA graphs, around a network that is not compiled."""
    calls = []
    monkeypatch.setattr(classification, "takes_cuda_graphs", lambda speed, strategy: speed == "compiled")
    monkeypatch.setattr(classification, "optimize", lambda *args, **options: calls.append(options))
    torch.manual_seed(0)
    model = Net().double()
    expected, _ = by_hand(copy.deepcopy(model), data(), 3, accumulate, 0.3)
    module, addresses = make(model, total=3 * 8 // accumulate, speed="compiled"), Addresses()
    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.3}
    run(tmp_path, module, data(), callbacks=[addresses], **options)
    assert calls == [{"compile": True, "cuda_graph": True}]
    if accumulate > 1:
        assert addresses.seen == [[p.grad.data_ptr() for p in model.parameters()]] * 24
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[key], value, atol=1e-11, rtol=1e-9, msg=key)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_gradients_are_clipped_in_every_precision(tmp_path, precision):
    torch.manual_seed(0)
    norms = []

    class Watch(lightning.Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_post_hook(
                lambda optimizer, args, kwargs: norms.append(total(optimizer))
            )

    def total(optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        return float(torch.stack([g.float().norm() for g in gradients]).norm())

    loader = data() if precision == "64-true" else [(x.float(), y) for x, y in data()]
    module = make(Net(), total=8)
    trainer = trainer_for(tmp_path, precision=precision, max_epochs=1, gradient_clip_val=0.01, callbacks=[Watch()])
    with quiet():
        trainer.fit(module, DataLoader(loader, batch_size=None) if isinstance(loader, list) else loader)
    assert len(norms) == 8
    assert max(norms) == pytest.approx(0.01, rel=1e-2)


def test_the_loss_is_computed_in_float32_under_autocast(tmp_path):
    loader = DataLoader([(x.float(), y) for x, y in data()], batch_size=None)
    module = make(Net(), total=8)
    run(tmp_path, module, loader, precision="bf16-mixed", max_epochs=1)
    assert module.last_loss.dtype == torch.float32


def test_frozen_modules_keep_weights_and_statistics(tmp_path):
    torch.manual_seed(0)
    model = Net().double()
    before = copy.deepcopy(model.state_dict())
    model.stem.requires_grad_(False)
    run(tmp_path, make(model, total=8, frozen=(model.stem,)), data(), max_epochs=1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("stem."), key


def test_validation_scores_raw_and_averaged_weights_on_every_image_once(tmp_path):
    torch.manual_seed(0)
    model = Net().double()
    module = make(model, total=8)
    loader = data()
    padded = torch.cat([loader.dataset.tensors[1][:45], torch.full((3,), IGNORE)])
    val = DataLoader(TensorDataset(loader.dataset.tensors[0], padded), batch_size=7)
    trainer = trainer_for(tmp_path, max_epochs=1)
    with quiet():
        trainer.fit(module, loader, val)
    for name, network in (("val", model), ("val_ema", module.ema)):
        logits = network.eval().requires_grad_(False)(loader.dataset.tensors[0][:45])
        labels = padded[:45]
        assert module.scores[f"{name}/top1"] == pytest.approx(float(100 * (logits.argmax(1) == labels).double().mean()))
        assert module.scores[f"{name}/loss"] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-6)
        assert module.scores[f"{name}/top5"] == 100.0


@pytest.mark.parametrize("classes", [2, 5, 6, 50])
def test_counts_against_sorting(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(40, classes, generator=generator)
    labels = torch.randint(classes, (40,), generator=generator)
    labels[::7] = IGNORE
    kept = labels != IGNORE
    order = logits.argsort(1, descending=True)
    top1 = sum(int(order[i, 0] == labels[i]) for i in range(40) if kept[i])
    top5 = sum(int(labels[i] in order[i, :5]) for i in range(40) if kept[i])
    got = count_correct(logits, labels)
    assert got[[0, 1, 3]].tolist() == [top1, top5, int(kept.sum())]
    assert float(got[2]) == pytest.approx(float(cross_entropy(logits[kept], labels[kept], reduction="sum")), rel=1e-6)


def test_description_is_made_of_plain_values(tmp_path):
    description = ModelDescription(
        model="net", num_classes=2, class_names=["a", "b"], mean=(0.5,), std=(0.5,), in_chans=1, model_kwargs={"k": [1]}
    )
    torch.save(description.as_dict(), tmp_path / "d.pt")
    assert torch.load(tmp_path / "d.pt", weights_only=True) == {
        "model": "net",
        "num_classes": 2,
        "class_names": ["a", "b"],
        "image_size": 224,
        "mean": [0.5],
        "std": [0.5],
        "in_chans": 1,
        "model_kwargs": {"k": [1]},
    }


class Counting(nn.Module):
    """A network that notes which calls reach Python: compiled ones do not."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, []

    def forward(self, x):
        if not torch.compiler.is_compiling():
            self.calls.append((self.training, len(x)))
        return self.network(x)


@pytest.mark.parametrize("speed", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_an_optimised_network_learns_the_same(tmp_path, speed):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = make(Counting(timm.create_model("replknet_nano", num_classes=CLASSES)).double(), total=8)
    fast = make(copy.deepcopy(plain.model), total=8, speed=speed)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(22, 3, 32, 32, generator=generator, dtype=torch.float64)
    loader = DataLoader(TensorDataset(images, torch.randint(CLASSES, (22,), generator=generator)), batch_size=6)
    for module in (plain, fast):
        trainer = trainer_for(tmp_path, max_epochs=2, limit_train_batches=3)
        with quiet():
            trainer.fit(module, loader, loader)
    assert plain.model.calls == 2 * ([(True, 6)] * 3 + [(False, 6)] * 3 + [(False, 4)])
    # Validation runs uncompiled.
    assert fast.model.calls == [call for call in plain.model.calls if speed == "eager" or not call[0]]
    assert fast.scores == pytest.approx(plain.scores, rel=1e-6)
    for one, other in ((plain.model, fast.model), (plain.ema, fast.ema)):
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            torch.testing.assert_close(states[1][key], value, rtol=1e-6, atol=1e-8, msg=key)
    pointwise = [network.model.network.stages[0].blocks[0].pw1.conv for network in (plain, fast)]
    assert [type(conv) for conv in pointwise] == [nn.Conv2d, PointwiseConv2d]
