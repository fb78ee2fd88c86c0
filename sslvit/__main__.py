"""The command sslvit, and python -m sslvit: a table of commands, each of which is imported when it is called."""

import ast
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from sslvit import __version__
from sslvit.cli import run_cli
from sslvit.cli.run import start
from sslvit.cli.words import HELP, HELP_ALL, meant, one_of, started_as
from sslvit.objectives import OBJECTIVES

RECIPES = "sslvit.recipes"


class Command(NamedTuple):
    group: str
    usage: str  # what follows its name
    about: str  # one line
    recipe: str = ""  # a module of sslvit.recipes, which has the command's options and help
    examples: tuple[str, ...] = ()  # what follows its name, of a command without a recipe
    words: tuple[int, int] = (0, 0)  # how many it takes, of a command without a recipe


COMMANDS = {
    "pretrain": Command(
        "Pretrain", "OBJECTIVE", f"by one of {len(OBJECTIVES)} objectives, such as mae; without one it lists them"
    ),
    "adapt": Command("Pretrain", "", "continue pretraining a model, ours or anybody's, on your images", "adapt"),
    "finetune": Command("Evaluate", "", "train all weights of a model on labels, and test it", "finetune"),
    "segment": Command("Evaluate", "", "train a ViT with a segmentation head on masks, and test it", "segment"),
    "probe": Command("Evaluate", "", "frozen features: neighbours, few-shot, logistic regression", "probe"),
    "linear-probe": Command("Evaluate", "", "linear classifiers by the papers' protocols", "linear_probe"),
    "probe-dense": Command("Evaluate", "", "frozen patches: classes of pixels, mean IoU", "probe_dense"),
    "analyse": Command("Evaluate", "", "what a ViT sees: patches, images, attention", "analyse"),
    "robustness": Command("Evaluate", "", "corrupted images, lost and shuffled patches, calibration", "robustness"),
    "baselines": Command("Evaluate", "", "accuracies without a model: commonest class, raw pixels", "baselines"),
    "pair": Command(
        "Evaluate", "A.parquet B.parquet", "compare two files of predictions, image by image",
        examples=("runs/a/predictions.parquet runs/b/predictions.parquet",), words=(2, 2),
    ),
    "compare": Command("Experiments", "", "ways to pretrain, at the same cost, with intervals", "compare"),
    "study": Command("Experiments", "", "one of the ViT paper's studies, at our scale", "study"),
    "embed": Command("Models", "MODEL DATA OUT", "features of images by any model, to a file", "embed"),
    "convert": Command("Models", "MODEL OUT", "write a model for timm, transformers, torchvision, ONNX, torch.export"),
    "info": Command(
        "Models", "MODEL [NAME=VALUE]", "describe a model, ours or someone else's",
        examples=("runs/mpp", "mae_pretrain_vit_base.pth family=mae"), words=(1, 99),
    ),
    "report": Command(
        "Runs", "FOLDER", "write the report of a run, a comparison or a study again",
        examples=("runs/mpp", "runs/compare"), words=(1, 1),
    ),
    "runs": Command("Runs", "[FOLDER]", "a table and a page of all runs below a folder"),
    "doctor": Command(
        "Runs", "[FOLDER]", "check this machine for training; the folder is where runs are written",
        examples=("", "/data/runs"), words=(0, 1),
    ),
    "recipe": Command(
        "Recipes", "[NAME]", "print a recipe's source, to be edited and run; without a name list them",
        examples=("mae > mine.py", ""), words=(0, 1),
    ),
}  # fmt: skip


def main() -> None:
    """Runs the command that the words name."""
    run_cli(lambda: run(sys.argv[1:], started_as()))


def run(words: Sequence[str], program: str) -> None:
    name, rest = (words[0].replace("_", "-"), words[1:]) if words else ("--help", [])
    if name == "pretrain":
        pretrain(rest, program)
    elif name == "convert":
        from sslvit.weights.info import Convert

        start(print_convert, Convert, rest, f"{program} convert")
    elif name == "runs":
        from sslvit.reports import runs

        start(runs.main, runs.Config, rest, f"{program} runs")
    elif name in COMMANDS and (recipe := COMMANDS[name].recipe):
        run_recipe(recipe, rest, f"{program} {name}")
    elif name in COMMANDS:
        run_small(name, rest, f"{program} {name}")
    elif name == "--version":
        print(f"sslvit {__version__}")
    elif name in (*HELP, *HELP_ALL):
        print(overview(program))
    else:
        raise ValueError(unknown(words[0], program))


def unknown(word: str, program: str) -> str:
    recipe = word.replace("-", "_")
    if recipe in OBJECTIVES:
        return f"{word} is an objective, and pretraining by it is: {program} pretrain {recipe}"
    kind, known = ("option", ("--help", "--version")) if word.startswith("-") else ("command", COMMANDS)
    return f"{program} has no {kind} {word}{meant(word, known) or f'; `{program} --help` lists all'}"


