"""DINO against its pseudo-code in float64, the official schedules by closed form, and lightly's loss if it is there."""

import json
import math
from pathlib import Path

import numpy as np
import preloaded
import pytest
import torch
import torch.distributed as dist
from recipes_run import run
from tiny_run import DEFAULTS, STEPS as STEPS_OF_RUN, source
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslvit import rng
from sslvit.config import TrainConfig
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.dino import DINO, Head, cross_entropy_of_pairs
from sslvit.objectives.objective import Batch
from sslvit.processes.collectives import start
from sslvit.storage import checkpoint
from sslvit.train import pretrain
from sslvit.training import optim
from sslvit.views.pretraining import MultiCrop as Crops
from sslvit.weights.folder import save_backbone

SIZES = {"outputs": 40, "hidden": 32, "bottleneck": 16}


def small_vit(**changes) -> ViT:
    return ViT(ViTConfig(**({"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 3} | changes)))


def small_dino(seed: int = 0, **changes) -> DINO:
    return DINO(small_vit(seed=seed), **({"drop_path": 0.0, "seed": seed} | SIZES | changes))


def batch_of(b: int = 6, sizes: tuple[int, ...] = (16, 16, 8, 8), seed: int = 0, dtype=torch.float32) -> Batch:
    ids = torch.arange(b)
    views = (rng.uniform(rng.key(seed, view, ids), 3, size, size).to(dtype) for view, size in enumerate(sizes))
    return Batch(tuple(views), rng.key(seed, "forward", ids))


@torch.no_grad()
def apart(objective: DINO) -> DINO:
    """A centre that is not zero, and a teacher that is not the student."""
    for name, p in [*objective.backbone.named_parameters(), *objective.head.named_parameters()]:
        if name != "weight_g":
            p += 0.02 * rng.normal(rng.key("apart", name), *p.shape)
    objective.centre += 0.1 * rng.normal(rng.key("centre"), len(objective.centre))
    return objective


def bicubic(had: int, wanted: int) -> Tensor:
    """Weights of the old places for each new one, by Keys' kernel with a = -0.75, as torch's plain bicubic has it. DINO
    gives it the scale (wanted + 0.1) / had instead of a size (vision_transformer.py, interpolate_pos_encoding)."""
    weights = torch.zeros(wanted, had).double()
    for i in range(wanted):
        place = (i + 0.5) * had / (wanted + 0.1) - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            x = abs(place - j)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), had - 1)] += near if x <= 1 else far
    return weights


def official_cls(vit: ViT, images: Tensor) -> Tensor:
    """The class token of an image of any size, by the official rule for positions."""
    (had, _), (h, w) = vit.grid, vit.grid_of(images)
    positions = vit.pos_embed[:, 1:].unflatten(1, (had, had))
    if (h, w) != vit.grid:
        positions = torch.einsum("ia,jb,labd->lijd", bicubic(had, h), bicubic(had, w), positions)
    return vit.encode(vit.embed(images) + positions.flatten(1, 2), (h, w)).cls


def pseudocode(objective: DINO, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """The paper's algorithm 1 with multi-crop, one view at a time: the loss, and the mean of the teacher's logits."""

    def network(vit: ViT, head: Head, images: Tensor) -> Tensor:
        x = official_cls(vit, images)
        for layer in (head.mlp[0], head.mlp[2]):
            x = x @ layer.weight.T + layer.bias
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        x = x @ head.mlp[4].weight.T + head.mlp[4].bias
        x = x / x.square().sum(1, keepdim=True).sqrt()
        last = nn.utils.parametrizations.weight_norm(nn.Linear(x.shape[1], len(head.weight_v), bias=False).double())
        parameters = {
            "parametrizations.weight.original0": head.weight_g,
            "parametrizations.weight.original1": head.weight_v,
        }
        return torch.func.functional_call(last, parameters, (x,))

    def distribution(logits: Tensor) -> Tensor:
        return logits.exp() / logits.exp().sum(1, keepdim=True)

    with torch.no_grad():
        teacher = [network(objective.backbone, objective.head, view) for view in batch.views[:2]]
    student = [network(objective.student, objective.student_head, view) for view in batch.views]
    terms = []
    for i, t in enumerate(teacher):
        for j, s in enumerate(student):
            if i != j:
                target = distribution((t - objective.centre) / temperature)
                terms.append(-(target * distribution(s / objective.student_temperature).log()).sum(1).mean())
    return torch.stack(terms).mean(), torch.cat(teacher).mean(0)


@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 16, 8, 8, 8)])
def test_loss_gradients_and_centre_equal_the_pseudocode_in_float64(sizes, norm_last_layer):
    objective = apart(small_dino(norm_last_layer=norm_last_layer)).double()
    with torch.no_grad():
        objective.student_head.weight_g += 0.2 * rng.uniform(rng.key("lengths"), SIZES["outputs"], 1)
    batch = batch_of(sizes=sizes, dtype=torch.float64)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    loss, metrics = objective(batch, 0.15)
    expected, mean = pseudocode(objective, batch, temperature=0.055)  # halfway from .04 to .07
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(loss, list(trained.values()))
    theirs = torch.autograd.grad(expected, list(trained.values()))
    for name, a, b in zip(trained, ours, theirs, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()), msg=name)
    assert ("student_head.weight_g" in trained) != norm_last_layer
    before = objective.centre.clone()
    objective.after_step(0.2)
    torch.testing.assert_close(objective.centre, 0.9 * before + 0.1 * mean, rtol=1e-12, atol=1e-15)
    assert metrics["divergence"] > 0


