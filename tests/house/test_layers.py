"""Imports point down through the rooms, in one order, and importing sslvit stays light. Read with ast, so that imports
inside functions count too."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sslvit"
RECIPES = PACKAGE.parent / "recipes"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each room and each file at the root. One may import from those before it, and from itself.
ROOMS = (
    "errors", "rng", "processes", "storage", "models", "views", "objectives", "data", "config", "runs",
    "cli", "weights", "training", "evaluate", "train", "finetuning", "reports", "experiments", "api",
)  # fmt: skip
FACES = ("__init__", "__main__")  # they show what is inside, and may import anything
LINK = "recipes"  # to the folder beside the package, so that sslvit.recipes.mae can be imported


def imports(path: Path) -> list[str]:
    """Full names of what a file imports, `from sslvit import rng` as sslvit.rng."""
    names, tree = [], ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = node.module == "sslvit" or (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            names += [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_a_room_imports_only_from_the_rooms_before_it():
    wrong = []
    for path in FILES:
        if room(path) in FACES:
            continue
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("sslvit.")} - {"__version__"}
        before = ROOMS[: ROOMS.index(room(path)) + 1]
        wrong += [f"{path.relative_to(PACKAGE)} imports from {other}" for other in rooms if other not in before]
    assert not wrong


def test_the_root_holds_no_more_than_a_newcomer_can_read():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "py.typed"}
    assert len(entries) <= 22
    assert {name.removesuffix(".py") for name in entries} - set(FACES) - {LINK} == set(ROOMS)


def test_the_recipes_are_modules_of_the_package_which_few_rooms_import():
    assert (PACKAGE / LINK).is_symlink()
    assert os.readlink(PACKAGE / LINK) == "../recipes"
    assert not [path for path in FILES if LINK in path.relative_to(PACKAGE).parts]  # or all here would be twice
    for path in FILES:
        names = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        named = [name for name in [*imports(path), *names] if str(name).startswith("sslvit.recipes")]
        assert not named or room(path) in ("experiments", "api", *FACES), path


def test_no_modules_import_each_other_in_a_circle():
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {other for other in imports(path) if other.startswith("sslvit.")}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done or name not in graph:
            return
        for other in graph[name]:
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        if name.rpartition(".")[2] not in FACES:
            visit(name, ())


def test_no_objective_imports_another():
    names = (
        "objective", "masking", "block_mask", "multiblock", "teacher", "distillation", "batch_norm", "projector",
        "spread", "schedule", "sinkhorn", "koleo", "gram",
    )  # fmt: skip
    shared = {f"sslvit.objectives.{name}" for name in names}
    for path in (PACKAGE / "objectives").glob("*.py"):
        others = {name for name in imports(path) if name.startswith("sslvit.objectives.")}
        assert others <= shared, path


def test_data_knows_no_model():
    for path in (PACKAGE / "data").rglob("*.py"):
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("sslvit.")}
        assert not {"models", "objectives", "train"} & rooms, path


def test_accelerate_stays_where_it_belongs():
    allowed = {"processes", "runs", "training", "train", "evaluate", "finetuning", "reports"}
    for path in FILES:
        names = {name.split(".")[0] for name in imports(path)}
        assert "tyro" not in names, path  # only benchmarks have it
        assert "accelerate" not in names or room(path) in allowed, path


LIMITS = {
    "supervised.py": 128, "dino.py": 132, "ibot.py": 133, "dinov2.py": 164, "moco_v3.py": 92, "linear_probe.py": 104,
    "probe.py": 125, "analyse.py": 110, "embed.py": 93, "adapt.py": 186, "lejepa.py": 95, "segment.py": 131,
    "data2vec.py": 95,
    "robustness.py": 115,
}  # fmt: skip


def test_a_recipe_stays_short_and_imports_no_other():
    recipes = {path.stem for path in RECIPES.glob("*.py")}
    for path in RECIPES.glob("*.py"):
        names = imports(path)
        assert not recipes & {name.split(".")[0] for name in names}, path
        assert not [name for name in names if name.startswith("sslvit.recipes")], path
        assert len(path.read_text().splitlines()) <= LIMITS.get(path.name, 90), path


def test_no_test_imports_from_a_test():
    for path in (PACKAGE.parent / "tests").rglob("*.py"):
        names = [name for name in imports(path) if name.startswith("test_")]
        assert not names, f"{path} imports from {names}"


@pytest.mark.processes
def test_importing_sslvit_is_light():
    code = (
        "import sys, sslvit, sslvit.models.vit, sslvit.rng, sslvit.objectives.mpp;"
        "heavy = ('torchvision', 'datasets', 'timm', 'transformers', 'matplotlib', 'pandas');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_nothing_is_unpickled_or_executed():
    """No pickle, no eval, no exec, no shell, and torch.load only with weights_only=True."""
    for path in [*FILES, *RECIPES.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not PICKLES & {n.split(".")[0] for n in names}, path
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert call not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"), f"{path}: {call}"
                assert options.get("shell", "False") == "False", path
                assert options.get("allow_pickle", "False") == "False", path
                if call == "torch.load":
                    assert options.get("weights_only") == "True", path
