"""pretrain and finetune: what they do where nothing is said, what they refuse, what they leave."""

import importlib
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import sslvit
from sslvit.api.calls import for_python
from sslvit.api.runs import configured, defaults
from sslvit.errors import CannotWrite, DataError
from sslvit.objectives import OBJECTIVES
from sslvit.storage import sealed

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
LABELS = [0, 1] * 20
TINY = {"batch_size": 8, "epochs": 1, "threads": 1}


def vit(size: int = 16) -> sslvit.ViT:
    return sslvit.ViT.variant("mu/8", image_size=size)


def asked_for(recipe: str, monkeypatch: pytest.MonkeyPatch, **changes) -> dict:
    """What a recipe would train, and how."""
    module = importlib.import_module(f"sslvit.recipes.{recipe}")
    seen: dict = {}

    def preview(config, objective, images, views, accelerator) -> bool:
        seen.update(config=config, objective=objective, views=views)
        return True

    monkeypatch.setattr(module, "preview", preview)
    presets = list(module.PRESETS.values())
    module.main(replace(presets[0 if changes["image_size"] <= 96 else 1], data="shapes:n=64", threads=1, **changes))
    return seen


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("recipe", OBJECTIVES)
def test_the_defaults_are_those_of_the_recipe(recipe, size, monkeypatch):
    seen = asked_for(recipe, monkeypatch, image_size=size, model="mu/8" if size == 32 else "mu/16")
    objective, config = seen["objective"], seen["config"]
    assert objective.default_views(size, 3) == seen["views"]
    mine, theirs = (
        defaults(objective),
        {field.name: getattr(config, field.name) for field in fields(sslvit.TrainConfig)},
    )
    apart = {"out", "threads", "dry_run", "show_views"}
    if size == 224:
        assert (mine["epochs"], mine["batch_size"]) == (100, 256)
        assert mine["warmup_epochs"] == min(config.warmup_epochs, 10)
        apart |= {"epochs", "batch_size", "warmup_epochs"}
    assert {n: v for n, v in mine.items() if n not in apart} == {n: v for n, v in theirs.items() if n not in apart}


def test_views_of_images_that_are_neither_grey_nor_rgb_change_no_colours():
    for objective in (sslvit.MoCoV3(vit(), hidden=8), sslvit.DINO(vit(), outputs=8, hidden=8, bottleneck=8)):
        objective.default_views(16, 5).check_channels(5)
        with pytest.raises(ValueError, match="mean nothing on 5 channels"):
            objective.default_views(16, 3).check_channels(5)
    crops = sslvit.DINO(vit(24), outputs=8, hidden=8, bottleneck=8).default_views((24, 48), 3)
    assert crops.small_size == (16, 24)  # half of both, in patches of 8: 12 is one and a half


def test_the_rate_and_the_warm_up_follow_what_is_chosen():
    objective = sslvit.MAE(vit(), decoder_width=16, decoder_heads=2)
    assert configured(objective, None, {"batch_size": 256}).lr == pytest.approx(4e-3)  # base_lr is of 256
    assert configured(objective, None, {"lr": 0.5}).lr == 0.5
    assert configured(sslvit.MPP(vit()), None, {"base_lr": 0.4, "batch_size": 64}).lr == pytest.approx(0.1)
    rooted = {"base_lr": 2e-3, "batch_size": 1024, "lr_rule": "sqrt"}
    assert configured(sslvit.MPP(vit()), None, rooted).lr == pytest.approx(4e-3)  # DINOv2's rate at its 1,024
    with pytest.raises(ValueError, match=r"--lr_drops 0.5 1.5: these are shares .* give 0.875"):
        configured(sslvit.MPP(vit()), None, {"lr_drops": (0.5, 1.5)})
    with pytest.raises(ValueError, match=r"--final_lr 1e-06 .* leave one out"):
        configured(sslvit.MPP(vit()), None, {"lr_drops": (0.5,), "final_lr": 1e-6})
    assert configured(objective, None, {"epochs": 5}).warmup_epochs == 0.5
    assert configured(objective, None, {"epochs": 5, "warmup_epochs": 2}).warmup_epochs == 2
    with pytest.raises(ValueError, match="lr and base_lr"):
        configured(objective, None, {"lr": 1.0, "base_lr": 1.0})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [({"epoch": 3}, "epochs"), ({"weight_deacy": 0.1}, "weight_decay"), ({"warmup": 1}, "warmup_epochs")],
)
def test_a_misspelt_option_names_the_nearest_and_nothing_is_written(wrong, right, tmp_path):
    with pytest.raises(TypeError, match=f"did you mean {right}"):
        sslvit.pretrain(sslvit.MPP(vit()), PIXELS, out=tmp_path / "run", **wrong)
    with pytest.raises(TypeError, match="pretrain has no argument 'dry_run'"):
        sslvit.pretrain(sslvit.MPP(vit()), PIXELS, out=tmp_path / "run", dry_run=True)
    with pytest.raises(ValueError, match=r"^batch_size is 0; it must be above 0"):
        sslvit.pretrain(sslvit.MPP(vit()), PIXELS, out=tmp_path / "run", batch_size=0)
    with pytest.raises(TypeError, match="did you mean steps"):
        sslvit.finetune(vit(), PIXELS, out=tmp_path / "run", step=3)
    assert not (tmp_path / "run").exists()


