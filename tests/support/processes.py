"""Several processes of a test that talk to each other, each a fresh interpreter with a rank."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def start(count: int, target: str, *arguments: object) -> list[subprocess.Popen[str]]:
    """`target` is "module:function" of the tests; it is called with the arguments as text in each of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    module, _, function = target.partition(":")
    code = f"import sys; from {module} import {function}; {function}(*sys.argv[1:])"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    common = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**common, "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]


def run(count: int, target: str, *arguments: object, seconds: float = 240) -> None:
    """As `start`, and wait for all to end well."""
    processes = start(count, target, *arguments)
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
    assert all(process.returncode == 0 for process in processes), "\n".join(error[-3000:] for error in errors)
