"""Masked patch prediction against the paper's text: exact counts, closed forms, and a float64 reference of our own."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from sslvit import rng
from sslvit.models.patches import patchify
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.mpp import MPP, color_classes, corrupted
from sslvit.objectives.objective import Batch


def small_vit(**changes) -> ViT:
    return ViT(ViTConfig(**({"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 3} | changes)))


def batch_of(objective: MPP, b: int = 5, seed: int = 0) -> Batch:
    vit = objective.backbone
    images = rng.uniform(rng.key(seed, "images", torch.arange(b)), vit.channels, *vit.image_size)
    return Batch((images,), rng.key(seed, "forward", torch.arange(b)))


def reference(objective: MPP, batch: Batch) -> torch.Tensor:
    """The paper's text, patch by patch in float64 with the same draws; the ViT written out from its equations."""
    weights = dict(objective.named_parameters())
    vit, (images,) = objective.backbone, batch.views
    p = vit.patch_size[0]
    mean, std = vit.mean.double(), vit.std.double()
    order = rng.permutation(rng.fold(batch.key, "corrupted"), math.prod(vit.grid))
    fate = rng.uniform(rng.fold(batch.key, "fate"), objective.count)
    other = rng.integers(rng.fold(batch.key, "other"), math.prod(vit.grid) - 1, objective.count)
    losses = []
    for i, image in enumerate(images.double()):
        kernel, bias = weights["backbone.patch_embed.proj.weight"], weights["backbone.patch_embed.proj.bias"]
        clean = F.conv2d(((image - mean) / std)[None], kernel, bias, stride=p)[0].flatten(1).T
        rows = list(clean)
        for j in range(objective.count):
            place = int(order[i, j])
            if fate[i, j] < 0.8:
                rows[place] = weights["mask_embedding"]
            elif fate[i, j] < 0.9:
                rows[place] = clean[(place + 1 + int(other[i, j])) % len(rows)]
        x = torch.cat([weights["backbone.cls_token"][0], torch.stack(rows)]) + weights["backbone.pos_embed"][0]

        def norm(x, name):
            return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

        def linear(x, name):
            return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

        for layer in range(vit.depth):
            name = f"backbone.blocks.{layer}"
            q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").split(vit.width, -1)
            heads = []
            for head in range(vit.heads):
                d = vit.width // vit.heads
                part = slice(head * d, head * d + d)
                heads.append((q[:, part] @ k[:, part].T / d**0.5).softmax(-1) @ v[:, part])
            x = x + linear(torch.cat(heads, -1), f"{name}.attn.proj")
            hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
            x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"{name}.mlp.fc2")
        x = norm(x, "backbone.norm")[1:]
        for j in range(objective.count):
            place = int(order[i, j])
            top, left = place // vit.grid[1] * p, place % vit.grid[1] * p
            pixels = image[:, top : top + p, left : left + p]
            out = linear(x[place], "head")
            if objective.target == "pixels":
                losses.append(((out - pixels.permute(1, 2, 0).flatten()) ** 2).mean())
                continue
            side = 4 if objective.target == "downsized" else 1
            cells = F.avg_pool2d(pixels, p // side).flatten(1).T
            for cell, logits in zip(cells, out.view(side * side, -1), strict=True):
                number = 0
                for value in cell:
                    number = number * 8 + min(7, math.floor(8 * float(value)))
                losses.append(torch.logsumexp(logits, 0) - logits[number])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("target", ["mean", "downsized", "pixels"])
@pytest.mark.parametrize("channels", [1, 3])
def test_loss_and_gradients_equal_the_papers_text_in_float64(target, channels):
    objective = MPP(small_vit(channels=channels, seed=3), target=target).double()
    batch = batch_of(objective, b=3)
    loss, _ = objective(Batch((batch.views[0].double(),), batch.key), 0.0)
    gradients = torch.autograd.grad(loss, list(objective.parameters()))
    expected = reference(objective, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, p), ours, theirs in zip(
        objective.named_parameters(),
        gradients,
        torch.autograd.grad(expected, list(objective.parameters())),
        strict=True,
    ):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(
            ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()), msg=f"{name} {p.shape}"
        )