def test_messages_name_arguments():
    assert for_python("--lr is 0: give --lr or --resume with --out X; the same command") == (
        "lr is 0: give lr or resume=True with out X; the same call"
    )
    command = "a new folder by `python -m sslvit convert MODEL NEW --foreign gelu=exact` and --init_from NEW"
    assert for_python(command) == command.replace("--init_from", "init_from")


def test_a_run_leaves_what_a_recipe_leaves_and_is_resumed_or_replaced(tmp_path):
    images = sslvit.open_images(PIXELS, labels=LABELS)
    objective = sslvit.MPP(vit())
    run = sslvit.pretrain(objective, images, out=tmp_path / "run", **TINY)
    names = {path.name for path in run.out.iterdir()}
    assert names >= {"model", "report.html", "metrics.jsonl", "config.json", "cost.json", "checkpoints", "data.txt"}
    assert run.report.exists()
    assert [line["step"] for line in run.evaluations] == [0, 5]
    assert {name for name in run.evaluations[0] if name.startswith("eval/")} >= {"eval/mean/20-nn", "eval/cls/10-shot"}
    model = run.model
    assert (model.declared, model.training) == ("mean", False)
    for name, value in objective.backbone.state_dict().items():  # trained in place
        assert torch.equal(value, model.state_dict()[name])
    assert repr(run).startswith(f"Run({str(run.out)!r}): step 5, loss ")
    assert sealed.read(run.out / "config.json")["views"].startswith("CropFlip(size=16")
    with pytest.raises(CannotWrite, match="continue it with resume=True, replace it with overwrite=True"):
        sslvit.pretrain(sslvit.MPP(vit()), images, out=run.out, **TINY)
    longer = sslvit.pretrain(sslvit.MPP(vit()), images, out=run.out, resume=True, **(TINY | {"epochs": 2}))
    assert longer.metrics[-1]["step"] == 10
    views = sslvit.views.CropFlip(16)
    with pytest.raises(ValueError, match=r"resume=True would continue a different run: views was .CropFlip"):
        sslvit.pretrain(sslvit.MPP(vit()), images, out=run.out, resume=True, views=views, **(TINY | {"epochs": 2}))
    anew = sslvit.pretrain(sslvit.MPP(vit()), images, out=run.out, overwrite=True, evaluate=False, **TINY)
    assert (anew.metrics[-1]["step"], anew.evaluations) == (5, [])
    assert repr(sslvit.Run(tmp_path / "none")).endswith("nothing is logged there")


