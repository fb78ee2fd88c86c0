"""SimMIM against transformers' ViTForMaskedImageModeling with our mask, and its squares against the official rule."""

import re
from pathlib import Path

import pytest
import torch
from einops import rearrange
from scipy import stats
from torch import Tensor

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives import simmim
from sslvit.objectives.objective import Batch
from sslvit.objectives.simmim import SimMIM
from sslvit.recipes.simmim import PAPER


def small_vit(**changes) -> ViT:
    return ViT(ViTConfig(**({"image_size": 32, "patch_size": 4, "width": 24, "depth": 2, "heads": 3} | changes)))


def batch_of(b: int = 4, size: int = 32) -> Batch:
    ids = torch.arange(b)
    return Batch((rng.uniform(rng.key(0, ids), 3, size, size).double(),), rng.key(0, "forward", ids))


def theirs_of(name: str, ours: dict[str, Tensor]) -> Tensor:
    """What transformers calls by this name, of our weights or gradients."""
    name = re.sub(r"^vit\.(?:encoder\.)?layers?\.", "backbone.blocks.", name)
    for old, new in (
        ("vit.embeddings.mask_token", "mask_token"),
        ("vit.embeddings.patch_embeddings.projection", "backbone.patch_embed.proj"),
        ("vit.embeddings.position_embeddings", "backbone.pos_embed"),
        ("vit.embeddings.", "backbone."),
        ("vit.layernorm", "backbone.norm"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.o_proj", "attn.proj"),
    ):
        name = name.replace(old, new)
    if found := re.fullmatch(r"(.*)\.attention\.([qkv])_proj\.(\w+)", name):
        return ours[f"{found[1]}.attn.qkv.{found[3]}"].chunk(3)["qkv".index(found[2])]
    if name.startswith("decoder"):  # a convolution whose outputs are channels, rows, columns of a patch
        weight = ours[name.replace("decoder.0", "head")]
        rows = rearrange(weight, "(p q c) ... -> (c p q) ...", p=4, q=4)
        return rows[..., None, None] if weight.ndim == 2 else rows
    return ours[name]


def test_loss_and_gradients_are_those_of_transformers_in_float64():
    transformers = pytest.importorskip("transformers")
    objective = SimMIM(small_vit(seed=3), unit=2, seed=3).double()
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=4,
        encoder_stride=4, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.ViTForMaskedImageModeling(config).double()
    named = dict(theirs.named_parameters())
    theirs.load_state_dict({name: theirs_of(name, dict(objective.named_parameters())).detach() for name in named})
    batch = batch_of()
    loss, metrics = objective(batch, 0.0)
    loss.backward()
    mask = torch.zeros(4, 64, dtype=torch.bool).scatter(1, objective.hidden(batch.key), True)
    expected = theirs(objective.backbone.standardise(batch.views[0]), bool_masked_pos=mask).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # theirs divides by 1e-5 more
    ours = {name: parameter.grad for name, parameter in objective.named_parameters()}
    for name, parameter in named.items():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            theirs_of(name, ours), parameter.grad, rtol=1e-6, atol=max(1e-7 * largest, 1e-14), msg=name
        )
        assert largest > 1e-12 or "k_proj.bias" in name  # which a softmax does not see
    assert metrics["loss_of_zeros"] > 0


def test_squares_of_32_px_are_hidden_whole_60_percent_of_them_rounded_up():
    """data_simmim.py at 224 px: 7 x 7 squares of 2 x 2 patches, 30 hidden, each equally likely."""
    objective = SimMIM(small_vit(image_size=224, patch_size=16))
    hidden = objective.hidden(rng.key(1, torch.arange(500)))
    assert hidden.shape == (500, 30 * 4)
    mask = torch.zeros(500, 196).scatter(1, hidden, 1)
    assert mask.sum() == hidden.numel()
    squares = rearrange(mask, "b (y p x q) -> b y x (p q)", y=7, p=2, x=7, q=2)
    assert torch.equal(squares, squares[..., :1].expand_as(squares))
    counts = squares[..., 0].sum(0).flatten()
    assert stats.chisquare(counts.tolist()).pvalue > 0.001


@pytest.mark.parametrize(
    ("size", "patch", "unit"),
    [
        (224, 16, 2),
        (224, 32, 1),
        (192, 16, 2),
        (32, 4, 1),
        (32, 8, 1),
        (64, 4, 2),
        (96, 8, 2),
        (28, 4, 1),
        (448, 16, 4),
    ],
)
def test_at_any_size_a_square_is_about_a_seventh_of_the_image(size, patch, unit):
    assert SimMIM(small_vit(image_size=size, patch_size=patch)).unit == unit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": 3}, r"unit 3 must divide the grid of 8 x 8 patches: it may be \[1, 2, 4, 8\], or 0"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0 would hide 64 of 64 squares"),
        ({"mask_ratio": 0.0}, "mask_ratio 0.0 would hide 0 of 64"),
        ({"unit": 8}, "would hide 1 of 1"),
    ],
)
def test_impossible_arguments_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        SimMIM(small_vit(), **options)


def test_the_token_is_cut_at_one_deviation_and_the_papers_rate_is_its():
    paper = SimMIM(small_vit(width=768, heads=12, depth=1))
    assert 0.019 < paper.mask_token.abs().max() <= 0.02
    assert paper.mask_token.std().item() == pytest.approx(0.02 * 0.5396, rel=0.1)  # a normal's, cut at 1
    config = PAPER.with_rate()
    assert config.lr == pytest.approx(4e-4)  # 1e-4 * 2048 / 512
    for epoch, rate in ((5, 2e-4), (10, 4e-4), (699, 4e-4), (700, 4e-5), (799, 4e-5)):
        assert config.learning_rate(epoch / 800) == pytest.approx(rate), epoch


def test_pictures_show_what_is_seen_and_the_predictions_in_the_hidden_places():
    objective, batch = SimMIM(small_vit()), batch_of()
    batch = Batch((batch.views[0].float(),), batch.key)
    with torch.no_grad():
        objective.head.weight.zero_()
        objective.head.bias.zero_()
    seen, filled = objective.reconstructed(batch)
    mask = torch.zeros(4, 64).scatter(1, objective.hidden(batch.key), 1)
    pixels = mask.view(4, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3).bool().expand_as(seen)
    assert torch.equal(seen[~pixels], batch.views[0][~pixels])
    assert torch.equal(filled[~pixels], batch.views[0][~pixels])
    assert (seen[pixels] == 0.5).all()
    mean = objective.backbone.mean.expand_as(filled[0]).expand_as(filled)
    torch.testing.assert_close(filled[pixels], mean[pixels])  # zero is the mean colour


def test_the_worked_example_of_the_documentation_is_this_file():
    page = (Path(__file__).parents[2] / "docs" / "adding.md").read_text()
    example = page.split("<!-- worked example -->\n```python\n")[1].split("```")[0]
    assert example == Path(simmim.__file__).read_text()