def test_exactly_half_of_the_patches_are_corrupted_80_10_10():
    objective = MPP(small_vit(image_size=32, patch_size=2, width=8, heads=1, depth=1))
    n, counts = 256, {"mask": 0, "other": 0, "kept": 0}
    for part in range(8):
        key = rng.key(1, torch.arange(100) + 100 * part)
        tokens = torch.randn(100, n, 8, generator=torch.Generator().manual_seed(part))
        chosen = rng.permutation(rng.fold(key, "corrupted"), n)[:, : objective.count]
        out, _ = corrupted(tokens, chosen, objective.mask_embedding, key)
        is_chosen = torch.zeros(100, n, dtype=torch.bool).scatter(1, chosen, True)
        assert is_chosen.sum(1).eq(n // 2).all()
        same = (out == tokens).all(-1)
        masked = (out == objective.mask_embedding).all(-1)
        assert same[~is_chosen].all()  # nothing but the chosen half is touched
        assert not (same & masked).any()
        swapped = is_chosen & ~same & ~masked
        # what was swapped in is a clean embedding of another patch of the same image
        image, place = swapped.nonzero()[0].tolist()
        source = (tokens[image] == out[image, place]).all(-1).nonzero().flatten()
        assert len(source) == 1
        assert source.item() != place
        counts["mask"] += int(masked.sum())
        counts["kept"] += int((is_chosen & same).sum())
        counts["other"] += int(swapped.sum())
    total = sum(counts.values())
    assert total == 8 * 100 * 128  # of 204,800 patches
    assert abs(counts["mask"] / total - 0.8) < 0.01
    assert abs(counts["other"] / total - 0.1) < 0.01
    assert abs(counts["kept"] / total - 0.1) < 0.01


def test_the_other_patch_is_any_other_equally_often():
    objective = MPP(small_vit(width=8, heads=1, depth=1), corrupt=1.0)
    key = rng.key(4, torch.arange(4000))
    tokens = torch.arange(1.0, 17.0)[None, :, None].expand(4000, 16, 8)
    chosen = torch.arange(16).expand(4000, 16)
    out = corrupted(tokens, chosen, objective.mask_embedding, key)[0][..., 0]
    swapped = (out != tokens[..., 0]) & (out >= 1)
    offsets = ((out - tokens[..., 0]) % 16)[swapped].long()
    counts = torch.bincount(offsets, minlength=16)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 0.01


@pytest.mark.parametrize(("corrupt", "expected"), [(0.5, 8), (0.15, 2), (1.0, 16)])
def test_the_share_of_corrupted_patches_is_exact(corrupt, expected):
    assert MPP(small_vit(), corrupt=corrupt).count == expected


def test_black_is_class_0_and_white_511_and_red_is_the_first_digit():
    def one(red, green, blue):
        image = torch.tensor([red, green, blue])[None, :, None, None].expand(1, 3, 4, 4)
        return int(color_classes(patchify(image, (4, 4)), (4, 4), 1))

    assert one(0.0, 0.0, 0.0) == 0
    assert one(1.0, 1.0, 1.0) == 511
    assert one(0.126, 0.0, 0.0) == 64
    assert one(0.124, 0.25, 0.999) == 2 * 8 + 7
    grey = torch.full((1, 1, 4, 4), 0.5)
    assert int(color_classes(patchify(grey, (4, 4)), (4, 4), 1)) == 4


def test_the_downsized_patch_is_read_row_by_row():
    image = torch.zeros(1, 1, 8, 8)
    image[..., 0:2, 2:4] = 1.0  # of the 4x4 cells of 2x2 pixels, the second of the first row
    image[..., 6:8, 0:2] = 0.5
    classes = color_classes(patchify(image, (8, 8)), (8, 8), 4).flatten()
    expected = torch.zeros(16, dtype=torch.long)
    expected[1], expected[12] = 7, 4
    assert torch.equal(classes, expected)


def test_a_patch_that_four_does_not_divide_is_downsized_by_area():
    image = torch.zeros(1, 1, 7, 7)
    image[..., 1] = 1.0  # of cells 1.75 pixels wide it fills 0.75 / 1.75 = 0.43 of the first and 0.14 of the second
    classes = color_classes(patchify(image, (7, 7)), (7, 7), 4)
    assert classes.view(4, 4).tolist() == [[3, 1, 0, 0]] * 4
    assert (color_classes(patchify(image * 0 + 0.5, (7, 7)), (7, 7), 4) == 4).all()


@pytest.mark.parametrize(("target", "channels", "colours"), [("mean", 3, 512), ("downsized", 3, 512), ("mean", 1, 8)])
def test_a_zero_head_has_the_loss_of_a_uniform_guess(target, channels, colours):
    objective = MPP(small_vit(channels=channels), target=target)
    torch.nn.init.zeros_(objective.head.weight)
    loss, metrics = objective(batch_of(objective), 0.0)
    assert loss.item() == pytest.approx(math.log(colours), rel=1e-6)
    assert 0 <= metrics["accuracy"] <= 1


def test_the_commonest_colour_metric_counts_the_commonest_colour():
    objective = MPP(small_vit(), corrupt=1.0)
    images = torch.zeros(4, 3, 16, 16)
    images[0] = 1.0  # a quarter of the patches is white
    _, metrics = objective(Batch((images,), rng.key(0, torch.arange(4))), 0.0)
    assert metrics["accuracy_of_commonest_colour"].item() == 0.75


def test_guessing_the_mean_patch_costs_its_variance():
    objective = MPP(small_vit(), target="pixels", corrupt=1.0)
    images = torch.zeros(2, 3, 16, 16)
    images[0] = 1.0
    _, metrics = objective(Batch((images,), rng.key(0, torch.arange(2))), 0.0)
    assert metrics["loss_of_mean_patch"].item() == pytest.approx(0.25)


def test_pixels_of_a_masked_patch_change_no_prediction():
    objective = MPP(small_vit())
    batch = batch_of(objective, b=8)
    chosen = rng.permutation(rng.fold(batch.key, "corrupted"), 16)[:, :8]
    fate, other = rng.uniform(rng.fold(batch.key, "fate"), 8), rng.integers(rng.fold(batch.key, "other"), 15, 8)
    swapped_in = {
        (i, int((chosen[i, j] + 1 + other[i, j]) % 16)) for i in range(8) for j in range(8) if 0.8 <= fate[i, j] < 0.9
    }
    images, changed = batch.views[0].clone(), 0
    for i in range(8):
        for j in range(8):
            place = int(chosen[i, j])
            if fate[i, j] < 0.8 and (i, place) not in swapped_in:
                images[i, :, place // 4 * 4 : place // 4 * 4 + 4, place % 4 * 4 : place % 4 * 4 + 4] = 0.123
                changed += 1
    assert changed > 30
    seen = []
    objective.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    objective(batch, 0.0)
    objective(Batch((images,), batch.key), 0.0)
    assert torch.equal(seen[0], seen[1])


def test_positions_are_added_after_corruption():
    """Two masked patches of one image differ only by where they are, so their predictions differ."""
    objective = MPP(small_vit(), corrupt=1.0)
    key = rng.key(0, torch.arange(1))
    tokens, _ = corrupted(torch.zeros(1, 16, 24), torch.arange(16)[None], objective.mask_embedding, key)
    masked = (tokens == objective.mask_embedding).all(-1)[0]
    with_positions = objective.backbone.add_positions(tokens)[0, masked]
    assert len(with_positions.unique(dim=0)) == int(masked.sum()) > 1


def test_an_images_loss_does_not_depend_on_its_batch():
    objective = MPP(small_vit()).double()
    batch = batch_of(objective, b=6)
    images = batch.views[0].double()
    whole, _ = objective(Batch((images,), batch.key), 0.0)
    parts = [objective(Batch((images[i : i + 2],), batch.key[i : i + 2]), 0.0)[0] for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"corrupt": 0.0}, "leaves nothing"),
        ({}, {"corrupt": 1.5}, "corrupt 1.5"),
        ({"channels": 5}, {}, "use the target pixels"),
        ({"patch_size": 2}, {"target": "downsized"}, "below 4"),
        ({}, {"target": "color"}, "color"),
    ],
)
def test_impossible_arguments_are_refused_with_their_values(changes, options, message):
    with pytest.raises(ValueError, match=message):
        MPP(small_vit(**changes), **options)


