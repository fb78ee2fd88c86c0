"""Features and protocols: the numbers of the functions behind them, and one sentence for what does not fit."""

import numpy as np
import pytest
import torch

import sslvit
from sslvit.data.spec import open_source
from sslvit.errors import DataError
from sslvit.evaluate import fewshot, knn, logistic
from sslvit.evaluate.features import Features, extract
from sslvit.processes.collectives import start
from sslvit.views.pretraining import eval_view


def features(x: torch.Tensor, y: list[int] | None, **more) -> Features:
    labels = None if y is None else torch.tensor(y)
    return Features({"cls": x}, labels, torch.arange(len(x)), torch.tensor([], dtype=torch.int64), **more)


@pytest.fixture(scope="module")
def both() -> tuple[Features, Features]:
    vit = sslvit.ViT.variant("mu/8", image_size=16)
    return tuple(sslvit.extract_features(vit, "shapes", split, ids=range(150)) for split in ("train", "test"))


def test_features_are_those_of_the_extractor_bit_for_bit(both):
    vit, source = sslvit.ViT.variant("mu/8", image_size=16), open_source("shapes", image_size=16)
    theirs = extract(vit, source, eval_view(16), start(threads=1), ids=np.arange(150), readouts=("cls", "mean"))
    assert torch.equal(both[0].x, theirs.by_readout["cls"])
    assert torch.equal(both[0].y, theirs.labels)
    assert both[0].classes == source.classes
    named = sslvit.extract_features(vit, "shapes", readout=("mean", "cls"), ids=range(150))
    assert named.declared == "cls"
    assert torch.equal(named.by_readout["mean"], theirs.by_readout["mean"])
    vit.declared = "mean"
    assert torch.equal(sslvit.extract_features(vit, "shapes", ids=range(150)).x, theirs.by_readout["mean"])


def test_a_path_a_backbone_and_an_objective_give_the_same(tmp_path):
    objective = sslvit.MPP(sslvit.ViT.variant("mu/8", image_size=16))
    sslvit.save_model(objective, tmp_path / "model")
    given = [objective, tmp_path / "model", str(tmp_path / "model"), sslvit.load_model(tmp_path / "model")]
    first, *others = [sslvit.extract_features(model, "shapes", ids=range(20)) for model in given]
    assert first.declared == "mean"
    assert all(torch.equal(first.x, other.x) for other in others)
    assert objective.training


def test_the_protocols_are_those_of_the_probes(both):
    train, test = both
    four = train.x, train.y, test.x, test.y
    assert sslvit.knn(train, test) == knn.knn(*four)
    assert sslvit.knn(train, test, k=3, temperature=0.1) == knn.knn(*four, k=3, temperature=0.1)
    few = fewshot.fewshot(*four, shots=5, draws=2)
    assert sslvit.few_shot(train, test, shots=5, draws=2) == (few.mean, few.spread)
    probe = sslvit.logistic_regression(train, test)
    scores = logistic.logistic(train.x, train.y, test.x).float()
    assert torch.equal(probe.predictions.probabilities, scores)
    assert probe.accuracy == (scores.argmax(1) == test.y).double().mean().item()
    head = sslvit.linear_probe(train, test, "mae")
    by_hand = test.x @ head.weights["weight"].T + head.weights["bias"]
    assert torch.equal(by_hand.argmax(1), head.predictions.probabilities.argmax(1))


def test_labels_of_named_classes_mean_the_same_class_in_both():
    """Test folders may lack a class: their numbers are others."""
    x = torch.eye(3)
    train = features(x, [0, 1, 2], classes=("ant", "bee", "cow"))
    test = features(x[1:], [0, 1], classes=("bee", "cow"))
    assert sslvit.knn(train, test, k=1) == 1.0
    assert sslvit.knn(train, features(x[1:], [0, 1]), k=1) == 0.0


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (features(torch.eye(3), None), features(torch.eye(3), [0, 1, 2]), "training features .* without labels"),
        (features(torch.eye(3), [0, 1, 2]), features(torch.eye(3), None), "test features .* without labels"),
        (features(torch.eye(3), [0, 1, 2]), features(torch.eye(3)[:, :2], [0, 1, 2]), "of 3 numbers, .* of 2"),
        (features(torch.eye(3), [0, 1, 1]), features(torch.eye(3), [0, 1, 2]), "have label 2, the .* only 0 to 1"),
        (
            features(torch.eye(3), [0, 1, 1], classes=("ant", "bee")),
            features(torch.eye(3), [0, 1, 1], classes=("ant", "cow")),
            "classes that the training images lack: cow",
        ),
        (
            features(torch.eye(3), [0, 1, 2], declared="cls"),
            features(torch.eye(3), [0, 1, 2])._replace(by_readout={"mean": torch.eye(3)}, declared="mean"),
            "by one model and one readout",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [sslvit.knn, sslvit.few_shot, sslvit.logistic_regression, sslvit.linear_probe])
