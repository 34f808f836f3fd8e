"""One thread for each process: tests run several at once, and threads that wait for each other's
core are far slower than none."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
