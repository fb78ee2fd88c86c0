"""What sslvit costs, beside what others do, in one run on this machine.

    python recipes/benchmark.py views      views a second of one core, against torchvision, Pillow, kornia and lightly
    python recipes/benchmark.py steps      a training step of each objective, against timm, transformers and lightly
    python recipes/benchmark.py loader     from files to views, against torchvision's ImageFolder; and the loader alone

Each is a script of its own, recipes/benchmark_NAME.py, whose header says what it found; --help after the name shows
its options.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("benchmark_") for path in HERE.glob("benchmark_*.py"))

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        asked = f"{sys.argv[1]!r} is no benchmark: choose" if len(sys.argv) > 1 else "choose a benchmark:"
        print(f"error: {asked} {' or '.join(NAMES)}", file=sys.stderr)
        sys.exit(78)
    script = str(HERE / f"benchmark_{sys.argv.pop(1)}.py")
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")
