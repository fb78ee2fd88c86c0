"""Who decays: kernels do; biases, norms, positions and tokens do not."""

import torch

from sslvit.objectives.mpp import MPP
from sslvit.optim import adamw, parameter_groups
from sslvit.vit import ViT


def test_every_trainable_parameter_is_in_one_group_and_only_kernels_decay():
    objective = MPP(ViT(image_size=8, patch_size=4, width=8, depth=1, heads=1, registers=2, layer_scale=0.1))
    objective.backbone.patch_embed.requires_grad_(False)
    decayed, spared = parameter_groups(objective, 0.1)
    names = {id(p): name for name, p in objective.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "head.weight",
        *(f"backbone.blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    every = [*decayed["params"], *spared["params"]]
    assert {id(p) for p in every} == {id(p) for p in objective.parameters() if p.requires_grad}
    assert len(every) == len({id(p) for p in every})


def test_decay_is_multiplied_by_the_learning_rate():
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = adamw([{"params": [p], "weight_decay": 0.5}], (0.9, 0.999))
    optimizer.param_groups[0]["lr"] = 0.1
    p.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 1 - 0.1 * 0.5))
