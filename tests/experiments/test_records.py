"""A record holds all that a comparison needs to know of a method and seed, whatever becomes of its files."""

import shutil
from pathlib import Path

import pytest
import torch
from made_up_comparison import comparison

from sslvit.errors import DataError
from sslvit.experiments.jobs import Job
from sslvit.experiments.records import Judged, Records
from sslvit.experiments.results import collect

FACTS = {"images": 100, "first method": "mpp"}
SETTINGS = {"methods": ["mae"], "seeds": 1, "epochs": 2.0, "fractions": (0.01, 1)}
NAMES = ("scratch-0", "scratch-cls-0", "mae-0")


def made(out: Path) -> tuple[dict[str, Path], list[Job]]:
    """A comparison of one method; its models, and its jobs, which are done."""
    comparison(out, {"scratch": [0.6], "mae": [0.8]}, places=("own",))
    jobs = [Job(f"probe/{name}/own", "probe", (), out / "probes" / name / "own" / "numbers.json") for name in NAMES]
    jobs += [Job("pretrain/mae-0", "mae", (), out / "models" / "mae-0" / "cost.json")]
    return {name: out / "models" / name for name in NAMES}, jobs


def test_results_by_records_are_those_by_the_files(tmp_path):
    models, jobs = made(tmp_path / "out")
    by_files = collect(tmp_path / "out", {"mae": "MAE"}, [0], ["own"], models)
    Records(tmp_path / "kept", SETTINGS, FACTS).keep(jobs, tmp_path / "out", ["own"], models)
    assert sorted(file.name for file in (tmp_path / "kept").iterdir()) == sorted(f"{name}.json" for name in NAMES)
    assert all(file.stat().st_size < 8_000 for file in (tmp_path / "kept").iterdir())
    shutil.rmtree(tmp_path / "out")
    records = Records(tmp_path / "kept", SETTINGS | {"seeds": 3, "methods": ["mae", "dino"]}, FACTS)  # it may grow
    assert collect(tmp_path / "out", {"mae": "MAE"}, [0], ["own"], models, records) == by_files


def test_a_record_is_written_when_all_jobs_are_done_and_not_before(tmp_path):
    models, jobs = made(tmp_path / "out")
    kept = tmp_path / "kept"
    unfinished = Job("finetune/mae-0/own/1", "finetune", (), tmp_path / "missing.json")
    Records(kept, SETTINGS, FACTS).keep([*jobs, unfinished], tmp_path / "out", ["own"], models)
    assert not (kept / "mae-0.json").exists()
    assert (kept / "scratch-0.json").exists()
    Records(None, SETTINGS, FACTS).keep(jobs, tmp_path / "out", ["own"], models)
    Records(kept, SETTINGS, FACTS).keep(jobs, tmp_path / "out", ["own"], models)
    assert (kept / "mae-0.json").exists()


def test_a_record_of_other_settings_or_with_a_flipped_bit_is_refused_in_a_sentence(tmp_path):
    models, jobs = made(tmp_path / "out")
    Records(tmp_path / "kept", SETTINGS, FACTS).keep(jobs, tmp_path / "out", ["own"], models)
    with pytest.raises(DataError, match=r"mae-0.json is of a comparison with other settings: epochs was 2.0, is now 3"):
        Records(tmp_path / "kept", SETTINGS | {"epochs": 3}, FACTS).read("mae-0")
    for other in ({"images": 99}, {"first method": "dino"}):
        with pytest.raises(DataError, match=r"mae-0.json is of another comparison: .* was .*, is now"):
            Records(tmp_path / "kept", SETTINGS, FACTS | other).read("mae-0")
    file = tmp_path / "kept" / "mae-0.json"
    file.write_text(file.read_text().replace('"epochs": 2.0', '"epochs": 3.0'))
    with pytest.raises(DataError, match=r"mae-0.json cannot be read .*restore it, or delete it"):
        Records(tmp_path / "kept", SETTINGS, FACTS).read("mae-0")
    assert Records(tmp_path / "kept", SETTINGS, FACTS).read("mae-1") is None
    assert Records(None, SETTINGS, FACTS).read("mae-0") is None


@pytest.mark.parametrize("images", [1, 8, 1003])
def test_which_images_were_right_survives_the_packing(images):
    right = torch.rand(images, generator=torch.Generator().manual_seed(images)) < 0.7
    judged = Judged(right, 0.5, False, True, 3)
    again = Judged.from_json(judged.as_json())
    assert torch.equal(again.right, right)
    assert again[1:] == judged[1:]
