"""I-JEPA's blocks by their properties and by hand; its loss in float64, image by image and block by block."""

import pytest
import torch
from objectives_zoo import PATCHES, bit, vit
from torch import Tensor

from sslvit import rng
from sslvit.objectives.ijepa import IJEPA
from sslvit.objectives.multiblock import contexts, draw_blocks, side_lengths
from sslvit.objectives.objective import Batch

GRID, N = (14, 14), 196
SCALE, ASPECT = (0.15, 0.2), (0.75, 1.5)


def objective(**changes) -> IJEPA:
    return IJEPA(vit(0, **PATCHES), predictor_width=24, predictor_depth=2, **changes).double()


def batch(b: int = 6) -> Batch:
    ids = torch.arange(b)
    return Batch((rng.uniform(rng.key(1, ids), 3, 16, 16).double(),), rng.key(2, ids))


@pytest.mark.parametrize(
    ("u", "scale", "aspect", "sides"),
    [
        # 29 patches at 0.75: sqrt(21.75) = 4.7 and sqrt(38.7) = 6.2.
        (0.0, SCALE, ASPECT, (5, 6)),
        # 34 at 1.125: 6.2 and 5.5.
        (0.5, SCALE, ASPECT, (6, 5)),
        # 39 at 1.5: 7.6 and 5.1.
        (0.9999999, SCALE, ASPECT, (8, 5)),
        # 166 and 195 patches: 12.9, and 14 of 14, of which one less is the most.
        (0.0, (0.85, 1.0), (1.0, 1.0), (13, 13)),
        (0.9999999, (0.85, 1.0), (1.0, 1.0), (13, 13)),
    ],
)
def test_one_number_decides_area_and_aspect_ratio(u, scale, aspect, sides):
    assert side_lengths(u, GRID, scale, aspect) == sides


@pytest.fixture(scope="module")
def drawn():
    key = rng.key(0, torch.arange(3000))
    return draw_blocks(key, 0.25, GRID)


