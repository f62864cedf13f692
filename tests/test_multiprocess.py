"""Several processes on this machine, connected by jax.distributed, transform arrays that none of them holds whole."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import CHECKS, DEVICES

WORKER = Path(__file__).with_name("distributed.py")
SECONDS = 300  # four processes that import and compile, on two busy cores


class Processes:
    """A run of the worker in several processes."""

    def __init__(self, count, folder):
        self.files = [folder / f"{count}-{process}.txt" for process in range(count)]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        port = _free_port()
        started = []
        for process, path in enumerate(self.files):
            with path.open("w") as file:
                command = [sys.executable, WORKER, str(port), str(process), str(count)]
                started.append(
                    subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )
        self.codes = _wait(started)
        self.outcomes = [dict(_results(file)) for file in self.files]

    def describe(self):
        """How each process ended, and the end of what it printed."""
        return "\n".join(
            f"---- process {process} of {len(self.codes)}: exit code {code}\n{file.read_text()[-3000:]}"
            for process, (code, file) in enumerate(zip(self.codes, self.files, strict=True))
        )


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(processes):
    """Waits for all; when one fails or the time is over, the others, which would wait for it, are ended."""
    deadline = time.monotonic() + SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):
            deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.kill()
    return [process.wait() for process in processes]


def _results(file):
    for line in file.read_text().splitlines():
        if line.startswith('["check_'):
            yield json.loads(line)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runs = {}

    def run(count):
        if count not in runs:
            runs[count] = Processes(count, tmp_path_factory.mktemp("processes"))
            if not any(runs[count].outcomes):  # they could not connect: another program may have taken the port
                runs[count] = Processes(count, tmp_path_factory.mktemp("again"))
        return runs[count]

    return run


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("count", [2, 4], ids="{}-processes".format)
def test_together(run, count, check):
    processes = run(count)
    failures = {process: found.get(check, "not reached") for process, found in enumerate(processes.outcomes)}
    assert not any(failures.values()), f"{failures}\n{processes.describe()}"


@pytest.mark.parametrize("count", [2, 4], ids="{}-processes".format)
def test_all_end_well(run, count):
    assert run(count).codes == [0] * count, run(count).describe()
