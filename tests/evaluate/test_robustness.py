"""Patches, numbers by hand, and the whole from a command line, in Python and in a comparison."""

import json

import numpy as np
import pytest
import torch
from recipes_run import run
from torch import nn

from sslvit import rng
from sslvit.data.readers import shapes
from sslvit.data.spec import open_source
from sslvit.evaluate import statistics
from sslvit.evaluate.metrics import calibration_error
from sslvit.evaluate.monitor import draw_ids
from sslvit.evaluate.robustness import assess as assessing, measure as measuring, patches
from sslvit.evaluate.robustness.corruptions import NAMES, STRENGTHS
from sslvit.evaluate.robustness.measure import CLEAN, CONFLICT, DROPS, SHARES, Answers, Measured, conditions
from sslvit.evaluate.robustness.summary import MEAN, corruption_error, interval, summary
from sslvit.models.readout import Classifier
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.reports import robustness as report
from sslvit.views.pretraining import EvalView
from sslvit.weights.folder import save_backbone


@pytest.fixture
def few_resamples(monkeypatch):
    """For tests that look at no interval."""
    monkeypatch.setattr(statistics, "RESAMPLES", 100)


IMAGE = torch.arange(1.0, 17).view(1, 1, 4, 4)
KEY = rng.key(0, torch.arange(1))


@pytest.mark.parametrize(
    ("share", "left"),
    [
        (0.0, [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]),
        (0.4, [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 11, 12], [0, 0, 15, 16]]),  # 1.6 of four patches: one
        (0.5, [[1, 2, 0, 0], [5, 6, 0, 0], [0, 0, 11, 12], [0, 0, 15, 16]]),
        (0.9, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 11, 12], [0, 0, 15, 16]]),
    ],
)
def test_the_first_patches_of_the_order_become_black(share, left):
    dropped = patches.dropped(IMAGE, torch.tensor([[2, 1, 0, 3]]), share, (2, 2))
    assert dropped.tolist() == [[left]]


def test_shares_that_floats_miss_drop_the_patches_that_they_say():
    """0.29 * 100 is 28.999999999999996."""
    dropped = patches.dropped(torch.ones(1, 1, 10, 10), torch.arange(100)[None], 0.29, (10, 10))
    assert dropped.sum() == 71


def test_patches_may_be_oblong_and_of_several_colours():
    image = torch.arange(1.0, 17).view(1, 2, 2, 4)
    dropped = patches.dropped(image, torch.tensor([[1, 0]]), 0.5, (1, 2))
    assert dropped.tolist() == [[[[1, 2, 0, 0], [5, 6, 0, 0]], [[9, 10, 0, 0], [13, 14, 0, 0]]]]


def test_shuffled_patches_are_the_same_ones_whole_and_in_the_order_of_the_key():
    orders = set()
    for number in range(40):
        key = rng.key(0, torch.tensor([number]))
        order = rng.permutation(rng.fold(key, "shuffle"), 4)[0].tolist()
        blocks = [IMAGE[0, 0, y : y + 2, x : x + 2] for y in (0, 2) for x in (0, 2)]
        a, b, c, d = (blocks[i] for i in order)
        expected = torch.cat([torch.cat([a, b], 1), torch.cat([c, d], 1)])
        assert torch.equal(patches.shuffled(IMAGE, key, (2, 2))[0, 0], expected)
        orders.add(tuple(order))
    assert len(orders) > 12  # of 24


def test_what_is_random_depends_on_the_image_and_not_on_the_batch():
    keys, images = rng.key(0, torch.arange(5)), torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = patches.shuffled(images, keys, (4, 4))
    assert torch.equal(whole[3:4], patches.shuffled(images[3:4], keys[3:4], (4, 4)))
    order = patches.random_order(keys, (4, 4))
    assert torch.equal(order[3:4], patches.random_order(keys[3:4], (4, 4)))
    assert order.sort().values.tolist() == [list(range(16))] * 5


