"""MAE against transformers' ViTMAE, against the official code's steps written out, and in closed form.

Where other packages differ from the paper and its code (read in these versions, not tested here):
- transformers 5.23 agrees once it is given weights and positions. Built from a configuration, its fixed positions (both
  tables) and its mask token are zeros; norm_pix_loss is off by default and LayerNorm's epsilon 1e-12.
- vit-pytorch 1.26.11 has raw pixels as targets, learned positions, no class token, one decoder block by default.
- stable-pretraining 0.1.8 leaves the class token out of the decoder, which sees the patches alone.
"""

import math
from functools import partial
from math import prod

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from sslvit import rng
from sslvit.models.patches import patchify
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.mae import MAE
from sslvit.objectives.objective import Batch

DECODER = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 4}


def small_vit(**changes) -> ViT:
    sizes = {"image_size": 24, "patch_size": 4, "width": 24, "depth": 2, "heads": 3}
    return ViT(ViTConfig(**(sizes | {"position": "sincos_mae", "init": "mae", "seed": 1} | changes)))


def batch_of(vit: ViT, b: int = 3, seed: int = 0) -> Batch:
    images = rng.uniform(rng.key(seed, "images", torch.arange(b)), vit.channels, *vit.image_size)
    return Batch((images.double(),), rng.key(seed, "forward", torch.arange(b)))


def order_of(objective: MAE, batch: Batch) -> Tensor:
    return rng.permutation(rng.fold(batch.key, "dropped"), prod(objective.backbone.grid))


