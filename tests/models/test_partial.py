"""What --train leaves trainable, and LoRA beside peft's on timm's model of the same weights."""

import copy

import peft
import pytest
import timm
import torch
from torch import nn

from sslvit.models.partial import adapters, merged, parse, train_only, trained
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig

WIDTH, DEPTH, HIDDEN = 64, 3, 256


def vit(**changes) -> ViT:
    given = {"image_size": 32, "patch_size": 8, "width": WIDTH, "depth": DEPTH, "heads": 4, "mlp_width": HIDDEN}
    return ViT(ViTConfig(**given | changes))


def timms(ours: ViT) -> nn.Module:
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=4, num_classes=0,
        global_pool="",
    )  # fmt: skip
    state = {name: value for name, value in ours.state_dict().items() if name not in ("mean", "std")}
    theirs.load_state_dict(state, strict=True)
    return theirs


@pytest.mark.parametrize("text", ["lora:4", "lora:4+mlp"])
def test_lora_is_pefts_on_timms_model_with_the_same_weights(text):
    ours = vit()
    theirs = timms(ours)
    train_only(ours, text)
    targets = ["qkv", "proj"] + (["fc1", "fc2"] if "mlp" in text else [])
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[f"attn.{t}" for t in targets[:2]] + targets[2:])
    theirs = peft.get_peft_model(theirs, config)
    names = [name.rpartition(".")[0] for name in adapters(ours) if name.endswith(".down")]
    draw = torch.Generator().manual_seed(0)
    lows = dict(theirs.named_modules())
    for name in names:
        low, other = ours.get_submodule(name).parametrizations.weight[0], lows[f"base_model.model.{name}"]
        with torch.no_grad():
            low.up.copy_(0.02 * torch.randn(low.up.shape, generator=draw))
            other.lora_A["default"].weight.copy_(low.down)
            other.lora_B["default"].weight.copy_(low.up)
    assert trained(ours) == trained(theirs) > 0
    images = torch.rand(5, 3, 32, 32, generator=draw)
    weights = torch.randn(5, 17, WIDTH, generator=draw)
    mine, other = tokens(ours, images), theirs(ours.standardise(images))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    (mine * weights).sum().backward()
    (other * weights).sum().backward()
    for name in names:
        low, other = ours.get_submodule(name).parametrizations.weight[0], lows[f"base_model.model.{name}"]
        torch.testing.assert_close(low.down.grad, other.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(low.up.grad, other.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)
    plain, together = merged(ours), theirs.merge_and_unload()
    torch.testing.assert_close(tokens(ours, images), mine, rtol=0, atol=0)  # it is as it was
    assert plain.state_dict().keys() == vit().state_dict().keys()
    torch.testing.assert_close(tokens(plain, images), mine, rtol=1e-5, atol=1e-5)
    for name, value in together.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def tokens(model: ViT, images: torch.Tensor) -> torch.Tensor:
    encoded = model(images)
    return torch.cat([encoded.cls.unsqueeze(1), encoded.patches], 1)


def test_training_begins_at_the_pretrained_model_and_the_draw_is_the_seeds():
    before = vit()
    images = torch.rand(2, 3, 32, 32)
    one, same, other = (copy.deepcopy(before) for _ in range(3))
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        train_only(model, "lora:2", seed=seed)
        torch.testing.assert_close(tokens(model, images), tokens(before, images), rtol=0, atol=0)
    down = adapters(one)["blocks.0.attn.qkv.down"]
    assert torch.equal(down, adapters(same)["blocks.0.attn.qkv.down"])
    assert not torch.equal(down, adapters(other)["blocks.0.attn.qkv.down"])
    assert not torch.equal(down, adapters(one)["blocks.1.attn.qkv.down"])
    wide = vit(width=256, mlp_width=256)
    train_only(wide, "lora:64")
    drawn = adapters(wide)["blocks.0.attn.qkv.down"]
    assert drawn.abs().max() <= 1 / 16  # torch's linear layers: uniform within the root of 1 / inputs
    assert drawn.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("head", 0),
        # Each of three blocks has two norms, and one comes after them: weight and bias of each.
        ("norm", (2 * DEPTH + 1) * 2 * WIDTH),
        ("attention", DEPTH * (4 * WIDTH * WIDTH + 4 * WIDTH)),
        ("last:1", 4 * WIDTH * WIDTH + 4 * WIDTH + 2 * WIDTH * HIDDEN + HIDDEN + WIDTH + 3 * 2 * WIDTH),
        # A is rank x inputs, B outputs x rank: of qkv 64 to 192, of proj 64 to 64.
        ("lora:8", DEPTH * 8 * ((64 + 192) + (64 + 64))),
        ("lora:8+mlp", DEPTH * 8 * ((64 + 192) + (64 + 64) + 2 * (64 + 256))),
    ],
)
def test_so_many_parameters_are_trained(text, number):
    model = vit()
    train_only(model, text)
    assert trained(model) == number


def test_all_changes_nothing_and_without_adapters_a_model_is_itself():
    model = vit()
    train_only(model, "all")
    assert trained(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert merged(model) is model
    assert adapters(model) == {}


@pytest.mark.parametrize(
    "text", ["lora", "lora:0", "lora:-1", "last", "last:2+mlp", "lora:8+attention", "everything", ""]
)
def test_other_words_are_refused(text):
    with pytest.raises(
        ValueError, match=r"choose one of all, head, norm, attention, last:N, lora:RANK or lora:RANK\+mlp"
    ):
        parse(text)


def test_parts_that_a_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match="--train last:4: the model has 3 blocks"):
        train_only(vit(), "last:4")
    with pytest.raises(ValueError, match=r"--train lora:65: the rank of a matrix of 192 x 64 is not that large"):
        train_only(vit(), "lora:65")
    resnet = BiT.variant("R20x0.5", image_size=32)
    with pytest.raises(ValueError, match="--train lora:4 needs a ViT; a BiT has no blocks"):
        train_only(resnet, "lora:4")
    train_only(resnet, "head")
    assert trained(resnet) == 0