def pretrain(words: Sequence[str], program: str) -> None:
    name = words[0] if words else "--help"
    if name.replace("-", "_") in OBJECTIVES:
        name = name.replace("-", "_")
        run_recipe(name, words[1:], f"{program} pretrain {name}")
    elif name in (*HELP, *HELP_ALL):
        print(objectives(program))
    elif name.startswith("-"):
        raise ValueError(f"{program} pretrain: an objective must come before {name}; choose {one_of(OBJECTIVES)}")
    else:
        raise ValueError(f"there is no objective {name}{meant(name, OBJECTIVES) or f'; choose {one_of(OBJECTIVES)}'}")


def run_recipe(name: str, words: Sequence[str], program: str) -> None:
    """As its own file does."""
    module = importlib.import_module(f"{RECIPES}.{name}")
    options = vars(module).get("PRESETS") or get_type_hints(module.main)["config"]
    start(module.main, options, words, program)


def run_small(name: str, words: Sequence[str], program: str) -> None:
    """A command that takes a few words and no options."""
    command = COMMANDS[name]
    if not {*HELP, *HELP_ALL}.isdisjoint(words):
        print(small_help(command, program))
        return
    least, most = command.words
    flags = [word for word in words if word.startswith("-")]
    if flags or not least <= len(words) <= most:
        got = flags[0] if flags else " ".join(words) or "nothing"
        raise ValueError(f"{program} takes {command.usage}, got {got}; `{program} --help` explains it")
    SMALL[name](*words)


def small_help(command: Command, program: str) -> str:
    lines = [f"{command.about[0].upper()}{command.about[1:]}.", "", f"  {program} {command.usage}", "", "Examples"]
    lines += [f"  {program} {example}".rstrip() for example in command.examples]
    return "\n".join([*lines, "", "It has no options, so --help-all lists none."])


def overview(program: str) -> str:
    """All commands on one screen."""
    lines = [
        f"sslvit {__version__}: self-supervised pretraining of Vision Transformers",
        "",
        f"  {program} COMMAND ...",
    ]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines.append(group)
        for name, command in COMMANDS.items():
            label = f"{name} {command.usage}".rstrip()
            lines += [f"  {label:<26}{command.about}"] if command.group == group else []
    lines += ["Examples", f"  {program} pretrain mpp", f"  {program} probe --model runs/mpp --data shapes"]
    lines += ["  accelerate launch -m sslvit pretrain mae --data folder:/my/images  # on several GPUs"]
    return "\n".join(
        [*lines, "", f"`{program} COMMAND --help` explains a command, --help-all lists all of its options."]
    )


def objectives(program: str) -> str:
    lines = [
        "Pretrain a Vision Transformer, or train it on labels.",
        "",
        f"  {program} pretrain OBJECTIVE [--OPTION VALUE ...]",
    ]
    lines += ["", "Objectives", *(f"  {name:<12}{headline(name)}" for name in OBJECTIVES), "", "Examples"]
    lines += [f"  {program} pretrain mpp"]
    lines += [f"  {program} pretrain mae --data folder:/my/images --image_size 224 --model S/16"]
    return "\n".join(
        [*lines, "", f"`{program} pretrain mpp --help` explains one, --help-all lists all of its options."]
    )


def source(recipe: str) -> str:
    """Reads the text of a recipe's file, without importing it."""
    found = find_spec(f"{RECIPES}.{recipe}")
    if found is None or found.origin is None:
        raise ValueError(f"there is no recipe {recipe}")
    return Path(found.origin).read_text(encoding="utf-8")


def headline(recipe: str) -> str:
    """What its header says first, without the address of a paper."""
    header = ast.get_docstring(ast.parse(source(recipe))) or ""
    return re.sub(r" \(https?:[^)]*\)", "", header.partition("\n")[0])


def print_recipe(name: str = "") -> None:
    names = [*OBJECTIVES, *(command.recipe for command in COMMANDS.values() if command.recipe)]
    recipe = name.replace("-", "_").removesuffix(".py")
    if not name:
        print("\n".join(f"{one:<14}{headline(one)}" for one in names))
    elif recipe in names:
        sys.stdout.write(source(recipe))
    else:
        raise ValueError(f"there is no recipe {name}{meant(recipe, names) or f'; choose {one_of(names)}'}")


def print_convert(config: Any) -> None:
    """Writes a model in another layout.

    sslvit convert runs/mpp/model out/hf --to transformers
    sslvit convert mae_pretrain_vit_base.pth out/mae --foreign family=mae
    """
    from sslvit.weights.info import convert

    print(convert(config))


def print_pair(first: str, second: str) -> None:
    from sslvit.evaluate.predictions import pair

    print(pair(Path(first), Path(second)))


def print_info(model: str, *facts: str) -> None:
    from sslvit.weights.info import about

    print(about(Path(model), facts))


def write_report(folder: str) -> None:
    from sslvit.experiments.gather import report_again

    print(report_again(Path(folder)))


def check_machine(folder: str = "runs") -> None:
    from sslvit.processes.collectives import start
    from sslvit.reports.doctor import examine

    accelerator = start()
    sys.exit(examine(Path(folder), accelerator.print))


SMALL: dict[str, Callable[..., None]] = {
    "pair": print_pair,
    "info": print_info,
    "report": write_report,
    "doctor": check_machine,
    "recipe": print_recipe,
}


if __name__ == "__main__":
    main()
