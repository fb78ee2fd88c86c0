"""What the tests start in no time is as true a process as one that subprocess starts."""

import json
import os
import signal
import subprocess
import sys

import preloaded
import psutil
import pytest

pytestmark = pytest.mark.processes

TOLD = """
import json, os, sys
print(json.dumps([sys.argv, sys.path[0], __name__, os.getcwd(), os.environ.get("NAME"), sys.stdin.read()]))
"""


@pytest.mark.parametrize("form", ["-c", "-m", ""])
def test_arguments_folder_environment_and_module_are_those_of_a_real_process(form, tmp_path):
    (tmp_path / "told.py").write_text(TOLD)
    command = [sys.executable, *{"-c": ["-c", TOLD], "-m": ["-m", "told"], "": ["told.py"]}[form], "a", "b c"]
    options = {"cwd": tmp_path, "env": os.environ | {"NAME": "caf\udce9"}, "text": True}
    ours = preloaded.run(command, **options)
    real = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, **options)
    assert json.loads(ours.stdout) == json.loads(real.stdout)
    assert (ours.stderr, ours.returncode) == ("", 0)


ENDS = ("pass", "raise SystemExit(75)", "raise SystemExit('a sentence')", "1 / 0", "import os; os._exit(3)")


@pytest.mark.parametrize("program", [*ENDS, "import os; os.kill(os.getpid(), 9)", "raise KeyboardInterrupt"])
def test_each_end_has_the_code_and_the_last_words_of_a_real_process(program):
    command = [sys.executable, "-c", f"import atexit; atexit.register(print, 'atexit'); {program}"]
    ours, real = preloaded.run(command, text=True), subprocess.run(command, capture_output=True, text=True)
    assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout)
    assert ours.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_it_is_a_child_with_usual_signals_and_no_file_but_its_three():
    program = "import os, signal; print(signal.pthread_sigmask(0, []), os.listdir('/proc/self/fd')[3:-1], flush=True)\n"
    program += "signal.pause()"
    with preloaded.Process([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "set() []\n"
        assert psutil.Process(process.pid).ppid() == os.getpid()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM


def test_what_is_read_at_the_start_of_a_process_cannot_be_given():
    with pytest.raises(ValueError, match="PYTHONUTF8 is read when a process starts"):
        preloaded.run([sys.executable, "-c", "pass"], env=os.environ | {"PYTHONUTF8": "0"})