@pytest.mark.parametrize(
    "words",
    ["--preset small --model XS/4", "--preset paper --epochs 100 --model XS/4", "--preset small --init_from {start}"],
)
def test_the_recipes_own_objective_is_the_official_arithmetic_in_float64(words, tmp_path):
    """Small crops see a table of 6 x 6 places at 3 x 3, whatever rule the model that is started from had."""
    given, sizes = [], {"image_size": 24, "patch_size": 4, "width": 24, "depth": 2, "heads": 3}
    save_backbone(ViT(ViTConfig(**sizes, position_resize="bicubic")), tmp_path / "start", {"readout": "cls"})
    words = f"{words} --data shapes:n=8 --image_size 24 --crops 3 12 --head 32 16 40 --drop_path 0"
    words += f" --momentum 0.9 --batch_size 8 --out {tmp_path / 'run'}"
    run("dino", words.format(start=tmp_path / "start"), pretrain=lambda *all: given.extend(all) or [], finish=print)
    objective = apart(given[0]).double()
    batch = batch_of(b=3, sizes=(24, 24, 12, 12, 12), dtype=torch.float64)
    loss, _ = objective(batch, 0.0)
    expected, _ = pseudocode(objective, batch, temperature=0.04)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    ours, theirs = (torch.autograd.grad(value, list(trained.values())) for value in (loss, expected))
    for name, a, b in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * float(b.abs().max()), msg=name)


