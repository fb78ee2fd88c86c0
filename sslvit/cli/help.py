"""Help: one screen with the options that most users need; and, if asked for, all options below it."""

import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from sslvit.cli.options import GROUPS, Option, documented, options_of, spelled
from sslvit.cli.parse import given, with_new_names
from sslvit.cli.words import HELP, HELP_ALL

# The options of the first screen, where a command has them.
SHOWN = (
    "data", "image_size", "split", "held_out",
    "model", "init_from", "foreign",
    "objective", "keep_data", "head_epochs", "backbone_lr", "train",
    "preset", "protocol", "study", "methods", "target", "corrupt", "mask_ratio", "decoder", "crops", "hidden", "color",
    "tanh", "magnitude", "readout", "scratch", "limit", "blocks", "k", "shots", "fractions", "fraction", "budget",
    "finetune_steps", "seeds", "augmented", "shown", "patch",
    "epochs", "steps", "batch_size", "lr", "base_lr", "seed",
    "precision", "workers", "out", "resume", "overwrite", "dry_run", "show_views", "jobs",
)  # fmt: skip
FEW = 10  # options, which a command shows all at once
NARROWEST, WIDEST = 80, 100  # columns
COMMAND = r"(?:recipes/\w+\.py|(?:-m )?sslvit pretrain \w+|(?:-m )?sslvit [\w-]+)"
EXAMPLE = re.compile(rf"^ {{4,8}}(accelerate launch |python |){COMMAND}(.*)$", re.MULTILINE)
EXAMPLES = 2
LABEL = 28  # columns of an option and what stands for its value; longer ones have a line of their own


def asked(words: Sequence[str]) -> bool:
    return not {*HELP, *HELP_ALL}.isdisjoint(words)


def text(program: str, main: Callable[..., Any], options: type | Mapping[str, Any], words: Sequence[str]) -> str:
    """The help that these words ask for, of a command whose options are those of a class, or of presets by name."""
    kind, default = defaults(options, [word for word in words if word not in (*HELP, *HELP_ALL)])
    known, columns = options_of(kind), min(max(shutil.get_terminal_size((WIDEST, 40)).columns, NARROWEST), WIDEST)
    lines = [*wrapped((kind.__doc__ or "").split("\n\n")[0], columns), "", usage(program, kind)]
    lines += examples(program, f"{main.__doc__}\n{main.__globals__.get('__doc__')}", columns)
    texts = documented(kind)
    for group in GROUPS:
        names = known if len(known) <= FEW else [name for name in SHOWN if name in known and is_set(name, default)]
        shown = [known[name] for name in names if known[name].group == group]
        rows = [row for one in shown for row in rows_of(one, default, first_sentence(texts.get(one.name, "")), columns)]
        lines += [group, *rows] if rows else []
    lines += ["", f"--help-all lists all {len(known)} options. Defaults are in brackets."]
    for group in GROUPS if not set(HELP_ALL).isdisjoint(words) else ():
        members = [one for one in known.values() if one.group == group]
        rows = [row for one in members for row in rows_of(one, default, full(one, texts), columns)]
        lines += ["", f"{group}, all options", *rows] if rows else []
    return "\n".join(lines)


def defaults(options: type | Mapping[str, Any], words: Sequence[str]) -> tuple[type, Any]:
    """The class of the options, and what has their defaults: the preset that the words name, or the class."""
    if isinstance(options, type):
        return options, options
    first = next(iter(options.values()))
    try:
        name = " ".join(given(type(first), with_new_names(words)).get(first.chosen_by, ()))
    except ValueError:  # help is for those too whose words are not right yet
        name = ""
    return type(first), options.get(name, first)


def usage(program: str, kind: type) -> str:
    known, places = options_of(kind), ""
    for name in getattr(kind, "positional", ()):
        places += f" {name.upper()}" if known[name].default is MISSING else f" [{name.upper()}]"
    return f"  {program}{places} [--OPTION VALUE ...]"


def examples(program: str, header: str, columns: int) -> list[str]:
    """Of the header of a recipe, as this command is called here; the first line says how several processes start."""
    found = EXAMPLE.findall(re.sub(r"\\\n *", "", header))
    lines = []
    for _, rest in found[:EXAMPLES]:
        words, _, remark = rest.partition("   ")
        lines += example(f"{program} {' '.join(words.split())}", remark.strip(), columns)
    if any(launcher.startswith("accelerate") for launcher, _ in found):
        command = program.removeprefix("python ")
        command = f"accelerate launch {'-m ' if command.startswith('sslvit') else ''}{command}"
        lines += example(command, "on several GPUs", columns)
    return ["Examples", *lines] if lines else []


def example(command: str, remark: str, columns: int) -> list[str]:
    """A command as a shell takes it, with a remark where there is room for it."""
    line = f"  {command.rstrip()}{f'  # {remark}' if remark else ''}"
    if len(line) <= columns:
        return [line]
    rows = textwrap.wrap(command, columns - 4, subsequent_indent="    ", break_on_hyphens=False)
    return [f"  {row} \\" for row in rows[:-1]] + [f"  {rows[-1]}"]


def is_set(name: str, default: Any) -> bool:
    """Of the two ways to give a learning rate only the one that the preset uses is on the first screen."""
    return name not in ("lr", "base_lr") or bool(getattr(default, name, 0))


def rows_of(option: Option, default: Any, words: str, columns: int) -> list[str]:
    """An option with these words and its default."""
    value = option.default if isinstance(default, type) else getattr(default, option.name, option.default)
    label = f"  --{'[no_]' if value is True else ''}{option.name} {option.metavar}".rstrip()
    needed = option.name in ("data", "model", "out") and value in (MISSING, "")
    shown = "required" if needed else "on" if value is True else "" if value is False else spelled(value)
    rows = wrapped(f"{words}{f' [{shown}]' if shown else ''}", columns - LABEL - 1) or [""]
    first = [f"{label:<{LABEL}} {rows[0]}"] if len(label) <= LABEL else [label, f"{'':<{LABEL}} {rows[0]}"]
    return [*first, *(f"{'':<{LABEL}} {row}" for row in rows[1:])]


def full(option: Option, texts: Mapping[str, str]) -> str:
    """All of its help, with its choices where its label has no room for them."""
    choices = f" One of {', '.join(map(str, option.choices))}." if option.metavar.startswith("NAME") else ""
    return f"{texts.get(option.name, '')}{choices}"


def first_sentence(words: str) -> str:
    """Without its stop, which would stand before the default; of a long one what is before a semicolon."""
    first = re.split(r"(?<=\.)\s+(?=[A-Z])", words)[0]
    first = first if len(first) < NARROWEST - LABEL else first.partition("; ")[0]
    return first if first.endswith("...") else first.removesuffix(".")


def wrapped(words: str, columns: int) -> list[str]:
    return textwrap.wrap(" ".join(words.split()), columns, break_long_words=False, break_on_hyphens=False)
