"""Facts about the BiT ResNets. Oracles: timm, and a transcription of the papers' equations in float64 below."""

import json
from dataclasses import asdict

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from sslvit.models.blocks import keep_inputs_only
from sslvit.models.readout import read
from sslvit.models.resnet import (
    BLOCKS,
    STEMS,
    BiT,
    BiTConfig,
    HybridStem,
    NormReLU,
    Pool,
    StandardizedConv,
    build_root,
    pad_same,
)
from sslvit.models.vit import ViT

TIMM_HYBRIDS = {
    "R": "vit_tiny_r_s16_p8_224",
    "R26": "vit_small_r26_s32_224",
    "R50": "vit_base_r50_s16_224",
    "R50-4stage": "vit_large_r50_s32_224",
}


def scramble(network, kernel_std=None):
    """Random scales and shifts, so that no identity hides an error, and kernels of the given deviation."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif kernel_std is not None:
                parameter.copy_(kernel_std * torch.randn(parameter.shape, generator=generator))
    return network.double().eval()


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# --- The papers' equations, written without modules -----------------------------------------------------------------


def group_norm(x, state, name, eps):
    b, c, h, w = x.shape
    groups = x.reshape(b, 32, c // 32 * h * w)
    centred = groups - groups.mean(2, keepdim=True)
    normal = (centred / (centred.square().mean(2, keepdim=True) + eps) ** 0.5).reshape(b, c, h, w)
    return normal * state[f"{name}.weight"].reshape(1, c, 1, 1) + state[f"{name}.bias"].reshape(1, c, 1, 1)


def same(n, kernel, stride):
    """Zeros before and after, as TensorFlow documents SAME."""
    total = max(kernel - stride, 0) if n % stride == 0 else max(kernel - n % stride, 0)
    return total // 2, total - total // 2


def convolve(x, kernel, version, stride):
    """A convolution as one matrix product over unfolded pixels, filters standardised as the version's code does."""
    size = kernel.shape[-1]
    filters = kernel.reshape(len(kernel), -1)
    filters = filters - filters.mean(1, keepdim=True)
    variance = filters.square().mean(1, keepdim=True)
    filters = filters / (variance**0.5 + 1e-5) if version == "v1" else filters / (variance + 1e-10) ** 0.5
    if version == "v1":
        top, bottom = same(x.shape[2], size, stride)
        left, right = same(x.shape[3], size, stride)
    else:
        top = bottom = left = right = (size - 1) // 2
    x = F.pad(x, (left, right, top, bottom))
    height, width = ((n - size) // stride + 1 for n in x.shape[2:])
    return (filters @ F.unfold(x, size, stride=stride)).reshape(len(x), len(kernel), height, width)


def pool(x, version):
    if version == "v1":
        (top, bottom), (left, right) = same(x.shape[2], 3, 2), same(x.shape[3], 3, 2)
        x = F.pad(x, (left, right, top, bottom), value=float("-inf"))
    else:
        x = F.pad(x, (1, 1, 1, 1), value=0.0)
    rows, columns = (range(0, n - 2, 2) for n in x.shape[2:])
    return torch.stack(
        [torch.stack([x[:, :, i : i + 3, j : j + 3].amax((2, 3)) for j in columns], -1) for i in rows], -2
    )


def transcription(x, state, version, blocks, root):
    eps = 1e-6 if version == "v1" else 1e-5
    norm = lambda x, name: group_norm(x, state, name, eps)  # noqa: E731
    conv = lambda x, name, stride=1: convolve(x, state[f"{name}.weight"], version, stride)  # noqa: E731
    x = conv(x, "stem.conv", 2 if root == "7x7" else 1)
    if version == "v1":
        x = norm(x, "stem.norm").relu()
    if root == "7x7":
        x = pool(x, version)
    for i, count in enumerate(blocks):
        for j in range(count):
            name, stride, shortcut = f"stages.{i}.blocks.{j}", 2 if i > 0 and j == 0 else 1, x
            if version == "v1":
                if j == 0:
                    shortcut = norm(conv(x, f"{name}.downsample.conv", stride), f"{name}.downsample.norm")
                y = norm(conv(x, f"{name}.conv1"), f"{name}.norm1").relu()
                y = norm(conv(y, f"{name}.conv2", stride), f"{name}.norm2").relu()
                x = (shortcut + norm(conv(y, f"{name}.conv3"), f"{name}.norm3")).relu()
            else:
                y = norm(x, f"{name}.norm1").relu()
                if j == 0:
                    shortcut = conv(y, f"{name}.downsample.conv", stride)
                y = norm(conv(y, f"{name}.conv1"), f"{name}.norm2").relu()
                y = norm(conv(y, f"{name}.conv2", stride), f"{name}.norm3").relu()
                x = shortcut + conv(y, f"{name}.conv3")
    return x if version == "v1" else norm(x, "norm").relu()


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("root", "blocks"), [("7x7", (1, 2, 1, 1)), ("3x3", (2, 1, 1))])
@pytest.mark.parametrize("size", [(32, 32), (45, 38)])
def test_outputs_equal_the_papers_equations_with_the_eps_of_googles_code(version, root, blocks, size):
    # Small kernels, where every eps counts.
    bit = BiT(
        BiTConfig(
            image_size=size,
            blocks=blocks,
            version=version,
            width_factor=0.5,
            root=root,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )
    )
    scramble(bit, kernel_std=1e-3)
    images = random_images(2, 3, *size)
    expected = transcription(images, bit.state_dict(), version, blocks, root)
    torch.testing.assert_close(bit.features(images), expected, rtol=1e-9, atol=1e-9)
    assert expected.shape[2:] == bit.grid


