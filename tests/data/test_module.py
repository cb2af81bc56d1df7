"""ImageData, alone and inside a Lightning trainer."""

import io
import tarfile

import lightning
import pytest
import torch
from torch import nn

from replknet._errors import UsageError
from replknet.data import IGNORE, NO_AUGMENTATION, Augmentation, ImageData, ImageFormat, LoaderConfig
from replknet.data.streams import ShardSet, StreamSamples

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # Lightning's advice about workers and logging intervals.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # A matter between Lightning and torch.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*is deprecated:FutureWarning"),
    # The run that goes on needs no checkpoint callback.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    # True of streams in general; this one is configured for its workers.
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined:UserWarning"),
]
IMAGE = ImageFormat(size=16, mean=(0.5,), std=(0.5,))


class Recorder(lightning.LightningModule):
    """Notes what it is fed; its weights follow the pictures, so that they tell whether two runs saw the same."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3 * 16 * 16, 10)
        self.seen: list[tuple[int, int, torch.Tensor]] = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.current_epoch, batch_idx, images.clone()))
        return nn.functional.cross_entropy(self.net(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        assert (batch[1] != IGNORE).all()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def digits(**options) -> ImageData:
    loader = options.pop("loader", LoaderConfig(workers=0))
    return ImageData("digits", image=IMAGE, batch_size=128, seed=3, loader=loader, **options)


def trainer(tmp_path, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        **({"enable_checkpointing": False} | options),
    )


def fit(tmp_path, data, ckpt_path=None, **options) -> Recorder:
    torch.manual_seed(0)
    model = Recorder()
    trainer(tmp_path, **options).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


# Within an epoch, at its end, and within a later one.
@pytest.mark.parametrize(
    ("workers", "normalize_on", "stop"),
    [
        (0, "device", 5),
        pytest.param(2, "worker", 11, marks=pytest.mark.slow),
        pytest.param(2, "worker", 15, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_sees_the_same_batches(tmp_path, workers, normalize_on, stop):
    def data():
        config = LoaderConfig(workers=workers, normalize_on=normalize_on, prefetch=2)
        return digits(loader=config, augmentation=Augmentation(hflip=0, crop="shift", erasing=0.5))

    whole = fit(tmp_path, data(), max_epochs=2)
    assert len(whole.seen) == 22
    save = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="cut", every_n_train_steps=stop, save_on_train_epoch_end=False
    )
    fit(tmp_path, data(), max_steps=stop, callbacks=[save], enable_checkpointing=True, limit_val_batches=0)
    rest = fit(tmp_path, data(), ckpt_path=tmp_path / "cut.ckpt", max_epochs=2)
    assert len(rest.seen) == 22 - stop
    for (epoch, number, images), (wanted_epoch, wanted_number, wanted) in zip(
        rest.seen, whole.seen[stop:], strict=True
    ):
        assert (epoch, number) == (wanted_epoch, wanted_number)
        assert torch.equal(images, wanted)
    assert torch.equal(rest.net.weight, whole.net.weight)


def test_attributes_for_a_model():
    data = digits()
    assert (data.num_classes, data.image_size, data.in_chans) == (10, 16, 3)
    assert data.class_names == [str(digit) for digit in range(10)]
    assert (data.num_train, data.num_val, data.train_batches(), data.train_batches(2)) == (1437, 360, 11, 5)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (128, 3, 16, 16)
    assert labels.dtype == torch.int64
    assert ImageData("digits", image=IMAGE, validate=False).val_dataloader() == []


def test_validation_reads_every_picture_once():
    labels = torch.cat([labels for _, labels in digits().val_dataloader()])
    assert labels.tolist() == digits().val_set.labels.tolist()


def test_channels_last_and_uint8_batches():
    data = digits(loader=LoaderConfig(workers=0, channels_last=True, normalize_on="device"))
    images, _ = next(iter(data.train_dataloader()))
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    (normalised, _) = data.on_after_batch_transfer((images, None), 0)
    plain = digits(augmentation=NO_AUGMENTATION, loader=LoaderConfig(workers=0, normalize_on="device"))
    raw, _ = next(iter(plain.train_dataloader()))
    wanted, _ = next(iter(digits(augmentation=NO_AUGMENTATION).train_dataloader()))
    assert normalised.dtype == torch.float32
    assert (plain.on_after_batch_transfer((raw, None), 0)[0] - wanted).abs().max() < 2e-6


def test_one_channel():
    data = ImageData("digits", image=ImageFormat(size=8, in_chans=1, mean=(0,), std=(1,)), batch_size=4)
    data.loader = LoaderConfig(workers=0)
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape == (4, 1, 8, 8)
    assert torch.equal((images[0, 0] * 16).round(), (images[0, 0] * 16.0).round())


def test_broken_pictures_of_both_loaders_are_told(tmp_path, write_classes):
    root = tmp_path / "set"
    for split in ("train", "val"):
        write_classes(root / split, {"a": 4, "b": 4})
        (root / split / "b" / "003.png").write_bytes(b"")
    data = ImageData(
        str(root),
        image=IMAGE,
        batch_size=4,
        augmentation=NO_AUGMENTATION,
        loader=LoaderConfig(workers=1, broken="skip"),
    )
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    messages = data.broken_images()
    assert [("train/b/003.png" in m, "val/b/003.png" in m) for m in messages] == [(True, False), (False, True)]


@pytest.mark.parametrize("style", ["names", "numbers"])
def test_a_flat_validation_folder_uses_the_training_classes(tmp_path, write_classes, style):
    write_classes(tmp_path / "train", {"n01": 2, "n02": 2, "n03": 2})
    write_classes(tmp_path, {"val": 3})
    # The first class does not occur.
    lines = {"names": "n03\nn02\nn03\n", "numbers": "2\n1\n2\n"}
    (tmp_path / "val.txt").write_text(lines[style])
    data = ImageData(str(tmp_path), image=IMAGE, batch_size=2, labels=str(tmp_path / "val.txt"))
    data.loader = LoaderConfig(workers=0)
    assert torch.cat([labels for _, labels in data.val_dataloader()]).tolist() == [2, 1, 2]
    assert data.class_names == ["n01", "n02", "n03"]


def test_wrong_requests_are_named(tmp_path, write_classes):
    root = tmp_path / "set"
    write_classes(root / "train", {"a": 2, "b": 2})
    write_classes(root / "val", {"a": 1, "c": 1})
    with pytest.raises(UsageError, match="not the same: b, c"):
        ImageData(str(root))
    with pytest.raises(UsageError, match="3 classes were asked for and the training data have 2"):
        ImageData(str(root), num_classes=3, validate=False)
    with pytest.raises(UsageError, match="same pictures"):
        ImageData(str(root / "train"))
    with pytest.raises(UsageError, match="4 training pictures are fewer than one batch of 8"):
        ImageData(str(root), batch_size=8, validate=False).train_dataloader()
    with pytest.raises(UsageError, match="batch size 0"):
        ImageData(str(root), batch_size=0)
    with pytest.raises(UsageError, match="workers -1"):
        LoaderConfig(workers=-1).resolved_workers()


def test_a_checkpoint_of_other_data_is_refused(tmp_path, write_classes):
    write_classes(tmp_path / "train", {"a": 8, "b": 8})
    data = ImageData(str(tmp_path), image=IMAGE, batch_size=4, validate=False)
    data.load_state_dict({"seed": 0, "length": 99, "epoch": 0, "start": 4})
    with pytest.raises(UsageError, match="length was 99 and is now 16"):
        data.train_dataloader()


def test_streams_go_through_lightning_and_resume(tmp_path, photographs):
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as archive:
            for number in range(24):
                buffer = io.BytesIO()
                photographs[0].crop((number, shard, number + 20, 20 + shard)).save(buffer, "PNG")
                for name, content in (
                    (f"{number}.png", buffer.getvalue()),
                    (f"{number}.cls", str(number % 3).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))

    def data():
        return ImageData(
            f"wds/{tmp_path}", image=IMAGE, batch_size=8, validate=False, num_classes=10, loader=LoaderConfig(workers=2)
        )

    assert isinstance(data().train_set, ShardSet)
    assert isinstance(data().train_dataloader().dataset, StreamSamples)
    # No validation set: Lightning would warn about its empty loader.
    whole = fit(tmp_path, data(), max_epochs=2, limit_val_batches=0)
    assert [place[:2] for place in whole.seen] == [(epoch, number) for epoch in range(2) for number in range(6)]
    save = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path / "run", filename="cut", every_n_train_steps=8, save_on_train_epoch_end=False
    )
    fit(tmp_path, data(), max_steps=8, callbacks=[save], enable_checkpointing=True, limit_val_batches=0)
    rest = fit(tmp_path, data(), ckpt_path=tmp_path / "run" / "cut.ckpt", max_epochs=2, limit_val_batches=0)
    assert len(rest.seen) == 4
    for (*_, images), (*_, wanted) in zip(rest.seen, whole.seen[8:], strict=True):
        assert torch.equal(images, wanted)
