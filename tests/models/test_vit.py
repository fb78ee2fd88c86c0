"""The backbone against timm, closed forms and the papers' counts. Oracles are written here or are other projects'."""

import json
import math
from dataclasses import asdict

import pytest
import timm
import torch
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from timm_twin import TINY, timm_twin
from torch import nn

from sslvit import rng
from sslvit.models.patches import patchify, unpatchify
from sslvit.models.readout import Classifier, Encoded, read
from sslvit.models.vit import ViT
from sslvit.models.vit_config import HYBRIDS, VARIANTS, ViTConfig


def timm_tokens(twin: VisionTransformer, vit: ViT, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(getattr(vit.config, name)).view(-1, 1, 1) for name in ("mean", "std"))
    return twin.forward_features((images - mean) / std)


def assert_same_tokens(encoded: Encoded, tokens: torch.Tensor, registers: int) -> None:
    classes = int(encoded.cls is not None)
    if classes:
        torch.testing.assert_close(encoded.cls, tokens[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(encoded.patches, tokens[:, classes + registers :], rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


SAME_AS_TIMM = {
    "cls": {},
    "mean, no cls": {"class_token": False},
    "registers": {"registers": 4},
    "registers without cls": {"registers": 2, "class_token": False},
    "registers without positions": {"registers": 3, "class_position": False},
    "cls without position": {"class_position": False},
    "no positions": {"position": "none"},
    "tall image": {"image_size": (24, 8)},
    "wide image": {"image_size": (8, 32)},
    "oblong patches": {"image_size": (16, 24), "patch_size": (4, 8)},
    "grey": {"channels": 1},
    "five channels": {"channels": 5, "mean": (0.1, 0.2, 0.3, 0.4, 0.5), "std": (0.5, 0.4, 0.3, 0.2, 0.1)},
    "tanh gelu": {"gelu": "tanh"},
    "no qkv bias": {"qkv_bias": False},
    "layer scale": {"layer_scale": 1e-5},
    "odd mlp width": {"mlp_width": 36},
    "another epsilon": {"epsilon": 0.3},
    "inception constants": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "one block, one head": {"depth": 1, "heads": 1},
    "everything": {"registers": 1, "class_position": False, "image_size": (8, 24), "channels": 1, "layer_scale": 0.1},
}


@pytest.mark.parametrize("changes", SAME_AS_TIMM.values(), ids=SAME_AS_TIMM)
def test_tokens_are_timms_with_timms_weights(changes):
    vit = ViT(ViTConfig(**(TINY | changes))).eval()
    twin = timm_twin(vit)
    assert list(vit.state_dict()) == list(twin.state_dict())
    images = torch.rand(3, vit.channels, *vit.image_size)
    assert_same_tokens(vit(images), timm_tokens(twin, vit, images), vit.registers)


@pytest.mark.parametrize("changes", [{}, {"class_position": False, "registers": 2}, {"class_token": False}])
@pytest.mark.parametrize("size", [(24, 24), (8, 8), (12, 28)])
def test_tokens_are_timms_at_other_resolutions(changes, size):
    vit = ViT(ViTConfig(**(TINY | changes))).eval()
    twin = timm_twin(vit)
    images = torch.rand(2, 3, *size)
    assert_same_tokens(vit(images), timm_tokens(twin, vit, images), vit.registers)


@pytest.mark.parametrize("changes", [{}, {"registers": 2, "class_position": False}, {"layer_scale": 0.1}])
def test_gradients_are_timms(changes):
    vit = ViT(ViTConfig(**(TINY | changes)))
    twin = timm_twin(vit).train()
    images, weights = torch.rand(3, 3, 16, 16), torch.randn(3, 17, 24)
    (torch.cat([(e := vit(images)).cls.unsqueeze(1), e.patches], 1) * weights).sum().backward()
    tokens = timm_tokens(twin, vit, images)
    (torch.cat([tokens[:, :1], tokens[:, -16:]], 1) * weights).sum().backward()
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in vit.named_parameters():
        scale = theirs[name].abs().max()
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=0, atol=float(1e-5 * scale), msg=name)


def test_a_wrong_or_missing_weight_is_an_error():
    vit = ViT(ViTConfig(**TINY))
    state = vit.state_dict()
    for wrong in (
        {name: value for name, value in state.items() if name != "blocks.1.mlp.fc1.bias"},
        state | {"head.weight": torch.zeros(10, 24)},
        state | {"pos_embed": torch.zeros(1, 26, 24)},
    ):
        with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.fc1\.bias|head\.weight|pos_embed"):
            vit.load_state_dict(wrong)


PAPER_COUNTS = {"Ti/16": 5_717_416, "S/16": 22_050_664, "B/16": 86_567_656, "L/16": 304_326_632, "H/14": 632_045_800}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PAPER_COUNTS)
def test_parameter_counts_are_the_papers(name):
    with torch.device("meta"):
        model = Classifier(ViT.variant(name, image_size=224), readout="cls", classes=1000)
    assert parameters(model) == PAPER_COUNTS[name]


WIDTH_DEPTH_HEADS_MLP = {
    "mu": (32, 1, 2, 128), "XS": (128, 6, 4, 512), "Ti": (192, 12, 3, 768), "S": (384, 12, 6, 1536),
    "S-moco_v3": (384, 12, 12, 1536), "M": (512, 12, 8, 2048), "B": (768, 12, 12, 3072), "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120), "So400m": (1152, 27, 16, 4304), "g": (1408, 40, 16, 6144), "G": (1664, 48, 16, 8192),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_the_published_sizes_and_the_count_that_follows(name):
    d, depth, heads, m = WIDTH_DEPTH_HEADS_MLP[name]
    with torch.device("meta"):
        vit = ViT.variant(f"{name}/14", image_size=224)
    block = 4 * d * d + 4 * d + 2 * d * m + d + m + 4 * d
    assert parameters(vit) == (3 * 14 * 14 + 1) * d + d + 257 * d + depth * block + 2 * d
    assert (vit.width, vit.depth, vit.heads, vit.grid) == (d, depth, heads, (16, 16))


def test_a_variant_can_be_changed_and_another_width_has_an_mlp_of_four_times_it():
    vit = ViT.variant("Ti/4", image_size=28, channels=1, width=128, depth=6, heads=4)
    assert vit.blocks[0].mlp.fc1.out_features == 512
    assert ViT.variant("Ti/4", image_size=28, mlp_width=100, depth=1).blocks[0].mlp.fc1.out_features == 100
    assert ViT.variant("S/16", image_size=(32, 64), patch_size=(8, 16), depth=1).grid == (4, 4)


@pytest.mark.parametrize("name", ["XS/7", "S/16", "S-moco_v3/16", "G/14", "R50+B/16", "R50+L/32", "R+Ti/16", "R+XS/8"])
def test_a_model_knows_the_name_of_its_variant(name):
    with torch.device("meta"):
        assert ViT.variant(name, image_size=224).name == name
        changed = ViT.variant(name, image_size=224, depth=3)
    assert changed.name.startswith(f"ViT of width {changed.width}, depth 3, heads {changed.heads}, patches of ")


TIMM_NAMES = {
    "Ti/16": "vit_tiny_patch16_224", "S/16": "vit_small_patch16_224", "H/14": "vit_huge_patch14_224",
    "g/14": "vit_giant_patch14_224", "G/14": "vit_gigantic_patch14_224", "R50+B/16": "vit_base_r50_s16_224",
    "R26+S/32": "vit_small_r26_s32_224", "R+Ti/16": "vit_tiny_r_s16_p8_224", "R50+L/32": "vit_large_r50_s32_224",
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_names_and_shapes_are_those_of_timms_model(name):
    with torch.device("meta"):
        ours = ViT.variant(name, image_size=224).state_dict()
        theirs = timm.create_model(TIMM_NAMES[name], num_classes=0).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_a_hybrid_embeds_the_features_of_its_resnet():
    vit = ViT.variant("R+Ti/16", image_size=(64, 96), depth=1)
    assert vit.patch_size == (32, 32)
    assert vit.grid == (2, 3)
    images = torch.rand(2, 3, 64, 96)
    features = vit.patch_embed.backbone(vit.standardise(images))
    assert features.shape == (2, 64, 16, 24)
    expected = rearrange(vit.patch_embed.proj(features), "b d h w -> b (h w) d")
    torch.testing.assert_close(vit.embed(images), expected, rtol=0, atol=1e-5)
    again = ViT.variant("R+Ti/16", image_size=(64, 96), depth=1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in vit.state_dict().items())
    assert set(HYBRIDS) >= {"R50+B/16", "R26+S/32", "R+Ti/16"}
    with pytest.raises(ValueError, match="not a multiple of 4"):
        ViT(ViTConfig(**(TINY | {"patch_size": 2, "hybrid": "R"})))


def test_patches_are_read_row_by_row_and_put_back():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, (2, 3))
    assert patches.shape == (2, 4, 18)
    assert patches[1, 2].tolist() == [images[1, c, y, x] for y in (2, 3) for x in (0, 1, 2) for c in range(3)]
    assert torch.equal(unpatchify(patches, (2, 3), (2, 2)), images)


def test_the_embedding_is_the_convolution_of_standardised_images():
    vit = ViT(ViTConfig(**TINY, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    images = torch.rand(2, 3, 16, 16)
    standardised = torch.stack([(images[:, c] - (0.1, 0.2, 0.3)[c]) / (0.4, 0.5, 0.6)[c] for c in range(3)], 1)
    expected = rearrange(vit.patch_embed.proj(standardised), "b d h w -> b (h w) d")
    torch.testing.assert_close(vit.embed(images), expected, rtol=0, atol=1e-5)


def test_without_positions_the_model_sees_a_bag_of_patches():
    vit = ViT(ViTConfig(**TINY, position="none")).eval()
    timm_twin(vit)
    tokens, order = vit.embed(torch.rand(2, 3, 16, 16)), torch.randperm(16)
    plain, shuffled = vit.encode(tokens), vit.encode(tokens[:, order])
    torch.testing.assert_close(shuffled.patches, plain.patches[:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(shuffled.cls, plain.cls, rtol=0, atol=1e-5)


def test_an_image_is_encoded_the_same_in_any_batch():
    vit = ViT(ViTConfig(**TINY, registers=1)).eval()
    timm_twin(vit)
    images = torch.rand(5, 3, 16, 16)
    whole = vit(images)
    for i in range(5):
        torch.testing.assert_close(vit(images[i : i + 1]).patches[0], whole.patches[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(vit(images.flip(0)).cls[4 - i], whole.cls[i], rtol=0, atol=1e-5)


def test_a_subset_of_tokens_is_encoded_as_if_there_were_no_others():
    vit = ViT(ViTConfig(**TINY, position="sincos_mae")).eval()
    tokens = vit.add_positions(vit.embed(torch.rand(2, 3, 16, 16)))
    kept = torch.tensor([3, 5, 11])
    encoded = vit.encode(tokens[:, kept])
    changed = tokens.clone()
    changed[:, [i for i in range(16) if i not in kept]] = 7.0
    assert torch.equal(encoded.patches, vit.encode(changed[:, kept]).patches)
    assert encoded.patches.shape == (2, 3, 24)


def test_readouts_are_the_class_token_the_mean_patch_and_both():
    encoded = Encoded(torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 5.0], [3.0, 7.0]]]))
    assert read(encoded, "cls").tolist() == [[1, 2]]
    assert read(encoded, "mean").tolist() == [[2, 6]]
    assert read(encoded, "both").tolist() == [[1, 2, 2, 6]]
    assert read(Encoded(None, encoded.patches), "mean").tolist() == [[2, 6]]
    with pytest.raises(ValueError, match="class token"):
        read(Encoded(None, encoded.patches), "both")
    with pytest.raises(ValueError, match="gap"):
        read(encoded, "gap")


@pytest.mark.parametrize("readout", ["cls", "mean", "both"])
@pytest.mark.parametrize("representation", [None, 10])
def test_a_new_classifier_has_loss_ln_k(readout, representation):
    model = Classifier(ViT(ViTConfig(**TINY)), readout=readout, classes=37, representation=representation)
    logits = model(torch.rand(4, 3, 16, 16))
    assert torch.equal(logits, torch.zeros(4, 37))
    assert nn.functional.cross_entropy(logits, torch.arange(4)).item() == pytest.approx(math.log(37), abs=1e-6)


def test_the_pretraining_head_has_a_tanh():
    model = Classifier(ViT(ViTConfig(**TINY)), readout="mean", classes=24, representation=24)
    nn.init.eye_(model.pre_logits.weight)
    nn.init.eye_(model.head.weight)
    images = torch.rand(2, 3, 16, 16)
    expected = model.backbone(images).patches.mean(1).tanh()
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-6)
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "pre_logits", "head"}


@pytest.mark.parametrize("norm", [True, False])
def test_intermediate_outputs_are_timms(norm):
    vit = ViT(ViTConfig(**TINY, registers=2)).eval()
    twin = timm_twin(vit)
    images = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor(vit.config.mean).view(-1, 1, 1), torch.tensor(vit.config.std).view(-1, 1, 1)
    theirs = twin.get_intermediate_layers((images - mean) / std, n=[0, 2], return_prefix_tokens=True, norm=norm)
    for ours, (patches, prefix) in zip(vit.intermediate(images, [0, 2], norm=norm), theirs, strict=True):
        torch.testing.assert_close(ours.patches, patches, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.cls, prefix[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(vit.intermediate(images, 1)[0].patches, vit(images).patches)
    assert len(vit.intermediate(images, 3)) == 3


def test_attention_is_what_the_blocks_attend_with():
    vit = ViT(ViTConfig(**TINY, registers=1)).eval()
    timm_twin(vit)
    images, inputs, outputs = torch.rand(2, 3, 16, 16), [], []
    for block in vit.blocks:
        block.attn.qkv.register_forward_hook(lambda _, __, qkv: inputs.append(qkv))
        block.attn.proj.register_forward_hook(lambda _, given, __: outputs.append(given[0]))
    vit(images)
    recorded = list(zip(inputs, outputs, strict=True))
    maps = vit.attention(images, vit.depth)
    assert [tuple(p.shape) for p in maps] == [(2, 3, 18, 18)] * 3
    for probabilities, (qkv, output) in zip(maps, recorded, strict=True):
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 18))
        values = rearrange(qkv, "b n (three k d) -> three b k n d", three=3, k=3)[2]
        torch.testing.assert_close(
            rearrange(probabilities @ values, "b k n d -> b n (k d)"), output, rtol=1e-5, atol=1e-5
        )
    assert torch.equal(vit.attention(images, [1])[0], maps[1])


def test_the_config_rebuilds_the_model_after_a_trip_through_json():
    for changes in (
        {"image_size": (8, 24), "patch_size": (4, 8), "registers": 2},
        {"position": "relative", "position_at": "every_layer", "seed": 5, "init": "mae"},
        {"channels": 2, "drop_path": 0.1, "layer_scale": 1e-5, "gelu": "tanh", "class_token": False},
    ):
        vit = ViT(ViTConfig(**(TINY | changes))).eval()
        again = ViT(ViTConfig(**json.loads(json.dumps(asdict(vit.config))))).eval()
        assert again.config == vit.config
        images = torch.rand(1, vit.channels, *vit.image_size)
        assert torch.equal(again(images).patches, vit(images).patches)


def test_checkpointing_changes_no_gradient_and_keeps_less():
    vit = ViT(ViTConfig(**TINY, drop_path=0.3, dropout=0.2))
    timm_twin(vit)
    images, key = torch.rand(4, 3, 16, 16), rng.key(1, torch.arange(4))
    gradients, kept = [], []
    for enable in (False, True):
        vit.set_grad_checkpointing(enable)
        vit.zero_grad()
        sizes = {}

        def remember(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            loss = read(vit(images, key), "both").square().sum()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in vit.parameters()])
        kept.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_autocast_to_bfloat16_stays_close():
    vit = ViT(ViTConfig(**TINY)).eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = vit(images).patches
    torch.testing.assert_close(low.float(), vit(images).patches, rtol=0, atol=0.05)


WRONG = {
    "image_size 18 16": {"image_size": (18, 16)},
    "image_size 0 ": {"image_size": 0},
    "width 24 is not a multiple of heads 5": {"heads": 5},
    "drop_path 1.0": {"drop_path": 1.0},
    "gelu must be.*'quick'": {"gelu": "quick"},
    "init must be.*'xavier'": {"init": "xavier"},
    "position must be.*'rotary'": {"position": "rotary"},
    "position_at must be.*'start'": {"position_at": "start"},
    "position_resize must be.*'nearest'": {"position_resize": "nearest"},
    "3 values": {"mean": (0.5,), "std": (0.5,)},
}


@pytest.mark.parametrize("message", WRONG)
def test_impossible_configurations_are_refused_with_the_reason(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        ViT(ViTConfig(**(TINY | WRONG[message])))


def test_impossible_inputs_are_refused_with_the_reason():
    vit = ViT(ViTConfig(**TINY))
    for images, message in (
        (torch.rand(1, 1, 16, 16), r"\(1, 1, 16, 16\)"),
        (torch.rand(3, 16, 16), r"\(3, 16, 16\)"),
        (torch.rand(1, 3, 16, 18), "16 18"),
    ):
        for method in (vit, vit.embed):
            with pytest.raises(ValueError, match=message):
                method(images)
    with pytest.raises(ValueError, match="15 tokens"):
        vit.add_positions(torch.rand(1, 15, 24))
    for layers in (4, 0, [3], [-1], []):
        with pytest.raises(ValueError, match="layers"):
            vit.intermediate(torch.rand(1, 3, 16, 16), layers)
    with pytest.raises(ValueError, match="XL/16"):
        ViT.variant("XL/16", image_size=224)
    with pytest.raises(ValueError, match="'S'"):
        ViT.variant("S", image_size=224)
    with pytest.raises(ValueError, match="readout 'cls'"):
        Classifier(ViT(ViTConfig(**TINY, class_token=False)), readout="cls", classes=10)