@pytest.mark.parametrize(("target", "cells"), [("mean", 1), ("downsized", 4), ("pixels", 0)])
def test_a_reconstruction_has_predicted_colours_in_corrupted_patches_alone(target, cells):
    objective = MPP(small_vit(), target=target)
    batch = batch_of(objective)
    torch.nn.init.zeros_(objective.head.weight)
    with torch.no_grad():
        if cells:  # the class of red 7, green 0, blue 3: in the middle of its eighth
            objective.head.bias.view(-1, 512)[:, 7 * 64 + 3] = 1.0
            colour = torch.tensor([7.5, 0.5, 3.5]) / 8
        else:
            objective.head.bias.fill_(0.3)
            colour = torch.full((3,), 0.3)
    corrupted, filled = (patchify(x, (4, 4)).unflatten(-1, (16, 3)) for x in objective.reconstructed(batch))
    images = patchify(batch.views[0], (4, 4)).unflatten(-1, (16, 3))
    same = (filled == images).all(-1).all(-1)
    assert same.sum(1).tolist() == [objective.count] * len(images)  # half of 16 patches are corrupted
    assert torch.allclose(filled[~same], colour.expand(16, 3))
    grey = (corrupted == 0.5).all(-1).all(-1)
    assert not (grey & same).any()
    assert 0.6 < grey.sum() / (~same).sum() < 0.95  # 80 % are masked


def test_the_three_bits_of_a_colour_are_read_back_in_their_order():
    objective = MPP(small_vit(), corrupt=1.0)
    batch = batch_of(objective)
    truth = color_classes(patchify(batch.views[0], (4, 4)), (4, 4), 1).squeeze(-1)

    predict = objective.predict

    def perfect(batch):
        encoded, _, chosen = predict(batch)
        return encoded, torch.nn.functional.one_hot(truth.gather(1, chosen.places), 512).float(), chosen

    objective.predict = perfect
    means = patchify(batch.views[0], (4, 4)).unflatten(-1, (16, 3)).mean(2)
    filled = patchify(objective.reconstructed(batch)[1], (4, 4)).unflatten(-1, (16, 3))
    assert (filled.mean(2) - means).abs().max() <= 1 / 16 + 1e-6
