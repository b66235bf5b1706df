"""One thread a test process: the models are tiny, and `pytest -n auto` runs a process on every core."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
