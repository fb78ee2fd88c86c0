"""A comparison's jobs are done once each, in an order that fits, whoever is killed, and however many work on them."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from recipes_run import RECIPES, run
from toy_jobs import Settings, toy, toys

from sslvit.cli.parse import parse
from sslvit.config import ImagesConfig
from sslvit.errors import CannotWrite, DataError
from sslvit.experiments.compare import (
    ComparisonConfig,
    Method,
    check,
    check_first,
    check_methods,
    names_of,
    passes,
    plan,
    sets,
    starts,
)
from sslvit.experiments.disk import check_room, needed
from sslvit.experiments.jobs import Job, check_settings, locked, reading, recipe_of
from sslvit.experiments.study import (
    Point,
    StudyConfig,
    amounts,
    baseline_rows,
    baselines_of,
    costs,
    results_of,
    runs_of,
    write,
)
from sslvit.experiments.work import JobFailed, delete_checkpoints, work_on
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.reports.charts import LEFT, RIGHT, WIDTH
from sslvit.storage import sealed
from sslvit.weights.folder import load_backbone, save_backbone

WORKER = Path(__file__).parents[1] / "support" / "toy_worker.py"


def worker(out: Path, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(WORKER), str(out)]
    with (out / "said.txt").open("a") as said:
        return subprocess.Popen(
            command, start_new_session=True, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=said
        )


def left_of(session: int) -> list[int]:
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGKILL)]


@pytest.mark.processes
@pytest.mark.parametrize("everybody", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGTERM, *SLOW])
def test_a_signal_reaches_the_jobs_and_none_goes_on_alone(tmp_path, number, everybody):
    process = worker(tmp_path, TOY_SECONDS="60")
    until = time.monotonic() + 60
    while len((tmp_path / "started.txt").read_text().split() if (tmp_path / "started.txt").exists() else []) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, number) if everybody else process.send_signal(number)
    process.wait(timeout=30)
    if number != signal.SIGKILL:
        assert process.returncode == 75
        said = (tmp_path / "said.txt").read_text()
        assert "stopped: asked to stop, with 0 of 6 jobs done; the same command continues" in said
    until = time.monotonic() + 10
    while left_of(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert left_of(process.pid) == []
    assert not any((tmp_path / name).exists() for name in "ab")


def test_a_place_that_cannot_be_written_and_settings_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotWrite, match=r"--out: .*file cannot be made: .*; choose another place"):
        check_settings(Settings(), tmp_path / "file" / "settings.json", free=("out",))
    (tmp_path / "settings.json").write_text("")
    with pytest.raises(DataError, match=r"settings.json cannot be read .* delete settings.json and give the same"):
        check_settings(Settings(), tmp_path / "settings.json", free=("out",))


@pytest.mark.processes
def test_jobs_are_done_in_an_order_that_fits_and_then_never_again(tmp_path, capsys):
    work_on(toys(tmp_path), tmp_path, at_a_time=2)
    started = (tmp_path / "started.txt").read_text().split()
    assert sorted(started) == sorted(job.name for job in toys(tmp_path))
    assert "[6/6]" in capsys.readouterr().out
    work_on(toys(tmp_path), tmp_path, at_a_time=2)
    assert (tmp_path / "started.txt").read_text().split() == started
    assert "6 jobs, 6 of them done" in capsys.readouterr().out


@pytest.mark.processes
def test_the_checkpoints_of_a_job_go_when_it_is_done_and_nothing_else_does(tmp_path):
    """Also of a job that was killed before it could delete them, and not of one that is not done or is being done."""
    jobs = [job._replace(run=tmp_path / "runs" / job.name) for job in toys(tmp_path)]
    kept = []
    for job in jobs:
        for name in ("checkpoints/step-00000001/state.json", "tried/checkpoints/x", "model/config.json", "cost.json"):
            (job.run / name).parent.mkdir(parents=True, exist_ok=True)
            (job.run / name).write_text("x")
        kept += [job.run / "model" / "config.json", job.run / "cost.json"]
    (tmp_path / "a").write_text("a")
    for job in jobs:
        delete_checkpoints(job, tmp_path)
    has = {job.name for job in jobs if (job.run / "checkpoints").exists()}
    assert has == {job.name for job in jobs} - {"a"}
    (tmp_path / "b").write_text("b")
    with locked(tmp_path / "locks" / "b"):
        delete_checkpoints(jobs[-1], tmp_path)
        assert (jobs[-1].run / "checkpoints").exists()
    work_on(jobs, tmp_path, at_a_time=2)
    assert sorted(path for path in (tmp_path / "runs").rglob("*") if path.is_file()) == sorted(kept)


def test_disk_is_needed_for_what_is_left_to_do_and_refused_where_there_is_less(tmp_path, monkeypatch, capsys):
    def job(name: str, recipe: str, run: bool) -> Job:
        return Job(name, recipe, (), tmp_path / name / "done", run=tmp_path / name if run else None)

    jobs = [
        job("a", "mpp", True),
        job("b", "supervised", True),
        job("c", "finetune", True),
        job("d", "probe", False),
    ]
    sizes = {"weights": 10_000_000, "read": 5_000_000, "predicted": 1_000_000}
    # Models with what lies beside them, features; of two runs at a time three checkpoints: weights, two moments, heads.
    whole = 3 * (11_000_000 + 2 * 2**20) + 5_000_000 + 2 * 3 * (3 * 10_000_000 + 1_000_000)
    assert needed(jobs, 2, **sizes) == whole
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "done").write_text("")
    assert needed(jobs, 2, **sizes) == 5_000_000
    free = shutil.disk_usage(tmp_path)._replace(free=100_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: free)
    with pytest.raises(
        CannotWrite, match=r"--out .*: 100 MB are free, and what is left to do needs about 231 MB\. Make"
    ):
        check_room(whole, tmp_path)
    check_room(5_000_000, tmp_path)
    assert capsys.readouterr().out == "about 5 MB of disk are needed at most, 100 MB are free\n"


@pytest.mark.processes
@pytest.mark.slow
def test_two_workers_in_one_folder_share_the_jobs(tmp_path):
    both = [worker(tmp_path), worker(tmp_path)]
    assert [one.wait(timeout=120) for one in both] == [0, 0]
    assert len((tmp_path / "started.txt").read_text().split()) == 6


@pytest.mark.processes
def test_a_worker_does_other_jobs_while_another_has_its_first(tmp_path):
    with locked(tmp_path / "locks" / "a") as mine:
        assert mine
        worker = threading.Thread(target=work_on, args=(toys(tmp_path), tmp_path), kwargs={"at_a_time": 1})
        worker.start()
        until = time.monotonic() + 60
        while not all((tmp_path / name).exists() for name in ("b", "b-0", "b-1")) and time.monotonic() < until:
            time.sleep(0.05)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name[:1] in "ab") == ["b", "b-0", "b-1"]
    worker.join(timeout=60)
    assert not worker.is_alive()
    assert len((tmp_path / "started.txt").read_text().split()) == 6


@pytest.mark.processes
@pytest.mark.slow
def test_killed_at_random_it_goes_on_and_repeats_only_what_was_running(tmp_path):
    draw = random.Random(0)
    for _ in range(4):
        process = worker(tmp_path)
        while not (tmp_path / "started.txt").exists():
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert worker(tmp_path).wait(timeout=120) == 0
    started = (tmp_path / "started.txt").read_text().split()
    assert {job.name for job in toys(tmp_path)} == set(started)
    assert len(started) <= 6 + 4 * 2  # two ran when it was killed


def test_a_job_that_fails_is_named_with_the_end_of_its_log_and_nothing_is_lost(tmp_path):
    broken = toy(tmp_path, "broken", "nowhere")._replace(needs=())
    with pytest.raises(JobFailed, match=r"(?s)broken ended with exit code 70.*what it needs is not there"):
        work_on([*toys(tmp_path), broken], tmp_path, at_a_time=1)
    with pytest.raises(ValueError, match="need others that are not there"):
        work_on([toy(tmp_path, "a", "missing")], tmp_path, at_a_time=1)


def test_a_method_carries_flags_of_its_recipe():
    method = Method("mpp:target=pixels,corrupt=0.15")
    assert (method.recipe, method.words) == ("mpp", ("--target", "pixels", "--corrupt", "0.15"))
    assert method.folder == "mpp-target-pixels-corrupt-0.15"
    assert Method("moco_v3").words == ()


def test_two_methods_of_the_same_name_are_named_by_their_flags():
    given = ("mpp:target=mean", "mpp:optimizer=mean", "mae")
    named = {"mpp-target-mean": given[0], "mpp-optimizer-mean": given[1], "mae": "MAE"}
    assert names_of(given) == named
    for missing in ("nobody:x=1", "../mpp", "examples.features"):
        with pytest.raises(ValueError, match=f"--methods {missing}: .* one of data2vec, dino, .*mae, moco_v3, mpp"):
            check_methods((missing,))


def test_a_method_has_its_papers_name_with_its_flags():
    texts = {"moco_v3": "MoCo v3", "mpp:target=pixels,corrupt=0.15": "MPP (pixels, corrupt 0.15)"}
    texts |= {
        "dino:crops=4 14": "DINO (crops 4 14)",
        "supervised": "supervised",
        "of_mine:x=1,no-y": "of_mine (x 1, no-y)",
    }
    assert {text: Method(text).name for text in texts} == texts


def test_a_folder_is_refused_with_other_settings_but_may_grow_and_move(tmp_path):
    def check(**given) -> dict:
        kinds = {"free": ("out",), "grows": ("methods",), "appended": ("transfer",)}
        return check_settings(Settings(**given), tmp_path / "x" / "settings.json", **kinds)

    assert check() == {"methods": ["mpp"], "transfer": [], "epochs": 3}
    both = {"methods": ("mpp", "mae"), "transfer": ("a", "b")}
    assert check(out="elsewhere", **both) == {"methods": ["mpp", "mae"], "transfer": ["a", "b"], "epochs": 3}
    for other in (("b", "a"), ("a",), ()):  # jobs of the first have numbers of a's
        with pytest.raises(ValueError, match=r"transfer was \['a', 'b'\], is now"):
            check(transfer=other)
    check(transfer=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"epochs was 3, is now 4\. Give them, or another --out"):
        check(transfer=("a", "b", "c"), epochs=4)


def test_the_first_method_of_a_budget_stays_the_first(tmp_path):
    file = tmp_path / "compare.json"
    sealed.write(file, {"methods": ["mpp", "mae"], "budget": "flops"})
    check_first(ComparisonConfig(methods=("mpp", "dino"), budget="flops"), file)
    check_first(ComparisonConfig(methods=("mae", "mpp")), file)
    with pytest.raises(ValueError, match="begun with --methods mpp first, whose flops are the budget of all"):
        check_first(ComparisonConfig(methods=("mae", "mpp"), budget="flops"), file)


def test_a_comparison_withholds_classes_from_pretraining_alone_and_measures_budgets(tmp_path):
    methods = ("supervised", "moco_v3", "mpp:target=pixels")
    given = {"data": "shapes:n=300", "out": tmp_path, "methods": methods, "held_out": (3, 5), "fractions": (0.1,)}
    given["finetune_fractions"] = (0.1,)
    config = ComparisonConfig(**given, budget="flops", epochs=6)
    for method, flops in zip(("supervised", "moco_v3", "mpp-target-pixels"), (100, 300, 50), strict=True):
        file = tmp_path / "measured" / f"{method}-dry_run" / "measured.json"
        file.parent.mkdir(parents=True)
        file.write_text(f'{{"flops_per_image": {flops}, "seconds_per_image": 1}}')
    epochs = passes(config, tmp_path / "start")
    assert epochs == {"supervised": 6, "moco_v3": 2, "mpp-target-pixels": 12}
    starts = {f"{method}-0": tmp_path / "start" for method in ("scratch", "scratch-cls")}
    jobs = {job.name: job for job in plan(config, starts, epochs)}
    trained = jobs["pretrain/mpp-target-pixels-0"].command()
    assert "--only_classes 0 1 2 4 6 7 8 9 10 11" in trained
    assert "--epochs 12 --warmup_epochs 1.2" in trained
    assert trained.endswith("--target pixels")
    assert "--only_classes 0 1 2 4 6 7 8 9 10 11" in jobs["probe/moco_v3-0/own"].command()
    assert "--only_classes 3 5" in jobs["probe/moco_v3-0/classes held out"].command()
    assert "--only_classes 0 1 2 4 6 7 8 9 10 11" in jobs["finetune/scratch-0/own/0.1"].command()
    assert jobs["finetune/moco_v3-0/own/0.1"].needs == ("pretrain/moco_v3-0",)
    assert "--only_classes 3 5" in jobs["finetune/moco_v3-0/classes held out/0.1"].command()
    assert jobs["probe/scratch-cls-0/own"].needs == ()
    alone = plan(ComparisonConfig(**given, finetune_everywhere=False), starts, epochs)
    assert not [job for job in alone if job.name.startswith("finetune") and "/own/" not in job.name]
    for held, words in {(3,): "hold out two", (3, 99): "are the classes 0 1 2", tuple(range(11)): "leave two"}.items():
        with pytest.raises(ValueError, match=words):
            sets(ComparisonConfig(**given | {"held_out": held}))


def test_seeds_start_from_different_weights_and_methods_of_a_seed_from_the_same(tmp_path):
    config = ComparisonConfig(
        data="shapes:n=300", out=tmp_path, model="mu/8", methods=("supervised", "mpp"), seeds=3, fractions=(0.5,)
    )
    made = starts(config)
    weights = {name: load_backbone(folder).state_dict() for name, folder in made.items()}
    drawn = [n for n, values in weights["scratch-0"].items() if values.std() > 0 and n not in ("mean", "std")]
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= set(drawn)
    for seed, other in ((0, 1), (0, 2), (1, 2)):
        alike = [n for n in drawn if torch.equal(weights[f"scratch-{seed}"][n], weights[f"scratch-{other}"][n])]
        assert alike == []
    for seed in range(3):
        for name, values in weights[f"scratch-{seed}"].items():
            assert torch.equal(values, weights[f"scratch-cls-{seed}"][name])
    jobs = {job.name: job for job in plan(config, made, {"supervised": 1.0, "mpp": 1.0})}
    for seed in range(3):
        for method in config.methods:
            words = jobs[f"pretrain/{method}-{seed}"].words
            assert words[words.index("--init_from") + 1] == str(made[f"scratch-{seed}"])
            assert words[words.index("--seed") + 1] == str(seed)
        for name in (f"scratch-{seed}", f"scratch-cls-{seed}"):
            for job in (f"probe/{name}/own", f"finetune/{name}/own/0.01"):
                words = jobs[job].words
                assert words[words.index("--model") + 1] == str(made[name])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_of_a_comparison_begins_with_the_weights_of_its_seeds_start(tmp_path, seed):
    config = ComparisonConfig(data="shapes:n=64", out=tmp_path, model="mu/8", methods=("mpp",), seeds=2, image_size=16)
    made = starts(config)
    words = plan(config, made, {"mpp": 1.0})
    (pretrain,) = [job for job in words if job.name == f"pretrain/mpp-{seed}"]
    entered = []
    given = {"pretrain": lambda *given: entered.extend(given) or [], "finish": lambda *_: None}
    run("mpp", " ".join(pretrain.words), **given)
    backbone = entered[0].backbone.state_dict()
    for name, values in load_backbone(made[f"scratch-{seed}"]).state_dict().items():
        assert torch.equal(backbone[name], values), name


def test_fine_tuning_has_a_length_per_share_and_scratch_its_own_flags(tmp_path):
    given = {"data": "shapes:n=300", "out": tmp_path, "methods": ("mpp",), "fractions": (0.5,)}
    config = ComparisonConfig(
        **given, finetune_fractions=(0.1, 0.5, 1.0), finetune_steps=(40, 0, 80), choice_steps=0.5,
        finetune_flags=("erase=0.1",), scratch_flags=("randaugment", "mixup=0.8"),
    )  # fmt: skip
    made = dict.fromkeys(("scratch-0", "scratch-cls-0"), tmp_path)
    jobs = {job.name: job.command() for job in plan(config, made, {"mpp": 1.0})}
    assert "--steps 40 --batch_size 64 --rates 0.03 0.1 --folds 0 --choice_steps 20" in jobs["finetune/mpp-0/own/0.1"]
    assert "--steps 80 " in jobs["finetune/scratch-0/own/1"]
    assert not [name for name in jobs if name.startswith("finetune") and name.endswith("/0.5")]
    assert jobs["finetune/mpp-0/own/1"].endswith("--erase 0.1")
    assert jobs["finetune/scratch-cls-0/own/1"].endswith("--erase 0.1 --randaugment --mixup 0.8")
    left = {job.name for job in plan(config, made, {"mpp": 1.0}, kept=["mpp-0", "scratch-0"])}
    assert left == {name for name in jobs if name == "baselines/own" or "scratch-cls-0" in name}


def test_a_method_may_start_from_other_random_weights(tmp_path):
    methods = ("mpp", "mpp:init=timm,target=pixels")
    config = ComparisonConfig(data="shapes:n=300", out=tmp_path, model="mu/8", methods=methods, fractions=(0.5,))
    made = starts(config)
    assert sorted(made) == ["scratch-0", "scratch-cls-0", "timm-0"]
    jobs = {job.name: job for job in plan(config, made, dict.fromkeys(("mpp", "mpp-init-timm-target-pixels"), 1.0))}
    assert f"--init_from {made['scratch-0']}" in jobs["pretrain/mpp-0"].command()
    other = jobs["pretrain/mpp-init-timm-target-pixels-0"].command()
    assert f"--init_from {made['timm-0']}" in other
    assert other.endswith("--target pixels")
    assert not [name for name in jobs if name.startswith(("probe/timm", "finetune/timm"))]
    jax, timm = (load_backbone(made[name]).state_dict() for name in ("scratch-0", "timm-0"))
    assert not torch.equal(jax["blocks.0.mlp.fc1.weight"], timm["blocks.0.mlp.fc1.weight"])
    assert Method(methods[1]).name == "MPP (timm, pixels)"


def test_held_out_classes_can_be_all_that_is_evaluated_on(tmp_path):
    given = {"data": "shapes:n=300", "out": tmp_path, "methods": ("mpp",), "held_out": (3, 5), "fractions": (0.5,)}
    config = ComparisonConfig(**given, evaluate_seen=False)
    made = dict.fromkeys(("scratch-0", "scratch-cls-0"), tmp_path)
    jobs = {job.name: job.command() for job in plan(config, made, {"mpp": 1.0})}
    assert not [name for name in jobs if "own" in name.split("/")]
    assert "--only_classes 0 1 2 4 6 7 8 9 10 11" in jobs["pretrain/mpp-0"]
    assert "--only_classes 3 5" in jobs["finetune/mpp-0/classes held out/0.01"]


def test_baselines_are_read_on_every_set_of_labels(tmp_path):
    other = f"shapes:texture,n={300}"
    given = {"data": "shapes:n=300", "out": tmp_path, "held_out": (3, 5), "transfer": (other,), "limit_test": 70}
    config = ComparisonConfig(**given, methods=("mpp",), fractions=(0.1, 1.0))
    begins = {f"{method}-0": tmp_path for method in ("scratch", "scratch-cls")}
    jobs = {job.name: job.command() for job in plan(config, begins, {"mpp": 1.0}) if job.recipe == "baselines"}
    assert list(jobs) == ["baselines/own", "baselines/classes held out", "baselines/transfer 1"]
    assert "--only_classes 0 1 2 4 6 7 8 9 10 11" in jobs["baselines/own"]
    assert "--only_classes 3 5" in jobs["baselines/classes held out"]
    assert f"--data {other}" in jobs["baselines/transfer 1"]
    for command in jobs.values():
        assert "--limit_train 0 --limit_test 70 --fractions 0.1 1.0" in command


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fractions": (0.0, 1.0)}, "--fractions is 0.0; it must be above 0"),
        ({"fractions": (0.5, 0.5)}, "--fractions 0.5 0.5: give one value or more, and each once"),
        (
            {"fractions": (0.001,)},
            r"--fractions 0.001: the largest class .* has \d\d images .*, which leaves fewer than two",
        ),
        ({"fractions": (float("nan"),)}, r"--fractions is \(nan,\); it must be finite"),
        ({"seeds": 0}, "--seeds is 0; it must be above 0"),
        ({"epochs": -1}, "--epochs is -1"),
        ({"jobs": -1}, "--jobs is -1; it must be at least 0"),
        ({"limit_test": -5}, "--limit_test is -5"),
        ({"finetune_rates": (0.0,)}, "--finetune_rates is 0"),
        ({"finetune_crop": 7}, "--finetune_crop is 7; it must be at most 1"),
        ({"finetune_steps": (-3,)}, "--finetune_steps is -3"),
        (
            {"finetune_steps": (5, 6)},
            r"--finetune_steps 5 6: give one number, or one for each of the 1 --fi",
        ),
        ({"scratch_flags": ("mixup=7",)}, "--scratch_flags mixup=7: --mixup is 7"),
        ({"scratch_flags": ("steps=1000",)}, "--scratch_flags steps=1000: --steps is the comparison's own"),
        ({"finetune_flags": ("no-curve",)}, "--finetune_flags no-curve: --no-curve is the comparison's own"),
        ({"budget": "seconds", "records": Path("kept")}, "--budget seconds differs between machines"),
        (
            {"held_out": (3, 5), "evaluate_seen": False, "finetune_everywhere": False},
            "--no_evaluate_seen --no_finetune_everywhere: no class is left",
        ),
        ({"finetune_flags": ("mixin=0.7",)}, "--finetune_flags mixin=0.7: .*mixup"),
        ({"methods": ("mpp:init=torch",)}, "--methods mpp:init=torch: init is one of jax, timm"),
        ({"methods": ()}, "--methods : name one or more"),
        ({"methods": ("mpp", "mpp")}, "--methods mpp mpp: name one or more, and each once"),
        ({"methods": ("probe",)}, "--methods probe: the recipe probe has no presets"),
        (
            {"methods": ("mpp", "mpp:target=nothing")},
            "--methods mpp:target=nothing: --target nothing: it must be mean",
        ),
        ({"methods": ("mpp:target",)}, "--methods mpp:target: --target takes one of mean, downsized or pixels"),
        ({"methods": ("mpp:lr=-1",)}, "--methods mpp:lr=-1: --lr is -1"),
        ({"methods": ("mpp:out=/x",)}, "--methods mpp:out=/x: --out is the same for all"),
        ({"methods": ("mpp:start=/x",)}, "mpp:start=/x: --start is the same for all"),
        ({"methods": ("compare",)}, "--methods compare: the recipe compare has no presets"),
        (
            {"methods": ("benchmarks",)},
            "--methods benchmarks: .*choose one of data2vec, dino, .*mae, .*supervised",
        ),
        ({"methods": ("mpp:image-size=8",)}, "mpp:image-size=8: --image-size is the same for all"),
        ({"model": "zz"}, "no model 'zz'"),
        ({"model": "XS/7"}, "7"),
        ({"transfer": ("shapes:n=300",)}, "none that pretraining sees"),
        ({"transfer": ("folder:/nowhere",)}, "/nowhere"),
        ({"data": "UNLABELLED"}, "UNLABELLED has no usable labels"),
        ({"data": "ALONE"}, "has no test split"),
    ],
)
def test_a_comparison_refuses_bad_settings_before_it_writes_or_trains_anything(tmp_path, given, words):
    for name in ("train/a/1.png", "train/b/2.png", "flat/1.png", "flat/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    folders = {"UNLABELLED": tmp_path / "flat", "ALONE": tmp_path}
    if "data" in given:
        words = words.replace("UNLABELLED", "flat")
        given = {"data": f"folder:{folders[given['data']]}"}
    config = ComparisonConfig(**{"data": "shapes:n=300", "fractions": (0.5,), "out": tmp_path / "out"} | given)
    with pytest.raises(ValueError, match=words):
        check(config)
    assert not (tmp_path / "out").exists()


def test_robustness_is_one_more_job_of_the_first_seeds_models_and_changes_no_other(tmp_path):
    config = ComparisonConfig(out=tmp_path, data="shapes:n=40", image_size=16, methods=("mpp", "mae"), seeds=2)
    models, epochs = starts(config), {"mpp": 1.0, "mae": 1.0}
    without, jobs = (plan(one, models, epochs) for one in (config, replace(config, robustness=True)))
    *others, last = jobs
    assert others == without
    assert last.needs == ("pretrain/mpp-0", "pretrain/mae-0")
    read = parse(recipe_of("robustness").Config, args=last.words)
    assert read.names == ("scratch (mean)", "scratch (cls)", "MPP", "MAE")
    folders = ("starts/scratch-0", "starts/scratch-cls-0", "runs/mpp-0", "runs/mae-0")
    assert read.model == tuple(tmp_path / name for name in folders)
    assert (read.heads, read.random, read.limit_test, read.image_size) == (False, False, 1000, 16)
    with pytest.raises(ValueError, match="--robustness reads models, and --records"):
        check(replace(config, robustness=True, records=tmp_path))


def test_jobs_read_the_images_as_the_comparison_does():
    config = ImagesConfig("folder:/x", 32, label_column="kind", only_classes=(1, 2), follow_links=True)
    assert reading(config) == (
        *(
            "--data",
            "folder:/x",
            "--image_size",
            "32",
            "--label_column",
            "kind",
            "--only_classes",
            "1",
            "2",
            "--follow_links",
        ),
    )
    assert reading(replace(config, only_classes=(5,)))[-4:] == ("kind", "--only_classes", "5", "--follow_links")
    assert reading(ImagesConfig("shapes", 16)) == ("--data", "shapes", "--image_size", "16")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_real_comparison_killed_ten_times_ends_byte_for_byte_as_one_that_was_not(tmp_path):
    words = ["--data", "shapes:n=300", "--model", "mu/8", "--methods", "supervised", "mpp", "--epochs", "1"]
    words += ["--fractions", "0.1", "1", "--finetune_steps", "4", "--limit_train", "200", "--limit_test", "100"]
    words += ["--batch_size", "32", "--jobs", "2"]

    def begun(out: Path) -> subprocess.Popen:
        command = [sys.executable, str(RECIPES / "compare.py"), *words, "--out", str(out)]
        return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)

    assert begun(tmp_path / "whole").wait() == 0
    kills = 0
    draw = random.Random(0)
    while kills < 10:
        process = begun(tmp_path / "killed")
        try:
            process.wait(draw.uniform(3, 11))
            break  # it was done before its tenth kill
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    print(f"{kills} kills")
    assert kills == 10
    assert begun(tmp_path / "killed").wait() == 0
    whole, killed = ((tmp_path / name / "report.md").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


def test_a_study_refuses_models_that_cannot_be_built_before_it_trains_anything():
    points = list(amounts(StudyConfig(data="shapes:n=300", shares=(0.5, 1))))
    assert [(point.series, point.x) for point in points[::2]] == [("ViT", 150), ("hybrid", 150), ("BiT ResNet", 150)]
    with pytest.raises(ValueError, match=r"width_factor 0\.25 gives 16 channels, not a multiple of 32"):
        list(amounts(StudyConfig(data="shapes:n=300", resnet="R20x0.25")))


@pytest.mark.parametrize("alike", [True, False])
def test_a_study_shows_each_point_over_seeds_beside_its_random_start(tmp_path, alike):
    config = StudyConfig(data="shapes:n=300", study="targets", seeds=2)
    points = [Point(name, None, "mpp", ("--epochs", "1")) for name in ("this one", "that one")]
    jobs = runs_of(config, points, tmp_path)
    for number, runs in enumerate(jobs):
        for seed, job in enumerate(runs):
            assert f"--seed {seed}" in job.command()
            start, end = 0.1 + (0 if alike else 0.05 * number), 0.3 + 0.2 * number + 0.02 * seed
            folder = job.product.parent
            save_backbone(
                ViT(ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=1)), folder, {"readout": "mean"}
            )
            told = [{"step": 0, "eval/mean/10-shot": start, "eval/cls/10-shot": 0.9}, {"step": 5, "loss": 1.0}]
            lines = [*told, {"step": 9, "eval/mean/10-shot": end, "eval/cls/10-shot": 0.9}]
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    write({"study": "targets", "points": results_of(points, jobs)}, tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert "| this one | 10.0 | 31.0 ± 1.4 |" in table  # the deviation of 30 and 32
    assert f"| that one | {10 if alike else 15}.0 | 51.0 ± 1.4 |" in table
    assert ("random start" in (tmp_path / "study.svg").read_text()) == alike


@pytest.mark.parametrize(("size", "kept"), [(224, 0.0), ((64, 128), 0.0), (32, None), ((32, 96), None)])
def test_a_comparison_from_before_centre_crops_goes_on_with_whole_images(size, kept, tmp_path):
    file, config = tmp_path / "compare.json", ComparisonConfig(image_size=size)
    saved = check_settings(config, file, free=("out",))
    del saved["eval_crop"]
    file.write_text(json.dumps(saved))
    if kept is not None:
        with pytest.raises(ValueError, match=r"eval_crop was 0\.0, is now None"):
            check_settings(config, file, free=("out",))
        config = replace(config, eval_crop=kept)
    assert check_settings(config, file, free=("out",))["eval_crop"] == kept


def test_a_study_shows_baselines_of_as_many_images_as_its_points_have(tmp_path):
    config = StudyConfig(data="shapes:n=300", study="amounts", shares=(0.5, 1))
    points = list(amounts(config))
    jobs = baselines_of(config, points, tmp_path)
    assert list(jobs) == [150, 300]
    for count, job in jobs.items():
        assert f"--images {count} --shots 10 --fractions --out" in job.command()
        job.product.parent.mkdir(parents=True)
        numbers = {"side": 32, "commonest class": 0.1, "raw pixels": {"10-shot": count / 1000, "20-nn": 0.4}}
        job.product.write_text(json.dumps(numbers))
    rows = baseline_rows(jobs, ["10-shot", "20-nn"])
    model = {"start": {"10-shot": [0.1], "20-nn": [0.1]}, "values": {"10-shot": [0.5], "20-nn": [0.6]}}
    results = {"study": "amounts", "points": [{"series": "ViT", "x": x} | model for x in (150, 300)]}
    write(results | {"baselines": rows}, tmp_path)
    text, drawn = ((tmp_path / name).read_text() for name in ("results.md", "study.svg"))
    for line in (
        "| commonest class | 150 | — | 10.0 | — | 10.0 |",
        "| raw pixels | 300 | — | 30.0 | — | 40.0 |",
        "| ViT | 150 | 10.0 | 50.0 | 10.0 | 60.0 |",
    ):
        assert line in text
    assert "32 x 32 pixels, instead of frozen features" in text
    assert "raw pixels" in drawn
    write(results, tmp_path)
    assert "- An earlier version made these results: they have no rows" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("study", ["readouts", "targets"])
def test_a_studys_plot_shows_baselines_beside_all_points(tmp_path, study):
    xs = (1e-3, 1e-2) if study == "readouts" else (None, None)
    model = {"start": {"10-shot": [0.1]}, "values": {"10-shot": [0.5]}}
    results = {"study": study, "points": [{"series": f"s{i}", "x": x} | model for i, x in enumerate(xs)]}
    rows = [{"series": "raw pixels", "x": None, "values": {"10-shot": [0.3]}, "side": 32}]
    write(results | {"baselines": rows}, tmp_path)
    drawn = (tmp_path / "study.svg").read_text()
    assert "raw pixels" in drawn
    if study == "readouts":  # a level line from the lowest to the highest rate
        (*_, line) = re.findall(r'points="([^"]*)" fill="none"', drawn)
        (x0, y0), (x1, y1) = (map(float, one.split(",")) for one in line.split())
        assert y0 == y1
        assert (x0, x1) == (LEFT, WIDTH - RIGHT)


def test_the_study_of_costs_places_each_model_by_the_flops_of_its_training(tmp_path):
    config = StudyConfig(data="shapes:n=64", study="costs", epochs=2, sizes=("XS/8", "R+XS/8", "R20x0.5", "XS/4"))
    points = list(costs(config))
    assert [point.series for point in points] == ["ViT", "hybrid", "BiT ResNet", "ViT"]
    jobs = runs_of(config, points, tmp_path)
    for (job,), flops in zip(jobs, (2e12, 3e12, 4e13, 8e12), strict=True):
        folder = job.product.parent
        vit = ViT(ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=1))
        save_backbone(vit, folder, {"readout": "mean"})
        (folder / "metrics.jsonl").write_text('{"step": 0, "eval/mean/10-shot": 0.1}\n')
        cost = {"images": 1, "seconds": 1.0, "flops": flops, "peak_memory_bytes": 1, "device": "CPU"}
        (folder / "cost.json").write_text(json.dumps(cost))
    results = results_of(points, jobs, costly=True)
    assert [one["x"] for one in results] == [2e12, 3e12, 4e13, 8e12]
    baseline = {"series": "raw pixels", "x": None, "values": {"10-shot": [0.3]}, "side": 32}
    write({"study": "costs", "points": results, "baselines": [baseline]}, tmp_path)
    assert "| BiT ResNet | 4.0e13 | 10.0 | 10.0 |" in (tmp_path / "results.md").read_text()
    assert ">1e12<" in (tmp_path / "study.svg").read_text()
    with pytest.raises(ValueError, match="no model 'zz/8'"):
        list(costs(replace(config, sizes=("zz/8",))))


def test_a_studys_baselines_are_read_by_its_recipe(tmp_path):
    config = StudyConfig(data="shapes:n=64", image_size=16, study="targets")
    (job,) = baselines_of(config, [Point("p", None, "mpp", ("--epochs", "1"))], tmp_path).values()
    run("baselines", " ".join(job.words))
    found = {row["series"]: row["values"] for row in baseline_rows({None: job}, ["10-shot", "20-nn"])}
    assert list(found) == ["commonest class", "raw pixels"]
    assert all(0 <= value <= 1 for values in found.values() for (value,) in values.values())
