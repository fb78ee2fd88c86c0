"""Works on the toy jobs of a folder, two at a time: python tests/support/toy_worker.py OUT"""

import sys
from pathlib import Path

from toy_jobs import toys

from sslvit.cli import run_cli
from sslvit.experiments.work import work_on

if __name__ == "__main__":
    out = Path(sys.argv[1])
    run_cli(lambda: work_on(toys(out), out, at_a_time=2))
