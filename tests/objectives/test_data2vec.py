"""data2vec with transformers' blocks and the formulas written out image by image, for 20 steps in float64."""

import copy
import math

import pytest
import torch
from objectives_zoo import vit
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.models.vit_config import SHARED_BIAS
from sslvit.objectives.data2vec import Data2Vec
from sslvit.objectives.objective import Batch
from sslvit.recipes.data2vec import PAPER

LAYERS, STEPS, RATE = 2, 20, 1e-2
MOMENTUM = (0.6, 0.9)
# transformers' names, which have q, k and v apart and no bias of keys (a softmax over keys does not see it).
NAMES = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "ls1.gamma": "lambda_1", "ls2.gamma": "lambda_2",
}  # fmt: skip
QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))


def objective(attention: dict | None = None, **changes) -> Data2Vec:
    options = {"average_layers": LAYERS, "momentum": MOMENTUM} | changes
    backbone = vit(0, depth=3, patch_size=2, drop_path=0.0, layer_scale=0.3, **(attention or {}))
    return Data2Vec(backbone, **options).double()


def batch(step: int = 0, b: int = 3) -> Batch:
    ids = torch.arange(b)
    return Batch((rng.uniform(rng.key(1, step, ids), 3, 16, 16).double(),), rng.key(2, step, ids))


