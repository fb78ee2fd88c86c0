"""Images of other channels than a pretrained model's: what --inflate makes of its filters, and that it is never
silent."""

import numpy as np
import pytest
import torch
from recipes_run import run
from timm.models._manipulate import adapt_input_conv

import sslvit
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.weights.channels import with_channels
from sslvit.weights.folder import load_backbone, save_backbone

KERNEL = "patch_embed.proj.weight"


def vit(**changes) -> ViT:
    return ViT.variant("mu/8", image_size=16, **changes).eval()


@pytest.mark.parametrize(("channels", "inflate"), [(1, "mean"), (2, "0,1"), (4, "0,1,2,0"), (7, "0,1,2,0,1,2,0")])
def test_filters_are_timms_where_timm_has_the_same_rule(channels, inflate):
    ours = vit()
    theirs = adapt_input_conv(channels, ours.state_dict()[KERNEL])
    torch.testing.assert_close(with_channels(ours, channels, inflate, "it").state_dict()[KERNEL], theirs)


def test_a_grey_image_is_seen_as_before_by_means_of_filters():
    grey = torch.rand(3, 1, 16, 16)
    ours = vit(mean=(0.3,) * 3, std=(0.2,) * 3)
    for channels in (1, 2, 5):
        other = with_channels(ours, channels, "mean", "it")
        assert (other.channels, len(other.config.mean), other.training) == (channels, channels, False)
        torch.testing.assert_close(
            other(grey.expand(-1, channels, -1, -1)).cls, ours(grey.expand(-1, 3, -1, -1)).cls, rtol=1e-5, atol=1e-6
        )


def test_each_new_channel_has_the_filter_and_the_constants_of_its_old_one():
    ours = vit(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    other = with_channels(ours, 4, "0,1,2,1", "it")
    for new, old in enumerate((0, 1, 2, 1)):
        torch.testing.assert_close(other.state_dict()[KERNEL][:, new], ours.state_dict()[KERNEL][:, old] * 3 / 4)
    assert (other.config.mean, other.config.std) == ((0.1, 0.2, 0.3, 0.2), (0.4, 0.5, 0.6, 0.5))
    mean = with_channels(ours, 2, "mean", "it").config
    assert mean.mean == pytest.approx((0.2, 0.2))
    assert mean.std == pytest.approx((0.5, 0.5))
    assert {n for n, t in other.state_dict().items() if not torch.equal(t, ours.state_dict()[n])} == {KERNEL}
    swapped = with_channels(ours, 3, "2,1,0", "it")
    assert torch.equal(swapped.state_dict()[KERNEL], ours.state_dict()[KERNEL].flip(1))
    assert with_channels(ours, 3, "mean", "it") is ours


@pytest.mark.parametrize(
    ("inflate", "sentence"),
    [
        ("", r"it takes images of 3 channels, these have 4: --inflate mean .* --inflate 0,1,2,0 from these"),
        ("0,1,2", r"--inflate 0,1,2: give 4 numbers, one per channel of the images, from 0 to 2"),
        ("0,1,2,3", r"--inflate 0,1,2,3: give 4 numbers"),
        ("average", r"--inflate average: say mean, or old channels such as 0,1,2,1"),
    ],
)
def test_another_number_of_channels_is_refused_with_the_way_out(inflate, sentence):
    with pytest.raises(ValueError, match=sentence):
        with_channels(vit(), 4, inflate, "it")


@pytest.mark.parametrize(("kind", "name"), [(BiT, "R11x0.5"), (ViT, "R+XS/8")])
def test_a_resnet_is_not_inflated(kind, name):
    with pytest.raises(ValueError, match="only the patches of a ViT can be inflated"):
        with_channels(kind.variant(name, image_size=16), 4, "mean", "it")


@pytest.fixture
def files(tmp_path):
    """A model of three channels, and labelled images of four."""
    save_backbone(vit(), tmp_path / "model", {"readout": "cls", "objective": "made up"})
    draw = np.random.default_rng(0)
    images = {f"x_{split}": draw.integers(0, 256, (32, 16, 16, 4), np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "four.npz", **images, y_train=np.arange(32) % 2, y_test=np.arange(32) % 2)
    return f"--data npz:{tmp_path / 'four.npz'} --threads 1 --batch_size 16 --out {tmp_path / 'run'}"


@pytest.mark.parametrize(
    "words",
    [
        "adapt --init_from MODEL --objective mpp --epochs 2",
        "mae --init_from MODEL --epochs 1 --warmup_epochs 0 --image_size 16 --decoder 16 1 2",
        "finetune --model MODEL --steps 2 --lr 0.01",
    ],
)
def test_training_on_four_channels_starts_from_three_and_says_so(files, tmp_path, capsys, words):
    recipe, _, rest = words.replace("MODEL", str(tmp_path / "model")).partition(" ")
    with pytest.raises(SystemExit):
        run(recipe, f"{rest} {files}")
    error = capsys.readouterr().err
    assert "--inflate mean" in error
    assert not (tmp_path / "run").exists()
    run(recipe, f"{rest} {files} --inflate 0,1,2,1")
    told = capsys.readouterr().out
    assert told.count("note: --inflate 0,1,2,1: from 3 channels to 4. Each filter is that of one old channel") == 1
    assert "inflate a model only to train it" in told
    assert load_backbone(tmp_path / "run" / "model").channels == 4


def test_a_model_of_colour_is_adapted_to_grey(files, tmp_path, capsys):
    folder = tmp_path / "grey"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 16), np.uint8)
    np.savez(tmp_path / "grey.npz", x_train=pixels)
    words = f"--data npz:{tmp_path / 'grey.npz'} --init_from {tmp_path / 'model'} --objective mpp --epochs 2"
    run("adapt", f"{words} --inflate mean --batch_size 16 --threads 1 --out {folder}")
    told = capsys.readouterr().out
    assert "from 3 channels to 1. Each filter is the mean of all old ones, times 3/1." in told
    assert "No set is kept: the built-in images have 3 channels, not 1" in told
    assert load_backbone(folder / "model").channels == 1


def test_python_fine_tunes_a_model_on_other_channels(files, tmp_path, capsys):
    given = {"out": tmp_path / "tuned", "steps": 2, "lr": 0.1, "batch_size": 16, "threads": 1}
    data = f"npz:{tmp_path / 'four.npz'}"
    with pytest.raises(ValueError, match="have 4 channels, not 3"):
        sslvit.finetune(tmp_path / "model", data, **given)
    tuned = sslvit.finetune(tmp_path / "model", data, **given, inflate="mean")
    assert tuned.classifier.backbone.channels == 4
    assert "note: --inflate mean: from 3 channels to 4." in capsys.readouterr().out
