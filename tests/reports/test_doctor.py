"""The doctor finds what is wrong, says what to do, and its exit code tells."""

import sys

import preloaded
import pytest
from started import with_shared_memory

from sslvit.errors import CANNOT_WRITE, INTERNAL
from sslvit.reports import doctor

pytestmark = pytest.mark.processes


def test_a_sound_machine_is_told_so(tmp_path):
    lines: list[str] = []
    assert doctor.examine(tmp_path / "not" / "yet", lines.append) == 0
    names = [line[5:17].strip() for line in lines]
    assert names[:3] == ["packages", "torchvision", "CPU"]
    assert names[-5:] == ["processes", "shared", "room", "disk", "training"]
    assert not any(line.startswith("FAIL") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.durable, "write", refuse)
    lines: list[str] = []
    assert doctor.examine(tmp_path, lines.append) == CANNOT_WRITE
    assert any(f"{tmp_path} cannot be written: Permission denied. Choose another --out" in line for line in lines)


def test_a_torchvision_of_another_torch_is_named(monkeypatch, tmp_path):
    def broken(*args):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("torchvision.ops.nms", broken)
    lines: list[str] = []
    assert doctor.examine(tmp_path, lines.append) == INTERNAL
    assert any("do not fit each other: operator torchvision::nms" in line for line in lines)


def test_little_shared_memory_is_told_with_what_runs_need_and_the_way_out(tmp_path):
    script = "from pathlib import Path; from sslvit.reports.doctor import examine; examine(Path('.'), print)"
    done = with_shared_memory("64m", script, cwd=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if "/dev/shm" in line]
    # 256 images of 224 px as float32 views are 154 MB, two workers hold up to ten such batches.
    assert line.startswith("warn shared      0.1 GB free at /dev/shm, for the batches of --workers: little, 2 workers")
    assert "256 images of 224 px need 1.5. A run that lacks it copies batches through pipes" in line
    assert "docker run --shm-size=8g" in line


@pytest.mark.parametrize(
    ("words", "code"), [(["doctor", "."], 0), (["docter"], 78), (["report", "/nowhere"], 66), ([], 0)]
)
def test_from_the_command_line(words, code, tmp_path):
    done = preloaded.run([sys.executable, "-m", "sslvit", *words], cwd=tmp_path, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") <= 1 or code == 0
    assert "Traceback" not in done.stderr


def test_two_processes_see_each_other(tmp_path):
    ended = preloaded.run_ranks([sys.executable, "-m", "sslvit", "doctor", str(tmp_path)])
    assert [done.returncode for done in ended] == [0, 0]
    assert "2 that see each other" in ended[0].stdout
