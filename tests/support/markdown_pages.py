"""The Markdown pages of the README and docs/: their headings, links, code blocks and commands."""

import re
import shlex
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROGRAMS = ("accelerate", "python", "sslvit", "torchrun", "taskset", "pip", "ruff", "mypy")


class Block(NamedTuple):
    page: str
    line: int
    text: str


def tokens_of(page: Path) -> list[Token]:
    tokens = MarkdownIt().enable("table").parse(page.read_text())
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def anchors(page: Path) -> set[str]:
    """The addresses of a page's headings, as GitHub and MyST make them."""
    tokens, times, names = tokens_of(page), Counter[str](), set()
    for before, heading in pairwise(tokens):
        if before.type == "heading_open":
            text = "".join(part.content for part in heading.children or () if part.type in ("text", "code_inline"))
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            names.add(f"{name}-{times[name]}" if times[name] else name)
            times[name] += 1
    return names


def links(page: Path) -> list[str]:
    """What a page links to or shows, but for addresses on the web."""
    tokens = tokens_of(page)
    found = [str(token.attrs.get("href") or token.attrs.get("src") or "") for token in tokens]
    html = [token.content for token in tokens if token.type in ("html_block", "html_inline")]
    found += [link for text in html for link in re.findall(r'(?:src|href)="([^"]+)"', text)]
    return [link for link in found if link and not re.match(r"\w+:", link)]


def blocks(language: str) -> list[Block]:
    """The code blocks of a language."""
    return [
        Block(page.relative_to(ROOT).as_posix(), token.map[0] + 1, token.content)
        for page in PAGES
        for token in tokens_of(page)
        if token.type == "fence" and token.map and token.info == language
    ]


def inline_code() -> list[tuple[str, str]]:
    """Code within a line or a table, with its page. The log and the changelog also tell of what is no more."""
    past = ("CHANGELOG.md", "docs/log.md")
    return [
        (name, token.content)
        for page in PAGES
        if (name := page.relative_to(ROOT).as_posix()) not in past
        for token in tokens_of(page)
        if token.type == "code_inline"
    ]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell text, without comments, with its variables filled in."""
    variables: dict[str, str] = {}
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$(\w+)", lambda name: variables[name[1]], line), comments=True)
        if len(words) == 1 and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0])):
            variables[assigned[1]] = assigned[2]
            continue
        parts = shlex.join(words).split(" '&&' ")
        found += [shlex.split(part.split(" '>' ")[0]) for part in parts]
    return [[word for word in command if not re.match(r"[A-Z_]+=", word)] for command in found if command]


def all_commands() -> list[tuple[str, list[str]]]:
    """Every whole command that a page names, in a block or within a line, with its page."""
    named = [(f"{block.page}:{block.line}", block.text) for block in blocks("sh")]
    named += [(page, code) for page, code in inline_code() if " " in code and "..." not in code]
    found = [(page, command) for page, text in named for command in commands_or_none(text)]
    return [(page, command) for page, command in found if command[0] in (*PROGRAMS, "git", "pre-commit")]


def commands_or_none(text: str) -> list[list[str]]:
    """Code within a line that is no command may be no shell text either."""
    try:
        return [command for command in commands(text) if command]
    except (ValueError, KeyError):
        return []
