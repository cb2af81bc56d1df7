import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from replknet.tasks.mixing import Mixing, MixingConfig
from replknet.tasks.randomness import seed_batch


def soft(labels, classes, smoothing):
    """(1 - s) on the label and s / classes everywhere."""
    return torch.eye(classes, dtype=torch.float64)[labels] * (1 - smoothing) + smoothing / classes


def cross_entropy(logits, targets):
    return float(-(targets * log_softmax(logits.double(), dim=1)).sum(1).mean())


def batch(n=6, classes=7, size=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, size, size, generator=generator)
    return images, torch.randint(classes, (n,), generator=generator), torch.randn(n, classes, generator=generator)


def draws(mixup, cutmix, size, seed):
    """The release's draws of one batch, in its order: mixed at all?, cutmix?, lambda, box centre."""
    np.random.seed(seed)
    np.random.rand()
    cut = np.random.rand() < 0.5 if mixup and cutmix else bool(cutmix)
    alpha = cutmix if cut else mixup
    lam = np.random.beta(alpha, alpha)
    if not cut:
        return None, lam
    side = int(size * np.sqrt(1 - lam))
    cy, cx = np.random.randint(0, size), np.random.randint(0, size)
    rows = np.clip([cy - side // 2, cy + side // 2 + side % 2], 0, size)
    columns = np.clip([cx - side // 2, cx + side // 2 + side % 2], 0, size)
    return (rows, columns), 1 - (rows[1] - rows[0]) * (columns[1] - columns[0]) / size**2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_images_targets_and_loss_follow_the_formula(mixup, cutmix, seed):
    images, labels, logits = batch()
    mixing = Mixing(MixingConfig(mixup=mixup, cutmix=cutmix, label_smoothing=0.1), 7)
    box, lam = draws(mixup, cutmix, 16, seed)
    expected = images.double().clone()
    partner = images.double().flip(0)
    if box is None:
        expected = lam * expected + (1 - lam) * partner
    else:
        (top, bottom), (left, right) = box
        expected[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    targets = lam * soft(labels, 7, 0.1) + (1 - lam) * soft(labels.flip(0), 7, 0.1)

    np.random.seed(seed)
    mixed, got = mixing(images, labels)
    torch.testing.assert_close(mixed.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.double(), targets, atol=1e-6, rtol=1e-6)
    assert float(mixing.loss(logits, got)) == pytest.approx(cross_entropy(logits, targets), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_label_smoothing_without_mixing(smoothing):
    images, labels, logits = batch()
    mixing = Mixing(MixingConfig(label_smoothing=smoothing), 7)
    same, targets = mixing(images, labels)
    assert same is images
    assert targets is labels
    expected = cross_entropy(logits, soft(labels, 7, smoothing))
    assert float(mixing.loss(logits, targets)) == pytest.approx(expected, rel=1e-6)


def test_the_loaders_batch_is_not_changed():
    images, labels, _ = batch()
    before = images.clone()
    np.random.seed(0)
    Mixing(MixingConfig(mixup=0.8), 7)(images, labels)
    assert torch.equal(images, before)


def test_random_state_is_a_function_of_the_position_alone():
    def numbers(*position):
        seed_batch(*position)
        return float(np.random.rand()), float(torch.rand(()))

    first = numbers(1, 0, 2, 3)
    np.random.rand(5)
    assert numbers(1, 0, 2, 3) == first
    others = {numbers(*p) for p in [(2, 0, 2, 3), (1, 1, 2, 3), (1, 0, 3, 3), (1, 0, 2, 4), (1, 0, 3, 2)]}
    assert first not in others
    assert len(others) == 5
