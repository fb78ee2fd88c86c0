"""What a recipe's user says reaches the source, and what of it may change when a run goes on."""

import importlib
import inspect
import re
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslvit.config import EVALUATION, FREE, LENGTH, ROUNDING, DataConfig, ImagesConfig, TrainConfig, option, rules
from sslvit.data import spec
from sslvit.data.source import ArraySource
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives import OBJECTIVES
from sslvit.objectives.mpp import MPP
from sslvit.processes.collectives import start
from sslvit.runs.settings import check_unchanged, configuration
from sslvit.storage import checkpoint
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Three images of 40 x 60, one of them a link to outside, and one of 100 x 100."""
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.full((40, 60, 3), 80 * number, np.uint8)).save(folder / f"{number}.png")
    (folder / "2.png").rename(tmp_path / "outside.png")
    (folder / "2.png").symlink_to(tmp_path / "outside.png")
    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(folder / "3.png")
    return str(folder)


def test_links_are_followed_when_asked(pictures):
    assert len(DataConfig(data=pictures, image_size=32).open()) == 3
    assert len(DataConfig(data=pictures, image_size=32, follow_links=True).open()) == 4


def test_the_canvas_and_the_limit_of_pixels_are_those_asked_for(pictures):
    assert DataConfig(data=pictures, image_size=32).open().canvas == (96, 96)
    source = DataConfig(data=pictures, image_size=32, canvas=50, max_pixels=9999).open()
    samples = source.read(np.arange(3))
    assert source.canvas == (33, 50)  # all that can be read are 40 x 60
    (bad,) = samples.bad
    assert (bad.id, bad.reason) == (2, "10,000 px > limit 9,999")


@pytest.mark.parametrize("changes", [{"image_size": 0}, {"image_size": -4}, {"canvas": 0}, {"max_pixels": 0}])
@pytest.mark.parametrize("data", ["shapes", "stream:parquet:/nowhere"])
def test_a_size_below_one_is_refused_by_its_name(changes, data):
    ((name, value),) = changes.items()
    config = DataConfig(data=data, epoch_images=9 if "stream" in data else 0, **changes)
    with pytest.raises(ValueError, match=f"--{name} is {value}; it must be above 0"):
        config.open()


def test_a_model_of_unequal_sides_is_given_images_of_its_size():
    assert ImagesConfig(data="shapes:n=8", image_size=0).source(image_size=(16, 24)).canvas == (24, 24)


def test_every_kind_of_data_stands_in_every_place_that_lists_them():
    table = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    for text in (inspect.getsource(ImagesConfig), inspect.getsource(DataConfig), spec.__doc__, table):
        assert not [kind for kind in spec.KINDS if not re.search(rf"\b{kind}\b", text)]


# What changes the result, so that --resume refuses another value. An option is refused unless it says otherwise where
# it is defined, and has to be listed here too: whether it may change was decided by somebody who thought about it.
DECIDES = """
areas assignment average_layers backbone_lr balance base_lr batch_size betas binary blocks canvas
center_momentum channels choice_steps chunks class_token classes clip clip_each color context_scale conventions
corrupt crops cutmix decoder dimension directions drop_path dropout epoch_images erase eval_data evaluate_every
final_lr final_weight_decay folds follow_links foreign fraction freeze_last_layer_epochs freeze_patch_projection
gram_epochs gram_weight head head_epochs hidden ignore image_column image_size images inflate init init_from
koleo_group koleo_weight label_column label_smoothing layer_decay layer_scale lr lr_drops lr_rule magnitude
mask_column mask_ratio mask_ratios max_pixels mixup model momentum no_weight_decay norm_last_layer norm_pix_loss
objective only_classes optimizer patch_head patch_rate patch_weight position position_at position_resize predictor
preset protocol ramp_epochs randaugment range rates readout reduce_zero_label relative_bias scales scratch seed shots
skip_spikes smallest_crop steps strength tanh target target_scale targets teacher_temperature temperature
temperature_epochs train unit warmup_epochs weight weight_decay weights
"""
CONFIGS = [
    type(next(iter(importlib.import_module(f"sslvit.recipes.{recipe}").PRESETS.values())))
    for recipe in (*OBJECTIVES, "finetune", "segment", "adapt")
]


def test_every_option_that_a_resumed_run_refuses_to_change_is_meant_to_be():
    fates = {one.name: "fixed" for config in CONFIGS for one in fields(config)}
    for config in CONFIGS:
        fates |= {name: rule["resume"] for name, rule in rules(config).items()}
    assert sorted(name for name, fate in fates.items() if fate == "fixed") == sorted(DECIDES.split())
    assert set(fates.values()) == {"fixed", FREE, ROUNDING, EVALUATION, LENGTH}


@pytest.mark.parametrize("resume", ["fixed", FREE, ROUNDING, EVALUATION, LENGTH])
def test_another_value_is_refused_with_both_warned_of_or_free(resume):
    @dataclass(frozen=True)
    class Config:
        choice: str = option("new", resume)

    if resume == "fixed":
        with pytest.raises(ValueError, match="choice was 'old', is now 'new'"):
            check_unchanged({"choice": "old"}, Config())
    else:
        assert len(check_unchanged({"choice": "old"}, Config())) == (resume in (ROUNDING, EVALUATION))


def test_an_option_of_an_earlier_version_that_is_gone_is_refused():
    with pytest.raises(ValueError, match="gone was 1, and this version has no such option"):
        check_unchanged({"gone": 1}, TrainConfig())


def test_a_size_of_equal_sides_is_the_same_run_as_one_number():
    square, number, oblong = (configuration(DataConfig(image_size=size)) for size in ((32, 32), 32, (32, 48)))
    assert square["image_size"] == 32  # as runs of earlier versions have it
    assert check_unchanged(number, DataConfig(image_size=(32, 32))) == []
    assert configuration(DataConfig(**oblong)) == oblong  # back from JSON, whose tuples are lists
    with pytest.raises(ValueError, match=r"image_size was 32, is now \[32, 48\]"):
        check_unchanged(number, DataConfig(image_size=(32, 48)))


def test_a_run_from_before_centre_crops_goes_on_and_says_that_its_evaluations_are_others(tmp_path, capsys):
    @dataclass(frozen=True)
    class Config(TrainConfig, DataConfig):
        pass

    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 112, 112), np.uint8)
    source = ArraySource(pixels, name="noise", fingerprint="noise")
    given = {"batch_size": 4, "lr": 1e-3, "epochs": 1, "warmup_epochs": 0.1, "image_size": 112, "resume": True}
    config = Config(out=tmp_path / "run", **given)

    def run() -> str:
        objective = MPP(ViT(ViTConfig(image_size=112, patch_size=56, width=8, depth=1, heads=1)))
        pretrain(objective, source, CropFlip(112), config, start(threads=1))
        return capsys.readouterr().out

    run()
    assert "eval_crop" not in run()
    found = checkpoint.latest(config.out / "checkpoints")
    del found.state["config"]["eval_crop"]
    checkpoint.save(config.out / "checkpoints", found.step, found.tensors, found.state)
    told = run()
    assert "eval_crop was 0.0, is now None" in told
    assert "evaluations from here do not compare with those before" in told


def test_a_run_from_before_ranges_goes_on_with_the_whole_range_by_name_and_with_no_other(tmp_path):
    @dataclass(frozen=True)
    class Config(TrainConfig, DataConfig):
        pass

    def run(**changes) -> None:
        given = {"batch_size": 4, "lr": 1e-3, "epochs": 1, "warmup_epochs": 0.1, "image_size": 16, "resume": True}
        objective = MPP(ViT(ViTConfig(image_size=16, patch_size=8, width=8, depth=1, heads=1)))
        source = ArraySource(np.zeros((8, 3, 16, 16), np.uint8), name="black", fingerprint="black")
        pretrain(
            objective,
            source,
            CropFlip(16),
            Config(out=tmp_path / "run", **given | changes),
            start(threads=1),
        )

    run()
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    del found.state["config"]["range"]
    checkpoint.save(tmp_path / "run" / "checkpoints", found.step, found.tensors, found.state)
    run(range=(0.0, 65535.0))
    with pytest.raises(ValueError, match="range was None, is now"):
        run(range=(0.0, 4095.0))


def test_folders_may_be_texts_from_python():
    assert TrainConfig(out="runs/x").out == Path("runs/x")
    assert CONFIGS[0](out="runs/x", image_size=(32, 32)).out == Path("runs/x")
