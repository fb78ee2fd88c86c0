"""Fine-tuning: its steps are torch's, its scales timm's, it starts where pretraining ended, survives kills bit for bit,
and chooses without a look at the test set."""

import json
import os
import re
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path

import finetune_run
import numpy as np
import preloaded
import pytest
import timm
import torch
import torch.nn.functional as F
from crashes import forked
from finetune_run import MEAN, SHORT, vit, write_fine_tuned
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay
from tiny_run import fingerprint, source

from sslvit import rng
from sslvit.data.loader import EpochSampler
from sslvit.data.subset import Subset
from sslvit.errors import DataError, Diverged
from sslvit.evaluate.predictions import load_predictions
from sslvit.evaluate.split import hold_out
from sslvit.finetuning import (
    PROTOCOLS,
    choose_rate,
    chosen_ids,
    classifier,
    finetune,
    halvings,
    held_out_parts,
    lengthened,
    predict,
    prepare,
    settled,
)
from sslvit.models.readout import logits, read
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.objectives.schedule import warmup_cosine
from sslvit.processes.collectives import start
from sslvit.train import pretrain
from sslvit.training.optim import parameter_groups
from sslvit.views.pretraining import EvalView
from sslvit.weights.folder import load_backbone, load_classifier, save_backbone

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
RECIPE = Path(__file__).parent.parent / "recipes" / "finetune.py"


@pytest.mark.parametrize("layer_decay", [0.65, 0.9])
def test_every_scale_is_timms_but_for_the_last_norm_which_is_the_heads_as_in_mae(layer_decay):
    objective = classifier(vit(depth=3), 5, PROTOCOLS["vit"], readout="cls", image_size=32)
    ours = {}
    names = {id(p): name.removeprefix("backbone.") for name, p in objective.named_parameters()}
    for group in parameter_groups(objective, 0.05, layer_decay=layer_decay):
        ours |= {names[id(p)]: (group["scale"], group["weight_decay"]) for p in group["params"]}
    model = timm.models.VisionTransformer(32, 16, embed_dim=16, depth=3, num_heads=2, num_classes=5)
    names, theirs = {id(p): name for name, p in model.named_parameters()}, {}
    for group in param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=layer_decay):
        theirs |= {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    assert ours.keys() == theirs.keys()
    for name, (scale, decay) in theirs.items():
        expected = 1.0 if name.startswith("norm.") else scale
        assert ours[name] == (pytest.approx(expected, rel=1e-12), decay), name
    assert ours["blocks.0.mlp.fc1.weight"][0] == pytest.approx(layer_decay**3)


def test_without_layer_decay_there_are_two_groups_at_full_rate():
    objective = classifier(vit(), 5, PROTOCOLS["vit"], readout="cls", image_size=32)
    assert [group["scale"] for group in parameter_groups(objective, 0.1)] == [1.0, 1.0]


def test_the_vit_protocols_training_is_a_plain_loop_of_torchs_sgd_with_clipping(tmp_path):
    config = lengthened(replace(PROTOCOLS["vit"], **SHORT, lr=0.05, out=tmp_path / "run"), 32)
    images, views, accelerator = source(), config.views(32), start(threads=1)
    ours = classifier(vit(), 4, config, **MEAN)
    plain = classifier(vit(), 4, config, **MEAN)
    pretrain(ours, images, views, config, accelerator)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    row = EpochSampler(images, batch_size=8, accumulation=1, rank=0, processes=1, seed=0)
    for step in range(4):
        samples, view_key, *_ = row[step]
        (x,) = views(samples.pixels, view_key, samples.extents)
        optimizer.param_groups[0]["lr"] = warmup_cosine(step / 4, 0.05, warmup=0.1)
        F.cross_entropy(plain.head(read(plain.backbone(x), "mean")), samples.labels).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    before = classifier(vit(), 4, config, **MEAN).state_dict()
    for (name, value), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-6)
        assert name == "backbone.cls_token" or not torch.equal(value, before[name]), name