def official_table(grid: tuple[int, int], width: int) -> Tensor:
    """util/pos_embed.py for a class token and the patches row by row, in float64 and in Python's own arithmetic. There
    np.meshgrid(grid_w, grid_h) has w first, so the first half of the channels says the column, the second the row."""
    rows = [[0.0] * width]
    for row in range(grid[0]):
        for column in range(grid[1]):
            halves = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (width / 4)) for i in range(width // 4)]
                halves += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(halves)
    return torch.tensor(rows, dtype=torch.float64)[None]


@pytest.mark.parametrize("grid", [(6, 6), (4, 8)])
def test_positions_of_encoder_and_decoder_have_the_column_first_as_in_the_official_code(grid):
    objective = MAE(small_vit(image_size=(4 * grid[0], 4 * grid[1])), **DECODER)
    for ours, width in ((objective.backbone.pos_embed, 24), (objective.decoder_pos_embed, 16)):
        table = official_table(grid, width)[:, -ours.shape[1] :]
        torch.testing.assert_close(ours.double(), table, rtol=0, atol=1e-6)
    # The patch in the first row and the second column, and the one below the first: not the same but for the halves.
    second, below = official_table(grid, 16)[0, 2], official_table(grid, 16)[0, 1 + grid[1]]
    assert torch.equal(second, below.roll(8))
    assert not torch.equal(second, below)


def shaken(objective: MAE) -> MAE:
    """In float64, with biases and norms that are not the zeros and ones of the start, so that each of them matters."""
    objective = objective.double()
    for i, p in enumerate(objective.parameters()):
        p.data += 0.05 * rng.normal(rng.key(9, i), *p.shape)
    return objective


def check_equal(loss: Tensor, expected: Tensor, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The losses, and the gradients by name: relative to the largest value of each tensor."""
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-8 * scale, msg=name)


def names_in_transformers(name: str) -> list[str]:
    """What transformers calls this parameter; its q, k and v are apart."""
    for ours, theirs in (
        ("backbone.patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
        ("backbone.cls_token", "vit.embeddings.cls_token"),
        ("backbone.blocks", "vit.layers"),
        ("backbone.norm", "vit.layernorm"),
        ("decoder_blocks", "decoder_layers"),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".attn.proj.", ".attention.o_proj."),
    ):
        name = name.replace(ours, theirs)
    name = name if name.startswith("vit.") else f"decoder.{name}"
    return [name.replace(".attn.qkv.", f".attention.{part}_proj.") for part in ("qkv" if ".qkv." in name else "q")]


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_and_gradients_equal_transformers_vitmae_in_float64(normalise):
    objective = shaken(MAE(small_vit(), **DECODER, norm_pix_loss=normalise))
    vit = objective.backbone
    config = ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=24, patch_size=4,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=64, norm_pix_loss=normalise, layer_norm_eps=1e-6,
    )  # fmt: skip
    peer = ViTMAEForPreTraining(config).double().train()
    positions, decoder_positions = peer.vit.embeddings.position_embeddings, peer.decoder.decoder_pos_embed
    positions.data.copy_(official_table(vit.grid, 24).float())  # of float32 in both, as in the official code
    decoder_positions.data.copy_(official_table(vit.grid, 16).float())
    theirs = {name: p for name, p in peer.named_parameters() if p.requires_grad}
    names = {name: names_in_transformers(name) for name, _ in objective.named_parameters()}
    assert sorted(name for some in names.values() for name in some) == sorted(theirs)
    for name, p in objective.named_parameters():
        for one, value in zip(names[name], p.data.chunk(len(names[name])), strict=True):
            theirs[one].data.copy_(value)
    batch = batch_of(vit)
    order = order_of(objective, batch)
    noise = torch.zeros(order.shape).scatter(1, order, torch.arange(36.0).expand_as(order))
    loss, _ = objective(batch, 0.0)
    loss.backward()
    expected = peer(vit.standardise(batch.views[0]), noise=noise).loss
    expected.backward()
    gradients = {name: torch.cat([theirs[one].grad for one in names[name]]) for name in names}
    check_equal(loss, expected, {name: p.grad for name, p in objective.named_parameters()}, gradients)


def official(objective: MAE, batch: Batch) -> Tensor:
    """The official steps in their order: shuffle, keep, encode, put mask tokens in, unshuffle, decode all, weigh by the
    mask. Blocks are timm's."""
    weights = dict(objective.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def blocks(x: Tensor, name: str, heads: int) -> Tensor:
        for layer in range(2):
            prefix = f"{name}.{layer}."
            block = Block(x.shape[-1], heads, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)).double()
            mine = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            x = torch.func.functional_call(block, mine, x, strict=True)
        return x

    vit, (images,) = objective.backbone, batch.views
    imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    mean, deviation = imagenet.double()[..., None, None]  # rounded to float32, as they are in the model
    images = (images - mean) / deviation
    kernel, bias = weights["backbone.patch_embed.proj.weight"], weights["backbone.patch_embed.proj.bias"]
    x = F.conv2d(images, kernel, bias, stride=vit.patch_size).flatten(2).transpose(1, 2)
    positions = official_table(vit.grid, vit.width).float().double()
    x = x + positions[:, 1:]
    ids_shuffle = order_of(objective, batch)
    ids_restore = ids_shuffle.argsort(1)
    b, n, d = x.shape
    kept = n // 4
    x = torch.gather(x, 1, ids_shuffle[:, :kept, None].repeat(1, 1, d))
    mask = torch.ones(b, n).double()
    mask[:, :kept] = 0
    mask = torch.gather(mask, 1, ids_restore)
    x = torch.cat([(weights["backbone.cls_token"] + positions[:, :1]).expand(b, -1, -1), x], 1)
    x = linear(norm(blocks(x, "backbone.blocks", vit.heads), "backbone.norm"), "decoder_embed")
    tokens = weights["mask_token"].repeat(b, n + 1 - x.shape[1], 1)
    unshuffled = torch.gather(torch.cat([x[:, 1:], tokens], 1), 1, ids_restore[:, :, None].repeat(1, 1, x.shape[2]))
    x = torch.cat([x[:, :1], unshuffled], 1) + official_table(vit.grid, 16).float().double()
    x = linear(norm(blocks(x, "decoder_blocks", 4), "decoder_norm"), "decoder_pred")[:, 1:]
    target = torch.stack(
        [
            images[:, :, i : i + 4, j : j + 4].permute(0, 2, 3, 1).flatten(1)
            for i in range(0, vit.image_size[0], 4)
            for j in range(0, vit.image_size[1], 4)
        ],
        1,
    )
    mean = target.mean(-1, keepdim=True)
    variance = ((target - mean) ** 2).sum(-1, keepdim=True) / (target.shape[-1] - 1)
    target = (target - mean) / (variance + 1e-6) ** 0.5
    return (((x - target) ** 2).mean(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("image_size", [24, (16, 32)])
def test_loss_and_gradients_equal_the_official_steps_in_float64(image_size):
    objective = shaken(MAE(small_vit(image_size=image_size), **DECODER))
    batch = batch_of(objective.backbone)
    loss, _ = objective(batch, 0.0)
    expected = official(objective, batch)
    names, parameters = zip(*objective.named_parameters(), strict=True)
    ours, theirs = (dict(zip(names, torch.autograd.grad(x, parameters), strict=True)) for x in (loss, expected))
    check_equal(loss, expected, ours, theirs)


@pytest.mark.parametrize("channels", [1, 3])
def test_predicting_zeros_costs_one_less_the_degree_of_freedom_of_the_mean(channels):
    """The sum of squares of n values of unbiased variance 1 is n - 1; the 1e-6 takes its share of a variance of v."""
    vit = small_vit(channels=channels)
    objective = MAE(vit, **DECODER).double()
    torch.nn.init.zeros_(objective.decoder_pred.weight)
    batch = batch_of(vit)
    loss, metrics = objective(batch, 0.0)
    n = 4 * 4 * channels
    variances = patchify(vit.standardise(batch.views[0]), (4, 4)).var(-1)
    share = (variances / (variances + 1e-6)).gather(1, order_of(objective, batch)[:, 9:]).mean()
    torch.testing.assert_close(loss, (1 - 1 / n) * share, rtol=1e-12, atol=0)
    assert loss.item() == pytest.approx(1 - 1 / n, rel=1e-4)
    assert metrics["loss_of_zeros"] == loss


def test_a_patch_of_one_colour_costs_nothing_where_zeros_are_predicted():
    objective = MAE(small_vit(channels=1), **DECODER)
    torch.nn.init.zeros_(objective.decoder_pred.weight)
    loss, _ = objective(Batch((torch.full((2, 1, 24, 24), 0.25),), rng.key(torch.arange(2))), 0.0)
    assert loss == 0


@pytest.mark.parametrize(
    ("image_size", "patch_size", "mask_ratio", "visible"),
    [(224, 16, 0.75, 49), (32, 4, 0.75, 16), (28, 4, 0.75, 12), (224, 16, 0.6, 78), (24, 4, 0.7, 10), (8, 4, 0.5, 2)],
)
def test_as_many_patches_are_visible_as_in_the_official_code(image_size, patch_size, mask_ratio, visible):
    objective = MAE(small_vit(image_size=image_size, patch_size=patch_size, depth=1), **DECODER, mask_ratio=mask_ratio)
    seen = []
    objective.backbone.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    objective(Batch((torch.rand(1, 3, image_size, image_size),), rng.key(torch.arange(1))), 0.0)
    assert seen == [(1, 1 + visible, 24)]


def test_the_loss_sees_dropped_patches_only_and_the_encoder_the_others_only():
    objective = MAE(small_vit(), **DECODER).double()
    batch = batch_of(objective.backbone, b=1)
    images = batch.views[0].clone().requires_grad_()
    dropped = order_of(objective, batch)[0, 9:]
    predicted = []
    objective.decoder_pred.register_forward_hook(lambda module, inputs, output: predicted.append(output))
    loss, _ = objective(Batch((images,), batch.key), 0.0)
    (gradient,) = torch.autograd.grad(predicted[0].square().sum(), images, retain_graph=True)
    touched = patchify(gradient, (4, 4))[0].abs().amax(-1) > 0
    assert sorted(dropped.tolist()) == torch.nonzero(~touched).flatten().tolist()
    assert predicted[0].shape == (1, 27, 48)
    target = objective.target(batch.views[0], dropped[None])
    torch.testing.assert_close(loss, (predicted[0] - target).square().mean())


def test_each_image_of_each_step_drops_its_own_uniformly_random_patches():
    objective = MAE(small_vit(), **DECODER)
    order = order_of(objective, Batch((), rng.key(0, torch.arange(4000))))
    counts = torch.bincount(order[:, 9:].flatten(), minlength=36).double()
    assert len(order.unique(dim=0)) == 4000
    assert ((counts / 4000 - 0.75).abs() < 5 * (0.75 * 0.25 / 4000) ** 0.5).all()


def test_a_backbone_without_class_token_or_with_learned_positions_can_be_trained_too():
    for changes, readout in (({"class_token": False}, "mean"), ({"position": "learned_1d", "registers": 2}, "cls")):
        objective = MAE(small_vit(**changes), **DECODER).double()
        assert objective.readout == readout
        loss, _ = objective(batch_of(objective.backbone), 0.0)
        loss.backward()
        unused = {name for name, p in objective.named_parameters() if p.grad is None}
        assert not unused


def test_vit_b_with_the_papers_decoder_has_the_parameters_of_the_official_checkpoint():
    """mae_pretrain_vit_base_full: 111,907,840 with its fixed positions, (196 + 1) * (768 + 512)."""
    vit = ViT.variant("B/16", image_size=224, position="sincos_mae", init="mae")
    assert sum(p.numel() for p in MAE(vit).parameters()) == 111_907_840 - 197 * (768 + 512)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"mask_ratio": 1.0}, "mask_ratio 1.0 of 36 patches"),
        ({}, {"mask_ratio": 0.0}, "leaves 36 visible"),
        ({}, {"decoder_width": 30}, "decoder_width 30"),
        ({"position": "learned_1d", "position_at": "every_layer"}, {}, "every_layer"),
    ],
)
def test_impossible_arguments_are_refused_with_their_values(changes, options, message):
    with pytest.raises(ValueError, match=message):
        MAE(small_vit(**changes), **(DECODER | options))


@pytest.mark.parametrize("normalise", [True, False])
def test_a_perfect_prediction_reconstructs_the_image_and_dropped_patches_are_grey(normalise):
    vit = ViT(
        ViTConfig(image_size=16, patch_size=4, width=24, depth=1, heads=3, position="sincos_mae", mean=(0.4, 0.5, 0.6))
    )
    objective = MAE(vit, decoder_width=16, decoder_depth=1, decoder_heads=4, norm_pix_loss=normalise)
    images, key = torch.rand(3, 3, 16, 16), rng.key(0, torch.arange(3))
    batch, predict = Batch((images,), key), objective.predict

    def perfect(batch: Batch):
        encoded, _, order = predict(batch)
        return encoded, objective.target(images, order[:, objective.visible :]), order

    objective.predict = perfect
    grey, filled = objective.reconstructed(batch)
    torch.testing.assert_close(filled, images, rtol=0, atol=1e-5)
    hidden = (grey == 0.5).all(1)
    assert hidden.float().mean() == 0.75
    assert torch.equal(grey.movedim(1, -1)[~hidden], images.movedim(1, -1)[~hidden])
