"""Adapting a model: heads first, then the backbone a little; what it says of it, and what it keeps."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from foreign_models import scramble, standardised
from recipes_run import run
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

import sslvit
from sslvit.evaluate.adaptation import BEST, Adaptation, Change, judged
from sslvit.models.partial import merged
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Batch
from sslvit.recipes import adapt
from sslvit.runs.ending import status_of
from sslvit.training.optim import parameter_groups
from sslvit.weights.folder import load_backbone, load_described, save_backbone

TINY = "--data shapes:n=64 --keep_data shapes:texture,n=64 --threads 1 --batch_size 16 --log_every 1"


@pytest.fixture
def model(tmp_path) -> Path:
    save_backbone(ViT.variant("mu/8", image_size=16), tmp_path / "model", {"readout": "cls", "objective": "made up"})
    return tmp_path / "model"


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_model_as_it_came_has_the_accuracy_of_timms_features(tmp_path):
    """To the digit, on the new images and on the kept ones; nearest neighbours are counted by numpy here."""
    theirs = scramble(
        timm.create_model("vit_small_patch14_dinov2", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    )
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    save_for_hf(theirs, tmp_path / "timm", safe_serialization=True, model_args=arguments)
    constants = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    words = f"{TINY} --init_from {tmp_path / 'timm'} --objective dino --epochs 2 --evaluate_every 0"
    run("adapt", f"{words} --out {tmp_path / 'run'}")
    first = lines_of(tmp_path / "run")[0]

    def features(data: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        images = sslvit.open_images(data, split=split, image_size=16)
        pixels = images.read(np.arange(len(images))).pixels / 255
        with torch.no_grad():
            tokens = theirs.forward_features(standardised(pixels, constants))
        unit = torch.nn.functional.normalize(tokens[:, 0], dim=-1)
        return unit.double().numpy(), np.asarray(images.required_labels())

    for data, kept in (("shapes:n=64", ""), ("shapes:texture,n=64", " (kept)")):
        (train, labels), (test, answers) = features(data, "train"), features(data, "test")
        similarity, right = test @ train.T, 0
        for row, answer in zip(similarity, answers, strict=True):
            nearest = np.argsort(-row)[:20]
            votes = np.bincount(labels[nearest], np.exp(row[nearest] / 0.07), minlength=12)
            right += votes.argmax() == answer
        assert first[f"eval/cls/20-nn{kept}"] == right / len(answers)


@pytest.mark.parametrize("objective", ["dinov2", "mae", "mpp"])
def test_it_says_what_the_model_was_and_what_became_of_it(model, tmp_path, capsys, objective):
    words = f"{TINY} --init_from {model} --objective {objective} --epochs 3 --out {tmp_path / 'run'}"
    run("adapt", words)
    told = capsys.readouterr().out
    lines = lines_of(tmp_path / "run")
    readout = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["sslvit"]["readout"]
    evaluated = [line for line in lines if f"eval/{readout}/20-nn" in line]
    assert [line["step"] for line in evaluated] == [0, 4, 8, 12]
    for line in evaluated:
        assert {f"eval/{readout}/20-nn (kept)", f"eval/{readout}/10-shot (kept)", "drift", "alignment"} <= line.keys()
    assert evaluated[0]["drift"] == pytest.approx(0, abs=1e-6)
    # The heads' epoch leaves the backbone as it was.
    same = {name for name in evaluated[0] if name.startswith("eval/") and evaluated[1][name] == evaluated[0][name]}
    assert same == {name for name in evaluated[0] if name.startswith("eval/")}
    assert evaluated[1]["drift"] == pytest.approx(0, abs=1e-6)
    assert evaluated[3]["drift"] > 0
    assert told.count("new images: ") == 3
    assert "step 12: " in told


def test_the_backbones_rate_is_nothing_then_a_line_then_level():
    config = adapt.Config(epochs=10, head_epochs=2, ramp_epochs=4, backbone_lr=0.1)
    rates = [config.backbone_rate(passes / 10) for passes in (0, 1.9, 2, 3, 4, 6, 9)]
    assert rates == pytest.approx([0, 0, 0, 0.025, 0.05, 0.1, 0.1])
    assert adapt.Config(head_epochs=0, ramp_epochs=0).backbone_rate(0) == 0.1
    with pytest.raises(ValueError, match=r"--head_epochs 10 of --epochs 10: the backbone would never learn; give 1"):
        adapt.Config(head_epochs=10, lr=1.0).check()


def test_backbone_and_heads_are_in_groups_of_their_own():
    objective = MPP(ViT.variant("mu/8", image_size=16))
    backbone = set(objective.backbone.parameters())
    for layer_decay in (1.0, 0.5):
        groups = parameter_groups(objective, 0.1, layer_decay=layer_decay, apart=True)
        assert sum(len(group["params"]) for group in groups) == len(list(objective.parameters()))
        for group in groups:
            assert all((one in backbone) == group["backbone"] for one in group["params"])
        assert {group["scale"] for group in groups if not group["backbone"]} == {1.0}
    assert not any(group["backbone"] for group in parameter_groups(objective, 0.1, layer_decay=0.5))


def test_a_part_is_adapted_and_the_best_model_is_kept(model, tmp_path):
    words = f"{TINY} --init_from {model} --objective mpp --epochs 2 --head_epochs 0 --backbone_lr 1 --base_lr 0.1"
    run("adapt", f"{words} --train norm --most_forgotten 1 --out {tmp_path / 'run'}")
    before, after = load_backbone(model).state_dict(), load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed
    assert all("norm" in name for name in changed)
    accuracies = [line["eval/mean/20-nn"] for line in lines_of(tmp_path / "run") if "eval/mean/20-nn" in line]
    assert (tmp_path / "run" / BEST / "model.safetensors").exists() == (max(accuracies[1:]) > accuracies[0])


def test_checks_come_soon_after_the_backbone_begins_however_long_a_pass_is():
    config = adapt.Config(epochs=3, head_epochs=1, batch_size=64)
    images = 64 * 5000
    due = [step for step in range(1, 15_001) if config.is_evaluated(step, 15_000, images)]
    early = [5100, 5200, 5400, 5800, 6600, 8200]  # 100, 200, 400, ... after the heads' pass
    assert due == [5000, *early, 10_000, 11_400, 15_000]
    few = [step for step in range(1, 31) if config.is_evaluated(step, 30, 640)]
    assert few == [10, 20, 30]
    never = replace(config, evaluate_every=0)
    assert [step for step in range(1, 15_001) if never.is_evaluated(step, 15_000, images)] == [15_000]


@pytest.mark.parametrize("objective", ["dinov2", "moco_v3"])
def test_the_teacher_of_adapters_is_their_average(objective):
    config = adapt.Config(objective=objective, train="lora:2", image_size=16)
    trained = adapt.objective_of(config, ViT.variant("mu/8", image_size=16))
    teacher, learner = trained.teacher, trained.learner
    assert not any(p.requires_grad for p in teacher.parameters())
    expected = {name: p.detach().double() for name, p in teacher.named_parameters()}
    assert {name for name, p in learner.named_parameters() if p.requires_grad} == {
        n for n in expected if ".0." in n[-9:]
    }
    moved = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moved, lr=1.0)
    steps, least = 3, {"dinov2": 0.996, "moco_v3": 0.99}[objective]
    for step in range(steps):
        views = trained.default_views(16, 3)(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), torch.arange(4))
        trained(Batch(views, torch.arange(4)), step / steps)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.after_step((step + 1) / steps)
        # DINO's by the progress of the step that was taken, MoCo v3's by that of the next.
        progress = (step + (objective == "moco_v3")) / steps
        share = 1 - (1 - least) * (1 + math.cos(math.pi * progress)) / 2
        now = dict(learner.named_parameters())
        expected = {name: share * old + (1 - share) * now[name].detach().double() for name, old in expected.items()}
    assert any((now[name] - p).abs().max() > 1e-4 for name, p in teacher.named_parameters())
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=0, atol=1e-6, msg=name)
    down, up = (expected[f"blocks.0.attn.proj.parametrizations.weight.0.{which}"] for which in ("down", "up"))
    weight = expected["blocks.0.attn.proj.parametrizations.weight.original"] + 2 * up @ down
    torch.testing.assert_close(merged(teacher).blocks[0].attn.proj.weight.double(), weight, rtol=0, atol=1e-6)


DINOV3 = {
    "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "registers": 4, "position": "rope", "swiglu": True,
    "position_at": "every_layer_shared", "rope_rescale": 2.0, "key_bias": False, "layer_scale": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "momentum"),
    [("dinov2", 0.996), ("dino", 0.996), ("ibot", 0.996), ("moco_v3", 0.99), ("simmim", None), ("mpp", None)],
)
def test_rotary_positions_and_registers_are_adapted_by_all_that_see_whole_images(objective, momentum):
    config = adapt.Config(objective=objective, image_size=32)
    adapted = adapt.objective_of(config, ViT(ViTConfig(image_size=32, **DINOV3)))
    pixels, key = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6)
    before = {name: p.clone() for name, p in (adapted.teacher or adapted.learner).named_parameters()}
    loss, _ = adapted(Batch(adapted.default_views(32, 3)(pixels, key), key), 0.0)
    loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained)
    torch.optim.Adam(trained, lr=1e-2).step()
    adapted.after_step(0.0)
    learner = dict(adapted.learner.named_parameters())
    for name, p in before.items():
        assert torch.equal(learner[name], p) != learner[name].requires_grad, name
        if momentum:
            expected = momentum * p + (1 - momentum) * learner[name]
            torch.testing.assert_close(dict(adapted.teacher.named_parameters())[name], expected, msg=name)


@pytest.mark.parametrize(
    ("changes", "objective", "lacking"),
    [
        (DINOV3, "mae", "no positions before the first block"),
        ({"class_token": False}, "dinov2", "no class token"),
        ({"class_token": False}, "moco_v3", "no class token"),
        ({"patch_size": 16}, "dinov2", "1 x 1 patches: give larger images, smaller patches, or an objective that"),
    ],
)
def test_a_model_that_an_objective_cannot_train_is_told_which_can(changes, objective, lacking):
    sizes = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}
    backbone = ViT(ViTConfig(**(sizes | changes)))
    with pytest.raises(ValueError, match=lacking):
        adapt.objective_of(adapt.Config(objective=objective, image_size=16), backbone)


def test_a_model_that_was_trained_with_drop_path_is_adapted_without():
    """By all alike, since a teacher drops nothing."""
    backbone = ViT.variant("mu/8", image_size=16, drop_path=0.3, dropout=0.1)
    adapted = adapt.objective_of(adapt.Config(objective="dino", image_size=16), backbone)
    assert (adapted.learner.drop_path, adapted.learner.dropout, adapted.backbone.dropout) == (0, 0, 0)
    torch.testing.assert_close(adapted.learner.state_dict(), backbone.state_dict(), rtol=0, atol=0)


def test_images_without_labels_are_adapted_to_without_a_kept_set(model, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "unlabelled.npz", x_train=pixels)
    words = f"--data npz:{tmp_path / 'unlabelled.npz'} --init_from {model} --objective mpp --epochs 2 --batch_size 16"
    run("adapt", f"{words} --threads 1 --out {tmp_path / 'run'} --keep_data=")
    told = capsys.readouterr().out
    assert "step 4: unknown: effective rank" in told
    assert "The new images have no labels, so no model is called the best" in told
    assert not (tmp_path / "run" / BEST).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--init_from is missing: the model to adapt"),
        ("--init_from /not/there", "/not/there"),
        ("--init_from MODEL --train head", "--train head would leave the model as it is"),
        ("--init_from MODEL --train everything", "--train everything: choose one of all, head, norm"),
        ("--init_from MODEL --keep_data folder:/nowhere", "/nowhere"),
        ("--init_from MODEL --image_size 20", "20"),
    ],
)
def test_what_cannot_be_adapted_is_said_in_a_sentence(model, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        run("adapt", f"--data shapes:n=64 --threads 1 {words.replace('MODEL', str(model))} --out {tmp_path / 'run'}")
    assert ended.value.code in (65, 66, 78)
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


class Scripted:
    """A monitor with these accuracies, one after the other, as of 2,000 images."""

    def __init__(self, accuracies: list[float]):
        self.left, self.ids = list(accuracies), (range(10_000), range(2000))

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        return {"eval/mean/20-nn": self.left.pop(0)}


def scripted(words: str, own: list[float], kept: list[float]) -> int:
    """The exit status of a run of 12 steps, evaluated after each 4."""
    monitors = {"monitor_of": lambda *_: Scripted(own), "kept_monitor": lambda *_: Scripted(kept)}
    try:
        run("adapt", f"{TINY} --objective mpp --epochs 3 --most_forgotten 0.1 {words}", **monitors)
    except SystemExit as ended:
        return ended.code
    return 0


def test_a_run_that_forgets_ends_and_goes_on_only_if_more_is_allowed(model, tmp_path, capsys):
    out = tmp_path / "run"
    words = f"--init_from {model} --out {out}"
    assert scripted(words, [0.5, 0.6, 0.7], [0.5, 0.45, 0.39]) == 3
    told = capsys.readouterr()
    assert "step 4: better but forgetting: new images: 50.0% at the start, 60.0% now; kept images: 50.0%" in told.out
    sentence = (
        f"kept images: 50.0% at the start, 39.0% now. A lower --backbone_lr or --train last:4 keeps more of it. It has "
        f"forgotten more than --most_forgotten 0.1, so the run ends here, without {out / 'model'}. "
        f"The best model, 60.0% after 4 steps, is in {out / BEST}"
    )
    assert told.err.count(sentence) == 1
    assert not (out / "model").exists()
    assert status_of(out).state == "diverged"
    assert sentence in status_of(out).message
    assert load_described(out)[1]["step"] == 8  # what it was then can be looked at
    # It continues where it ended: with the same verdict, or beyond it if that is asked for.
    assert scripted(f"{words} --resume", [], []) == 3
    assert sentence in capsys.readouterr().err
    assert scripted(f"{words} --resume --most_forgotten 0.2", [0.8], [0.41]) == 0
    assert f"The best model, 80.0% after 12 steps, is in {out / BEST}" in capsys.readouterr().out
    assert [line["step"] for line in lines_of(out) if "drift" in line] == [0, 4, 8, 12]
    assert status_of(out).state == "finished"


def test_a_run_of_adapters_that_ended_early_opens_with_them_in_its_weights(model, tmp_path):
    out = tmp_path / "run"
    words = f"--init_from {model} --out {out} --train lora:2 --backbone_lr 1 --base_lr 0.1"
    assert scripted(words, [0.5, 0.6, 0.6], [0.5, 0.5, 0.1]) == 3
    opened, before = load_described(out)[0].state_dict(), load_backbone(model).state_dict()
    changed = {name for name in before if not torch.equal(opened[name], before[name])}
    assert changed == {name for name in before if name.endswith(("attn.qkv.weight", "attn.proj.weight"))}
    assert scripted(f"{words} --resume --most_forgotten 1", [0.5], [0.5]) == 0


def test_a_run_that_has_forgotten_by_its_last_step_is_complete_and_says_so(model, tmp_path, capsys):
    out = tmp_path / "run"
    words = f"--init_from {model} --out {out}"
    assert scripted(words, [0.5, 0.5, 0.5, 0.6], [0.5, 0.5, 0.5, 0.3]) == 3
    told = capsys.readouterr()
    assert "step 12: better but forgetting: new images" in told.out
    assert f"The model is in {out / 'model'}, a report in {out / 'report.html'}" in told.out
    sentence = f"All steps are done, and the model in {out / 'model'} has forgotten more than --most_forgotten 0.1: "
    assert sentence in told.err
    assert f"No evaluation was better than the start, so there is no {out / BEST}" in told.err
    assert status_of(out).state == "finished"
    before = (out / "model" / "model.safetensors").read_bytes()
    assert scripted(f"{words} --resume", [], []) == 3
    assert sentence in capsys.readouterr().err
    assert (out / "model" / "model.safetensors").read_bytes() == before
    assert scripted(f"{words} --resume --most_forgotten 1", [], []) == 0
    # The step that was judged anew is now allowed, and better than the start.
    assert json.loads((out / BEST / "best.json").read_text())["step"] == 12


def test_a_verdict_that_a_kill_prevented_is_given_when_the_run_goes_on(model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    words = f"--init_from {model} --out {out} --save_every 4"

    def killed(self, backbone, step, numbers, *, last):
        sys.exit(9)

    with monkeypatch.context() as patched:
        patched.setattr(Adaptation, "judge", killed)
        assert scripted(words, [0.5, 0.6], [0.5, 0.5]) == 9
    assert not (out / BEST).exists()
    assert scripted(f"{words} --resume", [0.4, 0.4], [0.5, 0.5]) == 0
    assert json.loads((out / BEST / "best.json").read_text())["accuracy"] == 0.6
    told = capsys.readouterr().out
    assert told.index("step 4: better: ") < told.index("step 8: worse: ")
    assert f"The best model, 60.0% after 4 steps, is in {out / BEST}" in told


def test_the_best_model_of_adapters_has_them_in_its_weights(model, tmp_path):
    words = f"--init_from {model} --out {tmp_path / 'run'} --train lora:2 --backbone_lr 1 --base_lr 0.1"
    assert scripted(words, [0.5, 0.5, 0.5, 0.6], [0.5] * 4) == 0
    best, last = (load_file(tmp_path / "run" / kind / "model.safetensors") for kind in (BEST, "model"))
    before = load_backbone(model).state_dict()
    assert best.keys() == last.keys() == {name for name in before if name not in ("mean", "std")}
    assert all(torch.equal(best[name], last[name]) for name in best)
    changed = {name for name in best if not torch.equal(best[name], before[name])}
    assert changed == {name for name in best if name.endswith(("attn.qkv.weight", "attn.proj.weight"))}


GOOD, SAME, BAD = Change(0.5, 0.6, 2000), Change(0.5, 0.51, 2000), Change(0.5, 0.4, 2000)


@pytest.mark.parametrize(
    ("own", "kept", "rank", "word"),
    [
        (GOOD, SAME, (9.0, 9.0), "better"),
        (GOOD, BAD, (9.0, 9.0), "better but forgetting"),
        (SAME, SAME, (9.0, 9.0), "no different"),
        (SAME, BAD, (9.0, 9.0), "forgetting"),
        (BAD, None, (9.0, 9.0), "worse"),
        (Change(0.8, 0.1, 2000), SAME, (9.0, 9.0), "collapsed"),
        (BAD, None, (9.0, 1.5), "collapsed"),
        (SAME, None, (9.0, 1.5), "no different"),  # fewer directions, and as good
        (None, SAME, (9.0, 9.0), "unknown"),
        (None, BAD, (9.0, 9.0), "forgetting"),
        (None, None, (9.0, 2.0), "collapsed"),
    ],
)
def test_a_verdict_is_in_words(own, kept, rank, word):
    assert judged(own, kept, rank).word == word


def test_a_difference_counts_from_two_standard_errors_on():
    # Of 1,000 images the difference of two accuracies near 50% has an error of sqrt(2 * 0.25 / 1000), 2.2 points.
    assert Change(0.5, 0.54, 1000).direction == 0
    assert Change(0.5, 0.55, 1000).direction == 1
    assert Change(0.5, 0.45, 1000).direction == -1
    assert Change(0.5, 0.509, 10**9).direction == 0  # under a point
    assert str(Change(0.5, 0.55, 1000)) == "50.0% at the start, 55.0% now"
