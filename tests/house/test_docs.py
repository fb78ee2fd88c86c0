"""The README and docs/: links and anchors lead somewhere, and every command and option in them exists."""

import ast
import contextlib
import importlib
import io
import json
import re
import statistics
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from markdown_pages import PAGES, ROOT, all_commands, anchors, blocks, inline_code, links
from torch.distributed.run import get_args_parser

import sslvit
from sslvit.cli import choose, parse
from sslvit.weights.info import Convert

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RECIPES = {path.stem: path for path in (ROOT / "recipes").glob("*.py")}
# Commands of sslvit that take words, and how many; each other one is a recipe of its name.
WORDS = {"info": (1, 9), "report": (1, 1), "pair": (2, 2), "runs": (0, 1), "doctor": (0, 1), "recipe": (1, 1)}
PLACEHOLDERS = re.compile(r"^(OBJECTIVE|COMMAND|FOLDER|\[FOLDER\]|MODEL|DATA|OUT|LAYOUT)$")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(page):
    # What another page includes has links of its own place; these two are included as they are.
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_file() or page.parent == ROOT, f"{link}: Sphinx links to no folder"
        assert not anchor or anchor in anchors(target), link


def options_of(module) -> type:
    """The class of a recipe's configuration."""
    presets = getattr(module, "PRESETS", None)
    if presets:
        return type(next(iter(presets.values())))
    return next(value for name, value in vars(module).items() if name.endswith("Config") and name in source_of(module))


def source_of(module) -> str:
    return re.findall(r"run_cli\(main, (\w+)\)", Path(module.__file__).read_text())[0]


def check_recipe(name: str, words: list[str]) -> None:
    """Parses a recipe's command line, but opens nothing."""
    module = importlib.import_module(f"sslvit.recipes.{name}")
    presets = getattr(module, "PRESETS", None)
    words = [word for word in words if word not in ("--help",)]
    choose(presets, words) if presets else parse(getattr(module, source_of(module)), args=words)


def check_launched(words: list[str]) -> None:
    """What `accelerate launch`, torchrun or python starts: a recipe by file or as a module, a benchmark, pytest."""
    if words[:1] == ["-m"] and words[1].startswith("sslvit.recipes."):
        return check_recipe(words[1].removeprefix("sslvit.recipes."), words[2:])
    if words[:2] == ["-m", "sslvit"]:
        return check_sslvit(words[2:])
    if words[:2] == ["-m", "pytest"]:
        return check_pytest(words[2:])
    if words[:2] in (["-m", "sphinx"], ["-m", "venv"]):
        return None
    if words[0] == "mine.py":  # what `sslvit recipe` wrote
        return None
    file = ROOT / words[0]
    assert file.is_file(), words[0]
    if file.parent == ROOT / "recipes":
        check_recipe(file.stem, words[1:])
    return None


def check_sslvit(words: list[str]) -> None:
    command, *rest = words or [""]
    if command == "pretrain":
        check_recipe(rest[0], rest[1:])
    elif command == "convert":
        flags = ["--model", rest[0], "--out", rest[1], *rest[2:]] if rest[:1] and rest[0][0] != "-" else rest
        parse(Convert, args=flags)
    elif command == "embed":
        model, data, out, *more = rest
        check_recipe("embed", ["--model", model, "--data", data, "--out", out, *more])
    elif command in WORDS:
        least, most = WORDS[command]
        assert least <= len(rest) <= most, words
        assert command != "recipe" or rest[0] in RECIPES, words
    elif command:
        check_recipe(command.replace("-", "_"), rest)


