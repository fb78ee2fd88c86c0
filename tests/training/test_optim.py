"""Who decays, by the customs of the papers, and by how much."""

import pytest
import torch

from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.dino import DINO
from sslvit.objectives.mae import MAE
from sslvit.objectives.moco_v3 import MoCoV3
from sslvit.objectives.mpp import MPP
from sslvit.objectives.supervised import Supervised
from sslvit.training.optim import adamw, parameter_groups

KERNELS = {
    "head.weight",
    "backbone.patch_embed.proj.weight",
    *(f"backbone.blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
}
TOKENS = {f"backbone.{name}" for name in ("pos_embed", "pos_embed_x", "pos_embed_y", "cls_token", "reg_token")}


def objective() -> MPP:
    sizes = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 1, "heads": 1}
    return MPP(ViT(ViTConfig(**sizes, registers=2, layer_scale=0.1, position="learned_2d")))


@pytest.mark.parametrize(
    ("no_weight_decay", "expected"), [("tokens_and_vectors", KERNELS), ("vectors", KERNELS | TOKENS), ("nothing", None)]
)
def test_what_is_spared_is_what_the_papers_code_spares(no_weight_decay, expected):
    mpp = objective()
    names = {id(p): name for name, p in mpp.named_parameters()}
    decayed, spared = parameter_groups(mpp, 0.1, no_weight_decay=no_weight_decay)
    assert {names[id(p)] for p in decayed["params"]} == (set(names.values()) if expected is None else expected)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert (decayed["decays"], spared["decays"]) == (True, False)


def test_a_two_dimensional_bias_is_a_bias_to_the_papers_that_look_at_names():
    module = torch.nn.ModuleDict({"layer": torch.nn.Module()})
    module["layer"].bias = torch.nn.Parameter(torch.zeros(2, 2))
    assert [len(group["params"]) for group in parameter_groups(module, 0.1, no_weight_decay="vectors")] == [0, 1]


@pytest.mark.parametrize("no_weight_decay", ["tokens_and_vectors", "vectors", "nothing"])
def test_every_trainable_parameter_is_in_one_group_and_no_frozen_one(no_weight_decay):
    mpp = objective()
    mpp.backbone.patch_embed.requires_grad_(False)
    decayed, spared = parameter_groups(mpp, 0.1, no_weight_decay=no_weight_decay)
    every = [*decayed["params"], *spared["params"]]
    assert {id(p) for p in every} == {id(p) for p in mpp.parameters() if p.requires_grad}
    assert len(every) == len({id(p) for p in every})


SIZES = {"image_size": 8, "patch_size": 4, "width": 8, "heads": 1}
HEADS = {"outputs": 8, "hidden": 8, "bottleneck": 4}
# How it is made, and what the backbone that is trained is called in it.
LEARNERS = {
    "DINO": (lambda vit: DINO(vit, **HEADS, norm_last_layer=False), "student."),
    "MoCo v3": (lambda vit: MoCoV3(vit, hidden=8, dimension=4), "backbone."),
    "MAE": (lambda vit: MAE(vit, decoder_width=8, decoder_depth=1, decoder_heads=1), "backbone."),
    "MPP": (MPP, "backbone."),
    "supervised": (lambda vit: Supervised(vit, classes=3), "backbone."),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_layer_decay_reaches_the_backbone_that_is_trained_whatever_it_is_called(name):
    """MAE's formula (util/lr_decay.py): 0.5^(depth + 1 - layer), where what comes before the blocks is layer 0, block i
    is layer i + 1, and the last norm and every head are layer depth + 1."""
    make, prefix = LEARNERS[name]
    objective = make(ViT(ViTConfig(**SIZES, depth=3)))
    names = {id(p): name for name, p in objective.named_parameters()}
    scales = {}
    for group in parameter_groups(objective, 0.1, layer_decay=0.5):
        scales |= {names[id(p)]: group["scale"] for p in group["params"]}
    assert scales.keys() == {name for name, p in objective.named_parameters() if p.requires_grad}
    for name, scale in scales.items():
        inside = name.removeprefix(prefix)
        if inside.startswith(("cls_token", "pos_embed", "patch_embed")) and inside != name:
            assert scale == 0.5**4, name
        elif inside.startswith("blocks.") and inside != name:
            assert scale == 0.5 ** (4 - (int(inside.split(".")[1]) + 1)), name
        else:
            assert scale == 1, name
    assert sorted(set(scales.values())) == [0.0625, 0.125, 0.25, 0.5, 1.0]


class Slower(MPP):
    """Embeds patches at a fifth of the rate, as DINOv2."""

    def rate_factor(self, name: str) -> float:
        return 0.2 if name.startswith("patch_embed.") else 1.0


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_an_objective_may_multiply_the_rate_of_a_parameter_besides_layer_decay(layer_decay):
    objective = Slower(ViT(ViTConfig(**SIZES, depth=3)))
    scales = {
        p: group["scale"]
        for group in parameter_groups(objective, 0.1, layer_decay=layer_decay)
        for p in group["params"]
    }
    vit = objective.backbone
    assert scales[vit.patch_embed.proj.weight] == scales[vit.patch_embed.proj.bias] == 0.2 * layer_decay**4
    assert scales[vit.pos_embed] == layer_decay**4
    assert scales[objective.head.weight] == scales[vit.norm.weight] == 1.0
    assert len(scales) == len(list(objective.parameters()))


def test_positions_in_attention_and_mask_tokens_are_spared_with_the_tokens():
    """They are looked up or put in, never multiplied with: big_vision's custom decays kernels alone."""
    relative = MPP(ViT(ViTConfig(**SIZES, depth=1, position="relative", position_at="every_layer")))
    masked = MAE(ViT(ViTConfig(**SIZES, depth=1)), decoder_width=8, decoder_depth=1, decoder_heads=1)
    for objective, name in ((relative, "backbone.relative_embed"), (masked, "mask_token")):
        parameter = objective.get_parameter(name)
        assert parameter.ndim == 3
        for no_weight_decay, spared in (("tokens_and_vectors", True), ("vectors", False), ("nothing", False)):
            decayed, kept = parameter_groups(objective, 0.1, no_weight_decay=no_weight_decay)
            assert any(p is parameter for p in (kept if spared else decayed)["params"]), (name, no_weight_decay)


def test_an_unknown_custom_is_refused():
    with pytest.raises(ValueError, match="everything"):
        parameter_groups(objective(), 0.1, no_weight_decay="everything")


def test_decay_is_multiplied_by_the_learning_rate():
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = adamw([{"params": [p], "weight_decay": 0.5}], (0.9, 0.999))
    optimizer.param_groups[0]["lr"] = 0.1
    p.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 1 - 0.1 * 0.5))
