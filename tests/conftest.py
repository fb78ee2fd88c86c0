"""One thread a process: the tests' tensors are small, and threads that wait for each other make them much slower."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
