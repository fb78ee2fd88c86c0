"""Every recipe runs from its command line to its last line, and shows the very views that it trains on."""

import importlib
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_run import RECIPES, TINY, TRAINING, run
from torch import nn

from sslvit.cli.parse import parse
from sslvit.data.loader import EpochSampler
from sslvit.evaluate.predictions import load_predictions
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.objective import Batch
from sslvit.reports.show_views import GAP, SHOWN
from sslvit.storage import checkpoint, sealed
from sslvit.views.pretraining import EvalView
from sslvit.weights.folder import load_backbone, save_backbone

# One of each kind, in the tests that are slow of all.
KINDS = ("mpp", "mae", "dino", "dinov2", "lejepa", "supervised")
FEW = [pytest.param(recipe, marks=() if recipe in KINDS else pytest.mark.slow) for recipe in TRAINING]


@pytest.mark.parametrize("recipe", TRAINING)
def test_it_trains_prints_a_table_and_leaves_a_model(recipe, tmp_path, capsys):
    run(recipe, f"{TRAINING[recipe]} --out {tmp_path / 'run'}")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4]
    assert np.isfinite(lines[-1]["loss"])
    printed = capsys.readouterr().out
    assert "random start   after 4 steps" in printed
    assert f"The model is in {tmp_path / 'run' / 'model'}" in printed
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_dino_run_from_before_the_official_rule_for_positions_goes_on_with_its_own(tmp_path, capsys):
    words, root = f"{TRAINING['dino']} --save_every 2 --out {tmp_path / 'run'}", tmp_path / "run" / "checkpoints"
    run("dino", f"{words} --position_resize bicubic")
    last = checkpoint.latest(root).tensors
    shutil.rmtree(root / "step-00000004")
    found = checkpoint.latest(root)
    shutil.rmtree(found.path)
    del found.state["config"]["position_resize"]  # as it was before there was such an option
    checkpoint.save(root, 2, found.tensors, found.state)
    with pytest.raises(SystemExit) as ended:
        run("dino", f"{words} --resume")
    assert ended.value.code == 78
    assert "position_resize was 'bicubic', is now 'bicubic_offset'" in capsys.readouterr().err
    run("dino", f"{words} --resume --position_resize bicubic")
    again = checkpoint.latest(root).tensors
    assert all(torch.equal(tensor, again[name]) for name, tensor in last.items())


# The backbone of the paper's own code: vit_jax and big_vision; moco-v3's, mae's, dino's and SimMIM's vits; fairseq.
HALF = (0.5, 0.5, 0.5)
TIMM, JAX = {"gelu": "exact", "mean": (0.485, 0.456, 0.406)}, {"gelu": "tanh", "mean": HALF, "std": HALF}
BEIT = {"init": "beit", "position": "relative_bias", "position_at": "every_layer_shared", "key_bias": False}
PAPERS = {
    "mpp": JAX | {"init": "jax", "position": "learned_1d"},
    "mae": TIMM | {"init": "mae", "position": "sincos_mae"},
    "simmim": TIMM | BEIT | {"layer_scale": 0.1, "drop_path": 0.1, "class_token": True},
    "data2vec": TIMM | BEIT | {"layer_scale": 1e-4, "drop_path": 0.25, "class_token": True},
    "moco_v3": TIMM | {"init": "moco_v3", "position": "sincos_moco_v3"},
    "dino": TIMM | {"init": "dino", "position": "learned_1d", "position_resize": "bicubic_offset"},
    "ibot": TIMM | {"init": "dino", "position": "learned_1d", "position_resize": "bicubic_offset"},
    "dinov2": TIMM | {"init": "timm", "layer_scale": 1e-5, "position_resize": "bicubic_offset"},
}


MULTI_CROP = ("dino", "ibot", "dinov2")


