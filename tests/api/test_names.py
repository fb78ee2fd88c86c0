"""What `import sslvit` offers, and that each of it is explained by an example that runs."""

import doctest
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sslvit

NAMES = [
    *("ViT", "BiT", "Classifier", "Encoded", "Objective", "Batch", "MPP", "MAE", "MoCoV3", "DINO", "Supervised"),
    *("Segmentation", "probe_dense", "Dense"),
    *("SimCLR", "VICReg", "LeJEPA", "IJEPA", "Data2Vec"),
    *("SimMIM", "IBOT", "DINOv2"),
    *("open_images", "pretrain", "finetune", "Run", "TrainConfig", "extract_features", "knn", "few_shot"),
    *("logistic_regression", "linear_probe", "Features", "load_model", "save_model", "export_model", "push_to_hub"),
    *("pca_of_patches", "nearest_patches", "robustness", "corrupt"),
    *("Error", "views", "recipes"),
]


def test_the_public_names_are_these():
    assert sorted(sslvit.__all__) == sorted([*NAMES, "__version__"]) == sorted(dir(sslvit))
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        _ = sslvit.pretrian


def test_editors_and_type_checkers_are_told_the_same_names():
    source = Path(sslvit.__file__).read_text().partition("if TYPE_CHECKING:")[2].partition("\nPLACES")[0]
    told = [line.rpartition(" as ")[2].rstrip(",") for part in source.split(", ") for line in part.splitlines()]
    assert sorted(name for name in told if name in NAMES) == sorted(NAMES)


@pytest.mark.processes
def test_importing_sslvit_loads_no_torch_and_each_name_loads_by_itself():
    code = (
        "import sys, sslvit; assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "import sslvit.finetuning, sslvit.recipes.mae\n"
        "assert callable(sslvit.finetune) and sslvit.recipes.mpp.PRESETS and sslvit.views.CropFlip\n"
        "print(sslvit.Error.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("Error\n", "")


@pytest.mark.usefixtures("all_shapes")
@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_has_a_docstring_with_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thing = getattr(sslvit, name)
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), {}, name, None, 0)
    assert any("sslvit." in example.source for example in examples.examples), name
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.onnx")
        runner.run(examples, out=report.append)
    assert runner.failures == 0, "".join(report)
