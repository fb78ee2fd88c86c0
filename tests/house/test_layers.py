"""Imports point down, and importing sslvit stays light. Read with ast, so lazy imports count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sslvit"
RECIPES = PACKAGE.parent / "recipes"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each part with its layer: a file may import from lower layers, and from its own part.
LAYERS = {
    "launcher": -3, "errors": -2, "stopping": -1, "public": 0, "statistics": 0, "rng": 0, "schedule": 0, "ema": 0,
    "distributed": 0, "durable": 0, "npz": 1, "sealed": 1, "manifest": 2, "jsonl": 1.5, "run_files": 0, "checkpoint": 3,
    "masking": 1, "positions": 1, "init": 1, "batch_norm": 1, "health": 1,
    "readout": 2, "blocks": 2, "resnet": 3, "patches": 4, "vit": 5,
    "data": 2,
    "objectives": 6,
    "sharding": 6.5, "optim": 6, "model_folder": 6, "run_folder": 4, "bad_steps": 7,
    "evaluate": 8,
    "config": 6, "command_line": 7, "cost": 6.5, "resume": 7, "outcome": 8, "lost": 7, "records": 8, "endings": 8.5,
    "doctor": 9, "train": 9,
    "unpickle": 2, "weights": 7, "exports": 8, "info": 9, "hub": 8,
    "analysis": 8, "figures": 8, "finetune": 10, "show_views": 10, "dry_run": 11,
    "benchmark": 3, "parts": 10, "disk": 11, "page": 0, "charts": 0, "pictures": 11, "report": 12,
    "results": 12, "claims": 13, "results_tables": 14, "results_page": 15, "compare": 13, "study": 16, "reports": 17,
}  # fmt: skip


UPSTAIRS = {("vit", "hub")}  # ViT.from_pretrained and save_pretrained, which import when they are called


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> list[str]:
    """Full names of what a file imports, `from sslvit import rng` as sslvit.rng."""
    names, tree = [], ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # an annotation's import is never carried out
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = node.module == "sslvit" or (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            names += [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    mine = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if mine in ("__init__", "__main__"):
        return
    for name in imports(path):
        if name.startswith("sslvit.") and name != "sslvit.__version__":
            other = part(name)
            if (mine, other) in UPSTAIRS:
                continue
            assert other == mine or LAYERS[other] < LAYERS[mine], f"{mine} imports {name}"


def test_no_objective_imports_another():
    for path in (PACKAGE / "objectives").glob("*.py"):
        others = {name for name in imports(path) if name.startswith("sslvit.objectives.")}
        assert others <= {"sslvit.objectives.objective"}, path


def test_data_knows_no_model():
    for path in (PACKAGE / "data").rglob("*.py"):
        assert not {"vit", "resnet", "blocks", "objectives", "train"} & {
            part(n) for n in imports(path) if n.startswith("sslvit")
        }, path


def test_accelerate_and_the_command_line_stay_where_they_belong():
    allowed = {"train", "cost", "resume", "records", "distributed", "evaluate", "finetune"}
    allowed |= {"show_views", "dry_run", "pictures", "report", "sharding", "outcome", "endings"}
    for path in FILES:
        names = {name.split(".")[0] for name in imports(path)}
        assert "tyro" not in names or path.name in ("command_line.py", "__main__.py"), path
        if "accelerate" in names:
            assert path.relative_to(PACKAGE).with_suffix("").parts[0] in allowed, path


def test_nothing_imports_a_recipe_and_a_recipe_stays_short():
    for path in [*FILES, *RECIPES.glob("*.py"), *Path(__file__).parent.glob("*.py")]:
        assert not any(name.split(".")[0] == "recipes" for name in imports(path)), path


def test_importing_sslvit_is_light():
    code = (
        "import sys, sslvit, sslvit.models.vit, sslvit.rng, sslvit.objectives.mpp;"
        "heavy = ('torchvision', 'datasets', 'timm', 'transformers', 'matplotlib', 'pandas');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_unpickled_or_executed():
    """No pickle, no eval, no exec, no shell, and torch.load only with weights_only=True."""
    for path in [*FILES, *RECIPES.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "cloudpickle", "joblib"} & {n.split(".")[0] for n in names}, path
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert call not in ("eval", "exec", "os.system", "yaml.load"), f"{path}: {call}"
                assert options.get("shell") != "True", path
                assert options.get("allow_pickle") != "True", path
                if call == "torch.load":
                    assert options.get("weights_only") == "True", path
