"""Effective receptive field: closed forms, the plain protocol, batching, resuming, and a user's mistakes."""

import itertools
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import replknet
from replknet._errors import RunError, UsageError
from replknet.analysis.erf import effective_receptive_field, effective_receptive_fields


def plain_protocol(features, images, reduce=torch.relu):
    """The protocol one image at a time, written down independently of the package."""
    total = 0.0
    for image in images:
        x = image.clone()[None].requires_grad_()
        y = features(x)
        (gradient,) = torch.autograd.grad(torch.relu(y[:, :, y.shape[2] // 2, y.shape[3] // 2]).sum(), x)
        total = total + reduce(gradient).sum((0, 1)).double()
    return (total / len(images)).numpy()


def error(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    model = timm.create_model("replknet_nano").eval()
    # Fresh batch norms do nothing in eval mode; give them something to do.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


class TestClosedForms:
    @pytest.mark.parametrize("kernel", [3, 7, 31])
    def test_one_depthwise_layer_is_its_kernel(self, kernel):
        torch.manual_seed(0)
        conv = replknet.layers.DepthwiseConv2d(3, 3, kernel, padding=kernel // 2, groups=3, bias=False).double()
        images = torch.randn(2, 3, 45, 53).double()
        result = effective_receptive_field(
            conv, images, layer="output", n=2, score="sum", variant="signed", dtype=torch.float64
        )
        expected = np.zeros((45, 53))
        half = kernel // 2
        window = np.s_[22 - half : 22 + half + 1, 26 - half : 26 + half + 1]
        inside = conv.weight.detach().sum((0, 1)).numpy()
        expected[window] = inside
        assert error(result.matrix, expected) < 1e-12

    def test_relu_score_counts_only_channels_that_are_on(self):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 3, 5, padding=2, groups=3)
        images = torch.randn(4, 3, 15, 15)
        result = effective_receptive_field(conv, images, layer="output", n=4)
        on = conv(images)[:, :, 7, 7] > 0
        kernels = conv.weight.detach()[:, 0].clamp(min=0)
        expected = np.zeros((15, 15))
        expected[5:10, 5:10] = torch.einsum("nc,cij->ij", on.float(), kernels).numpy() / 4
        assert 0 < on.sum() < on.numel()
        assert error(result.matrix, expected) < 1e-6

    def test_a_stack_is_the_correlation_of_its_kernels(self):
        torch.manual_seed(0)
        sizes = (5, 7, 3)
        layers = [nn.Conv2d(3, 3, k, padding=k // 2, groups=3, bias=False).double() for k in sizes]
        # A gradient runs through the layers backwards: full convolution of all kernels, as they are.
        kernel = layers[0].weight
        for layer in layers[1:]:
            pad = layer.weight.shape[-1] - 1
            kernel = F.conv2d(kernel.transpose(0, 1), layer.weight.flip(2, 3), padding=pad, groups=3).transpose(0, 1)
        side = sum(sizes) - len(sizes) + 1
        result = effective_receptive_field(
            nn.Sequential(*layers),
            torch.zeros(1, 3, 31, 31),
            layer="output",
            n=1,
            score="sum",
            variant="abs",
            dtype=torch.float64,
        )
        half = side // 2
        inside = result.matrix[15 - half : 16 + half, 15 - half : 16 + half]
        assert kernel.shape[-1] == side
        assert error(inside, kernel.detach().abs().sum((0, 1)).numpy()) < 1e-12
        assert np.count_nonzero(result.matrix) == side * side

    def test_strides_shift_the_window_as_they_should(self):
        conv = nn.Conv2d(1, 1, 3, stride=2, padding=1, bias=False)
        nn.init.constant_(conv.weight, 1.0)
        result = effective_receptive_field(conv, torch.ones(1, 1, 16, 16), layer="output", n=1)
        # The map is 8 × 8; its centre, unit 4, sees pixels 7 to 9.
        assert np.argwhere(result.matrix).min(0).tolist() == [7, 7]
        assert np.argwhere(result.matrix).max(0).tolist() == [9, 9]
        assert result.feature_size == (8, 8)


class TestProtocol:
    def test_replknet_equals_the_plain_protocol(self, nano, images):
        result = effective_receptive_field(nano, images, n=5, batch_size=2)
        assert error(result.matrix, plain_protocol(nano.forward_features, images)) < 1e-5
        assert (result.n_images, result.n_not_finite, result.layer) == (5, 0, "forward_features")

    def test_merging_changes_nothing(self, nano, images):
        before = effective_receptive_field(nano, images[:2], n=2, dtype=torch.float64)
        plain = timm.create_model("replknet_nano").eval()
        plain.load_state_dict(nano.state_dict())
        merged = replknet.reparameterize(plain)
        after = effective_receptive_field(merged, images[:2], n=2, dtype=torch.float64)
        assert error(after.matrix, before.matrix) < 1e-5

    @pytest.mark.parametrize(
        ("variant", "reduce"),
        [("abs", torch.abs), ("squared", torch.square), ("signed", lambda g: g), ("release", torch.relu)],
    )
    def test_variants(self, nano, images, variant, reduce):
        result = effective_receptive_field(nano, images[:2], n=2, variant=variant)
        assert error(result.matrix, plain_protocol(nano.forward_features, images[:2], reduce)) < 1e-5

    def test_batches_do_not_mix_images(self, nano, images):
        single = effective_receptive_field(nano, images, n=5, batch_size=1)
        batched = effective_receptive_field(nano, images, n=5, batch_size=4)
        assert error(batched.matrix, single.matrix) < 1e-5
        # relu of the batch's summed gradient would be smaller.
        assert batched.matrix.sum() == pytest.approx(single.matrix.sum(), rel=1e-5)

    def test_stages_agree_with_each_stage_alone(self, nano, images):
        together = effective_receptive_fields(nano, images[:1], layers="stages", n=1)
        assert list(together) == [f"stages.{index}" for index in range(len(nano.stages))]
        for name, result in together.items():
            alone = effective_receptive_field(nano, images[:1], layer=name, n=1)
            assert error(result.matrix, alone.matrix) < 1e-6
        sizes = [result.feature_size[0] for result in together.values()]
        assert sizes == sorted(sizes, reverse=True)
        last = effective_receptive_field(nano, images[:1], n=1)
        assert error(together[name].matrix, last.matrix) < 1e-6

    def test_a_map_that_is_overwritten_in_place_is_read_before(self):
        net = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3, padding=1), relu=nn.ReLU(inplace=True)))
        nn.init.constant_(net.conv.bias, -100.0)
        image = torch.rand(1, 1, 9, 9)
        result = effective_receptive_field(net, image, layer="conv", score="sum", variant="abs", n=1)
        assert np.count_nonzero(result.matrix) == 9

    def test_checkpointing_and_layers_inside_checkpointed_blocks(self, nano, images):
        for layer in (None, "stages.1.blocks.0", "stages.0.blocks.1.pw1"):
            plain = effective_receptive_field(nano, images[:1], layer=layer, n=1)
            thrifty = effective_receptive_field(nano, images[:1], layer=layer, n=1, checkpointing=True)
            assert error(thrifty.matrix, plain.matrix) < 1e-6
        assert not nano.stem.grad_checkpointing

    def test_bfloat16_is_close_and_leaves_the_model_alone(self, nano, images):
        exact = effective_receptive_field(nano, images[:2], n=2)
        rough = effective_receptive_field(nano, images[:2], n=2, dtype=torch.bfloat16)
        assert 0 < error(rough.matrix, exact.matrix) < 0.2
        assert {parameter.dtype for parameter in nano.parameters()} == {torch.float32}

    def test_modes_and_flags_are_put_back(self, images):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
        model[1].eval()
        model[0].bias.requires_grad_(False)
        mean = model[1].running_mean.clone()
        effective_receptive_field(model, images, layer="output", n=2)
        assert [module.training for module in model] == [True, False, True]
        assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(model[1].running_mean, mean)

    def test_images_without_finite_gradient_are_left_out_and_counted(self, nano, images):
        spoiled = images.clone()
        spoiled[1, 0, 40, 40] = torch.nan
        spoiled[3, 2, 0, 0] = torch.inf
        result = effective_receptive_field(nano, spoiled, n=None, batch_size=5)
        assert (result.n_images, result.n_not_finite) == (3, 2)
        good = effective_receptive_field(nano, images[[0, 2, 4]], n=3)
        assert error(result.matrix, good.matrix) < 1e-5

    def test_bad_images_do_not_count_towards_n(self, nano, images):
        spoiled = torch.cat([torch.full_like(images[:2], torch.nan), images])
        result = effective_receptive_field(nano, spoiled, n=4, batch_size=3)
        assert (result.n_images, result.n_not_finite) == (4, 2)
        assert error(result.matrix, effective_receptive_field(nano, images, n=4).matrix) < 1e-5


class TestNetworks:
    @pytest.mark.parametrize(
        ("name", "size", "grid"),
        [
            ("vit_tiny_patch16_224", 224, (14, 14)),
            ("vit_small_patch14_reg4_dinov2", 518, (37, 37)),
            ("swin_tiny_patch4_window7_224", 224, (7, 7)),
            ("mixer_s32_224", 224, (7, 7)),
            ("xcit_nano_12_p16_224", 64, (4, 4)),
            ("pvt_v2_b0", 64, (2, 2)),
            ("resnet18", 65, (3, 3)),
            ("tf_efficientnet_lite0", 96, (3, 3)),
        ],
    )
    def test_timm_models_of_every_layout(self, name, size, grid):
        torch.manual_seed(0)
        model = timm.create_model(name, depth=1) if name.startswith("vit") else timm.create_model(name)
        result = effective_receptive_field(model, torch.randn(1, 3, size, size), n=1)
        assert result.feature_size == grid
        assert result.matrix.shape == (size, size)
        assert result.matrix.max() > 0

    def test_class_token_is_not_part_of_the_grid(self):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
        image = torch.randn(1, 3, 64, 64)
        result = effective_receptive_field(model, image, n=1)

        def grid(x):
            return model.forward_features(x)[:, 1:].transpose(1, 2).reshape(1, -1, 4, 4)

        assert error(result.matrix, plain_protocol(grid, image)) < 1e-5

    def test_nhwc_outputs_are_turned(self):
        torch.manual_seed(0)
        model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)).eval()
        image = torch.randn(1, 3, 224, 224)
        result = effective_receptive_field(model, image, n=1)
        expected = plain_protocol(lambda x: model.forward_features(x).permute(0, 3, 1, 2), image)
        assert error(result.matrix, expected) < 1e-5

    @pytest.mark.parametrize(
        ("name", "layer"), [("resnet18", "layer4"), ("vit_b_32", "encoder"), ("shufflenet_v2_x0_5", "conv5")]
    )
    def test_torchvision_models_whose_last_map_has_to_be_found(self, name, layer):
        import torchvision

        torch.manual_seed(0)
        model = torchvision.models.get_model(name).eval()
        size = 224 if name == "vit_b_32" else 64
        image = torch.randn(1, 3, size, size)
        result = effective_receptive_field(model, image, n=1)
        assert result.layer == layer
        kept = []
        model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: kept.append(output))

        def features(x):
            model(x)
            output = kept.pop()
            return output if output.ndim == 4 else output[:, 1:].transpose(1, 2).reshape(1, -1, 7, 7)

        assert error(result.matrix, plain_protocol(features, image)) < 1e-5

    def test_outputs_wrapped_as_transformers_does(self):
        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.patches = nn.Conv2d(3, 8, 8, stride=8)

            def forward(self, x):
                tokens = self.patches(x).flatten(2).transpose(1, 2)
                token = tokens.mean(1, keepdim=True)
                return SimpleNamespace(last_hidden_state=torch.cat([token, tokens], 1), pooler_output=token[:, 0])

        result = effective_receptive_field(Wrapped(), torch.randn(1, 3, 32, 48), n=1, score="sum", variant="abs")
        assert (result.layer, result.feature_size) == ("output", (4, 6))
        assert np.count_nonzero(result.matrix[16:24, 24:32]) == 64
        assert np.count_nonzero(result.matrix) == 64

    def test_features_only_models_use_the_deepest_map(self):
        model = timm.create_model("resnet18", features_only=True)
        result = effective_receptive_field(model, torch.randn(1, 3, 64, 64), n=1)
        assert result.feature_size == (2, 2)