@pytest.mark.parametrize("readout", ["cls", "mean"])
def test_the_salient_patch_is_the_one_that_the_model_attends_to(readout):
    """Queries are constant and keys grow with what is bright, so that a bright patch has most of the attention."""
    vit = ViT.variant("mu/8", image_size=32, position="none")
    block = vit.blocks[-1]
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
        vit.patch_embed.proj.weight[0] = 1.0
        vit.patch_embed.proj.weight[1] = -1.0
        for norm in (block.norm1, vit.norm):
            norm.weight.fill_(1.0)
        width = vit.width
        block.attn.qkv.bias[:width] = 1.0
        block.attn.qkv.weight[width, 0] = 5.0
    images = torch.full((2, 3, 32, 32), 0.4)
    images[0, :, 8:16, 16:24] = 1.0  # patch 6 of 4 x 4
    images[1, :, 24:, :8] = 1.0  # patch 12
    assert patches.salient_order(vit, images, (4, 4), readout)[:, 0].tolist() == [6, 12]
    assert patches.salient_order(vit, images, (2, 2), readout)[:, 0].tolist() == [1, 2]


def test_a_model_that_is_read_by_its_mean_patch_has_the_salience_of_its_patches():
    """By the attention of the last block: a row of the class token, or the mean of the patches' rows."""
    vit = ViT.variant("mu/8", image_size=16)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    (attention,) = vit.attention(images, 1)
    for readout, rows in (("cls", attention[:, :, 0, 1:]), ("mean", attention[:, :, 1:, 1:].mean(2))):
        expected = rows.mean(1).argsort(1, descending=True)
        assert torch.equal(patches.salient_order(vit, images, (2, 2), readout), expected)


def test_grids_of_shuffled_patches_divide_the_image():
    assert patches.shuffles((32, 32)) == [1, 2, 4, 8, 16]
    assert patches.shuffles((224, 224)) == [1, 2, 4, 8, 16, 32]
    assert patches.shuffles((16, 24)) == [1, 2, 4, 8]
    assert patches.shuffles((15, 15)) == [1]


def test_an_object_in_anothers_colour_is_the_same_scene_but_for_the_object():
    ids = torch.arange(40)
    own = shapes.shape_label(ids)
    assert torch.equal(shapes.make(ids, 32, colors_of=own), shapes.make(ids, 32))
    other = shapes.make(ids, 32, colors_of=(own + 6) % 12)  # the opposite hue
    changed = (other != shapes.make(ids, 32)).any(1).double().mean((1, 2))
    assert (changed > 0.02).all()
    assert (changed < 0.75).all()


# Four images of two classes: by hand.
LABELS = torch.tensor([0, 0, 1, 1])


def made_up() -> Measured:
    """The model `best` is right about the first three of the images; `worst` about the first, except that it is right
    about two in fog. Both are sure by 3/4."""
    names = [CLEAN, *(f"{name} {strength}" for name in NAMES for strength in STRENGTHS)]
    best, worst, fog = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 0, 0])
    sure = torch.full((4,), 0.75, dtype=torch.float64)
    answers = {
        name: {"best": Answers(best, sure), "worst": Answers(fog if name.startswith("fog") else worst, sure)}
        for name in names
    }
    answers[CONFLICT] = {"best": Answers(torch.tensor([0, 5, 1, 7]), sure), "worst": Answers(LABELS + 8, sure)}
    return Measured(torch.arange(4), LABELS, answers, torch.tensor([4, 5, 6, 2]))


