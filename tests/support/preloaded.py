"""Python processes that start in no time: forks of a server that has imported torch and sslvit already.

`Process` and `run` take a command line of Python as subprocess.Popen and subprocess.run do, and what they start is as
true a process: a child of the test, with its own arguments, environment, folder, files, signals and end. But it has
imported all of PRELOADED, has the server's memory, seed of hashes and few shapes, and reads no variable that Python
or a library reads when it starts. Where these matter, or the interpreter, a launcher or an import is what is tested,
start a real one.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

RECIPES = (
    "mpp",
    "mae",
    "simmim",
    "moco_v3",
    "dino",
    "ibot",
    "dinov2",
    "supervised",
    "finetune",
    "probe",
    "linear_probe",
    "embed",
    "compare",
)
PRELOADED = (
    "torch._dynamo",  # which the first optimizer imports
    "torch.distributed.fsdp",
    "datasets",
    "pytest",
    "scipy.stats",
    "sklearn.linear_model",
    "sslvit.api",
    "sslvit.reports.doctor",
    "sslvit.weights.info",
    *(f"sslvit.recipes.{name}" for name in RECIPES),
)
READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "MKL_", "HF_", "XDG_", "HOME", "TMPDIR")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as conftest.py has it
AT_IMPORT = dict(os.environ)
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <sys/prctl.h>


class Process(subprocess.Popen):
    """subprocess.Popen of `python SCRIPT ...`, `python -m MODULE ...` or `python -c PROGRAM ...`."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest) -> None:
        """The one part of Popen that starts something; all else is Popen's own."""
        pipes, new_session = rest[3:9], rest[-2]  # fds: of stdin, stdout and stderr, the child's and ours
        python, *words = [os.fspath(word) for word in args]
        assert python == sys.executable, args
        env = dict(os.environ if env is None else env)
        for name in env.keys() | AT_IMPORT.keys():
            if name.startswith(READ_AT_START) and env.get(name) != AT_IMPORT.get(name):
                raise ValueError(f"{name} is read when a process starts: start a real one")
        with open(os.devnull) as nothing:
            given = (pipes[0], pipes[3], pipes[5])
            files = [file if file != -1 else usual for file, usual in zip(given, (nothing.fileno(), 1, 2), strict=True)]
            self.pid = fork([words, os.path.abspath(cwd or "."), env, new_session], files)
        self._close_pipe_fds(*pipes)
        self._child_created = True


def run(command: list, *, check: bool = False, timeout: float = 240, **options) -> subprocess.CompletedProcess:
    """subprocess.run, with the output captured if nothing else is said."""
    with Process(command, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options)) as process:
        try:
            said = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, *said)
    if check:
        done.check_returncode()
    return done


def ranks(command: list, *, env: dict, **options) -> list[Process]:
    """The two processes that torchrun starts, without torchrun."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    env = env | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Process(command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, **options) for rank in "01"]


def run_ranks(command: list, **environment: str) -> list[subprocess.CompletedProcess]:
    """Of each process what `run` gives of one."""
    env = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    started = ranks(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [
        subprocess.CompletedProcess(command, process.returncode, *words)
        for process, words in zip(started, said, strict=True)
    ]


def spawn(function: Callable, args: tuple, nprocs: int) -> None:
    """torch.multiprocessing.spawn: function(rank, *args) in each of some processes."""
    called = pickle.dumps((sys.path, function.__module__, function.__name__, args))
    program = "import sys, pickle, importlib\n"
    program += f"sys.path[:], module, name, args = pickle.loads({called!r})\n"
    program += "getattr(importlib.import_module(module), name)(int(sys.argv[1]), *args)"
    started = [
        Process([sys.executable, "-c", program, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(nprocs)
    ]
    said = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0] * nprocs, "\n".join(said)


# The test's side


def fork(request: list, files: list[int]) -> int:
    """The pid of a new child of this process, which the server starts."""
    with adopting():
        message = json.dumps(request).encode()
        socket.send_fds(server(), [len(message).to_bytes(4)], files)
        server().sendall(message)
        answer = server().recv(4)
    assert answer, "the server of forks has ended"
    return int.from_bytes(answer)


@contextmanager
def adopting() -> Iterator[None]:
    """Whoever loses its parent below this process becomes its child."""
    set_option = ctypes.CDLL(None).prctl
    set_option(SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        set_option(SUBREAPER, 0, 0, 0, 0)


@cache
def server() -> socket.socket:
    """Begins at the first use, and ends with this process."""
    ours, theirs = socket.socketpair()
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import preloaded\n"
    program += f"preloaded.execute(preloaded.serve({theirs.fileno()}))"
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=AT_IMPORT)
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# The server's side


def serve(requests_at: int) -> list[str]:
    """Returns in each child, with its command line; in the server never."""
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("few_shapes")
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    others = [name for name in threads if name != "jemalloc_bg_thd"]  # which jemalloc begins again
    assert len(others) == 1, f"a fork would have one thread of {threads}"
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=requests_at) as requests:
        while True:
            head, files, *_ = socket.recv_fds(requests, 4, 3)
            if not head:
                os._exit(0)
            message = requests.recv(int.from_bytes(head), socket.MSG_WAITALL)
            if not (child := fork_twice()):
                break
            for file in files:
                os.close(file)
            requests.sendall(child.to_bytes(4))
    return become(*json.loads(message), files=files)


def fork_twice() -> int:
    """In the child 0, and in the server its pid, when its parent has gone and the test has adopted it."""
    reader, writer = os.pipe()
    between = os.fork()
    if not between:
        between, child = os.getpid(), os.fork()
        if child:
            os.write(writer, child.to_bytes(4))
            os._exit(0)
        while os.getppid() == between:
            time.sleep(0.001)
        os.close(reader)
        os.close(writer)
        return 0
    os.waitpid(between, 0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        return int.from_bytes(pipe.read(4))


def become(words: list[str], folder: str, env: dict[str, str], new_session: bool, *, files: list) -> list[str]:
    if new_session:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for name, usual in (("stdin", sys.stdin), ("stdout", sys.stdout), ("stderr", sys.stderr)):
        options = {"encoding": usual.encoding, "errors": usual.errors, "closefd": False}
        options |= {"mode": usual.mode, "buffering": 1 if name == "stderr" else -1}
        setattr(sys, name, open(usual.fileno(), **options))  # noqa: SIM115
        setattr(sys, f"__{name}__", getattr(sys, name))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path.remove(str(Path(__file__).parent))
    sys.path.remove("")
    sys.modules["numpy"].random.seed()
    return words


def execute(words: list[str]) -> None:
    """As Python does with these words; but what it would take half a second to take down is left to the system."""
    try:
        execute_in_main(words)
        code = 0
    except SystemExit as asked:
        if not isinstance(asked.code, int | None):
            raise
        code = asked.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 255)


def execute_in_main(words: list[str]) -> None:
    main = sys.modules["__main__"].__dict__
    for name in ("sys", "preloaded"):
        del main[name]
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        runpy._run_module_as_main(words[1])
    elif words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), main)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        sys.argv = words
        main["__file__"] = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main)