class TestResuming:
    def test_a_stopped_run_gives_the_same_matrix(self, nano, images, tmp_path, monkeypatch):
        monkeypatch.setattr("replknet.analysis._accumulate._SECONDS_BETWEEN_STATES", 0.0)
        state = tmp_path / "state.npz"

        class StopError(Exception):
            pass

        def stop_at_three(done, _n):
            if done == 3:
                raise StopError

        with pytest.raises(StopError):
            effective_receptive_field(nano, images, n=5, state_file=state, progress=stop_at_three)
        seen = []
        resumed = effective_receptive_field(
            nano, images, n=5, state_file=state, progress=lambda done, _n: seen.append(done)
        )
        assert seen == [4, 5]
        assert np.array_equal(resumed.matrix, effective_receptive_field(nano, images, n=5).matrix)
        assert list(tmp_path.iterdir()) == []

    def test_a_finished_state_needs_no_further_pass(self, nano, images, tmp_path, monkeypatch):
        state = tmp_path / "state.npz"
        monkeypatch.setattr("replknet.analysis._accumulate.State.remove", lambda self: self.save())
        first = effective_receptive_field(nano, images, n=2, state_file=state)
        again = effective_receptive_field(nano, images, n=2, state_file=state)
        assert np.array_equal(first.matrix, again.matrix)
        assert again.feature_size == first.feature_size

    @pytest.mark.parametrize("change", [{"variant": "abs"}, {"score": "sum"}, {"layer": "stages.0"}])
    def test_the_state_of_another_run_is_refused(self, nano, images, tmp_path, monkeypatch, change):
        monkeypatch.setattr("replknet.analysis._accumulate.State.remove", lambda self: self.save())
        effective_receptive_field(nano, images, n=1, state_file=tmp_path / "s.npz")
        name = {"layer": "layers"}.get(next(iter(change)), next(iter(change)))
        with pytest.raises(UsageError, match=f"another {name}"):
            effective_receptive_field(nano, images, n=2, state_file=tmp_path / "s.npz", **change)

    def test_the_state_of_other_weights_is_refused(self, images, tmp_path, monkeypatch):
        monkeypatch.setattr("replknet.analysis._accumulate.State.remove", lambda self: self.save())
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = nn.Conv2d(3, 4, 3)
            if seed == 0:
                effective_receptive_field(model, images, layer="output", n=1, state_file=tmp_path / "s.npz")
        with pytest.raises(UsageError, match="another weights"):
            effective_receptive_field(model, images, layer="output", n=2, state_file=tmp_path / "s.npz")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"nonsense" * 50])
    def test_a_broken_state_file_is_named(self, nano, images, tmp_path, content):
        state = tmp_path / "state.npz"
        state.write_bytes(content)
        with pytest.raises(RunError, match=r"state\.npz is no readable state file"):
            effective_receptive_field(nano, images, n=1, state_file=state)