@pytest.mark.usefixtures("few_resamples")
def test_the_numbers_of_a_report_are_those_by_hand():
    numbers = summary(made_up())
    assert numbers["images"] == 4
    assert numbers["accuracy"][CLEAN]["best"][0] == 0.75
    assert numbers["accuracy"]["fog 3"]["worst"][0] == 0.5
    assert numbers["accuracy"]["strength 2"]["worst"][0] == pytest.approx((13 * 0.25 + 0.5) / 14)
    assert numbers["accuracy"][MEAN]["worst"][0] == pytest.approx((13 * 0.25 + 0.5) / 14)
    assert numbers["ahead of the first"][CLEAN]["worst"][0] == -0.5
    assert numbers["mean corruption error"]["best"][0] == 1.0
    assert numbers["mean corruption error"]["worst"][0] == pytest.approx((13 * 0.75 / 0.25 + 0.5 / 0.25) / 14)
    # All in one bin: |accuracy - confidence|.
    assert numbers["calibration error"]["0"] == {"best": 0.0, "worst": pytest.approx(0.5)}
    assert numbers["calibration error"]["4"]["worst"] == pytest.approx((13 * 0.5 + 0.25) / 14)
    # Of four answers two name the outline and one the colour; the other model names neither.
    found = numbers["outline against colour"]
    assert [found["best"][name][0] for name in ("outline", "colour", "share")] == [0.5, 0.25, pytest.approx(2 / 3)]
    assert [found["worst"][name][0] for name in ("outline", "colour")] == [0.0, 0.0]
    assert found["worst"]["share"] is None


def test_without_errors_of_the_reference_there_is_no_mean_corruption_error():
    assert corruption_error(torch.ones(4, 2).double(), torch.tensor([[0.0, 1.0]] * 4).double()) is None


def test_draws_without_an_error_of_the_reference_have_no_part_in_the_interval():
    """One image of 20 is wrong: a third of the resamples are without it."""
    reference = torch.zeros(20, 1).double()
    reference[0] = 1.0
    mean, low, high = corruption_error(reference + reference.flip(0), reference)
    assert mean == 2.0
    assert 1.0 <= low <= high <= 20.0


def test_a_reference_that_hardly_ever_errs_in_all_corruptions_at_once_has_no_mean_corruption_error():
    """One wrong image in each of ten corruptions: (1 - 1/e)^10 is a hundredth of the draws."""
    reference = torch.eye(20, 10).double()
    assert corruption_error(reference, reference) is None


def test_intervals_are_those_of_the_binomial():
    """Of 1,000 images 300 are right: the standard error of the share is the root of 0.3 * 0.7 / 1000."""
    mean, low, high = interval(torch.cat([torch.ones(300), torch.zeros(700)]))
    reach = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert mean == pytest.approx(0.3)
    assert (low, high) == pytest.approx((0.3 - reach, 0.3 + reach), abs=0.002)


def test_the_gap_of_confidences_is_the_error_of_the_probabilities():
    probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.55, 0.45]])
    labels = torch.tensor([0, 0, 1])
    # In three bins of their own: |1 - .9|, |0 - .7|, |0 - .55|, a third of each.
    assert calibration_error(probabilities, labels) == pytest.approx((0.1 + 0.7 + 0.55) / 3)


@pytest.fixture
def models(tmp_path):
    """A classifier of 16 px that always names the first shape, and the backbone of the same."""
    vit = ViT.variant("mu/8", image_size=16)
    save_backbone(vit, tmp_path / "plain", {"readout": "mean"})
    classifier = Classifier(vit, readout="cls", classes=12)
    nn.init.constant_(classifier.head.bias[0], 9.0)
    save_backbone(
        vit,
        tmp_path / "tuned",
        {"readout": "cls"},
        head={name: value for name, value in classifier.state_dict().items() if name.startswith("head")},
    )
    return tmp_path / "tuned", tmp_path / "plain"


def words(models, tmp_path, more: str = "") -> str:
    same = f"--data shapes:n=120 --limit_test 12 --threads 1 --out {tmp_path / 'out'} --cache {tmp_path / 'cache'}"
    return f"--model {' '.join(map(str, models))} {same} {more}"


@pytest.mark.usefixtures("few_resamples")
def test_one_command_compares_classifiers_and_probes_with_random_starts(models, tmp_path, capsys):
    run("robustness", words(models, tmp_path))
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["seal"]
    assert list(numbers["read by"]) == ["tuned", "plain", "random (tuned)", "random (plain)"]
    assert numbers["read by"]["tuned"] == "its own head of cls"
    # The classifier's answer never changes, so nothing changes its accuracy: the share of the first shape.
    ids = torch.from_numpy(np.sort(assessed_ids()))
    first = (shapes.shape_label(ids) == 0).double().mean().item()
    assert all(one["tuned"][0] == pytest.approx(first) for one in numbers["accuracy"].values())
    assert set(numbers["accuracy"]) >= {*conditions((16, 16), (2, 2)), MEAN}
    assert {f"{kind} drop {share:g}" for kind in DROPS for share in SHARES} <= set(numbers["accuracy"])
    printed, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    assert "outline against colour" in printed
    assert printed.count("95% CI") == 6
    assert page.count("<svg") == 6
    assert "without frost" in page