def test_the_same_run_from_python_and_by_the_recipe_are_the_same_bits(tmp_path):
    from recipes_run import run as recipe

    recipe("mae", f"--data shapes:n=64 --image_size 16 --model mu/8 --epochs 1 --threads 1 --out {tmp_path / 'recipe'}")
    backbone = sslvit.ViT.variant("mu/8", image_size=16, position="sincos_mae", init="mae")
    objective = sslvit.MAE(backbone, decoder_width=128, decoder_depth=2, decoder_heads=4)
    run = sslvit.pretrain(objective, "shapes:n=64", out=tmp_path / "run", epochs=1, warmup_epochs=2, threads=1)
    theirs = sslvit.Run(tmp_path / "recipe")
    untimed = [[{k: v for k, v in line.items() if k != "seconds"} for line in one.metrics] for one in (run, theirs)]
    assert untimed[0] == untimed[1]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name])


def test_supervised_is_evaluated_only_on_images_that_it_is_given(tmp_path, capsys):
    images = sslvit.open_images(PIXELS, labels=LABELS)
    run = sslvit.pretrain(sslvit.Supervised(vit(), classes=2), images, out=tmp_path / "a", **TINY)
    assert run.evaluations == []
    assert "has no test images; give test_images" in capsys.readouterr().out
    test = sslvit.open_images(PIXELS[::-1].copy(), labels=LABELS)
    run = sslvit.pretrain(sslvit.Supervised(vit(), classes=2), images, out=tmp_path / "b", test_images=test, **TINY)
    assert len(run.evaluations) == 2
    other = sslvit.open_images(PIXELS, labels=list(range(40)))
    with pytest.raises(DataError, match="beyond the training images' 1"):
        sslvit.pretrain(sslvit.MPP(vit()), images, out=tmp_path / "c", test_images=other, **TINY)


def test_fine_tuning_learns_what_is_there_and_returns_a_classifier(tmp_path):
    dark, bright = PIXELS // 4, 255 - PIXELS // 4
    images = np.concatenate([dark, bright])
    source = sslvit.open_images(images, labels=[0] * 40 + [1] * 40)
    tuned = sslvit.finetune(vit(), source, out=tmp_path / "run", steps=20, lr=0.1, batch_size=16, threads=1)
    assert tuned.accuracy == tuned.metrics["top1"] == 1.0
    assert len(tuned.predictions.labels) == 8  # the tenth of each class that was held out
    scores = tuned.classifier(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    assert (scores.argmax(1) == torch.from_numpy(source.labels)).double().mean() > 0.9
    names = {"test.json", "predictions.parquet", "confusion.png", "report.html"}  # as the recipe
    assert {path.name for path in tuned.out.iterdir()} >= names
    tested = sealed.read(tuned.out / "test.json")
    assert {name: tested[name] for name in ("top1", "images", "lr", "held out")} == {
        "top1": 1.0,
        "images": 8,
        "lr": 0.1,
        "held out": {},
    }
    assert tuned.predictions.about["protocol"] == "vit"
    with pytest.raises(DataError, match="no usable labels"):
        sslvit.finetune(vit(), PIXELS, out=tmp_path / "none", steps=1)


def test_another_objective_does_not_continue_a_run(tmp_path):
    def objective(corrupt: float) -> sslvit.MPP:
        return sslvit.MPP(sslvit.ViT.variant("mu/8", image_size=16), corrupt=corrupt)

    tiny = {"out": tmp_path / "run", "evaluate": False, "batch_size": 16}
    sslvit.pretrain(objective(0.5), "shapes:n=32", epochs=1, **tiny)
    with pytest.raises(ValueError, match=r"objective_options was \{'count': 2"):
        sslvit.pretrain(objective(0.25), "shapes:n=32", epochs=2, resume=True, **tiny)
    sslvit.pretrain(objective(0.5), "shapes:n=32", epochs=2, resume=True, **tiny)


def test_fine_tuning_reads_images_as_it_is_asked_to(tmp_path):
    vit = sslvit.ViT.variant("mu/8", image_size=16)
    chosen = {"steps": 2, "lr": 0.1, "batch_size": 16, "only_classes": (0, 1, 2)}
    tuned = sslvit.finetune(vit, "shapes:n=64", out=tmp_path / "tuned", **chosen)
    assert set(tuned.predictions.labels.tolist()) == {0, 1, 2}
    with pytest.raises(TypeError, match="test_data"):
        sslvit.finetune(vit, "shapes:n=64", out=tmp_path / "other", test_data="folder:/nowhere")
