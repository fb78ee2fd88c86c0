"""Sphinx configuration: python -m sphinx -W docs docs/_build/html"""

from importlib.metadata import version as installed

project = "sslvit"
copyright = "the sslvit authors"
release = version = installed("sslvit")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = "sslvit"
html_show_sourcelink = False
autodoc_typehints = "description"
autodoc_member_order = "bysource"
suppress_warnings = ["myst.xref_missing"]
