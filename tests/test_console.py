"""The command sslvit: what it starts, its help on one screen, and what it says of mistakes."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import preloaded
import pytest
from started import TORCHRUN, free_port

from sslvit import __main__ as sslvit, __version__
from sslvit.cli import help
from sslvit.cli.options import GROUPS, documented, options_of
from sslvit.cli.parse import parse
from sslvit.cli.words import nearest, started_as
from sslvit.errors import BAD_CONFIGURATION
from sslvit.experiments.jobs import recipes
from sslvit.weights.info import Convert

HERE = Path(__file__).parents[1]
NAMES = [*sslvit.OBJECTIVES, *(c.recipe for c in sslvit.COMMANDS.values() if c.recipe)]
THERE = [name for name in NAMES if (HERE / "recipes" / f"{name}.py").exists()]
LINES = [["pretrain", name] for name in sslvit.OBJECTIVES]
LINES += [[name] for name, one in sslvit.COMMANDS.items() if one.recipe in ("", *THERE)]


def kind_of(recipe: str) -> type:
    module = importlib.import_module(f"sslvit.recipes.{recipe}")
    presets = vars(module).get("PRESETS")
    return type(next(iter(presets.values()))) if presets else get_type_hints(module.main)["config"]


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    """Not those of the terminal that the tests run in."""
    monkeypatch.setenv("COLUMNS", "100")


def said(words: list[str], monkeypatch, capsys) -> tuple[str, str, int]:
    """What `sslvit WORDS` prints, to both, and its exit code."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sslvit", *words])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as the console command is started
    code = 0
    try:
        sslvit.main()
    except SystemExit as end:
        code = end.code
    return *capsys.readouterr(), code


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("words", [[], *LINES], ids=" ".join)
def test_help_fits_a_screen(words, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    out, err, code = said([*words, "--help"], monkeypatch, capsys)
    lines = out.splitlines()
    assert (err, code) == ("", 0)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert "--help-all" in lines[-1]
    assert f"  {' '.join(['sslvit', *words])}" in out
    assert lines.count("Examples") == 1
    if words[:1] == ["pretrain"] and len(words) == 2:
        assert [line for line in lines if line in GROUPS] == [*GROUPS]
        options = [line for line in lines if line.startswith("  --")]
        assert 10 <= len(options) <= 18
        assert all(len(line) <= columns for line in lines if "accelerate launch" not in line)
        assert f"--preset {'small|plain|vit' if words[1] == 'supervised' else 'small|paper'}" in out


def test_every_option_of_the_first_screen_is_one_of_some_command():
    names = {name for recipe in THERE for name in options_of(kind_of(recipe))}
    assert [name for name in help.SHOWN if name not in names] == []


@pytest.mark.parametrize("recipe", [*THERE, "convert"])
def test_every_option_has_a_help_text(recipe):
    kind = Convert if recipe == "convert" else kind_of(recipe)
    texts = documented(kind)
    assert [name for name in options_of(kind) if not texts.get(name, "").endswith((".", ").", "..."))] == []


def test_all_options_follow_the_same_screen_in_the_spelling_that_is_typed(monkeypatch, capsys):
    screen, _, _ = said(["pretrain", "mae", "--help"], monkeypatch, capsys)
    for flag in ("--help-all", "--help_all"):
        out, _, code = said(["pretrain", "mae", flag], monkeypatch, capsys)
        assert code == 0
        assert out.startswith(screen.rstrip("\n"))
        rest = out.removeprefix(screen.rstrip("\n"))
        assert sorted(re.findall(r"^  --(?:\[no_\])?(\w+)", rest, re.MULTILINE)) == sorted(options_of(kind_of("mae")))
        assert [line for line in rest.splitlines() if line.endswith(", all options")] == [
            f"{g}, all options" for g in GROUPS
        ]
        assert "--[no_]norm_pix_loss       Standardise the pixels of each patch, which are then predicted. [on]" in rest
        assert "default" not in rest.replace("by default", "").replace("defaults of the other", "").replace(
            "By default", ""
        )


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_every_command_lists_all_its_options(words, monkeypatch, capsys):
    screen, _, _ = said([*words, "--help"], monkeypatch, capsys)
    out, err, code = said([*words, "--help-all"], monkeypatch, capsys)
    assert (err, code) == ("", 0)
    listed = re.findall(r"^  --(?:\[no_\])?(\w+)", out.removeprefix(screen.rstrip("\n")), re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert re.findall(r"--help-all lists all (\d+) options", screen) in ([], [str(len(listed))])


def test_help_shows_the_defaults_of_the_preset_that_is_named(monkeypatch, capsys):
    out, _, _ = said(["pretrain", "mae", "--preset", "paper", "--help"], monkeypatch, capsys)
    assert re.search(r"--epochs FLOAT .*\[800\]", out)
    assert re.search(r"--data TEXT .*\[required\]", out)
    assert re.search(r"--base_lr FLOAT .*\[0.00015\]", out)
    assert "--lr FLOAT" not in out  # the preset has the other


@pytest.mark.processes
def test_a_recipe_alone_shows_the_same_help_and_names_itself(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    command, _, _ = said(["pretrain", "mpp", "--help"], monkeypatch, capsys)
    for start, name in (
        (["recipes/mpp.py"], "recipes/mpp.py"),
        (["-m", "sslvit.recipes.mpp"], "-m sslvit.recipes.mpp"),
    ):
        done = preloaded.run([sys.executable, *start, "--help"], text=True, cwd=HERE)
        expected = command.replace("accelerate launch -m sslvit pretrain mpp", f"accelerate launch {name}")
        assert done.stdout == expected.replace("sslvit pretrain mpp", f"python {name}"), done.stderr


MISTAKES = [
    ("pretain mpp", "sslvit has no command pretain; did you mean pretrain?"),
    ("pretrain mocov3", "there is no objective mocov3; did you mean moco_v3?"),
    ("pretrain swav", "simmim, moco_v3, dino, ibot, dinov2, simclr, vicreg, lejepa, ijepa, data2vec or supervised"),
    ("pretrain --epochs 3", "an objective must come before --epochs; choose mpp"),
    ("mpp", "sslvit pretrain mpp"),
    ("moco-v3 --epochs 3", "sslvit pretrain moco_v3"),
    ("--verison", "did you mean --version?"),
    ("nonsense", "`sslvit --help` lists all"),
    ("pretrain mpp --epoch 3", "there is no option --epoch; did you mean --epochs?"),
    ("pretrain mpp --imgsz 224", "there is no option --imgsz; did you mean --image_size?"),
    ("pretrain mpp --batchsize 3", "did you mean --batch_size?"),
    ("pretrain mpp --Batch-Size=3", "did you mean --batch_size?"),
    ("pretrain mpp --zzz", "there is no option --zzz; --help-all lists all"),
    ("pretrain mpp --epochs 3 -resume", "-resume: options begin with two hyphens: --resume"),
    ("pretrain mpp --log_with", "--log_with takes one or more values, but got none"),
    ("pretrain mpp --only_classes --epochs 3", "--only_classes takes one or more whole numbers, but got none"),
    ("pretrain mpp epochs 3", "epochs: options begin with two hyphens: --epochs"),
    ("embed runs/mine", "--data is missing"),
    ("embed runs/mine shapes", "--out is missing"),
    ("embed --overwrite a b c.npy d", "'d' belongs to no option"),
    ("embed a b c.npy --batch_size 4 5", "--batch_size takes a whole number, and '5' is one too many"),
    ("runs --watch 30 /nope", "there is no folder /nope"),
    ("convert a b --head c", "--head takes no value, got c"),
    ("pretrain mpp -epochs 3", "-epochs: options begin with two hyphens: --epochs"),
    ("pretrain mpp --preset papr", "--preset papr: it must be small or paper; did you mean paper?"),
    ("pretrain mpp --target colour", "--target colour: it must be mean, downsized or pixels"),
    ("pretrain mpp --epochs", "--epochs takes a number, but got none"),
    ("pretrain mpp --epochs ten", "--epochs ten: it must be a number"),
    ("pretrain mpp --batch_size 2.5", "--batch_size 2.5: it must be a whole number"),
    ("pretrain mpp --epochs 1 2", "--epochs takes a number, got 1 2"),
    ("pretrain mpp --resume yes", "--resume takes no value, got yes"),
    ("pretrain mpp --resume=yes", "--resume takes no value; --no_resume turns it off"),
    ("pretrain mpp more", "'more' belongs to no option, which all begin with --"),
    ("pretrain mae --decoder 1 2", "--decoder takes 3 whole numbers, got 1 2"),
    ("pretrain mpp --model nothing", "--model 'nothing': it must be a width and a patch size"),
    ("pretrain supervised --model R50", "--model 'R50': it must be like R50x1"),
    ("pretrain mpp --image_size 65", "--image_size 65 is not a multiple of patch_size 8"),
    ("pretrain mae --decoder 130 2 4", "--decoder 130 is not a multiple of decoder_heads 4"),
    ("pretrain dino --crops 4 17", "--crops 4 17: sides must be multiples of the model's patch of 4 x 4"),
    ("pretrain mpp --data /nope", "--data /nope does not exist: the nearest folder is /"),
    ("pretrain mpp --eval_data /nope", "--eval_data /nope does not exist"),
    ("pretrain mpp --init_from /nope", "--init_from /nope does not exist"),
    ("probe --model /nope", "--model /nope does not exist"),
    ("compare --methods mpp:targt=pixels", "--methods mpp:targt=pixels: there is no option --targt; did you mean"),
    ("convert", "--model is missing"),
    ("convert a b c", "'c' belongs to no option"),
    ("convert a b --too onnx", "did you mean --to?"),
    ("pair a", "sslvit pair takes A.parquet B.parquet, got a"),
    ("info", "sslvit info takes MODEL [NAME=VALUE], got nothing"),
    ("doctor --fast", "sslvit doctor takes [FOLDER], got --fast"),
    ("recipe mea", "there is no recipe mea; did you mean mae?"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_sentence_that_names_the_nearest_right_word(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out, err, code = said(words.split(), monkeypatch, capsys)
    assert code in (BAD_CONFIGURATION, 66), err
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert sentence in err
    assert os.listdir(tmp_path) == []


def test_a_sentence_that_begins_with_the_name_of_an_option_by_chance_is_left_alone():
    from sslvit.cli.run import as_typed
    from sslvit.recipes.mpp import SMALL

    assert as_typed("images in /x cannot be read", SMALL) == "images in /x cannot be read"
    assert as_typed("corrupt 0.5 of 0 patches", SMALL) == "--corrupt 0.5 of 0 patches"


def test_the_nearest_word_is_found_whatever_its_hyphens_and_there_may_be_none():
    assert nearest("linear_prob", ["probe", "linear-probe"]) == "linear-probe"
    assert nearest("MPP", ["mpp", "mae"]) == "mpp"
    assert nearest("xyz", ["mpp", "mae"]) == ""


def test_values_of_all_types_are_read():
    config = parse(
        kind_of("dino"),
        args=shlex.split(
            "--image_size 32 48 --crops 4 16 24 --no-color --norm-last-layer --betas 0.8 0.9 --only_classes 1 2 "
            "--lr=1e-3 --final_weight_decay None --channels 1 --range -5 1e3 --root /x --seed 1 --seed 2 --log_with a b"
        ),
    )
    assert (config.image_size, config.crops, config.color, config.norm_last_layer) == (
        (32, 48),
        (4, 16, 24),
        False,
        True,
    )
    assert (config.betas, config.only_classes, config.final_weight_decay) == ((0.8, 0.9), (1, 2), None)
    assert (config.channels, config.range, config.root, config.lr) == (1, (-5.0, 1000.0), Path("/x"), 1e-3)
    assert (config.seed, config.log_with) == (2, ("a", "b"))
    assert type(config.channels) is int
    assert parse(Convert, args=["a", "b", "--to", "onnx"]) == Convert(Path("a"), Path("b"), "onnx")
    assert parse(kind_of("finetune"), args=["--rates"]).rates == ()


@pytest.mark.parametrize(
    "words", ["a b --to onnx --head", "--to onnx a --head b", "--head a --to=onnx b", "b --head --to onnx --model a"]
)
def test_words_without_a_name_may_stand_after_options(words):
    assert parse(Convert, args=words.split()) == Convert(Path("a"), Path("b"), "onnx", head=True)


def test_the_objectives_are_the_recipes_that_pretrain():
    assert sorted(sslvit.OBJECTIVES) == recipes()


@pytest.mark.parametrize("start", [["sslvit"], ["-m", "sslvit"], ["recipes/mpp.py"], ["/home/me/mine.py"]])
def test_the_command_is_named_as_it_was_started(start, monkeypatch):
    names = {"sslvit": "sslvit", "-m": "python -m sslvit"}
    spec = type("Spec", (), {"name": "sslvit.__main__"}) if start[0] == "-m" else None
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [start[-1]])
    assert started_as() == names.get(start[0], f"python {start[0]}")


def test_the_version_is_said(monkeypatch, capsys):
    assert said(["--version"], monkeypatch, capsys) == (f"sslvit {__version__}\n", "", 0)


@pytest.mark.parametrize("name", ["mae", "linear-probe"])
def test_a_recipe_is_written_out_as_it_is(name, monkeypatch, capsys):
    out, _, code = said(["recipe", name], monkeypatch, capsys)
    assert code == 0
    assert out == (HERE / "recipes" / f"{name.replace('-', '_')}.py").read_text()
    names = [alias for node in ast.walk(ast.parse(out)) if isinstance(node, ast.ImportFrom) for alias in [node.module]]
    assert not [module for module in names if module.startswith("recipes")]


SMALL = "--data shapes:n=16 --image_size 16 --model mu/8 --epochs 1 --batch_size 8 --warmup_epochs 0 --threads 1"
TINY = shlex.split(SMALL)


@pytest.mark.processes
def test_a_recipe_that_was_written_out_runs_anywhere(tmp_path):
    command = [sys.executable, "-m", "sslvit"]
    source = preloaded.run([*command, "recipe", "mae"], text=True, check=True).stdout
    (tmp_path / "mine.py").write_text(source.replace('"runs/mae"', '"runs/mine"'))
    words = ["mine.py", *TINY, "--decoder", "16", "1", "2"]
    done = preloaded.run([sys.executable, *words], cwd=tmp_path, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mine" / "model" / "model.safetensors").exists()


@pytest.mark.processes
def test_two_processes_train_together_by_the_command(tmp_path):
    words = [*TORCHRUN, free_port(), "-m", "sslvit", "pretrain", "mpp", *TINY, "--out", str(tmp_path / "run")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=250, env=env)
    assert done.returncode == 0, done.stderr
    assert '"processes": 2' in (tmp_path / "run" / "cost.json").read_text()


LIGHT = "import sys; sys.argv = ['sslvit', *{words!r}]; from sslvit.__main__ import main; main(); "
LIGHT += "print([name for name in ('torch', 'numpy', 'accelerate', 'tyro') if name in sys.modules])"


@pytest.mark.processes
@pytest.mark.parametrize("words", ["", "--help", "--version", "pretrain --help", "recipe mae", "doctor --help"])
def test_help_of_the_command_loads_no_torch(words):
    code = LIGHT.format(words=words.split())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.processes
@pytest.mark.timing
def test_help_comes_within_a_second():
    for words in ([], ["--help"], ["pretrain", "--help"]):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sslvit", *words], capture_output=True, check=True)
        assert time.perf_counter() - began < 1


# What Python has on Linux and not on Windows, as far as it is used when modules are imported.
WINDOWS = """
import os, signal, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "sslvit"]:
    del sys.modules[name]
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import fcntl, resource, torch, accelerate, psutil, datasets
for name in ("fcntl", "resource"):
    del sys.modules[name]
sys.meta_path.insert(0, Missing())
for name in ("SIGUSR1", "pthread_sigmask", "sigwaitinfo"):
    delattr(signal, name)
for name in ("register_at_fork", "getuid"):
    delattr(os, name)
sys.platform = "win32"
"""


IMPORT = """
for name in ("sslvit.train", "sslvit.data.spec", "sslvit.recipes.mpp"):
    try:
        __import__(name)
    except ImportError as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


@pytest.mark.processes
def test_without_what_linux_has_an_import_says_so():
    done = preloaded.run([sys.executable, "-c", WINDOWS + IMPORT], text=True, check=True)
    sentence = "NeedsLinux: sslvit trains and reads images on Linux only, and Python has no fcntl on win32: on Windows"
    for name, line in zip(("train", "data.spec", "recipes.mpp"), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"sslvit.{name}: {sentence} install it in WSL")


@pytest.mark.processes
def test_without_what_linux_has_the_command_says_so_in_one_sentence():
    code = WINDOWS + "from sslvit.__main__ import main\nsys.argv = ['sslvit', *sys.argv[1:]]\nmain()"
    done = preloaded.run([sys.executable, "-c", code, "pretrain", "mpp"], text=True)
    assert done.returncode == BAD_CONFIGURATION
    assert done.stderr.startswith("error: sslvit trains and reads images on Linux only")
    assert done.stderr.count("\n") == 1


def test_cores_are_counted_where_affinity_is_not_known(monkeypatch):
    from sslvit.processes.system import cores

    assert cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores() == 7


@pytest.mark.processes
def test_a_worker_of_a_loader_is_ended_by_any_sigterm_where_senders_are_unknown():
    code = "import signal; del signal.sigwaitinfo; from sslvit.processes.signals import ignore_signals_in_worker\n"
    code += "ignore_signals_in_worker(); print(signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
    code += "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN); signal.raise_signal(signal.SIGTERM)"
    done = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("set()\nTrue\n", -15)
