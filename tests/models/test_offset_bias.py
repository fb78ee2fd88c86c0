"""BEiT's bias of attention by offset: against its definition, timm's tables and timm's interpolation of them."""

import copy

import pytest
import torch
from timm.layers.pos_embed_rel import RelPosBias, resize_rel_pos_bias_table
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.partial import train_only
from sslvit.models.positions import offset_bias, resize_offsets
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.mae import MAE
from sslvit.objectives.simmim import SimMIM
from sslvit.training.optim import parameter_groups

SIZES = {
    "image_size": (12, 20), "patch_size": 4, "width": 12, "depth": 3, "heads": 3, "position": "relative_bias",
    "position_resize": "geometric",
}  # fmt: skip
PLACES = ["every_layer", "every_layer_shared"]
pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # of timm's


def drawn(at: str = "every_layer", **changes) -> ViT:
    vit = ViT(ViTConfig(**(SIZES | {"position_at": at} | changes)))
    draw = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.4, generator=draw)
    return vit.eval()


def images(*size: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (1, 1), (1, 4)])
@pytest.mark.parametrize("classes", [0, 1])
def test_a_table_is_spread_over_all_pairs_as_timms_is(grid, classes):
    theirs = RelPosBias(grid, 3, prefix_tokens=classes)
    table = theirs.relative_position_bias_table
    assert torch.equal(offset_bias(table, grid), theirs.get_bias()[0])
    weights = torch.randn(theirs.get_bias().shape[1:])
    mine, other = (torch.autograd.grad((x * weights).sum(), table)[0] for x in (
        offset_bias(table, grid), theirs.get_bias()[0],
    ))  # fmt: skip
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((4, 4), (3, 7)), ((14, 14), (24, 24)), ((3, 5), (5, 3))])
def test_the_table_of_another_grid_is_timms(old, new):
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1) + 3, 2, generator=torch.Generator().manual_seed(0))
    shape = ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, 2)
    expected = resize_rel_pos_bias_table(table, new, shape, old)
    torch.testing.assert_close(resize_offsets(table, old, new, "geometric"), expected, rtol=0, atol=1e-5)
    assert torch.equal(resize_offsets(table, old, old, "geometric"), table)


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("changes", [{"key_bias": False}, {"class_token": False}, {"class_position": False}])
def test_logits_are_those_of_the_content_plus_the_entry_of_the_offset(at, changes):
    vit = drawn(at, **changes).double()
    (h, w), p, pixels = vit.grid, vit.prefix, images(12, 20).double()
    x = torch.cat([*([vit.cls_token.expand(2, -1, -1)] if p else []), vit.embed(pixels)], 1)
    for layer, block in enumerate(vit.blocks):
        table = vit.relative_bias[layer if at == "every_layer" else 0]
        bias = torch.zeros(3, p + h * w, p + h * w, dtype=torch.float64)
        for i in range(h * w):
            for j in range(h * w):
                rows, columns = i // w - j // w + h - 1, i % w - j % w + w - 1
                bias[:, p + i, p + j] = table[rows * (2 * w - 1) + columns]
        if p:
            bias[:, 0, :], bias[:, :, 0], bias[:, 0, 0] = table[-3, :, None], table[-2, :, None], table[-1]
        linear = block.attn.qkv
        given = linear.bias.clone()
        given[12:24] *= vit.config.key_bias
        q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (
            block.norm1(x) @ linear.weight.T + given
        ).chunk(3, -1))  # fmt: skip
        attended = (q @ k.mT / 2 + bias).softmax(-1) @ v
        x = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x), (None, None))
    torch.testing.assert_close(vit.forward_features(pixels), vit.norm(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("how", ["geometric", "bilinear", "bicubic"])
def test_resizing_for_good_is_resizing_on_the_way(at, how):
    vit, pixels = drawn(at, position_resize=how), images(20, 8)
    resized = vit.resized((20, 8))
    assert torch.equal(resized(pixels).patches, vit(pixels).patches)
    assert resized.relative_bias[0].shape == (9 * 3 + 3, 3)


@pytest.mark.parametrize("at", PLACES)
def test_checkpoints_and_bf16_compute_the_same(at):
    vit, key = drawn(at, drop_path=0.3).train(), rng.key(0, torch.arange(2))
    outputs, gradients = [], []
    for checkpointing in (False, True):
        vit.set_grad_checkpointing(checkpointing)
        vit.zero_grad()
        outputs.append(vit(images(12, 20), key).patches)
        outputs[-1].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in vit.parameters() if parameter.grad is not None])
    assert torch.equal(*outputs)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    expected = outputs[0].detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (vit(images(12, 20), key).patches - expected).abs().max() < 0.05 * expected.abs().max()
    assert copy.deepcopy(vit).bfloat16()(images(12, 20).bfloat16(), key).patches.dtype == torch.bfloat16


def test_a_block_compiles_into_one_graph():
    vit, pixels = drawn(depth=1), images(12, 20)
    expected = vit(pixels).patches
    vit.blocks[0].compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(vit(pixels).patches, expected.detach(), rtol=0, atol=1e-6)


def test_weight_decay_and_rates_follow_the_papers_code():
    """BEiT's optim_factory.py: a block's table has the block's rate, a shared one the head's; and neither is in its
    no_weight_decay, so that of our customs only that of big_vision spares them. timm spares them."""
    for at in PLACES:
        objective = SimMIM(drawn(at))
        groups = parameter_groups(objective, 0.1, layer_decay=0.5, no_weight_decay="vectors")
        scales = {p: (group["scale"], group["decays"]) for group in groups for p in group["params"]}
        tables = [p for name, p in objective.named_parameters() if "relative_bias" in name]
        expected = [0.5**3, 0.5**2, 0.5] if at == "every_layer" else [1.0]
        assert [scales[table] for table in tables] == [(rate, True) for rate in expected]
        _, spared = parameter_groups(objective, 0.1, no_weight_decay="tokens_and_vectors")
        assert all(any(table is p for p in spared["params"]) for table in tables)
        names = {name for name, _ in drawn(at).named_parameters() if "relative_bias" in name}
        assert len(names) == len(tables)
        assert drawn(at).no_weight_decay() == names | {"cls_token"}


def test_the_last_blocks_are_trained_with_their_tables():
    def trained(vit: ViT) -> list[str]:
        return [name for name, p in vit.named_parameters() if p.requires_grad and "relative_bias" in name]

    assert trained(drawn().freeze(2)) == ["relative_bias.1", "relative_bias.2"]
    assert not trained(drawn().freeze())
    assert not trained(drawn("every_layer_shared").freeze(2))  # a change would reach the frozen blocks
    for at, expected in (("every_layer", ["relative_bias.2"]), ("every_layer_shared", [])):
        vit = drawn(at)
        train_only(vit, "last:1")
        assert trained(vit) == expected


def test_what_has_no_entry_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="no entries for registers: 2 must be 0"):
        drawn(registers=2)
    with pytest.raises(ValueError, match="'geometric' is for 'relative_bias', not for 'learned_1d'"):
        ViTConfig(**(SIZES | {"position": "learned_1d"}))
    with pytest.raises(ValueError, match="'relative_bias' lives inside attention"):
        drawn("stem")
    with pytest.raises(ValueError, match=r"'relative_bias' needs all of the grid \(3, 5\), got 7 tokens"):
        drawn().encode(torch.rand(2, 7, 12))
    with pytest.raises(ValueError, match="needs all patches in the encoder"):
        MAE(drawn(), decoder_width=8, decoder_depth=1, decoder_heads=1)
