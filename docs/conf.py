"""Sphinx configuration: python -m sphinx -W --keep-going -b html docs docs/_build/html"""

import ast
import inspect
import re
from pathlib import Path

from sphinx.util.docutils import SphinxDirective

import sslvit

project = "sslvit"
copyright = "the sslvit authors"
release = version = sslvit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["html_image"]  # <img> with a width, which GitHub shows too
myst_heading_anchors = 3
exclude_patterns = ["_build", "_templates"]
smartquotes = False  # or --data would become –data
html_theme = "pydata_sphinx_theme"
html_title = "sslvit"
html_show_sourcelink = False
html_copy_source = False
templates_path = ["_templates"]
html_sidebars = {"**": ["all-pages.html"]}
html_theme_options = {
    "github_url": "https://github.com/sslvit/sslvit",
    "navbar_center": [],  # all pages are in the sidebar
    "show_prev_next": False,
}
default_role = "code"  # `name` in a docstring
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
toc_object_entries = False  # a heading per name is enough
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

PACKAGE = Path(sslvit.__file__).parent


def documented(name: str) -> str:
    """The directive that documents a public name: a class or a module with its members, or a function."""
    found = getattr(sslvit, name)
    if inspect.ismodule(found):
        members = "\n   :members:\n   :imported-members:" if hasattr(found, "__all__") else ""
        return f".. automodule:: {found.__name__}{members}"
    kind = "class" if inspect.isclass(found) else "function"
    return f".. auto{kind}:: sslvit.{name}" + ("\n   :members:" if kind == "class" else "")


def list_arguments(app, what, name, found, options, lines):
    """Makes a list of a paragraph of a docstring that explains arguments: `images: what it takes. out: a folder.`"""
    try:
        known = set(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return
    texts = "\n".join(lines).split("\n\n")
    for i, text in enumerate(texts):
        parts = re.split(r"(?:^|(?<=[.)]) )((?:\w+, )*\w+): ", " ".join(text.split()))
        if not text.startswith(">>>") and len(parts) > 2 and set(parts[1].split(", ")) <= known:
            entries = zip(parts[1::2], parts[2::2], strict=True)
            texts[i] = parts[0] + "\n".join(f"- **{names}**: {about}" for names, about in entries)
    lines[:] = "\n\n".join(texts).split("\n")


class Public(SphinxDirective):
    """Documents public names, one per line."""

    has_content = True

    def run(self):
        blocks = [f"### {name}\n\n```{{eval-rst}}\n{documented(name)}\n```" for name in self.content]
        return self.parse_text_to_nodes("\n\n".join(blocks), allow_section_headings=True)


class Room(SphinxDirective):
    """Lists the modules of a room, or the files at the root, with the first sentence of each."""

    required_arguments = 1

    def run(self):
        folder = PACKAGE if self.arguments[0] == "root" else PACKAGE / self.arguments[0]
        paths = sorted(folder.glob("*.py") if folder == PACKAGE else folder.rglob("*.py"))
        return self.parse_text_to_nodes("\n".join(entry for path in paths if (entry := summary(path))))


def summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    sentence = " ".join(text.split("\n\n")[0].split())
    return f"- `{name}`: {sentence}" if sentence and name != "sslvit" else ""


def setup(app):
    app.connect("autodoc-process-docstring", list_arguments)
    app.add_directive("public", Public)
    app.add_directive("room", Room)
