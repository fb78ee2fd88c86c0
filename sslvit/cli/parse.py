"""Words of a command line to a configuration: options on top of a preset."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, replace
from typing import Any, TypeVar

from sslvit.cli.options import Option, expected, most, options_of, value_of
from sslvit.cli.words import meant
from sslvit.config import TrainConfig
from sslvit.runs.settings import RENAMED, RENAMED_BUDGET

Chosen = TypeVar("Chosen", bound=TrainConfig)
Options = TypeVar("Options")


def parse(kind: type[Options], default: Options | None = None, args: Sequence[str] | None = None) -> Options:
    """A configuration from the command line. Options that were renamed work by their old names too, and say so."""
    options, values = options_of(kind), dict[str, Any]()
    for name, words in given(kind, with_new_names(sys.argv[1:] if args is None else args)).items():
        option = options[name]
        values[name] = words == ["on"] if option.is_switch else value_of(option, words)
    if default is not None:
        return replace(default, **values)  # type: ignore[type-var]
    missing = [name for name, option in options.items() if option.default is MISSING and name not in values]
    if missing:
        raise ValueError(f"--{missing[0]} is missing: it takes {expected(options[missing[0]])}")
    return kind(**values)


def choose(presets: Mapping[str, Chosen], words: Sequence[str] | None = None) -> Chosen:
    """The preset named on the command line, by default the first, with the other flags on top of it; checked.

    Of --lr and --base_lr the one on the command line wins over the other in the preset.
    """
    first, words = next(iter(presets.values())), with_new_names(sys.argv[1:] if words is None else words)
    typed = given(type(first), words)
    config = parse(type(first), presets.get(" ".join(typed.get(first.chosen_by, ())), first), words)
    if "base_lr" in typed and not config.base_lr > 0:
        raise ValueError(f"--base_lr is {config.base_lr:g}; it must be above 0")
    if "base_lr" in typed and "lr" in typed and config.lr:
        raise ValueError(
            f"--base_lr {config.base_lr:g} and --lr {config.lr:g} both set the learning rate: give --lr, the rate "
            "itself, or --base_lr, the rate per 256 images of a batch"
        )
    config = (replace(config, lr=0.0) if "base_lr" in typed else config).with_rate()
    config.check()
    return config


def given(kind: type, words: Sequence[str]) -> dict[str, list[str]]:
    """The words of each option that is given, the last time that it is; of a switch on or off. A class may name, in
    `positional`, the options that words without a name are for: wherever these stand, in this order."""
    options, found, loose, name = options_of(kind), dict[str, list[str]](), list[tuple[str, str]](), ""
    positional = getattr(kind, "positional", ())
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            name, off = named(flag, options)
            if not name:
                unknown = meant(flag[2:], options, "--") or "; --help-all lists all"
                raise ValueError(f"there is no option {flag}{unknown}")
            if options[name].is_switch:
                if equals:
                    raise ValueError(f"{word}: {flag} takes no value; --no_{name} turns it off")
                found[name] = ["off" if off else "on"]
            else:
                found[name] = [value] if equals else []
        elif word.startswith("-") and named(word.partition("=")[0], options)[0]:
            raise ValueError(misplaced(word, name, options))
        elif name and not options[name].is_switch and not (positional and len(found[name]) >= most(options[name])):
            found[name].append(word)
        else:
            loose.append((word, name))
            name = ""
    places = [one for one in positional if one not in found]
    if len(loose) > len(places):
        raise ValueError(misplaced(*loose[len(places)], options))
    return found | {place: [word] for place, (word, _) in zip(places, loose, strict=False)}


def named(flag: str, options: Mapping[str, Option]) -> tuple[str, bool]:
    """The option that a flag is, or nothing, and whether it is turned off. Hyphens and underscores are the same."""
    name = flag.lstrip("-").replace("-", "_")
    positive = name.removeprefix("no_")
    if name not in options and positive in options and options[positive].is_switch:
        return positive, True
    return (name if name in options else ""), False


def misplaced(word: str, name: str, options: Mapping[str, Option]) -> str:
    """What is wrong with a word that belongs to no option."""
    if named(word.partition("=")[0], options)[0]:
        return f"{word}: options begin with two hyphens: --{word.lstrip('-')}"
    if name and not options[name].is_switch:
        return f"--{name} takes {expected(options[name])}, and {word!r} is one too many"
    return f"--{name} takes no value, got {word}" if name else f"{word!r} belongs to no option, which all begin with --"


def with_new_names(words: Sequence[str]) -> list[str]:
    """Options that were renamed, and --budget operations, as they are called now."""
    renamed = [with_new_name(word) for word in words]
    for i, word in enumerate(renamed):
        flag, equals, value = word.partition("=")
        if flag == "--budget" and value in RENAMED_BUDGET:
            renamed[i] = f"{flag}{equals}{RENAMED_BUDGET[value]}"
        elif word in RENAMED_BUDGET and i and renamed[i - 1] == "--budget":
            renamed[i] = RENAMED_BUDGET[word]
    return renamed


def with_new_name(word: str) -> str:
    """--drop=0.5 as --mask_ratio=0.5."""
    flag, equals, value = word.partition("=")
    negated = flag.startswith(("--no-", "--no_")) and flag not in ("--no_weight_decay", "--no-weight-decay")
    old = flag[5:] if negated else flag[2:]
    new = RENAMED.get(old.replace("-", "_")) if flag.startswith("--") else None
    if new is None:
        return word
    renamed = f"--{'no-' if negated else ''}{new}"
    print(f"note: {flag} is now {renamed}; the old name works in this version only", file=sys.stderr)
    return f"{renamed}{equals}{value}"