class TestMistakes:
    def test_unknown_layer_names_near_ones(self, nano, images):
        with pytest.raises(UsageError, match=r"no layer 'stage\.3'; did you mean .*stages\.3"):
            effective_receptive_field(nano, images, layer="stage.3")

    def test_a_layer_without_spatial_features(self, nano, images):
        with pytest.raises(UsageError, match=r"'head'.*no spatial features"):
            effective_receptive_field(nano, images, layer="head", n=1)

    def test_a_network_without_spatial_features(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 5))
        with pytest.raises(UsageError, match="no layer with spatial features"):
            effective_receptive_field(model, images, n=1)

    def test_a_layer_that_is_never_called(self, images):
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        model[0].unused = nn.Conv2d(3, 3, 1)
        with pytest.raises(UsageError, match=r"never calls 0\.unused"):
            effective_receptive_field(model, images, layer="0.unused", n=1)

    def test_a_layer_that_does_not_depend_on_the_image(self, images):
        class Constant(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Identity()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x):
                return self.conv(x) + self.table(torch.ones(1, 4, 94, 94))

        with pytest.raises(UsageError, match="does not depend on the image"):
            effective_receptive_field(Constant(), images, layer="table", n=1)

    def test_a_size_the_network_cannot_take(self):
        model = timm.create_model("mixer_s32_224")
        with pytest.raises(UsageError, match=r"MlpMixer cannot run on images of 320 × 320"):
            effective_receptive_field(model, torch.randn(1, 3, 320, 320), n=1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"variant": "l2"}, "variant is one of release, abs, squared, signed"),
            ({"score": "max"}, "score is one of relu, sum"),
            ({"n": 0}, "n is a number of images"),
            ({"batch_size": 0}, "batch_size is at least 1"),
            ({"dtype": torch.int8}, "dtype is float32"),
            ({"layer": "stages"}, "effective_receptive_fields"),
        ],
    )
    def test_options(self, nano, images, options, message):
        with pytest.raises(UsageError, match=message):
            effective_receptive_field(nano, images, **options)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([], "no images"),
            (torch.zeros(0, 3, 8, 8), "no images"),
            ([torch.zeros(3, 64, 64), torch.zeros(3, 64, 32)], "one size"),
            ([torch.zeros(64, 64)], r"\[C, H, W\]"),
            (["cat.png"], r"\[C, H, W\].*str"),
            ([torch.zeros(3, 64, 64, dtype=torch.uint8)], "floating-point"),
        ],
    )
    def test_images(self, nano, given, message):
        with pytest.raises(UsageError, match=message):
            effective_receptive_field(nano, given, n=2)

    def test_nothing_finite(self, nano):
        with pytest.raises(RunError, match="no image gave a finite gradient"):
            effective_receptive_field(nano, torch.full((2, 3, 64, 64), torch.nan))

    def test_no_checkpointing_to_be_had(self, images):
        with pytest.raises(UsageError, match="no activation checkpointing"):
            effective_receptive_field(nn.Conv2d(3, 3, 3), images, layer="output", checkpointing=True)