@pytest.mark.parametrize("views", [2, 5])
def test_the_loss_is_lightlys(views):
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    key = rng.key(0, torch.arange(views))
    teacher, student = rng.normal(key[:2], 6, 40).double(), rng.normal(rng.fold(key, "student"), 6, 40).double()
    student.requires_grad_(True)
    theirs = lightly.DINOLoss(output_dim=40, teacher_temp=0.05, student_temp=0.1).double()
    theirs.center += 0.3
    expected = theirs(list(teacher), list(student), teacher_temp=0.05)
    ours = cross_entropy_of_pairs(((teacher - 0.3) / 0.05).softmax(-1), student / 0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    (a,), (b,) = torch.autograd.grad(ours, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("sizes", [(16, 16), (16, 16, 8, 8, 8)])
def test_a_uniform_teacher_and_student_cost_ln_k(sizes):
    objective = small_dino()
    with torch.no_grad():
        for head in (objective.head, objective.student_head):
            head.weight_v[:] = head.weight_v[0]
    loss, metrics = objective(batch_of(sizes=sizes), 0.5)
    assert loss.item() == pytest.approx(math.log(40), rel=1e-6)
    assert metrics["teacher_entropy"].item() == pytest.approx(math.log(40), rel=1e-6)
    assert metrics["teacher_outputs"].item() == pytest.approx(40, rel=1e-5)
    assert metrics["divergence"].item() == pytest.approx(0, abs=1e-5)
    assert metrics["teacher_information"].item() == pytest.approx(0, abs=1e-5)


def test_a_teacher_that_is_sure_of_one_output_for_all_images_uses_one_output():
    objective = small_dino()
    objective.centre[1:] += 10
    _, metrics = objective(batch_of(), 0.5)
    assert metrics["teacher_outputs"].item() == pytest.approx(1, abs=1e-5)
    assert metrics["teacher_entropy"].item() == pytest.approx(0, abs=1e-5)


def test_the_teacher_follows_by_the_official_momentum_of_the_iteration():
    """The official schedule is an array with one value an iteration, read at the iteration that was just taken."""
    iterations = 10
    official = 1 + 0.5 * (0.996 - 1) * (1 + np.cos(np.pi * np.arange(iterations) / iterations))
    objective, batch = small_dino().double(), batch_of(b=2, dtype=torch.float64)
    for i in range(iterations):
        teacher = [*objective.backbone.parameters(), *objective.head.parameters()]
        student = [*objective.student.parameters(), *objective.student_head.parameters()]
        objective(batch, i / iterations)
        with torch.no_grad():
            for t, s in zip(teacher, student, strict=True):
                t.zero_()
                s.fill_(1.0)
        objective.after_step((i + 1) / iterations)
        for t in teacher:
            torch.testing.assert_close(t, torch.full_like(t, 1 - official[i]), rtol=1e-9, atol=0)


def test_the_teachers_temperature_rises_linearly_and_stays_near_the_official_steps():
    objective = small_dino()
    assert objective.temperature(0.0) == pytest.approx(0.04)
    assert objective.temperature(0.15) == pytest.approx(0.055)
    assert [objective.temperature(progress) for progress in (0.3, 0.7, 1.0)] == pytest.approx([0.07] * 3)
    assert small_dino(temperature_warmup=0.0).temperature(0.0) == 0.07
    official = np.concatenate([np.linspace(0.04, 0.07, 30), np.full(70, 0.07)])  # an epoch each, of 100
    for i in range(1000):
        assert abs(objective.temperature(i / 1000) - official[i // 10]) <= 0.001 + 1e-9


def test_forward_moves_neither_the_centre_nor_the_teacher_and_after_step_both():
    objective = small_dino()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective(batch_of(), 0.0)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    with torch.no_grad():
        for p in [*objective.student.parameters(), *objective.student_head.parameters()]:
            p += 0.1
    objective.after_step(0.1)
    moved = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, _ in objective.named_parameters()} | {"centre"} == moved


def test_the_centre_moves_once_a_step_by_the_mean_over_all_its_parts():
    whole, parts = small_dino().double(), small_dino().double()
    batch = batch_of(b=8, dtype=torch.float64)
    whole(batch, 0.3)
    for part in (slice(0, 4), slice(4, 8)):
        parts(Batch(tuple(view[part] for view in batch.views), batch.key[part]), 0.3)
    whole.after_step(0.4)
    parts.after_step(0.4)
    assert whole.centre.abs().max() > 0
    torch.testing.assert_close(parts.centre, whole.centre, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("view", [0, 2])
def test_what_is_not_finite_reaches_nothing_when_the_step_is_not_taken(value, view):
    objective, spared = small_dino(), small_dino()
    good, bad = batch_of(), batch_of(seed=1)
    bad.views[view][3, 1, 5, 5] = value
    loss, _ = objective(bad, 0.1)
    assert not loss.isfinite()
    for dino in (objective, spared):  # the loop goes on with the next batch
        dino(good, 0.2)
        dino.after_step(0.3)
    for name, tensor in objective.state_dict().items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, spared.state_dict()[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_teacher_makes_the_loss_non_finite(value):
    """So the loop's look at the loss is enough to keep the centre clean."""
    objective = small_dino()
    with torch.no_grad():
        objective.head.mlp[4].bias[0] = value
    loss, _ = objective(batch_of(), 0.1)
    assert not loss.isfinite()


def test_the_last_layer_is_held_at_first_and_the_optimizer_passes_over_it():
    objective, batch = small_dino(norm_last_layer=False), batch_of()
    optimizer = optim.adamw(optim.parameter_groups(objective, 0.4), (0.9, 0.999))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    last = {"weight_v": objective.student_head.weight_v, "weight_g": objective.student_head.weight_g}
    before = {name: p.clone() for name, p in last.items()}
    for step, progress in enumerate((0.0, 0.009, 0.01)):
        objective(batch, progress)[0].backward()
        for parameter in objective.frozen_parameters(progress):
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(progress + 0.01)
        for name, p in last.items():
            assert torch.equal(p, before[name]) == (step < 2), (name, step)
            assert (p in optimizer.state) == (step == 2)
    assert optimizer.state[last["weight_v"]]["step"] == 1
    assert optimizer.state[objective.student_head.mlp[4].weight]["step"] == 3


def test_the_loop_holds_the_last_layer_and_then_lets_it_go(tmp_path):
    def run(epochs_held: float) -> tuple[DINO, Tensor]:
        objective = small_dino(norm_last_layer=False, freeze_last_layer=epochs_held / DEFAULTS["epochs"])
        before = objective.student_head.weight_v.detach().clone()
        views = Crops(16, 8, 2)
        config = TrainConfig(out=tmp_path / f"{epochs_held}", **DEFAULTS)
        pretrain(objective, source(), views, config, start(threads=1))
        return objective, before

    objective, before = run(DEFAULTS["epochs"])
    assert torch.equal(objective.student_head.weight_v, before)
    saved = checkpoint.latest(tmp_path / f"{DEFAULTS['epochs']}" / "checkpoints").tensors
    moments = [name for name in saved if name.startswith("optimizer.")]
    assert moments
    assert not any("student_head.weight" in name for name in moments)
    objective, before = run(DEFAULTS["epochs"] / 2)
    assert not torch.equal(objective.student_head.weight_v, before)
    saved = checkpoint.latest(tmp_path / f"{DEFAULTS['epochs'] / 2}" / "checkpoints").tensors
    assert saved["optimizer.student_head.weight_v.step"] == STEPS_OF_RUN // 2


def test_each_size_is_forwarded_once_and_the_teacher_sees_the_large_crops_alone():
    objective, seen = small_dino(), {"student": [], "teacher": []}
    objective.student.register_forward_hook(lambda module, inputs, output: seen["student"].append(inputs[0].shape))
    objective.backbone.register_forward_hook(lambda module, inputs, output: seen["teacher"].append(inputs[0].shape))
    objective(batch_of(b=3, sizes=(16, 16, *[8] * 6)), 0.5)
    assert seen == {"student": [(6, 3, 16, 16), (18, 3, 8, 8)], "teacher": [(6, 3, 16, 16)]}


def test_the_teacher_is_exported_starts_as_the_student_and_gets_no_gradient():
    backbone = small_vit()
    objective = DINO(backbone, **SIZES, drop_path=0.3)
    assert objective.backbone is backbone
    assert objective.readout == "cls"
    assert (objective.backbone.drop_path, objective.student.drop_path) == (0.0, 0.3)
    student = objective.student.state_dict()
    assert all(torch.equal(value, student[name]) for name, value in backbone.state_dict().items())
    objective(batch_of(), 0.5)[0].backward()
    frozen = {name for name, p in objective.named_parameters() if p.grad is None}
    teachers = {name for name, _ in objective.named_parameters() if name.startswith(("backbone.", "head."))}
    assert frozen == teachers | {"student_head.weight_g"}


def test_drop_path_draws_for_each_crop_anew_and_never_for_the_teacher():
    objective = small_dino(drop_path=0.5)
    image = batch_of(b=8).views[0]
    batch = Batch((image, image), batch_of(b=8).key)
    first, second = objective.encode(batch).chunk(2)
    assert not torch.allclose(first, second)
    assert torch.equal(objective.backbone(image).cls, objective.backbone(image).cls)


def test_the_length_of_weight_v_does_not_matter_and_that_of_weight_g_does():
    head, features = small_dino().double().head, rng.normal(rng.key(0), 5, 24).double()
    logits = head(features)
    assert logits.abs().max() <= 1  # cosines
    with torch.no_grad():
        head.weight_v *= 7
        torch.testing.assert_close(head(features), logits, rtol=1e-12, atol=1e-15)
        head.weight_g *= 3
        torch.testing.assert_close(head(features), 3 * logits, rtol=1e-12, atol=1e-15)


def test_the_last_layer_keeps_all_digits_in_mixed_precision():
    head, features = small_dino().head, rng.normal(rng.key(0), 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        logits, embeddings = head(features), nn.functional.normalize(head.mlp(features).float(), dim=-1)
    assert logits.dtype == torch.float32
    rows = nn.functional.normalize(head.weight_v, dim=-1)
    torch.testing.assert_close(logits, embeddings @ rows.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("vit", "options", "message"),
    [
        ({"class_token": False}, {}, "class token"),
        ({"drop_path": 0.1}, {}, "drop_path 0.1"),
        ({"dropout": 0.2}, {}, "dropout 0.2"),
        ({}, {"teacher_temperature": (0.0, 0.07)}, "temperatures"),
        ({}, {"student_temperature": -1.0}, "temperatures -1.0"),
        ({}, {"momentum": 1.2}, "momentum 1.2"),
        ({}, {"freeze_last_layer": -0.1}, "freeze_last_layer -0.1"),
    ],
)
def test_impossible_arguments_are_refused_with_their_values(vit, options, message):
    with pytest.raises(ValueError, match=message):
        DINO(small_vit(**vit), **SIZES, **options)


@pytest.mark.parametrize("sizes", [(16,), (16, 8), (16, 8, 8)])
def test_the_first_two_views_must_be_of_one_size(sizes):
    with pytest.raises(ValueError, match=r"\(6, 3, 16, 16\)"):
        small_dino()(batch_of(sizes=sizes), 0.5)


STEPS = 20


def train(rank: int, processes: int, folder: Path) -> None:
    """Some steps with this process's rows of each batch, the last layer held in the first four."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=processes)
    objective = small_dino(drop_path=0.2, freeze_last_layer=0.2)
    model = DistributedDataParallel(objective) if processes > 1 else objective
    optimizer = optim.adamw(optim.parameter_groups(objective, 0.04), (0.9, 0.999))
    losses = []
    for step in range(STEPS):
        batch = batch_of(b=16, seed=step)
        mine = slice(rank * 16 // processes, (rank + 1) * 16 // processes)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        loss, _ = model(Batch(tuple(view[mine] for view in batch.views), batch.key[mine]), step / STEPS)
        loss.backward()
        for parameter in objective.frozen_parameters(step / STEPS):
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step((step + 1) / STEPS)
        if processes > 1:
            loss = loss.detach().clone()
            dist.all_reduce(loss)
        losses.append(loss.item() / processes)
    (folder / f"{processes}-{rank}.json").write_text(
        json.dumps(
            {"losses": losses, "centre": objective.centre.tolist(), "class": objective.backbone.cls_token.tolist()}
        )
    )
    if processes > 1:
        dist.destroy_process_group()


@pytest.mark.processes
def test_two_processes_have_the_losses_and_the_centre_of_one(tmp_path):
    train(0, 1, tmp_path)
    preloaded.spawn(train, (2, tmp_path), nprocs=2)
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert first["centre"] == second["centre"]
    assert first["class"] == second["class"]
    np.testing.assert_allclose(first["centre"], one["centre"], rtol=1e-3, atol=1e-6)