@pytest.mark.processes
@pytest.mark.parametrize(
    ("protocol", "kills"), [("vit", (4, 11)), pytest.param("modern", (10,), marks=pytest.mark.slow)]
)  # of 12 steps: two rates, all
def test_a_run_killed_in_its_choice_or_after_it_ends_bit_identical(tmp_path, protocol, kills):
    def work(out: Path, kill_after: int | None = None) -> None:
        seen, pwrite = 0, os.pwrite

        def count(*args):
            nonlocal seen
            seen += b'"step"' in args[1]  # a line of a log: a step
            if seen == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return pwrite(*args)

        os.pwrite = count
        config = replace(PROTOCOLS[protocol], **SHORT, lr=1e-3, rates=(0.01, 0.02), out=out, resume=True)
        finetune(vit(), source(40), config, start(threads=1), **MEAN)

    assert forked(lambda: work(tmp_path / "whole")) == 0
    for kill_after in kills:
        out = tmp_path / str(kill_after)
        assert forked(lambda: work(out, kill_after)) == signal.SIGKILL  # noqa: B023
        assert forked(lambda: work(out)) == 0  # noqa: B023
        for part in (".", "choice/lr-0.01", "choice/lr-0.02"):
            assert fingerprint(out / part) == fingerprint(tmp_path / "whole" / part)


@pytest.mark.parametrize(("train", "moved"), [("head", ""), ("last:1", r"blocks\.1\.|norm\."), ("norm", "norm")])
def test_a_part_is_trained_and_the_rest_stays_bit_for_bit(tmp_path, train, moved):
    config = replace(PROTOCOLS["vit"], **SHORT, rates=(), lr=0.1, out=tmp_path / "run", train=train)
    finetune(vit(), source(40), config, start(threads=1), **MEAN)
    before, after = vit().state_dict(), load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name, value in before.items() if name in after and not torch.equal(after[name], value)}
    assert changed == {name for name in changed if re.search(moved, name)} if moved else changed == set()
    assert bool(changed) == bool(moved)
    assert after["head.weight"].abs().sum() > 0


@pytest.mark.processes
def test_lora_killed_and_resumed_ends_bit_identical_and_its_model_is_plain(tmp_path):
    def work(out: Path, kill_after: int | None = None) -> None:
        config = replace(PROTOCOLS["vit"], **SHORT, rates=(), lr=0.1, out=out, resume=True, train="lora:2")
        write = os.pwrite

        def count(*args):
            if kill_after and f'"step": {kill_after}'.encode() in args[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args)

        os.pwrite = count
        finetune(vit(), source(40), config, start(threads=1), **MEAN)

    assert forked(lambda: work(tmp_path / "whole")) == 0
    assert forked(lambda: work(tmp_path / "killed", 3)) == signal.SIGKILL
    assert forked(lambda: work(tmp_path / "killed")) == 0
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")
    one, two = ((tmp_path / name / "lora.safetensors").read_bytes() for name in ("whole", "killed"))
    assert one == two
    updates, before = load_file(tmp_path / "whole" / "lora.safetensors"), vit().state_dict()
    after = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert before.keys() - after.keys() == set()
    for name, value in before.items():
        place = name.removesuffix(".weight")
        update = 2 * updates[f"{place}.up"] @ updates[f"{place}.down"] if f"{place}.up" in updates else 0
        torch.testing.assert_close(after[name], value + update, rtol=1e-6, atol=1e-7)
    assert len(updates) == 2 * 2 * 2  # A and B of qkv and proj in two blocks
    assert load_classifier(tmp_path / "whole" / "model").backbone.config == vit().config


