"""The wheel is whole: installed where there is no clone, it pretrains, probes, compares and embeds."""

import importlib.util
import os
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[2]
TINY = "--image_size 16 --data shapes:n=64 --threads 1"

# In the new environment, of every process: reading the clone's code is an error.
GUARD = """
import sys
def guard(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith({places}):
        raise RuntimeError(f"{{event}} of {{arguments[0]}}, which is in the clone")
sys.addaudithook(guard)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds, is not there"),
]


def build(kind: str, project: Path, folder: Path) -> Path:
    """A wheel or an sdist, by what pip asks hatchling for."""
    folder.mkdir()
    code = f"import sys; from hatchling.build import build_{kind}; build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=project, check=True, capture_output=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", CLONE, tmp_path_factory.mktemp("build") / "wheel")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The python of an environment of its own, where the wheel is and of ours the dependencies alone."""
    place = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (packages,) = place.glob("lib/python*/site-packages")
    ours = {*site.getsitepackages(), *(path for path in sys.path if Path(path).name == "site-packages")}
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(ours)) + "import no_clone\n")
    places = tuple(str(CLONE / name) for name in ("sslvit", "recipes", "tests"))
    (packages / "no_clone.py").write_text(GUARD.format(places=places))
    return python


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """Runs a module of the package in one empty folder."""
    folder = tmp_path_factory.mktemp("work")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"SSLVIT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run([str(installed), *words], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = folder
    return run


def test_the_wheel_has_all_recipes_and_their_settings_and_no_benchmarks(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "sslvit", "recipes"], cwd=CLONE, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no clone")
    files = {name for name in tracked.stdout.split() if name != "sslvit/recipes"}
    ours = {f"sslvit/{name}" if name.startswith("recipes/") else name for name in files}
    left_out = ("sslvit/recipes/benchmarks/", "sslvit/recipes/results/")
    assert {name for name in names if ".dist-info/" not in name} == {n for n in ours if not n.startswith(left_out)}
    assert {"sslvit/py.typed", "sslvit/recipes/mpp.py", "sslvit/recipes/configs/ddp.yaml"} <= names


def test_a_wheel_of_the_source_distribution_is_the_same(wheel, tmp_path):
    with tarfile.open(build("sdist", CLONE, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (project,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", project, tmp_path / "again")
    contents = [
        {name: opened.read(name) for name in opened.namelist() if not name.endswith("/RECORD")}
        for opened in map(zipfile.ZipFile, (wheel, again))
    ]
    assert contents[0] == contents[1]


def test_every_module_is_imported_from_the_wheel(run, installed):
    code = (
        "import importlib, pkgutil, sslvit\n"
        "names = [m.name for m in pkgutil.walk_packages(sslvit.__path__, 'sslvit.') if '__main__' not in m.name]\n"
        "print(len(names)); [print(importlib.import_module(name).__file__) for name in ['sslvit', *names]]"
    )
    count, *files = run("-c", code).splitlines()
    assert int(count) > 100
    assert len(files) == int(count) + 1
    assert all(file.startswith(str(installed.parents[1])) for file in files)


def test_the_clone_would_have_been_noticed(run, installed):
    code = f"import sys; sys.path.insert(0, {str(CLONE)!r}); import sslvit"
    with pytest.raises(AssertionError, match="which is in the clone"):
        run("-c", code)


def test_without_a_clone_it_pretrains_probes_compares_and_embeds(run):
    small = f"{TINY} --model XS/8"
    train = f"{small} --epochs 1 --warmup_epochs 0 --batch_size 16 --out runs/mpp"
    assert "The model is in runs/mpp/model" in run("-m", "sslvit.recipes.mpp", *train.split())
    probe = f"{TINY} --model runs/mpp --limit_test 100"
    assert "20-nn" in run("-m", "sslvit.recipes.probe", *probe.split())
    compare = (
        "--data shapes:n=64 --image_size 16 --model mu/8 --methods mpp --epochs 0.5 --batch_size 32 --fractions 1 "
    )
    compare += "--finetune_steps 2 --finetune_rates 0.1 --limit_train 64 --limit_test 64 --jobs 1"
    assert "The report is runs/compare/report.html" in run("-m", "sslvit.recipes.compare", *compare.split())
    embed = f"{TINY} --model runs/mpp --out features.parquet"
    assert "64 rows of 128 in features.parquet" in run("-m", "sslvit.recipes.embed", *embed.split())
    assert "MPP" in run("-m", "sslvit", "info", "runs/mpp")