# --- timm ------------------------------------------------------------------------------------------------------------


def timm_stem(kind):
    return timm.create_model(TIMM_HYBRIDS[kind], depth=1).patch_embed.backbone


@pytest.mark.parametrize("kind", STEMS)
def test_hybrid_stems_have_timms_parameters_and_with_the_same_weights_its_outputs(kind):
    oracle, stem = timm_stem(kind), HybridStem(kind, 3).double()
    # Filters are standardised: a large deviation changes nothing, but timm's eps and Google's both vanish next to it.
    stem.load_state_dict(scramble(oracle, kernel_std=100.0).state_dict(), strict=True)
    for size in [(224, 224), (96, 70)]:
        images = 2 * random_images(1, 3, *size) - 1
        with torch.no_grad():
            result, expected = stem(images), oracle(images)
        assert result.shape[1] == stem.width
        assert tuple(result.shape[2:]) == tuple(-(-n // stem.stride) for n in size)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["R50-v1 stem", "R50x1"])
def test_timms_eps_moves_initial_outputs_by_less_than_a_thousandth_of_their_spread(name):
    v1 = name == "R50-v1 stem"
    oracle = scramble(timm_stem("R50") if v1 else timm.create_model("resnetv2_50x1_bit", num_classes=0, global_pool=""))
    ours = (HybridStem("R50", 3) if v1 else BiT.variant("R50x1", image_size=64)).double()
    ours.load_state_dict(oracle.state_dict(), strict=True)
    images = random_images(1, 3, 64, 64)
    with torch.no_grad():
        result = ours(2 * images - 1) if v1 else ours.features(images)
        expected = oracle(2 * images - 1)
    assert 0 < (result - expected).std() < 1e-3 * expected.std()


@pytest.mark.parametrize("size", [(224, 224), (75, 128)])
def test_r50x1_equals_timms_bit_given_the_same_weights_and_googles_eps(size):
    oracle = timm.create_model("resnetv2_50x1_bit", num_classes=0)
    for module in scramble(oracle).modules():
        if isinstance(module, nn.Conv2d):
            module.eps = 1e-10
    bit = BiT.variant("R50x1", image_size=size).double()
    bit.load_state_dict(oracle.state_dict(), strict=True)
    images = random_images(1, 3, *size)
    with torch.no_grad():
        encoded, expected = bit(images), oracle.forward_features(2 * images - 1)
    assert encoded.cls is None
    assert tuple(expected.shape[2:]) == bit.grid
    torch.testing.assert_close(encoded.patches, expected.flatten(2).mT, rtol=0, atol=1e-9)
    torch.testing.assert_close(read(encoded, "mean"), oracle.forward_head(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "oracle"),
    [("R50x1", "resnetv2_50x1_bit"), ("R101x1", "resnetv2_101x1_bit"), ("R152x2", "resnetv2_152x2_bit")],
)
def test_variants_have_timms_parameters_exactly(name, oracle):
    with torch.device("meta"):
        expected = {k: v.shape for k, v in timm.create_model(oracle, num_classes=0).state_dict().items()}
        assert {k: v.shape for k, v in BiT.variant(name, image_size=224).state_dict().items()} == expected


@pytest.mark.parametrize("name", ["R50x1", "R20x0.5", "R26x1-v1", "R152x2"])
def test_a_model_knows_the_name_of_its_variant(name):
    with torch.device("meta"):
        assert BiT.variant(name, image_size=32).name == name


# --- Sizes -----------------------------------------------------------------------------------------------------------


def parameters_of(version, blocks, base, root, channels=3):
    """Kernels, and two numbers for each channel that is normalised."""
    count, before = (49 if root == "7x7" else 9) * channels * base, base
    if version == "v1":
        count += 2 * base
    for i, repeats in enumerate(blocks):
        inner, outer = base * 2**i, 4 * base * 2**i
        for j in range(repeats):
            count += before * inner + 9 * inner**2 + inner * outer + 2 * inner + 2 * inner
            count += 2 * outer if version == "v1" else 2 * before
            if j == 0:
                count += before * outer + (2 * outer if version == "v1" else 0)
            before = outer
    return count + (2 * before if version == "v2" else 0)


@pytest.mark.parametrize(
    ("name", "version", "base"),
    [
        *[(f"R{depth}x1", "v2", 64) for depth in BLOCKS],
        *[(f"R{depth}x1-v1", "v1", 64) for depth in BLOCKS],
        ("R50x3", "v2", 192),
        ("R20x0.5", "v2", 32),
        ("R29x0.5-v1", "v1", 32),
    ],
)
def test_parameters_are_as_many_as_the_architecture_says(name, version, base):
    with torch.device("meta"):
        bit = BiT.variant(name, image_size=64)
    blocks = BLOCKS[int(name[1:].partition("x")[0])]
    expected = parameters_of(version, blocks, base, "3x3" if len(blocks) == 3 else "7x7")
    assert sum(p.numel() for p in bit.parameters()) == expected
    # A bottleneck has three layers; the root and the classifier make two more.
    assert 3 * sum(blocks) + 2 == int(name[1:].partition("x")[0])


def test_parameters_with_a_classifier_are_those_published_for_bit():
    # The counts of timm's results table, in millions, of the models with 1000 classes.
    for name, millions in {
        "R50x1": 25.55,
        "R50x3": 217.32,
        "R101x1": 44.54,
        "R101x3": 387.93,
        "R152x2": 236.34,
    }.items():
        with torch.device("meta"):
            bit = BiT.variant(name, image_size=224)
        assert round((sum(p.numel() for p in bit.parameters()) + 1000 * bit.width + 1000) / 1e6, 2) == millions


@pytest.mark.parametrize("name", ["R11x0.5", "R20x0.5", "R20x0.5-v1", "R14x0.5", "R14x0.5-v1"])
@pytest.mark.parametrize("size", [28, 32, (33, 64)])
def test_the_grid_is_that_of_the_features(name, size):
    bit = BiT.variant(name, image_size=size)
    features = bit.features(torch.rand(1, 3, *bit.image_size))
    assert tuple(features.shape[1:]) == (bit.width, *bit.grid)
    assert bit.stride == (4 if "R14" not in name else 32)


# --- Layers ----------------------------------------------------------------------------------------------------------


def test_same_padding_puts_the_odd_pixel_right_and_below():
    ones = torch.ones(1, 1, 4, 5)
    # 4 at stride 2: 3 pixels for 2 outputs need 5, one more, below. 5: 3 outputs need 7, one on each side.
    assert pad_same(ones, 3, 2)[0, 0].sum(0).tolist() == [0, 4, 4, 4, 4, 4, 0]
    assert pad_same(ones, 3, 2)[0, 0].sum(1).tolist() == [5, 5, 5, 5, 0]
    # 224 at stride 2 with 7: 112 outputs need 229, two before and three after.
    padded = pad_same(torch.ones(1, 1, 224, 224), 7, 2)
    assert padded.shape == (1, 1, 229, 229)
    assert padded[0, 0, 2:226, 2:226].all()


def test_v2_pools_zeros_from_outside_and_v1_never_sees_a_negative():
    negative = -torch.ones(1, 1, 6, 6)
    assert Pool("v2")(negative)[0, 0].tolist() == [[0, 0, 0], [0, -1, -1], [0, -1, -1]]
    for version in ("v1", "v2"):
        assert [type(m) for m in build_root(version, "7x7", 3, 32)][1:-1] == ([NormReLU] if version == "v1" else [])


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_scaling_a_filter_or_adding_to_it_changes_nothing(version):
    conv = StandardizedConv(version, 8, 4, 3).double()
    x = random_images(2, 8, 5, 5)
    with torch.no_grad():
        conv.weight.mul_(1e3)
        before = conv(x)
        conv.weight.mul_(7.0).add_(5.0)
        torch.testing.assert_close(conv(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["R14x0.5", "R14x0.5-v1"])
def test_an_images_features_do_not_depend_on_its_batch(name):
    bit = BiT.variant(name, image_size=32).double()
    images = random_images(3, 3, 32, 32)
    torch.testing.assert_close(bit(images).patches[1:2], bit(images[1:2]).patches, rtol=0, atol=1e-12)


def test_images_are_standardised_inside_with_constants_that_are_no_weights():
    images = random_images(1, 2, 32, 32)
    bit = BiT.variant("R11x0.5", image_size=32, channels=2, mean=(0.1, 0.2), std=(0.3, 0.4)).double()
    plain = BiT.variant("R11x0.5", image_size=32, channels=2, mean=(0.0, 0.0), std=(1.0, 1.0)).double()
    by_hand = (images - torch.tensor([0.1, 0.2]).reshape(2, 1, 1)) / torch.tensor([0.3, 0.4]).reshape(2, 1, 1)
    torch.testing.assert_close(bit(images).patches, plain(by_hand).patches, rtol=0, atol=1e-5)
    assert not {"mean", "std"} & set(bit.state_dict())


# --- Start and gradients ---------------------------------------------------------------------------------------------


def test_a_v1_block_starts_as_its_shortcut_because_its_last_scale_is_zero():
    bit = BiT.variant("R26x0.5-v1", image_size=32)
    x = torch.randn(2, 32, 8, 8)
    for block in bit.blocks:
        assert not block.norm3.weight.any()
        shortcut = block.downsample(x)
        x = block(x)
        assert torch.equal(x, shortcut.relu())
    assert all(not block.norm3.weight.any() for block in HybridStem("R26", 3).stages[0].blocks)


def test_all_other_scales_start_at_one_and_kernels_with_variance_one_over_fan_in():
    for name in ("R26x1", "R26x1-v1"):
        bit = BiT.variant(name, image_size=32)
        for key, parameter in bit.named_parameters():
            if parameter.ndim == 4:
                n, fan_in = parameter.numel(), parameter[0].numel()
                # Within five standard errors; a truncated normal's kurtosis is below a normal's.
                assert abs(parameter.var() * fan_in - 1) < 5 * (2 / n) ** 0.5, key
                assert parameter.abs().max() < 2.28 * fan_in**-0.5, key
            elif key.endswith("bias"):
                assert not parameter.any(), key
            elif not (name.endswith("v1") and ".norm3." in key):
                assert (parameter == 1).all(), key


def test_the_start_is_a_function_of_the_seed_and_leaves_torchs_generator_alone():
    def make(seed):
        return [BiT.variant("R11x0.5", image_size=32, seed=seed), HybridStem("R", 3, seed=seed)]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = make(0)
    assert torch.equal(torch.rand(3), expected)
    for a, b, c in zip(first, make(0), make(1), strict=True):
        for key, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[key])
            assert value.ndim == 1 or not torch.equal(value, c.state_dict()[key])


@pytest.mark.parametrize("name", ["R14x0.5", "R14x0.5-v1", "R11x0.5"])
def test_gradients_reach_every_parameter_and_checkpointing_does_not_change_them(name):
    bit = scramble(BiT.variant(name, image_size=64))
    images, weights = random_images(2, 3, 64, 64), random_images(bit.width)

    def gradients():
        bit.zero_grad()
        (read(bit(images), "mean") @ weights).sum().backward()
        return {key: parameter.grad.clone() for key, parameter in bit.named_parameters()}

    plain = gradients()
    assert [key for key, gradient in plain.items() if not gradient.any()] == []
    bit.grad_checkpointing = True
    assert all(torch.equal(gradient, plain[key]) for key, gradient in gradients().items())


def test_gradient_checkpointing_of_a_module_reaches_bits_and_vits():
    module = nn.ModuleList([BiT.variant("R11x0.5", image_size=32), ViT.variant("mu/8", image_size=32)])
    keep_inputs_only(nn.Sequential(module))
    assert [backbone.grad_checkpointing for backbone in module] == [True, True]


def test_at_the_start_of_v1_nothing_inside_a_branch_learns_but_its_last_norm():
    bit = BiT.variant("R14x0.5-v1", image_size=64).double()
    bit(random_images(2, 3, 64, 64)).patches.square().mean().backward()
    inside = [block.get_parameter(f"conv{i}.weight").grad for block in bit.blocks for i in (1, 2, 3)]
    assert not any(gradient.any() for gradient in inside)
    assert all(block.norm3.weight.grad.any() for block in bit.blocks)


# --- Names and the door ----------------------------------------------------------------------------------------------


def test_the_config_rebuilds_the_model_after_a_trip_through_json():
    changes = {"image_size": (28, 36), "channels": 1, "mean": (0.25,), "std": (0.5,), "seed": 3}
    bit = BiT.variant("R20x0.5-v1", **changes)
    again = BiT(BiTConfig(**json.loads(json.dumps(asdict(bit.config)))))
    assert again.config == bit.config
    assert again.grid == bit.grid == (7, 9)
    images = torch.rand(1, 1, 28, 36)
    assert torch.equal(again(images).patches, bit(images).patches)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HybridStem("R51", 3), "R51"),
        (lambda: BiT.variant("R51x1", image_size=32), "R51x1"),
        (lambda: BiT.variant("R50", image_size=32), "R50"),
        (lambda: BiT.variant("R50x0.25", image_size=32), "16"),
        (lambda: BiT.variant("R50x0.501", image_size=32), "0.501"),
        (lambda: BiT(BiTConfig(image_size=32, blocks=(1, 0))), r"\(1, 0\)"),
        (lambda: BiT(BiTConfig(image_size=32, blocks=())), "blocks"),
        (lambda: BiT(BiTConfig(image_size=32, blocks=(1,), version="v3")), "v3"),
        (lambda: BiT(BiTConfig(image_size=32, blocks=(1,), root="5x5")), "5x5"),
        (lambda: BiT(BiTConfig(image_size=32, blocks=(1,), mean=(0.5, 0.5))), "3 values"),
        (lambda: BiT.variant("R11x0.5", image_size=32)(torch.rand(1, 1, 32, 32)), r"\(1, 1, 32, 32\)"),
        (lambda: BiT.variant("R11x0.5", image_size=32)(torch.rand(3, 32, 32)), r"\(3, 32, 32\)"),
    ],
)
def test_impossible_arguments_are_refused_with_their_values(make, words):
    with pytest.raises(ValueError, match=words):
        make()