def test_loaders_generators_and_batches_are_all_images(nano, images):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(5)), batch_size=2)
    expected = effective_receptive_field(nano, images, n=4).matrix
    for source in (list(images), (image for image in images), iter([images[:3], images[3:]]), loader):
        assert error(effective_receptive_field(nano, source, n=4).matrix, expected) < 1e-5


def test_fewer_images_than_asked_for_is_said(nano, images, caplog):
    result = effective_receptive_field(nano, itertools.islice(images, 2), n=50)
    assert result.n_images == 2
    assert "50 images were asked for and 2 could be used" in caplog.text


def test_no_parameter_gets_a_gradient(nano, images):
    effective_receptive_field(nano, images, n=1)
    assert all(parameter.grad is None for parameter in nano.parameters())


def test_checkpointing_starts_by_itself_for_large_images_on_the_cpu(monkeypatch):
    monkeypatch.setattr("replknet.analysis.erf._LARGE_IMAGE", 64 * 64)
    calls = []

    class Thrifty(nn.Conv2d):
        grad_checkpointing = False

        def set_grad_checkpointing(self, enable=True):
            calls.append(enable)
            self.grad_checkpointing = enable

    model = Thrifty(3, 4, 3, padding=1)
    for side, expected in ((32, []), (64, [True])):
        effective_receptive_field(model, torch.randn(1, 3, side, side), layer="output", n=1)
        assert calls == expected
        assert not model.grad_checkpointing
    effective_receptive_field(model, torch.randn(1, 3, 64, 64), layer="output", n=1, checkpointing=False)
    assert calls == [True]


@pytest.mark.gpu
@pytest.mark.parametrize("merged", [False, True])
def test_gpu_gives_the_cpus_matrix(nano, images, cuda, merged):
    model = timm.create_model("replknet_nano").eval()
    model.load_state_dict(nano.state_dict())
    if merged:
        replknet.reparameterize(model)
    expected = effective_receptive_field(model, images, n=5).matrix
    got = effective_receptive_field(model, images, n=5, batch_size=3, device=cuda, dtype=torch.float64)
    assert error(got.matrix, expected) < 1e-4
    rough = effective_receptive_field(model, images, n=5, batch_size=5, device=cuda, dtype=torch.bfloat16)
    assert error(rough.matrix, expected) < 0.2
