"""Training where others stumble: no home, no name for the user, an ASCII locale, names of files that are not UTF-8."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from recipes_run import RECIPES

pytestmark = pytest.mark.processes

SMALL = "--preset small --model XS/8 --image_size 16 --epochs 1 --warmup_epochs 0 --batch_size 16 --threads 1"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
UTF8 = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}
NAME = "caf\udce9 ü"  # as Python has the bytes b"caf\xe9 \xc3\xbc"


def train(recipe: str, *words: str, environment: dict, without: tuple[str, ...] = (), first: tuple = ()) -> bytes:
    env = {name: value for name, value in os.environ.items() if name not in without} | environment
    env |= {"OMP_NUM_THREADS": "1"}
    command = [*first, sys.executable, str(RECIPES / f"{recipe}.py"), *SMALL.split(), *words]
    done = subprocess.run([os.fsencode(word) for word in command], capture_output=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr
    return done.stdout


def test_a_user_without_a_home_and_a_name_can_train(tmp_path):
    nobody = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
    if not shutil.which("unshare") or subprocess.run([*nobody, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody become a user that it does not know")
    without = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "SSLVIT_CACHE")
    words = "--data", "shapes:n=64", "--out", str(tmp_path / "run")
    said = train("mpp", *words, first=nobody, without=without, environment={"TMPDIR": str(tmp_path)})
    assert f"free at {tmp_path / 'sslvit-54321'}" in said.decode()
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("environment", "shown"),
    [(ASCII, "caf\\udce9 \\udcc3\\udcbc"), pytest.param(UTF8, "caf\\udce9 ü", marks=pytest.mark.slow)],
)
def test_an_ascii_locale_and_names_that_are_not_utf_8_stop_nothing(tmp_path, environment, shown):
    for split in ("train", "test"):
        for kind in ("a\udce9", "b|<b>ü"):
            folder = tmp_path / NAME / split / kind
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"\udce9{i}.png")
        (folder / "bad\udce9.png").write_bytes(b"no picture")
    out = tmp_path / f"run {NAME}"
    words = "--data", f"folder:{tmp_path / NAME}", "--out", str(out), "--workers", "1"
    said = train("supervised", *words, environment=environment | {"SSLVIT_CACHE": str(tmp_path / "cache")})
    encoding = "ascii" if environment is ASCII else "utf-8"
    assert f"The model is in {tmp_path}/run {shown}/model, a report in" in said.decode(encoding)
    for name in ("report.html", "report.md", "data.txt", "model/README.md", "config.json", "bad_images.jsonl"):
        assert (out / name).read_bytes().decode("utf-8"), name