def assessed_ids() -> np.ndarray:
    """The twelve test images: the built-in test images follow the training images."""
    test = open_source("shapes:n=120", split="test", image_size=16)
    return test.first + draw_ids(test, 12)


def test_a_model_without_attention_loses_random_patches_only(monkeypatch):
    every = conditions((32, 32), (4, 4))
    few = {name: every[name] for name in (CLEAN, *(f"{kind} drop 0.5" for kind in DROPS), "fog 1")}
    monkeypatch.setattr(measuring, "conditions", lambda size, grid: dict(few))
    bit = BiT.variant("R20x0.5", image_size=32)
    subject = measuring.Subject("resnet", bit, "mean", lambda x: x[:, :12].softmax(-1), "its first features")
    vit = subject._replace(name="vit", backbone=ViT.variant("mu/8", image_size=32))
    test, device = open_source("shapes:n=20", split="test", image_size=32), torch.device("cpu")
    measured = measuring.measure([subject, vit], test, np.arange(4), EvalView(32), (32, 32), (4, 4), device)
    assert sorted(name for name, one in measured.answers.items() if "resnet" not in one) == [
        "non-salient drop 0.5",
        "salient drop 0.5",
    ]
    assert all("vit" in one for one in measured.answers.values())
    assert torch.equal(measured.labels, torch.from_numpy(test.labels[:4]))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--grid 3", "--grid 3 3: images of 16 x 16 pixels do not divide into a grid of 3 x 3"),
        ("--names one", "--names one: give 2 different ones"),
        ("--probe svm", "--probe svm: it must be logistic or knn"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(models, tmp_path, capsys, more, said):
    with pytest.raises(SystemExit):
        run("robustness", words(models, tmp_path, more))
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_head_of_too_few_classes_is_refused(tmp_path):
    vit = ViT.variant("mu/8", image_size=16)
    models = {"few": (Classifier(vit, readout="cls", classes=3), "cls")}

    class Test:
        name = "images"

        def required_labels(self) -> np.ndarray:
            return np.array([0, 3])

    with pytest.raises(ValueError, match="images has label 3, beyond the 3 classes of the head of few"):
        assessing.assess(models, Test(), None, None, (16, 16), torch.device("cpu"), None)


def test_a_head_of_other_classes_is_refused(tmp_path, capsys):
    classifier = Classifier(ViT.variant("mu/8", image_size=16), readout="cls", classes=12)
    head = {name: value for name, value in classifier.state_dict().items() if name.startswith("head")}
    about = {"readout": "cls", "classes": [*shapes.SHAPES[1:], "disc"]}
    save_backbone(classifier.backbone, tmp_path / "other", about, head=head)
    with pytest.raises(SystemExit):
        run("robustness", words([tmp_path / "other"], tmp_path))
    assert "the classes of the head of other are not those of shapes" in capsys.readouterr().err


def test_models_of_other_sizes_need_one_image_size():
    models = {name: (ViT.variant("mu/8", image_size=size), "cls") for name, size in (("a", 16), ("b", 32))}
    with pytest.raises(ValueError, match=r"image_size: a \(16, 16\), b \(32, 32\); give one --image_size"):
        assessing.image_size_of(models)


@pytest.mark.usefixtures("few_resamples")
def test_a_report_without_the_built_in_images_says_nothing_of_colours():
    measured = made_up()
    del measured.answers[CONFLICT]
    numbers = summary(measured._replace(colors=None))
    numbers |= {"data": "mine", "size": [32, 32], "grid": [4, 4], "parameters": "CIFAR-10-C", "read by": {}}
    assert "colour" not in "".join([*report.lines_of(numbers), report.as_page(numbers).partition("</style>")[2]])