def theirs(state: dict[str, Tensor], mask_token: Tensor) -> dict[str, Tensor]:
    """Ours by transformers' names; works for gradients too."""
    found = {"embeddings.mask_token": mask_token, "embeddings.cls_token": state["cls_token"]}
    if "pos_embed" in state:
        found["embeddings.position_embeddings"] = state["pos_embed"]
    else:
        found["encoder.relative_position_bias.relative_position_bias_table"] = state["relative_bias"][0]
    for name, value in state.items():
        if name.startswith("patch_embed.proj."):
            found[name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")] = value
        if not name.startswith("blocks."):
            continue
        _, number, name = name.split(".", 2)
        layer = f"encoder.layer.{number}."
        if name.startswith("attn.qkv."):
            kind = name.removeprefix("attn.qkv.")
            for each, part in zip(QKV, value.chunk(3), strict=True):
                if not (kind == "bias" and each.endswith("key")):
                    found[f"{layer}{each}.{kind}"] = part
            continue
        ours = next(one for one in NAMES if name.startswith(one))
        found[layer + name.replace(ours, NAMES[ours])] = value
    return found


def data2vec_model(backbone: ViT, mask_token: Tensor) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = backbone.config
    model = transformers.Data2VecVisionModel(
        transformers.Data2VecVisionConfig(
            hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
            intermediate_size=config.mlp_width, layer_norm_eps=config.epsilon, image_size=16, patch_size=2,
            use_mask_token=True, layer_scale_init_value=1.0, drop_path_rate=0.0,
            use_absolute_position_embeddings=config.position != "relative_bias",
            use_shared_relative_position_bias=config.position == "relative_bias",
        )
    ).double()  # fmt: skip
    model.load_state_dict(theirs(backbone.state_dict(), mask_token))
    return model


def written_out_loss(
    student: nn.Module, norm: nn.LayerNorm, teacher: nn.Module, images: Tensor, masks: Tensor
) -> Tensor:
    """Image by image; the teacher's encoder is given the student's embeddings."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for image, mask in zip(images, masks, strict=True):
        last = student(image[None], bool_masked_pos=mask[None], output_hidden_states=True).hidden_states[-1]
        predicted = norm(last)  # as fairseq's extract_features returns it to the student, and not to the teacher
        with torch.no_grad():
            embedded, _ = student.embeddings(image[None])
            outputs = teacher.encoder(embedded, output_hidden_states=True, resolution=(16, 16)).hidden_states
        for patch in mask.nonzero()[:, 0] + 1:  # behind the class token
            mean = sum(output[0, patch] for output in outputs[-LAYERS:]) / LAYERS
            target = (mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()
            error = (predicted[0, patch] - target).abs()
            total = total + torch.where(error < 2, error**2 / 4, error - 1).sum() / math.sqrt(len(error))
            count += 1
    return total / count


@pytest.mark.parametrize(("attention", "steps"), [({}, STEPS), (SHARED_BIAS, 5)], ids=["positions", "a bias by offset"])
def test_20_steps_are_those_written_out_with_transformers_blocks(attention, steps):
    ours = objective(attention)
    with torch.no_grad():  # LayerScale and norms that are not all one, biases that are not zero
        for name, parameter in ours.backbone.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * rng.normal(rng.key(name), *parameter.shape)
        ours.target.load_state_dict(ours.backbone.state_dict())
    student = data2vec_model(ours.backbone, ours.mask_token)
    teacher = copy.deepcopy(student)
    norm = nn.LayerNorm(ours.backbone.width, eps=ours.backbone.config.epsilon).double()
    norm.load_state_dict(ours.backbone.norm.state_dict())
    trained = [list(ours.parameters()), [*student.parameters(), *norm.parameters()]]
    optimizers = [torch.optim.SGD([p for p in one if p.requires_grad], RATE) for one in trained]
    standardise, counts = ours.backbone.standardise, set()
    for step in range(steps):
        given = batch(step)
        loss, metrics = ours(given, step / STEPS)
        masks = ours.hidden(given.key).mask
        counts.add(tuple(masks.sum(1).tolist()))
        expected = written_out_loss(student, norm, teacher, standardise(given.views[0]), masks)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        assert metrics["hidden"].item() == pytest.approx(masks.double().mean().item())
        for optimizer, value in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            value.backward()
        gradients = {name: p.grad for name, p in ours.backbone.named_parameters() if p.requires_grad}
        gradients = theirs(gradients, ours.mask_token.grad)
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-12, msg=name)
        for name, parameter in norm.named_parameters():
            found = getattr(ours.backbone.norm, name).grad
            torch.testing.assert_close(found, parameter.grad, rtol=1e-7, atol=1e-12, msg=name)
        for optimizer in optimizers:
            optimizer.step()
        ours.after_step((step + 1) / STEPS)
        momentum = 0.6 + 0.3 * (step + 1) / STEPS
        with torch.no_grad():
            for mine, other in zip(teacher.encoder.parameters(), student.encoder.parameters(), strict=True):
                mine.copy_(momentum * mine + (1 - momentum) * other)
    assert any(len(set(each)) > 1 for each in counts)  # so that a mean over images would be another loss
    averaged = theirs(ours.target.state_dict(), ours.mask_token)
    for name, parameter in teacher.encoder.named_parameters():
        torch.testing.assert_close(averaged[f"encoder.{name}"], parameter.detach(), rtol=1e-9, atol=1e-12, msg=name)


def test_the_teacher_sees_whole_images_through_the_students_embeddings_and_drops_nothing():
    ours = Data2Vec(vit(0, patch_size=2, drop_path=0.5), average_layers=2, momentum=(0.5, 0.5)).double().train()
    given = batch()
    with torch.no_grad():
        for parameter in ours.backbone.parameters():
            parameter += 0.1
    ours.after_step(0.1)
    changed = {
        name
        for name, parameter in ours.target.named_parameters()
        if not torch.equal(parameter, dict(ours.backbone.named_parameters())[name])
    }
    assert {name.split(".")[0] for name in changed} == {"blocks", "norm"}
    hidden = ours.hidden(given.key)
    calm = copy.deepcopy(ours).eval()
    assert torch.equal(ours.targets(given.views[0], hidden), calm.targets(given.views[0], hidden))
    assert not torch.equal(ours(given, 0.0)[0], calm(given, 0.0)[0])  # the student drops half of the last block


def test_targets_are_of_outputs_before_the_final_norm():
    ours, given = objective(), batch()
    hidden = ours.hidden(given.key)
    before = ours.targets(given.views[0], hidden)
    with torch.no_grad():
        ours.target.norm.weight.zero_()
    assert torch.equal(ours.targets(given.views[0], hidden), before)


def test_the_papers_masks_hide_about_120_of_196_patches_in_blocks():
    ours = Data2Vec(vit(0, image_size=56), average_layers=1)  # 14 x 14
    counts = ours.hidden(rng.key(0, torch.arange(2000))).mask.sum(1)
    assert ours.wanted == 120
    assert Data2Vec(vit(0, depth=12)).average_layers == 6
    assert counts.max() == 120
    assert 110 < counts.double().mean() < 120


def test_the_papers_rate_is_5e_4_at_its_batch():
    assert PAPER.with_rate().lr == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_layers": 4}, "average_layers 4 must be from 1 to 3"),
        ({"momentum": (0.9, 1.5)}, "momentum at the end 1.5 must lie in"),
        ({"mask_ratio": 0.0}, "mask_ratio 0.0 must be above 0"),
        ({"beta": 0.0}, "beta 0.0 above 0"),
    ],
)
def test_impossible_arguments_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**options)
