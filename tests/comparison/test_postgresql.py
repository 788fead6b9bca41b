"""The same sharing through a PostgreSQL server, a temporary one that runs as an unprivileged user."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import comparisons
import pytest
from sharing import assert_lost, assert_shared, assert_taken_over


def program(name):
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not program("initdb") or not program("pg_ctl"), reason="no PostgreSQL server is installed (initdb, pg_ctl)"
    ),
]
USER = "postgres"


def unprivileged(*command):
    """The server refuses to run as root."""
    return ["runuser", "-u", USER, "--", *command] if os.geteuid() == 0 else list(command)


@pytest.fixture(scope="module")
def server():
    """URL of a server that ends with the tests."""
    root = Path(tempfile.mkdtemp(prefix="pg"))  # a socket's path may not be long, as pytest's are
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if os.geteuid() == 0:
        shutil.chown(root, USER)
    run = {"cwd": root, "timeout": 120, "stdout": subprocess.DEVNULL}
    subprocess.run(
        unprivileged(program("initdb"), "-D", f"{root}/data", "-U", USER, "-A", "trust", "-N"), check=True, **run
    )
    options = f"-p {port} -h 127.0.0.1 -k {root} -F"
    control = unprivileged(program("pg_ctl"), "-D", f"{root}/data", "-w")
    subprocess.run([*control, "-l", f"{root}/log", "-o", options, "start"], check=True, **run)
    yield f"postgresql://{USER}@127.0.0.1:{port}/{USER}"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, **run)
    shutil.rmtree(root)


@pytest.fixture
def url(server):
    """A database of its own for each test."""
    import psycopg

    name = f"t{os.urandom(4).hex()}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"create database {name}")
    return f"{server.rpartition('/')[0]}/{name}"


def test_workers_that_start_together_make_every_run_once(url, tmp_path):
    assert_shared(url, tmp_path, comparisons.make(seeds=range(4), cost_rounds=1), count=3)


def test_the_run_of_a_killed_worker_is_taken_over(url, tmp_path):
    assert_taken_over(url, tmp_path, comparisons.make(methods=["lora"]))


def test_a_worker_without_signs_of_life_loses_its_run(url):
    assert_lost(url, comparisons.make())