@pytest.mark.parametrize("recipe", PAPERS)
def test_the_paper_preset_has_the_backbone_of_the_papers_code(recipe, tmp_path):
    given = []
    words = f"--preset paper --data shapes:n=8 --image_size 16 --model XS/8 --out {tmp_path / 'run'}"
    words += " --head 32 16 64" if recipe in MULTI_CROP else ""
    run(recipe, words, pretrain=lambda *all: given.extend(all) or [], finish=print)
    built = given[0].backbone.config
    assert {name: getattr(built, name) for name in PAPERS[recipe]} == PAPERS[recipe]


@pytest.mark.parametrize("recipe", ["moco_v3", *MULTI_CROP])
def test_five_channels_are_refused_with_a_flag_before_anything_is_deleted(recipe, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 5), np.uint8)
    np.savez(tmp_path / "five.npz", x_train=pixels, y_train=np.arange(64) % 4)
    words = f"{TRAINING[recipe]} --data npz:{tmp_path / 'five.npz'} --out {tmp_path / 'run'} --overwrite"
    run(recipe, f"{words} --no-color")
    assert (tmp_path / "run" / "model").exists()
    with pytest.raises(SystemExit) as ended:
        run(recipe, words)
    assert ended.value.code == 78
    assert "saturation and hue and grey mean nothing on 5 channels (1 or 3): use --no-color" in capsys.readouterr().err
    assert (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("recipe", TRAINING)
def test_the_views_shown_are_those_trained_on(recipe, tmp_path, monkeypatch):
    entered = []
    run(recipe, f"{TRAINING[recipe]} --out {tmp_path / 'run'} --show_views {tmp_path / 'views.png'}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["views.png"]
    run(
        recipe,
        f"{TRAINING[recipe]} --out {tmp_path / 'run'}",
        pretrain=lambda *given: entered.extend(given) or [],
        finish=lambda *_: None,
    )
    objective, source, views, config, *_ = entered
    assert isinstance(objective, nn.Module)
    share = {"batch_size": config.batch_size, "accumulation": 1, "rank": 0, "processes": 1, "seed": config.seed}
    samples, key, slot_key, _ = EpochSampler(source, **share)[0]
    seen = views(samples.pixels, key, samples.extents)
    with torch.no_grad():
        hidden = objective.reconstructed(Batch(seen, slot_key, samples.labels))[:1]
    assert len(hidden) == (recipe in ("mpp", "mae", "simmim"))
    columns = [*EvalView(16)(samples.pixels, key), *seen, *hidden]
    with Image.open(tmp_path / "views.png") as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (SHOWN * (16 + GAP), sum(images.shape[-1] + GAP for images in columns), 3)
    left = 0
    for images in columns:
        height, width = images.shape[-2:]
        for row in range(SHOWN):
            shown = sheet[row * (16 + GAP) :][:height, left : left + width]
            assert (shown == (images[row] * 255).round().byte().permute(1, 2, 0).numpy()).all()
        left += width + GAP


@pytest.mark.parametrize("recipe", TRAINING)
def test_views_that_cannot_be_written_end_in_a_sentence_with_their_flag(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(recipe, f"{TRAINING[recipe]} --out {tmp_path / 'run'} --show_views /nowhere/v.png")
    assert stopped.value.code == 73
    assert "error: --show_views /nowhere/v.png cannot be written: No such file or dir" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", TRAINING)
def test_another_model_than_that_of_init_from_is_refused_but_a_presets_gives_way(recipe, tmp_path, capsys):
    save_backbone(ViT.variant("mu/8", image_size=16), tmp_path / "mu", {"readout": "mean"})
    words = f"--init_from {tmp_path / 'mu'} --out {tmp_path / 'run'}"
    with pytest.raises(SystemExit) as stopped:
        run(recipe, f"{TRAINING[recipe].replace('--model XS/8', '--model Ti/8')} {words}")
    assert stopped.value.code == 78
    assert f"--model Ti/8 is not the model of --init_from {tmp_path / 'mu'}, mu/8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    entered = []
    instead = {"pretrain": lambda *given: entered.append(given) or [], "finish": lambda *_: None}
    for model in ("", "--model mu/8", "--model=mu/8"):
        run(recipe, f"{TRAINING[recipe].replace('--model XS/8', model)} {words}", **instead)
        note = "note: the model is mu/8, from --init_from; the preset's would be XS/"
        assert (note in capsys.readouterr().out) == (not model)
    assert [objective.backbone.name for objective, *_ in entered] == ["mu/8"] * 3


def test_drop_path_is_of_training_and_reaches_the_model_of_init_from(tmp_path):
    save_backbone(ViT.variant("mu/8", image_size=16, drop_path=0.5), tmp_path / "mu", {"readout": "mean"})
    entered, words = [], TRAINING["simmim"].replace("--model XS/8", f"--init_from {tmp_path / 'mu'}")
    instead = {"pretrain": lambda *given: entered.append(given) or [], "finish": lambda *_: None}
    for drop_path in ("", "--drop_path 0.2"):
        run("simmim", f"{words} {drop_path} --out {tmp_path / 'run'}", **instead)
    assert [objective.backbone.drop_path for objective, *_ in entered] == [0.0, 0.2]
    assert [objective.backbone.config.drop_path for objective, *_ in entered] == [0.0, 0.2]


def test_a_run_that_began_while_model_was_ignored_beside_init_from_continues(tmp_path):
    save_backbone(ViT.variant("mu/8", image_size=16), tmp_path / "mu", {"readout": "mean"})
    words, root = f"{TINY} --init_from {tmp_path / 'mu'} --save_every 2 --out {tmp_path / 'run'}", tmp_path / "run"
    run("mpp", words.replace("--model XS/8", ""))
    shutil.rmtree(root / "checkpoints" / "step-00000004")
    begun = checkpoint.latest(root / "checkpoints")
    shutil.rmtree(begun.path)
    begun.state["config"]["model"] = "Ti/8"  # as it was then
    checkpoint.save(root / "checkpoints", 2, begun.tensors, begun.state)
    run("mpp", f"{words.replace('XS/8', 'Ti/8')} --resume")
    assert (root / "checkpoints" / "step-00000004").exists()


@pytest.mark.parametrize("recipe", FEW)
def test_main_checks_its_configuration_and_returns_the_evaluations(recipe, tmp_path):
    module = importlib.import_module(f"sslvit.recipes.{recipe}")
    words = [*TRAINING[recipe].split(), "--out", str(tmp_path / "run")]
    config = parse(module.Config, args=words)  # which leaves the rate per 256 images as it is
    with pytest.raises(ValueError, match="--keep is 0"):
        module.main(replace(config, keep=0))
    assert not (tmp_path / "run").exists()
    first, last = module.main(config)
    assert (first["step"], last["step"]) == (0, 4)
    assert any(name.startswith("eval/") for name in last)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    root = config.lr_rule == "sqrt"  # as of DINOv2
    assert saved["lr"] == (config.lr or config.base_lr * (1 / 4 if root else 1 / 16))


@pytest.mark.parametrize("recipe", TRAINING)
def test_its_defaults_are_its_first_preset_and_a_papers_lacks_its_images(recipe):
    module = importlib.import_module(f"sslvit.recipes.{recipe}")
    assert next(iter(module.PRESETS.values())) == module.Config()
    for name, preset in module.PRESETS.items():
        assert preset.preset == name
        if name != "small":
            with pytest.raises(ValueError, match="--data is missing"):
                preset.open()


@pytest.fixture
def model(tmp_path) -> Path:
    save_backbone(
        ViT(ViTConfig(image_size=16, patch_size=8, width=16, depth=4, heads=2)), tmp_path / "model", {"readout": "mean"}
    )
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path, monkeypatch) -> str:
    """A folder of two classes; one test image of each cannot be read, and a linked one only if that is allowed."""
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for number in range(60):
        folder = tmp_path / "set" / ("test" if number < 20 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
    for label in "ab":
        (tmp_path / "set" / "test" / label / "x.png").write_bytes(b"")
    return str(tmp_path / "set")


LEFT_OUT = "2 of 22 images of folder:{data}/test cannot be read and are left out, e.g. {data}/test/a/x.png: "


def test_finetuning_scores_the_test_images_that_can_be_read(model, data, tmp_path, capsys):
    out = tmp_path / "run"
    words = f"--model {model} --data {data} --rates 0.01 --steps 2 --batch_size 8 --threads 1 --out {out}"
    run("finetune", f"{words} --show_views {tmp_path / 'views.png'}")
    assert (tmp_path / "views.png").exists()
    assert not out.exists()
    run("finetune", words)
    printed = capsys.readouterr().out
    assert LEFT_OUT.format(data=data) in printed
    assert "test, 20 images, lr 0.01" in printed
    assert len(load_predictions(out / "predictions.parquet").ids) == 20


def test_a_fine_tuned_model_that_answers_one_class_is_warned_of(model, data, tmp_path, capsys):
    """A head that starts at zero and a rate of nearly nothing: of equal scores the first class is the answer."""
    words = "--rates 1e-30 --steps 1 --batch_size 8 --threads 1"
    run("finetune", f"--model {model} --data {data} {words} --out {tmp_path / 'run'}")
    printed = capsys.readouterr().out
    assert "warning: 100.0% of 20 images are predicted as class 0; 50.0% belong to it" in printed
    assert "balanced accuracy 50.00%" in printed


@pytest.mark.parametrize("recipe", ["probe", "linear_probe"])
def test_probing_scores_the_test_images_that_can_be_read(recipe, model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(recipe, f"--model {model} --data {data} --threads 1")
    printed = capsys.readouterr().out
    assert printed.count(LEFT_OUT.format(data=data)) == 1
    if recipe == "probe":
        assert "40 training and 20 test images" in printed
    assert torch.tensor([float(line[24:].split()[0]) for line in printed.splitlines()[1:3]]).isfinite().all()


def test_the_benchmark_of_views_names_the_peers_that_are_not_installed(capsys):
    main = runpy.run_path(str(RECIPES / "benchmarks" / "views.py"))["main"]
    main.__globals__["find_spec"] = lambda name: None
    main(sizes=(32,), sets=("plain",), rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"{name} is not installed and is left out" for name in ("kornia", "lightly", "timm")]
    assert [line.split()[3] for line in lines[3:]] == ["sslvit", "official", "torchvision"]


@pytest.mark.slow
def test_parts_of_a_model_are_fine_tuned_and_compared_in_a_table(tmp_path, capfd):
    save_backbone(ViT.variant("mu/8", image_size=16), tmp_path / "model", {"readout": "cls"})
    main = runpy.run_path(str(RECIPES / "benchmarks" / "parts.py"))["main"]
    given = {"model": tmp_path / "model", "data": "shapes:n=64", "out": tmp_path / "out", "steps": 2}
    main(**given, parts=("head", "all"), options="--lr 0.01 --threads 1 --batch_size 16")
    table = capfd.readouterr().out.splitlines()[-4:]
    head, whole = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[2:])
    backbone = load_backbone(tmp_path / "model")
    count = backbone.width * 12 + 12  # a linear layer for 12 shapes
    every = count + sum(parameter.numel() for parameter in backbone.parameters())
    assert [head[0], head[2], whole[0], whole[2]] == ["head", f"{count:,}", "all", f"{every:,}"]
    assert (head[3], whole[3]) == (f"{100 * count / every:.3g}", "100")
    for cells in (head, whole):
        assert 0 <= float(cells[1]) <= 100
        assert float(cells[4].replace(",", "")) > 100
        assert float(cells[5]) > 0
    assert (tmp_path / "out" / "parts.md").read_text().splitlines() == table


@pytest.mark.parametrize("recipe", FEW)
def test_a_dry_run_goes_through_everything_and_leaves_the_runs_folder_alone(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    run(recipe, f"{TRAINING[recipe]} --out {out} --dry_run --plan h100:80GB x 8")
    printed = capsys.readouterr().out
    assert not out.exists()
    left = {path.name for path in (tmp_path / "run-dry_run").iterdir()}
    assert left == {"data.txt", "first_batch.png", "views.png", "measured.json"}
    measured = sealed.read(tmp_path / "run-dry_run" / "measured.json")
    assert set(measured) == {"seconds_per_image", "flops_per_image"}
    assert min(measured.values()) > 0
    assert "all get a gradient" in printed
    assert "the run     4 steps" in printed  # 64 images, 16 a step
    assert "read back the same" in printed
    assert "h100 of 80 GB x 8: fits" in printed
    assert "it learns" in printed or recipe in MULTI_CROP, printed  # a loss need not fall whose teacher moves as well


def test_a_dry_run_of_fine_tuning_too(model, data, tmp_path, capsys):
    out = tmp_path / "run"
    run("finetune", f"--model {model} --data {data} --steps 9 --batch_size 8 --threads 1 --out {out} --dry_run")
    assert "the run     9 steps" in capsys.readouterr().out
    assert not out.exists()


@pytest.fixture(scope="module")
def wide_photos(tmp_path_factory) -> str:
    """Two classes of images of 20 x 30, 8 to train on and 4 to test."""
    folder, draw = tmp_path_factory.mktemp("wide"), np.random.default_rng(0)
    for number in range(12):
        file = folder / ("train" if number < 8 else "val") / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), np.uint8)).save(file)
    return str(folder)


OBLONG = dict.fromkeys(MULTI_CROP, "--crops 2 8 16") | dict.fromkeys(
    ("mpp", "mae", "simmim", "moco_v3", "supervised"), ""
)


@pytest.mark.parametrize("recipe", OBLONG)
def test_images_may_be_wider_than_high(recipe, wide_photos, tmp_path, capsys):
    flags = TRAINING[recipe].replace("--data shapes:n=64 --image_size 16 --model XS/8", "--model mu/8")
    words = f"{flags} --data {wide_photos} --image_size 16 24 --batch_size 8 {OBLONG[recipe]} --out {tmp_path / 'run'}"
    seen = []
    run(recipe, f"{words} --show_views {tmp_path / 'views.png'}", preview=lambda *given: seen.extend(given) or True)
    run(recipe, words)
    batch = seen[3](torch.zeros(2, 3, 20, 30, dtype=torch.uint8), torch.arange(2))
    assert {tuple(view.shape[2:]) for view in batch} == {(16, 24)} | ({(8, 16)} if recipe in MULTI_CROP else set())
    model = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert model["pretrained_cfg"]["input_size"] == [3, 16, 24]
    assert "8 images of 16 x 24 px" in (tmp_path / "run" / "report.md").read_text()
    if recipe == "mpp":
        run("mpp", f"{words} --resume")
        same = f"--model {tmp_path / 'run'} --data {wide_photos} --threads 1"
        run("probe", f"{same} --fractions 1 --shots 1 --out {tmp_path / 'p'} --cache {tmp_path / 'c'}")
        run("linear_probe", f"{same} --image_size 24 32 --protocol grid --cache {tmp_path / 'c'}")
        run("finetune", f"{same} --image_size 24 16 --steps 1 --batch_size 4 --rates 0.01 --out {tmp_path / 'f'}")
        tuned = json.loads((tmp_path / "f" / "model" / "config.json").read_text())
        assert tuned["pretrained_cfg"]["input_size"] == [3, 24, 16]
        run("analyse", f"{same} --image_size 16 32 --out {tmp_path / 'a'}")
        assert json.loads((tmp_path / "a" / "analysis.json").read_text())["image size"] == [16, 32]
