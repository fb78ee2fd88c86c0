"""Prints the lowest versions that pyproject.toml allows, as pip's constraints."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
wanted = [project["dependencies"], *project["optional-dependencies"].values()]
found = [re.fullmatch(r"([\w-]+)>=([\w.]+)", one) for some in wanted for one in some]
print("\n".join(sorted({f"{one[1]}=={one[2]}" for one in found if one})))
