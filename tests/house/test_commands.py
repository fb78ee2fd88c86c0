"""Every command, option and test that the README and docs/ name exists. Commands are parsed as the program itself does,
up to where it would open its images."""

import ast
import contextlib
import importlib
import io
import re
from dataclasses import fields
from itertools import pairwise
from typing import get_type_hints

import pytest
from accelerate.commands.launch import launch_command_parser
from markdown_pages import PYPROJECT, ROOT, all_commands, inline_code
from torch.distributed.run import get_args_parser

from sslvit import __main__ as command
from sslvit.cli.parse import choose, parse
from sslvit.reports import runs
from sslvit.weights.info import Convert

RECIPES = {path.stem: path for path in (ROOT / "recipes").glob("*.py") if path.stem != "__init__"}
PLACEHOLDER = re.compile(r"\[?(OBJECTIVE|COMMAND|FOLDER|MODEL|DATA|OUT|LAYOUT|RUN|NAME|MORE)\]?|.*OWNER/NAME")


@pytest.fixture(autouse=True)
def commands_parse_and_do_nothing(monkeypatch):
    monkeypatch.setattr(command, "start", lambda main, options, words, program: parsed(options, words))
    monkeypatch.setattr(command, "SMALL", dict.fromkeys(command.SMALL, lambda *words: None))


def parsed(options: object, words: list[str]) -> None:
    parse(options, args=words) if isinstance(options, type) else choose(options, words)


def options_of(recipe: str) -> object:
    """The class of a recipe's configuration, or its presets."""
    module = importlib.import_module(f"sslvit.recipes.{recipe}")
    return vars(module).get("PRESETS") or get_type_hints(module.main)["config"]


def check(words: list[str]) -> None:
    program, *rest = words
    if program == "accelerate":
        assert rest[0] == "launch", words
        known = launch_command_parser().parse_args(rest[1:])
        assert not known.config_file or (ROOT / known.config_file).is_file()
        check_launched((["-m"] if known.module else []) + [known.training_script, *known.training_script_args])
    elif program == "torchrun":
        known = get_args_parser().parse_args(rest)
        check_launched((["-m"] if known.module else []) + [known.training_script, *known.training_script_args])
    elif program == "taskset":
        check(rest[2:])
    elif program == "python":
        check_launched(rest)
    elif program == "sslvit":
        command.run(rest, "sslvit")
    elif program == "pip":
        extras = {name for some in re.findall(r"\[([\w,]+)\]", " ".join(rest)) for name in some.split(",")}
        assert extras <= set(PYPROJECT["project"]["optional-dependencies"])


def check_launched(words: list[str]) -> None:
    """What `accelerate launch`, torchrun or python starts: a recipe by file or as a module, a benchmark, pytest."""
    if words[0] == "-m" and words[1].startswith("sslvit.recipes."):
        parsed(options_of(words[1].removeprefix("sslvit.recipes.")), words[2:])
    elif words[:2] == ["-m", "sslvit"]:
        command.run(words[2:], "sslvit")
    elif words[:2] == ["-m", "pytest"]:
        check_pytest(words[2:])
    elif words[0] == "-m":
        assert words[1] == "sphinx", words
    elif words[0] != "mine.py":  # what `sslvit recipe` wrote
        assert (ROOT / words[0]).is_file(), words[0]
        if (ROOT / words[0]).parent == ROOT / "recipes":
            parsed(options_of(words[0].removeprefix("recipes/").removesuffix(".py")), words[1:])


def check_pytest(words: list[str]) -> None:
    """Files exist, -m names known markers, and -k a test in these files."""
    names = ""
    for path in (ROOT / word for word in words if "/" in word or word == "tests"):
        assert path.exists(), path
        for file in [path] if path.is_file() else path.rglob("test_*.py"):
            nodes = ast.walk(ast.parse(file.read_text()))
            names += " ".join([file.stem, *(node.name for node in nodes if isinstance(node, ast.FunctionDef))])
    given = dict(pairwise(words))
    markers = {line.split(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"\w+", given.get("-m", ""))) - {"not", "and", "or"} <= markers
    assert given.get("-k", "") in names, words


def only_names_a_program(page: str, words: list[str]) -> bool:
    """Within a line `sslvit convert` is the name of a command, and `accelerate launch --quiet` starts nothing."""
    if ":" in page:  # a block
        return False
    if words[0] == "sslvit" and len(words) == 2:
        assert words[1] in (*command.COMMANDS, "--help"), words
        return True
    return words[0] == "accelerate" and not any(word == "-m" or word.endswith(".py") for word in words)


def test_every_command_of_the_pages_can_be_given():
    found = all_commands()
    assert len(found) > 60
    wrong = []
    for page, given in found:
        words = [re.sub(r"^(R|N|8N)$", "1", word) for word in given]
        output = io.StringIO()
        try:
            if any(PLACEHOLDER.fullmatch(word) for word in words) or only_names_a_program(page, words):
                continue
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                check(words)
        except (Exception, SystemExit) as error:
            wrong.append(f"{page}: {' '.join(given)}: {type(error).__name__} {error} {output.getvalue()[-600:]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "words",
    [
        "sslvit pretrain mpq",
        "sslvit pretrain mae --mask_ration 0.5",
        "sslvit convert runs/mpp out --to tim",
        "sslvit report",
        "accelerate launch --multi_gpus recipes/mpp.py",
        "accelerate launch recipes/mpp.py --epochs ten",
        "accelerate launch -m sslvit.recipes.mpq",
        "python recipes/prob.py",
        "python -m pytest -m slowly tests",
        "python -m pytest tests/house -k nobody",
        "pip install -e .[devel]",
    ],
)
def test_a_command_that_cannot_be_given_would_be_noticed(words, capsys):
    with pytest.raises((Exception, SystemExit)):
        check(words.split())


def test_every_option_that_a_page_names_exists():
    """Options of the recipes and commands, and of the programs that start recipes and tests."""
    found = [Convert, runs.Config, *(options_of(name) for name in RECIPES)]
    kinds = [one if isinstance(one, type) else type(next(iter(one.values()))) for one in found]
    names = {field.name for kind in kinds for field in fields(kind)}
    known = {f"--{before}{name}" for name in names for before in ("", "no_", "no-")} | {
        "--help",
        "--help-all",
        "--version",
    }
    for parser in (launch_command_parser(), get_args_parser()):
        known |= {flag for action in parser._actions for flag in action.option_strings}
    named = [(page, flag) for page, code in inline_code() for flag in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", code)]
    assert len(named) > 60
    assert [(page, flag) for page, flag in named if flag not in known] == []


def test_every_test_that_the_table_of_reliability_names_is_there():
    cells = [code for page, code in inline_code() if page == "docs/reliability.md" and "tests" in code]
    assert len(cells) > 30
    for code in cells:
        check_pytest([word.strip('"') for word in re.findall(r'"[^"]+"|\S+', code.removeprefix("python -m pytest "))])
