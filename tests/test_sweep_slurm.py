"""`-m launcher=slurm`: job scripts that come back after a signal, on a SLURM of a few lines and on a real one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_slurm import needs_slurm

from ssl_lab.cli import launch_slurm
from ssl_lab.cli.main import main

STUB = """
import json, os, signal, sys, time
given = dict(word.split("=", 1) for word in sys.argv[2:])
seed, lives = int(given["seed"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
with open("seen.jsonl", "a") as file:
    file.write(json.dumps({"seed": seed, "lives": lives}) + "\\n")
if seed == 13:
    sys.exit("ssl-lab: seed 13 brings bad luck")
if seed == 20:
    time.sleep(1000)
if lives == 0 and seed == 30:
    sys.exit(75)
if lives < 2 and seed == 31:
    os.kill(os.getpid(), signal.SIGKILL)
"""
COMMANDS = {  # what is needed of SLURM, one machine, without a queue
    "sbatch": """
script=$2; id=$(mktemp "$FAKE/live-XXXX"); id=${id##*-}; cp "$script" "$FAKE/script-$id"
log=$(sed -n 's/^#SBATCH --output=//p' "$script"); export SLURM_JOB_ID=$id
setsid bash -c 'echo $$ > "$2/group-$SLURM_JOB_ID"; lives=0; again=$2/again-$SLURM_JOB_ID
while SLURM_RESTART_COUNT=$lives bash "$0" >> "$1" 2>&1; [ -e "$again" ]; do rm "$again"; lives=$((lives+1)); done
rm "$2/live-$SLURM_JOB_ID"' "$script" "$log" "$FAKE" > /dev/null 2>&1 &
echo "$id;cluster"
""",
    "srun": 'exec "$@"',
    "squeue": 'cd "$FAKE"; ls | sed -n "s/^live-//p"',
    "scontrol": '[ "$1" = requeue ] && touch "$FAKE/again-$2"',
    "scancel": 'kill -9 -- -$(cat "$FAKE/group-$1"); rm -f "$FAKE/live-$1"',
}


@pytest.fixture(params=["imitated", pytest.param("real", marks=[pytest.mark.slow, needs_slurm])])
def slurm(request, tmp_path, monkeypatch):
    """A cluster, an empty folder to work in, and a stand-in for jobs that writes down what it was asked for."""
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(launch_slurm, "COMMAND", [sys.executable, str(tmp_path / "stub.py")])
    monkeypatch.setattr(launch_slurm, "_LOOK", 0.3)
    if request.param == "imitated":
        for name, text in COMMANDS.items():
            file = tmp_path / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text("#!/bin/bash\n" + text)
            file.chmod(0o755)
        (tmp_path / "fake").mkdir()
        monkeypatch.setenv("FAKE", str(tmp_path / "fake"))
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        yield request.param
        return
    over = threading.Event()
    impatient = threading.Thread(target=hurry, args=[over])
    impatient.start()
    yield request.param
    over.set()
    impatient.join()


def hurry(over):
    """A real SLURM lets a job wait for two minutes after it was put back."""
    while not over.wait(2):
        queue = subprocess.run(["squeue", "--me", "-h", "-t", "PD", "-o", "%i"], capture_output=True, text=True)
        for job in queue.stdout.split():
            subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], capture_output=True)


def seen():
    return sorted((c["seed"], c["lives"]) for c in map(json.loads, Path("seen.jsonl").read_text().splitlines()))


@pytest.mark.faults("C9", "jobs of a sweep on SLURM fail, are signalled, are killed: put back or named, code 1")
def test_jobs_come_back_or_are_named(slurm, capsys):
    assert main(["-m", "method=mae", "trainer.accelerator=cpu", "seed=0,13,30,31", "launcher=slurm"]) == 1
    assert seen() == [(0, 0), (13, 0), (30, 0), (30, 1), (31, 0), (31, 1), (31, 2)]
    out = capsys.readouterr().out
    assert "3 ok, 1 failed" in out and "exit code 1: seed 13 brings bad luck" in out.replace("\n", "")
    (script,) = Path().glob("runs/sweeps/*/2.sh")
    assert "--gpus" not in script.read_text()


def test_a_signal_takes_the_jobs_out_of_the_queue(slurm, tmp_path):
    program = "import sys; from ssl_lab.cli import launch_slurm as slurm; from ssl_lab.cli.main import main; "
    program += f"slurm.COMMAND, slurm._LOOK = {launch_slurm.COMMAND!r}, 0.3; sys.exit(main())"
    words = ["-m", "method=mae", "trainer.accelerator=cpu", "seed=20,0", "launcher=slurm", "launcher.jobs=1"]
    process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path("seen.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "0 ok, 0 failed, 1 stopped, 1 not run" in text
    assert seen() == [(20, 0)]
    assert subprocess.run(["squeue", "--me", "-h"], capture_output=True, text=True).stdout.split() == []


def test_a_closed_terminal_leaves_the_jobs_to_slurm(monkeypatch, tmp_path):
    monkeypatch.setattr(launch_slurm.Queue, "look", lambda self: (1, frozenset({"7"})))
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: pytest.fail("nothing is cancelled"))
    job = launch_slurm.Submitted("7", tmp_path / "1.code", launch_slurm.Queue())
    assert job.code() is None
    job.stop(signal.SIGHUP)
    assert job.code() == 75


def test_a_queue_that_cannot_be_asked_says_nothing_about_jobs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    queue = launch_slurm.Queue()
    job = launch_slurm.Submitted("7", tmp_path / "1.code", queue)
    assert job.code() is None and queue.look() == (0, frozenset())
    job.stop(signal.SIGTERM)
    assert job.code() is None


@pytest.mark.skipif(shutil.which("bash") is None, reason="runs shell scripts")
def test_what_a_job_asks_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(launch_slurm, "asked", lambda *command: asked.append(command) or "7")
    monkeypatch.setattr(launch_slurm.Submitted, "code", lambda self: 0)
    words = ["strategy=ddp", "trainer.devices=8", "trainer.num_nodes=2", "launcher=slurm"]
    words += ["launcher.options={partition: gpu, cpus_per_task: 4, time: '1-00:00:00', requeue: false}"]
    assert main(["-m", "experiment=mae_in1k", "data.path=x", "seed=1,2", *words]) == 0
    scripts = [command[2] for command in asked if command[0] == "sbatch"]
    text = Path(scripts[1]).read_text()
    told = re.findall("^#SBATCH --(.*)$", text, re.M)
    assert {"nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "cpus-per-task=4"} <= set(told)
    assert "time=1-00:00:00" in told and "requeue" not in told and "signal=USR1@120" in told
    assert re.search(
        r"^srun .* train experiment=mae_in1k data.path=x seed=2 strategy=ddp trainer.devices=8", text, re.M
    )
    assert subprocess.run(["bash", "-n", scripts[1]]).returncode == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["strategy=ddp"], "trainer.devices=auto"),
        (["launcher.jobs=0"], "at least one"),
        (["launcher.options=8"], "launcher.options"),
    ],
)
def test_mistakes_take_a_line(monkeypatch, tmp_path, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "method=mae", "seed=1,2", "launcher=slurm", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_machine_without_slurm(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["-m", "method=mae", "seed=1,2", "launcher=slurm"]) == 2
    assert "no sbatch on this machine" in capsys.readouterr().err