def check_pytest(words: list[str]) -> None:
    """Files exist, -m names known markers, and -k a test in these files."""
    files = [word for word in words if "/" in word or word == "tests"]
    names = ""
    for word in files:
        path = ROOT / word
        assert path.exists(), word
        for file in [path] if path.is_file() else path.rglob("test_*.py"):
            tree = ast.parse(file.read_text())
            names += file.stem + " ".join(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    given = dict(zip(words, words[1:], strict=False))
    markers = {line.split(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"\w+", given.get("-m", ""))) - {"not", "and", "or"} <= markers
    assert given.get("-k", "") in names, words


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
        check_sslvit(rest)
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert {name for some in extras for name in some.split(",")} <= set(PYPROJECT["project"]["optional-dependencies"])


def test_every_command_of_the_pages_can_be_given():
    """Parsed as the program itself would, up to where it would open its images."""
    found = all_commands()
    assert len(found) > 60
    wrong = []
    for page, command in found:
        words = [re.sub(r"^(R|N|8N)$", "1", word) for word in command]
        if any(PLACEHOLDERS.match(word) for word in words):
            continue
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
                check(words)
        except (Exception, SystemExit) as error:
            wrong.append(f"{page}: {' '.join(command)}: {type(error).__name__} {error} {errors.getvalue()[-600:]}")
    assert not wrong, "\n".join(wrong)


def known_options() -> set[str]:
    """Options of the recipes, of `convert`, and of the programs that start recipes and tests."""
    modules = [importlib.import_module(f"sslvit.recipes.{name}") for name in RECIPES]
    kinds = [Convert, *(options_of(module) for module in modules)]
    names = {field.name for kind in kinds for field in fields(kind)}
    ours = {f"--{'' if yes else 'no-'}{name}" for name in names for yes in (True, False)}
    theirs = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    theirs |= {flag for action in get_args_parser()._actions for flag in action.option_strings}
    return ours | theirs | {"--help", "--pids-limit"}


def test_every_option_that_a_page_names_exists():
    known = known_options()
    named = [(page, flag) for page, code in inline_code() for flag in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", code)]
    assert len(named) > 60
    assert [(page, flag) for page, flag in named if flag not in known] == []


def test_every_test_that_the_table_of_reliability_names_is_there():
    cells = [code for page, code in inline_code() if page == "docs/reliability.md" and "tests" in code]
    assert len(cells) > 30
    for code in cells:
        check_pytest([word.strip('"') for word in re.findall(r'"[^"]+"|\S+', code.removeprefix("python -m pytest "))])


def test_costs_are_those_of_the_data_file():
    """Images per second, the median over seeds."""
    text = (ROOT / "docs" / "quickstart.md").read_text()
    ((file, table),) = re.findall(r"<!-- costs from (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    header, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    costs = json.loads((ROOT / file).read_text())["costs"]
    assert row == [f"{statistics.median(cost['images_per_second'] for cost in costs[name]):.0f}" for name in header]


def test_the_page_of_the_api_names_what_is_public():
    written = [name for text in blocks("{public}") for name in text.text.split()]
    assert len(written) == len(set(written))
    if hasattr(sslvit, "__all__"):
        assert set(written) == set(sslvit.__all__) - {"__version__"}


def test_every_page_is_in_the_table_of_contents_and_every_room_on_its_page():
    toctree = [name for text in blocks("{toctree}") for name in text.text.split() if not name.startswith(":")]
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in PAGES if path.parent != ROOT}
    assert pages - {"index"} == {name for name in toctree if "/" in name or (ROOT / f"docs/{name}.md").exists()}
    shown = set(re.findall(r"\{room\} (\w+)", (ROOT / "docs" / "internals.md").read_text())) - {"root"}
    folders = {path.name for path in Path(sslvit.__file__).parent.iterdir() if (path / "__init__.py").exists()}
    assert shown == folders


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", "CITATION.cff", ".github/workflows/test.yml"])
def test_files_for_others_programs_are_yaml(name):
    assert isinstance(yaml.safe_load((ROOT / name).read_text()), dict)


def test_the_version_is_that_of_the_changelog_and_the_citation():
    released = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == sslvit.__version__ == str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"])
