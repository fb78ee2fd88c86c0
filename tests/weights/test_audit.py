"""What a run touches beside its own folder: nothing. Python tells of every file, connection, process and pickle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from started import draw_images

pytestmark = pytest.mark.processes

SCRIPT = Path(__file__).parents[1] / "support" / "audited.py"
TOKEN, KEY = "hf_canary_of_a_token", "canary-of-a-key"
SYSTEM = ("/proc", "/sys", "/dev", "/usr", "/lib", "/etc")
# Each with what it is: the commit that a run is of; the machine, by Python's platform; where libraries are, by theirs.
PROCESSES = {"git": "describe", "uname": "-p", "/sbin/ldconfig": "-p"}


@pytest.fixture(scope="module")
def audited(tmp_path_factory) -> tuple[Path, list[list[str]], str]:
    """The folder in which all runs; the events; what was printed."""
    root = tmp_path_factory.mktemp("audited")
    for name in ("images", "home", "tmp"):
        (root / name).mkdir()
    draw_images(root / "images")
    tiny = "--image_size 16 --threads 1"
    train = f"mpp --data folder:images {tiny} --model XS/8 --epochs 1 --warmup_epochs 0 --batch_size 8 --out run"
    words = (
        f"then {train} then {train} --epochs 1 --resume then probe --model run --data shapes:n=64 {tiny} --out probe"
    )
    words += f" --fractions 1 --limit_test 64 then finetune --model run --data shapes:n=64 {tiny} --steps 2"
    words += " --batch_size 8 --rates 0.01 --out fine"
    own = {"SSLVIT_CACHE": f"{root}/home/.cache/sslvit", "HF_HOME": f"{root}/home/.cache/hf"}
    own |= {"HOME": f"{root}/home", "TMPDIR": f"{root}/tmp", "HF_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": KEY}
    command = [sys.executable, str(SCRIPT), str(root / "events"), *words.split()]
    done = subprocess.run(command, cwd=root, env=os.environ | own, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    events = [json.loads(line) for line in (root / "events").read_text().splitlines()]
    return root, events, done.stdout + done.stderr


def test_nothing_connects_anywhere(audited):
    assert not [event for event in audited[1] if event[0].startswith(("socket.", "urllib.", "ftplib."))]


def test_no_process_is_started_but_three_that_are_known(audited):
    started = [
        event for event in audited[1] if event[0].startswith(("subprocess.", "os.system", "os.exec", "os.posix"))
    ]
    assert started, "the hook works"
    for event, program, words, *_ in started:
        assert event == "subprocess.Popen"
        assert PROCESSES[program] in words


def test_nothing_is_unpickled(audited):
    assert not [event for event in audited[1] if event[0] == "pickle.find_class"]


def test_files_are_written_in_the_runs_folders_and_the_users_cache_only(audited):
    root, events, _ = audited
    places = [str(root / name) for name in ("run", "probe", "fine", "runs", "home/.cache", "tmp")]
    written = [path for event, path, *_ in events if event == "write"]
    assert any(path.startswith(f"{root}/run/") for path in written), "the hook works"
    allowed = (*places, "/dev/null", "/dev/shm/", "/proc/self/")
    assert not [path for path in written if not path.startswith(allowed)]


def test_files_are_read_of_the_data_the_package_and_the_system_only(audited):
    root, events, _ = audited
    here = (str(root), str(SCRIPT.parent.parent), sys.prefix, sys.base_prefix, *map(os.path.realpath, sys.path[1:]))
    read = [path for event, path, *_ in events if event == "read"]
    assert sum(path.startswith(f"{root}/images/") for path in read) >= 32, "the hook works"
    assert not [path for path in read if not path.startswith((*here, *SYSTEM))]


def test_no_secret_of_the_environment_is_written_or_printed(audited):
    root, _, printed = audited
    files = [file for name in ("run", "probe", "fine", "runs", "home", "tmp") for file in (root / name).rglob("*")]
    content = b"".join(file.read_bytes() for file in files if file.is_file()) + printed.encode()
    assert b'"loss"' in content, "the files are looked into"
    assert TOKEN.encode() not in content
    assert KEY.encode() not in content