def test_features_that_do_not_fit_are_one_sentence(protocol, train, test, said):
    with pytest.raises((DataError, ValueError), match=said):
        protocol(train, test)


def test_what_cannot_be_extracted_is_one_sentence(both):
    vit = sslvit.ViT.variant("mu/8", image_size=16)
    with pytest.raises(TypeError, match="did you mean image_column"):
        sslvit.extract_features(vit, "shapes", image_colum="x")
    with pytest.raises(ValueError, match="readout must be cls, mean, both"):
        sslvit.extract_features(vit, "shapes", readout="last", ids=range(3))
    with pytest.raises(ValueError, match="a Linear is no model of sslvit"):
        sslvit.extract_features(torch.nn.Linear(2, 2), "shapes")
    with pytest.raises(ValueError, match="protocol must be one of grid"):
        sslvit.linear_probe(*both, "dinov3")
    with pytest.raises(ValueError, match="reads all patches"):
        sslvit.linear_probe(*both, "attentive")
    with pytest.raises(ValueError, match="have the readouts cls, mean"):
        _ = both[0]._replace(by_readout={"cls": both[0].x, "mean": both[0].x}, declared="").x
    with pytest.raises(DataError, match="without labels"):
        _ = features(torch.eye(2), None).y


def test_models_are_saved_loaded_and_exported(tmp_path):
    classifier = sslvit.Classifier(sslvit.ViT.variant("mu/8", image_size=16), readout="mean", classes=3)
    sslvit.save_model(classifier, tmp_path / "classifier", data="mine")
    loaded = sslvit.load_model(tmp_path / "classifier", head=True)
    assert isinstance(loaded, sslvit.Classifier)
    assert (loaded.readout, loaded.head.weight.shape) == ("mean", (3, 32))
    backbone = sslvit.load_model(tmp_path / "classifier")
    assert (type(backbone), backbone.declared, backbone.training) == (sslvit.ViT, "mean", False)
    sslvit.export_model(tmp_path / "classifier", tmp_path / "timm", to="timm")
    assert torch.equal(sslvit.load_model(tmp_path / "timm").cls_token, backbone.cls_token)
    with pytest.raises(ValueError, match=r"^to must be one of timm"):
        sslvit.export_model(backbone, tmp_path / "other", to="tim")
    with pytest.raises(sslvit.Error, match="neither a folder here nor OWNER/NAME"):
        sslvit.load_model("no/such/model")
    sslvit.save_model(backbone, tmp_path / "backbone")
    with pytest.raises(DataError, match="a backbone without a head"):
        sslvit.load_model(tmp_path / "backbone", head=True)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.arange(20) < 3, r"type bool: give a list of whole numbers; np.flatnonzero\(mask\)"),
        (torch.arange(20) < 3, "type bool"),
        ([0.0, 1.0], "type float64: give a list of whole numbers"),
        ([[0, 1]], r"shape \(1, 2\)"),
        ([0, -1], "ids contain -1: the images of .* are numbered 0 to 19"),
        ([20], "ids contain 20"),
        ([], "no images"),
    ],
)
def test_ids_are_numbers_of_images_and_nothing_else(ids, said):
    vit = sslvit.ViT.variant("mu/8", image_size=16)
    with pytest.raises(ValueError, match=said):
        sslvit.extract_features(vit, "shapes:n=20", ids=ids)


def test_ids_may_be_a_tensor():
    vit = sslvit.ViT.variant("mu/8", image_size=16)
    assert sslvit.extract_features(vit, "shapes:n=20", ids=torch.tensor([7, 2])).ids.tolist() == [7, 2]