def test_the_recipe_tests_what_lora_trained(tmp_path, monkeypatch):
    save_backbone(vit(), tmp_path / "pretrained", {"readout": "mean"})
    write_npz(tmp_path / "set.npz", 1)
    words = ["--model", str(tmp_path / "pretrained"), "--data", f"npz:{tmp_path / 'set.npz'}", "--threads", "1"]
    words += ["--steps", "8", "--batch_size", "8", "--rates", "0.05", "0.2", "--train", "lora:2"]
    recipe(monkeypatch, *words, "--out", str(tmp_path / "run"))
    tested = json.loads((tmp_path / "run" / "test.json").read_text())
    width, depth, head = 16, 2, 4 * 16 + 4
    assert tested["trained parameters"] == depth * 2 * ((width + 3 * width) + 2 * width) + head
    saved = load_classifier(tmp_path / "run" / "model")
    images = np.load(tmp_path / "set.npz")["test_images"]
    scores = saved(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).softmax(-1)
    predicted = load_predictions(tmp_path / "run" / "predictions.parquet").probabilities
    torch.testing.assert_close(scores.detach(), predicted, rtol=1e-4, atol=1e-5)


def test_it_starts_where_pretraining_ended_at_any_size_and_trains_fixed_positions():
    pretrained = vit(position="sincos_mae").eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    copy = prepare(pretrained, 64, drop_path=0.1)
    assert copy.training
    assert copy.pos_embed.shape[1] == 17
    for ours, theirs in zip(copy.eval()(images), pretrained(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert isinstance(copy.pos_embed, torch.nn.Parameter)
    assert copy.config.drop_path == 0.1


@torch.no_grad()
def test_the_modern_head_norms_the_mean_of_unnormed_patches_afresh():
    pretrained = vit()
    pretrained.norm.weight.fill_(3.0)
    objective = classifier(pretrained, 4, PROTOCOLS["modern"], readout="mean", image_size=32)
    assert not [name for name in objective.state_dict() if name.startswith("backbone.norm.")]
    objective.head.weight.copy_(rng.normal(rng.key(0), 4, 16))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    patches = pretrained.eval().intermediate(images, 1, norm=False)[0].patches
    expected = F.layer_norm(patches.mean(1), (16,), eps=1e-6) @ objective.head.weight.T
    found = logits(objective, read(objective.backbone.eval()(images), "mean"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # The class token has the norm that was trained with it.
    assert classifier(pretrained, 4, PROTOCOLS["modern"], readout="cls", image_size=32).fc_norm is None


@pytest.mark.parametrize(("protocol", "readout"), [("vit", "cls"), ("vit", "mean"), ("modern", "mean")])
@torch.no_grad()
def test_the_exported_classifier_is_the_same_here_and_in_timm_with_its_backbone(tmp_path, protocol, readout):
    config = replace(PROTOCOLS[protocol], out=tmp_path)
    objective = classifier(vit(), 4, config, readout=readout, image_size=32).eval()
    for name, value in objective.head_state_dict().items():
        value += 0.1 * rng.normal(rng.key(name), *value.shape)
    save_backbone(objective.backbone, tmp_path / "model", {"readout": readout}, head=objective.head_state_dict())
    ids = np.arange(6)
    expected = predict(objective, source(), EvalView(32), start(threads=1), ids=ids).probabilities
    images = source().read(ids).pixels.float() / 255
    ours = load_classifier(tmp_path / "model")(images).softmax(-1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    torch.testing.assert_close(
        theirs(objective.backbone.standardise(images)).softmax(-1), expected, rtol=1e-4, atol=1e-6
    )
    for one, other in zip(load_backbone(tmp_path / "model")(images), objective.backbone(images), strict=True):
        assert torch.equal(one, other)


def test_a_backbone_is_no_classifier(tmp_path):
    save_backbone(vit(), tmp_path / "model", {"readout": "cls"})
    with pytest.raises(DataError, match="without a head"):
        load_classifier(tmp_path / "model")


def test_the_best_held_out_rate_wins_of_equals_the_first_and_none_that_diverges():
    def accuracy(rate: float) -> float:
        if rate > 1:
            raise Diverged("nan")
        return {0.1: 0.5, 0.2: 0.7, 0.3: 0.7}[rate]

    assert choose_rate((0.1, 9.0, 0.2, 0.3), accuracy) == (0.2, {0.1: 0.5, 9.0: -1.0, 0.2: 0.7, 0.3: 0.7})
    with pytest.raises(Diverged, match="diverged at every learning rate"):
        choose_rate((2.0, 3.0), accuracy)


@pytest.mark.parametrize("images", [7, 999, 60_000, 54_321])
def test_so_many_steps_are_so_many_steps_of_any_set(images):
    config = lengthened(replace(PROTOCOLS["vit"], steps=997), images)
    assert -(-config.epochs * images // config.batch_size) == 997
    assert config.warmup_epochs / config.epochs == pytest.approx(0.1)


def recipe(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *words])
    runpy.run_path(str(RECIPE), run_name="__main__")


def write_npz(file: Path, test_seed: int) -> None:
    draw, other = np.random.default_rng(0), np.random.default_rng(test_seed)
    arrays = {"train_images": draw.integers(0, 256, (40, 32, 32, 3), np.uint8), "train_labels": np.arange(40) % 4}
    arrays |= {"test_images": other.integers(0, 256, (12, 32, 32, 3), np.uint8)}
    np.savez(file, **arrays, test_labels=other.permutation(np.arange(12) % 4))


def test_a_rate_or_epochs_replace_the_protocols_and_both_are_refused():
    vit, modern = PROTOCOLS["vit"], PROTOCOLS["modern"]
    assert settled(vit) == vit
    assert settled(modern) == modern.with_rate()
    assert settled(replace(vit, lr=0.5)).rates == ()
    assert settled(replace(vit, epochs=3)).steps == 0
    alone = settled(replace(vit, rates=(0.5,)))
    assert (alone.lr, alone.rates) == (0.5, ())
    told = replace(modern, lr=modern.base_lr * modern.batch_size / 256, rates=(1e-3, 3e-3))  # its lr was not given
    assert settled(told).rates == (1e-3, 3e-3)
    assert settled(replace(vit, rates=(), lr=0.5)).lr == 0.5
    for both in ({"lr": 0.5, "rates": (0.1, 0.2)}, {"steps": 7, "epochs": 3}, {"warmup_epochs": 3}):
        with pytest.raises(ValueError, match=r"give"):
            settled(replace(vit, **both))


def test_another_test_set_changes_no_choice_and_no_weight(tmp_path, monkeypatch, capsys):
    save_backbone(vit(), tmp_path / "pretrained", {"readout": "mean"})
    words = ["--model", str(tmp_path / "pretrained"), "--rates", "0.01", "0.1", "--threads", "1"]
    words += ["--steps", "2", "--batch_size", "8"]
    for seed in (1, 2):
        write_npz(tmp_path / f"{seed}.npz", seed)
        data = [f"npz:{tmp_path / f'{seed}.npz'}", "--out", str(tmp_path / f"run-{seed}")]
        recipe(monkeypatch, *words, "--data", *data)
    assert "test, 12 images, lr 0." in capsys.readouterr().out
    one, two = ((tmp_path / f"run-{seed}" / "model" / "model.safetensors").read_bytes() for seed in (1, 2))
    assert one == two
    found = [load_predictions(tmp_path / f"run-{seed}" / "predictions.parquet") for seed in (1, 2)]
    assert found[0].about["lr"] == found[1].about["lr"]
    assert not torch.equal(found[0].labels, found[1].labels)
    parts = (".", "choice/lr-0.01", "choice/lr-0.1")
    texts = [(tmp_path / "run-1" / part / "environment.json").read_text() for part in parts]
    kept, held = hold_out(torch.arange(40) % 4, 0.1)
    assert [json.loads(text)["images"] for text in texts] == [40, len(kept), len(kept)]
    assert len(kept) + len(held) == 40


def test_a_rate_is_chosen_by_cross_validation_where_labels_are_few(tmp_path, capsys):
    labels = torch.arange(40) % 4
    config = replace(PROTOCOLS["vit"], **SHORT, rates=(0.01, 0.1), folds=0, choice_steps=2, out=tmp_path / "run")
    parts = held_out_parts(labels, config)
    assert [len(held) for _, held in parts] == [8] * 5
    assert sorted(row for _, held in parts for row in held.tolist()) == list(range(40))
    assert all(sorted([*rows.tolist(), *held.tolist()]) == list(range(40)) for rows, held in parts)
    _, tried = finetune(vit(), source(40), config, start(threads=1), **MEAN)
    told = capsys.readouterr().out
    for rate, accuracy in tried.items():
        assert f"lr {rate:g}: {accuracy:.2%} of 40 held-out training images" in told
        assert accuracy * 40 == pytest.approx(round(accuracy * 40))  # of all 40, each once
        runs = [tmp_path / "run" / "choice" / f"lr-{rate:g}-fold-{fold}" for fold in range(5)]
        assert [json.loads((run / "environment.json").read_text())["steps"] for run in runs] == [2] * 5
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["steps"] == SHORT["steps"]


@pytest.mark.parametrize(
    ("images", "folds", "held"),
    [
        (250, 0, [50] * 5),  # all of them, and still fewer than 500
        (1250, 0, [250] * 2),
        (2500, 0, [500]),
        (5000, 0, [500]),
        (25_000, 0, [500]),  # 2% of them
        (50_000, 0, [1000]),
        (2500, 1, [250]),  # the ViT paper's tenth
        (100, 4, [25] * 4),
    ],
)
def test_how_many_labels_are_held_out(images, folds, held):
    labels = torch.arange(images) % 5
    config = replace(PROTOCOLS["vit"], folds=folds)
    assert [len(some) for _, some in held_out_parts(labels, config)] == pytest.approx(held, rel=0.02)


def test_the_curve_ends_with_the_test_and_changes_neither_weights_nor_choice(tmp_path, monkeypatch):
    save_backbone(vit(), tmp_path / "pretrained", {"readout": "mean"})
    write_npz(tmp_path / "set.npz", 1)
    words = ["--model", str(tmp_path / "pretrained"), "--data", f"npz:{tmp_path / 'set.npz'}", "--threads", "1"]
    words += ["--steps", "21", "--batch_size", "8", "--rates", "0.01", "0.1"]
    recipe(monkeypatch, *words, "--out", str(tmp_path / "without"))
    recipe(monkeypatch, *words, "--out", str(tmp_path / "with"), "--curve")
    tested = json.loads((tmp_path / "with" / "test.json").read_text())
    assert [step for step, _ in tested["curve"]] == [10, 21]
    assert tested["curve"][-1][1] == tested["top1"]
    assert "curve" not in json.loads((tmp_path / "without" / "test.json").read_text())
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    log = (tmp_path / "with" / "choice" / "lr-0.1" / "metrics.jsonl").read_text()
    assert "eval/" not in log
    page = (tmp_path / "with" / "report.html").read_text()
    assert "random start" not in page
    assert halvings(21) == [21, 10]
    assert halvings(2000) == [2000, 1000, 500, 250, 125, 62, 31, 15]
    assert halvings(3) == [3]


def test_a_rate_is_chosen_under_the_crop_that_was_chosen(tmp_path, monkeypatch):
    train, seen, standardise = source(), [], ViT.standardise

    def looking(self: ViT, images: torch.Tensor) -> torch.Tensor:
        seen.extend([] if self.training else images)
        return standardise(self, images)

    monkeypatch.setattr(ViT, "standardise", looking)
    config = replace(PROTOCOLS["vit"], **SHORT, rates=(0.01, 0.02), out=tmp_path / "run", eval_crop=0.5)
    finetune(vit(), train, config, start(threads=1), **MEAN)
    samples = train.read(np.arange(len(train)))
    (cropped,) = EvalView(32, (64, 64))(samples.pixels, rng.key(samples.ids), samples.extents)
    held = hold_out(samples.labels)[1]
    assert len(seen) == 2 * len(held)
    torch.testing.assert_close(torch.stack(seen), cropped[held].repeat(2, 1, 1, 1))


def test_the_recipe_tests_under_the_crop_that_was_chosen(tmp_path, monkeypatch):
    save_backbone(vit(), tmp_path / "pretrained", {"readout": "mean"})
    write_npz(tmp_path / "set.npz", 1)
    words = ["--model", str(tmp_path / "pretrained"), "--data", f"npz:{tmp_path / 'set.npz'}", "--threads", "1"]
    words += ["--steps", "2", "--batch_size", "8", "--lr", "0.1", "--eval_crop"]
    for kept in ("1", "0.5"):
        recipe(monkeypatch, *words, kept, "--out", str(tmp_path / kept))
    whole, centre = (load_predictions(tmp_path / kept / "predictions.parquet").probabilities for kept in ("1", "0.5"))
    assert not torch.allclose(whole, centre, atol=1e-4)


def test_a_test_image_that_cannot_be_read_is_not_scored_as_another(capsys):
    objective, test = classifier(vit(), 4, PROTOCOLS["vit"], readout="cls", image_size=32), source(10)
    test.bad = {4: ("4.png", "torn")}
    found = predict(objective, test, EvalView(32), start(threads=1))
    assert found.ids.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert found.labels.tolist() == test.labels[found.ids].tolist()
    assert "1 of 10 images of noise cannot be read and are left out, e.g. 4.png: torn" in capsys.readouterr().out


def test_a_part_of_a_source_replaces_a_bad_image_from_within():
    whole = source(10)
    whole.bad = {4: ("4.png", "torn"), 5: ("5.png", "torn")}
    part = Subset(whole, np.array([2, 4, 5, 8]))
    samples = part.read(np.array([1, 0, 3, 2]))
    assert samples.ids.tolist() == [1, 0, 3, 2]
    assert [(line.id, line.path) for line in samples.bad] == [(1, "4.png"), (2, "5.png")]
    allowed = {whole.pixels[row].tobytes() for row in (2, 8)}
    assert all(pixels.numpy().tobytes() in allowed for pixels in samples.pixels)
    assert np.array_equal(part.labels, whole.labels[[2, 4, 5, 8]])
    with pytest.raises(DataError, match="none of them can be used"):
        Subset(whole, np.array([4, 5])).read(np.array([0]))
    assert part.fingerprint != Subset(whole, np.array([2, 4, 5, 9])).fingerprint


def test_shots_are_so_many_images_of_each_class_and_not_a_fraction_as_well():
    labels = torch.arange(40) % 4
    part = chosen_ids(labels, replace(PROTOCOLS["vit"], shots=3))
    assert labels[part].bincount().tolist() == [3, 3, 3, 3]
    with pytest.raises(ValueError, match=r"--shots 3 and --fraction 0.5: give one"):
        chosen_ids(labels, replace(PROTOCOLS["vit"], shots=3, fraction=0.5))


@pytest.mark.processes
def test_two_processes_fine_tune_and_choose_as_one(tmp_path):
    for done in preloaded.run_ranks([sys.executable, finetune_run.__file__, str(tmp_path / "two")]):
        assert done.returncode == 0, done.stderr
    write_fine_tuned(tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "tried.json").read_text()) for name in ("one", "two"))
    assert one == two
    weights, others = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_bit_resnet_is_fine_tuned_and_has_no_layers_to_drop(tmp_path):
    backbone = BiT.variant("R20x0.5", image_size=32)
    config = replace(PROTOCOLS["vit"], out=tmp_path / "run", rates=(), lr=0.3, **SHORT)
    objective, _ = finetune(backbone, source(40), config, start(threads=1), **MEAN)
    kept = load_classifier(tmp_path / "run" / "model")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(kept(images), logits(objective.eval(), objective.backbone(images).patches.mean(1)))
    before = dict(backbone.named_parameters())
    assert [name for name, value in objective.backbone.named_parameters() if torch.equal(value, before[name])] == []
    with pytest.raises(ValueError, match="a BiT ResNet has no drop_path"):
        prepare(backbone, 32, drop_path=0.1)