def corners(places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = places // GRID[1], places % GRID[1]
    return rows.amin(-1), columns.amin(-1), rows.amax(-1), columns.amax(-1)


def test_targets_are_full_rectangles_of_one_size_anywhere_but_at_the_last_place(drawn):
    top, left, bottom, right = corners(drawn.targets)
    height, width = (bottom - top + 1).unique(), (right - left + 1).unique()
    assert len(height) == len(width) == 1
    assert drawn.targets.shape == (3000, 4, height * width)  # as many places as the rectangle has, so it is full
    assert top.unique().tolist() == [*range(14 - int(height))]  # the last would be 14 - height
    assert left.unique().tolist() == [*range(14 - int(width))]
    share = drawn.targets.shape[-1] / N
    assert 0.13 < share < 0.22
    counts = torch.stack([(top == first).double().mean() for first in top.unique()])
    torch.testing.assert_close(counts, torch.full_like(counts, 1 / len(counts)), atol=0.02, rtol=0)


def test_contexts_have_no_patch_of_a_target_and_are_cut_in_raster_order(drawn):
    seen = torch.zeros(3000, N, dtype=torch.bool).scatter(1, drawn.context, True)
    hidden = torch.zeros(3000, N, dtype=torch.bool).scatter(1, drawn.targets.flatten(1), True)
    assert not (seen & hidden).any()
    assert (seen.sum(1) == drawn.context.shape[1]).all()
    assert (drawn.context.diff(dim=1) > 0).all()
    # The block is 13 x 13 in the corner, all that is possible; what is not hidden of it is seen, but for what is cut.
    corner = torch.zeros(14, 14, dtype=torch.bool)
    corner[:13, :13] = True
    whole = corner.flatten() & ~hidden
    assert drawn.context.shape[1] == whole.sum(1).min()
    for image in range(50):
        assert drawn.context[image].tolist() == whole[image].nonzero()[: drawn.context.shape[1], 0].tolist()


def test_blocks_of_an_image_depend_on_its_key_and_the_step_alone(drawn):
    few = draw_blocks(rng.key(0, torch.arange(7, 12)), 0.25, GRID)
    assert torch.equal(few.targets, drawn.targets[7:12])
    shared = min(few.context.shape[1], drawn.context.shape[1])
    assert torch.equal(few.context[:, :shared], drawn.context[7:12, :shared])
    sizes = {draw_blocks(rng.key(0, torch.arange(2)), step / 50, GRID).targets.shape[-1] for step in range(50)}
    assert {5 * 6, 6 * 6, 6 * 5} & sizes
    assert len(sizes) >= 3


def test_a_context_of_which_too_little_is_left_gives_up_the_last_target():
    """Of 14 x 14 patches 10 or fewer are too little."""
    hidden = torch.zeros(2, 4, N, dtype=torch.bool)
    hidden[:, 0, :14] = True
    hidden[0, 3, 14:] = True  # nothing is left
    seen = contexts(rng.key(0, torch.arange(2)), (13, 13), GRID, hidden)
    block = torch.zeros(14, 14, dtype=torch.bool)
    block[1:13, :13] = True  # without the first row
    assert torch.equal(seen, block.flatten().expand(2, -1))
    hidden[0, 0] = True
    hidden[0, 0, 5] = False  # even without the others too little is left: then all of the block is seen
    block[0, :13] = True
    assert torch.equal(contexts(rng.key(0, torch.arange(2)), (13, 13), GRID, hidden)[0], block.flatten())
    tiny = contexts(rng.key(0, torch.arange(2)), (2, 2), GRID, hidden)[0]  # four patches, and ten are too few
    assert tiny.nonzero().tolist() == [[5]]


def test_the_loss_is_smooth_l1_of_normalised_features_block_by_block():
    """Each image and each of its blocks alone, with the formulas written out."""
    model, given = objective(), batch()
    with torch.no_grad():
        for parameter in model.student.parameters():  # two encoders that differ
            parameter.add_(0.05 * rng.normal(rng.key(parameter.numel()), *parameter.shape).to(parameter))
    drawn = draw_blocks(rng.fold(given.key, "blocks"), 0.4, (4, 4))
    total, count = 0.0, 0
    for i, image in enumerate(given.views[0].unsqueeze(1)):
        whole = model.backbone(image).patches[0]
        tokens = model.student.add_positions(model.student.embed(image))[:, drawn.context[i]]
        seen = (
            model.predictor_embed(model.student.encode(tokens).patches) + model.predictor_pos_embed[:, drawn.context[i]]
        )
        for block in drawn.targets[i]:
            x = torch.cat([seen, model.mask_token + model.predictor_pos_embed[:, block]], 1)
            for layer in model.predictor_blocks:
                x = layer(x)
            predicted = model.predictor_proj(model.predictor_norm(x[:, seen.shape[1] :]))[0]
            wanted = whole[block]
            mean, variance = wanted.mean(-1, keepdim=True), wanted.var(-1, correction=0, keepdim=True)
            error = (predicted - (wanted - mean) / (variance + 1e-5).sqrt()).abs()
            total = total + torch.where(error < 1, error**2 / 2, error - 0.5).sum()
            count += error.numel()
    loss, metrics = model(given, 0.4)
    torch.testing.assert_close(loss, total / count, rtol=1e-9, atol=0)
    assert metrics["context"] == drawn.context.shape[1]
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    for name, ours, theirs in zip(
        names, torch.autograd.grad(loss, parameters), torch.autograd.grad(total / count, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12, msg=name)


def test_the_target_encoder_follows_with_a_momentum_that_rises_linearly_from_that_of_the_step_taken():
    model = objective(momentum=0.9)
    name = "blocks.0.mlp.fc1.weight"
    expected = dict(model.backbone.named_parameters())[name].clone()
    for step, momentum in enumerate((0.9, 0.925, 0.95, 0.975)):
        student = dict(model.student.named_parameters())[name]
        with torch.no_grad():
            student.add_(1.0)
        model(batch(), step / 4)
        model.after_step((step + 1) / 4)
        expected = momentum * expected + (1 - momentum) * student.detach()
    torch.testing.assert_close(dict(model.backbone.named_parameters())[name].detach(), expected)


def test_what_it_cannot_be_built_on_is_refused():
    with pytest.raises(ValueError, match="too few to hide blocks"):
        IJEPA(vit(0, **PATCHES, patch_size=16))
    with pytest.raises(ValueError, match=r"1 view of 16 x 16, and got \[\(16, 16\), \(16, 16\)\]"):
        objective()(batch()._replace(views=batch().views * 2), 0.0)
    with pytest.raises(ValueError, match="I-JEPA hides patches of a ViT, and BiT has none"):
        IJEPA(bit(0))
    with pytest.raises(ValueError, match="not a multiple of its 3 heads"):
        IJEPA(vit(0, **PATCHES), predictor_width=16)
