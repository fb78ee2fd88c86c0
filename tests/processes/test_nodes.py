"""Two nodes on one machine: two agents of torchrun that meet on loopback. One is killed, and the job is started again,
with both or with one, as recipes/configs/slurm.sh does it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from started import SCRIPT, draw_images, free_port, until_step
from tiny_run import STEPS, fingerprint

from sslvit.storage import checkpoint

pytestmark = [pytest.mark.processes, pytest.mark.slow]
WORDS = ("save_every=2", "resume=true")
SLOW = {"SLOW_STEPS": "0.3"}  # so that there is time to disturb it


def agent(images: Path, out: Path, port: str, *, nodes: str = "2", **environment: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", "1",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test",
        "--rdzv_conf", "join_timeout=120,last_call_timeout=2",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    file = out.parent / f"{out.name}.stderr"
    with file.open("a") as log:
        words = [*command, SCRIPT, str(images), str(out), *WORDS]
        return subprocess.Popen(words, env=env, stderr=log, stdout=log, start_new_session=True)


def ended(*agents: subprocess.Popen) -> list[int]:
    return [one.wait(timeout=300) for one in agents]


def killed(one: subprocess.Popen) -> None:
    """As a node that loses power: the agent and its processes at once."""
    os.killpg(one.pid, signal.SIGKILL)
    one.wait()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("nodes") / "whole"
    port = free_port()
    assert ended(agent(images, out, port), agent(images, out, port)) == [0, 0]
    return fingerprint(out)


def test_after_a_node_is_lost_the_other_ends_and_both_go_on_when_started_again(images, tmp_path, undisturbed):
    out, port = tmp_path / "run", free_port()
    first, second = (agent(images, out, port, **SLOW) for _ in range(2))
    until_step(out, 5, first)
    killed(second)
    assert first.wait(timeout=120) != 0
    port = free_port()
    assert ended(agent(images, out, port), agent(images, out, port)) == [0, 0]
    assert fingerprint(out) == undisturbed


def test_a_run_goes_on_with_another_number_of_nodes(images, tmp_path):
    out, port = tmp_path / "run", free_port()
    both = agent(images, out, port, **SLOW), agent(images, out, port, **SLOW)
    until_step(out, 5, both[0])
    for one in both:
        killed(one)
    assert ended(agent(images, out, free_port(), nodes="1")) == [0]
    assert checkpoint.latest(out / "checkpoints").step == STEPS
