"""Works on the toy parts of a folder, two at a time: python tests/support/toy_worker.py OUT"""

import sys
from pathlib import Path

from toy_parts import toys

from sslvit.cli import run_cli
from sslvit.experiments.jobs import work_on

if __name__ == "__main__":
    out = Path(sys.argv[1])
    run_cli(lambda: work_on(toys(out), out, out, jobs=2, devices=0))
