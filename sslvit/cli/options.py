"""The options of a configuration: their names, types, help and groups, read from its class."""

import ast
import inspect
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from sslvit.cli.words import meant, one_of
from sslvit.config import FREE, ROUNDING, rules

IN_WORDS = {int: "a whole number", float: "a number", str: "a value", Path: "a path"}
PLURALS = {int: "whole numbers", float: "numbers", str: "values", Path: "paths"}
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
IMAGES, MODEL, METHOD, TRAINING, RUN = GROUPS = ("Images", "Model", "Method", "Training", "Run")
# The group of an option that several classes define for themselves.
GROUP_OF = {
    **dict.fromkeys(("data", "channels", "split"), IMAGES),
    **dict.fromkeys(("model", "init_from", "inflate"), MODEL),
    **dict.fromkeys(("epochs", "steps", "batch_size"), TRAINING),
    **dict.fromkeys(("out", "workers", "overwrite", "threads", "cache", "jobs"), RUN),
}
# Of the options of any number of values: without rates --lr is the rate, without fractions no regression is fitted.
MAY_BE_EMPTY = ("rates", "fractions")
LONGEST_CHOICES = 32  # characters of choices that stand in the place of a value


class Option(NamedTuple):
    name: str
    kind: Any  # its type
    default: Any  # MISSING if it has none
    group: str

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def choices(self) -> tuple[Any, ...]:
        words = [word for one in alternatives(self.kind) for word in shape(one)[0]]
        return tuple(choice for word in words if get_origin(word) is Literal for choice in get_args(word))

    @property
    def metavar(self) -> str:
        """What stands for its value in help: INT [INT]."""
        if self.is_switch:
            return ""
        if self.choices:
            together = "|".join(map(str, self.choices))
            more = " ..." if most(self) == float("inf") else ""
            return (together if len(together) <= LONGEST_CHOICES else "NAME") + more
        shapes = sorted((shape(one) for one in alternatives(self.kind)), key=lambda each: len(each[0]))
        words = [METAVARS[one] for one in shapes[0][0]]
        words += [f"[{METAVARS[one]}]" for one in shapes[-1][0][len(words) :]]
        return " ".join(words) + (" ..." if shapes[0][1] else "")


def options_of(kind: type) -> dict[str, Option]:
    """By name, in the order in which the classes define them."""
    hints, places = get_type_hints(kind), groups(kind)
    return {one.name: Option(one.name, hints[one.name], one.default, places[one.name]) for one in fields(kind)}


def groups(kind: type) -> dict[str, str]:
    """The group of each option: of the class that defined it first. What decides nothing about the training is the
    run's."""
    found: dict[str, str] = {}
    for base in [base for base in reversed(kind.__mro__) if is_dataclass(base)]:
        for name in vars(base).get("__annotations__", {}):
            found.setdefault(name, GROUP_OF.get(name, vars(base).get("group", METHOD)))
    known = rules(kind)
    of_the_run = {name for name in found if name in known and known[name]["resume"] in (FREE, ROUNDING)}
    return found | {name: RUN for name in of_the_run if found[name] == TRAINING}


def documented(kind: type) -> dict[str, str]:
    """The texts below the fields of a class and its bases, each in one line."""
    texts: dict[str, str] = {}
    for base in [base for base in reversed(kind.__mro__) if is_dataclass(base)]:
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, SyntaxError):  # without its source there is no help, but the option is there
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for one, below in pairwise(body):
            match one, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return texts


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union but for None, or the type itself."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(one for one in kinds if one is not NoneType)


def shape(kind: Any) -> tuple[tuple[Any, ...], bool]:
    """The types of an option's words, and whether there may be any number of them."""
    if get_origin(kind) is not tuple:
        return (kind,), False
    words = get_args(kind)
    return (words[:1], True) if words[-1] is Ellipsis else (words, False)


def most(option: Option) -> float:
    """The number of words that an option takes at most."""
    shapes = [shape(kind) for kind in alternatives(option.kind)]
    return max(float("inf") if any_number else len(kinds) for kinds, any_number in shapes)


def value_of(option: Option, words: list[str]) -> Any:
    """The value that words on the command line stand for. Raises ValueError, with the option's name."""
    if words in (["None"], ["none"]) and NoneType in get_args(option.kind):
        return None
    for kind in alternatives(option.kind):
        kinds, any_number = shape(kind)
        if any_number and (words or option.name in MAY_BE_EMPTY):
            return tuple(read(option, kinds[0], word) for word in words)
        if len(kinds) == len(words):
            values = tuple(read(option, one, word) for one, word in zip(kinds, words, strict=True))
            return values if get_origin(kind) is tuple else values[0]
    got = f", got {' '.join(words)}" if words else ", but got none"
    raise ValueError(f"--{option.name} takes {expected(option)}{got}")


def expected(option: Option) -> str:
    """In words: 1 or 2 whole numbers."""
    counts = sorted({len(shape(kind)[0]) for kind in alternatives(option.kind)})
    if option.choices:
        return f"one {'or more ' if most(option) == float('inf') else ''}of {one_of(option.choices)}"
    first = shape(alternatives(option.kind)[0])[0][0]
    if most(option) == float("inf"):
        return f"one or more {PLURALS[first]}"
    if counts == [1]:
        return IN_WORDS[first]
    return f"{one_of(counts)} {PLURALS[first]}"


def read(option: Option, kind: Any, word: str) -> Any:
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if word not in choices:
            raise ValueError(f"--{option.name} {word}: it must be {one_of([*choices])}{meant(word, choices)}")
        return choices[word]
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"--{option.name} {word}: it must be {IN_WORDS[kind]}") from None


def spelled(value: Any) -> str:
    """A value as one types it."""
    if value in (None, "", (), MISSING):
        return ""
    if isinstance(value, tuple | list):
        return " ".join(map(spelled, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
