"""`-m`: every combination is checked before the first runs; jobs are processes, and none hides another."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_orphans import of_session
from test_slurm import ranks, wait_for
from training import TINY

from ssl_lab.cli import launch
from ssl_lab.cli.catalog import conf_folder
from ssl_lab.cli.compose import compose
from ssl_lab.cli.main import main
from ssl_lab.errors import UserError
from ssl_lab.train.signals import Signals

STUB = """
import json, os, signal, sys, time
given = dict(word.split("=", 1) for word in sys.argv[2:])
seed = int(given.get("seed", 0))
facts = {"words": sys.argv[1:], "seed": seed, "group": os.getpgrp(), "began": time.time()}
facts |= {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
if seed == 13:
    sys.exit("ssl-lab: seed 13 brings bad luck")
if seed == 14:
    print("a word on the way")
    try:
        1 / 0
    except ZeroDivisionError:
        import traceback
        traceback.print_exc()
        sys.exit("ssl-lab: train failed, see the traceback above")
if seed == 15:
    os.kill(os.getpid(), signal.SIGKILL)
if seed in (20, 21):
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(75))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if seed == 20 else print("no"))
    os.system("sleep 1000 &")
    open(f"waiting-{seed}", "w").close()
    time.sleep(1000)
    time.sleep(1000)
facts["ended"] = time.time()
with open("seen.jsonl", "a") as file:
    file.write(json.dumps(facts) + "\\n")
"""


def sweep(line):
    """Exit code of `ssl-lab -m` with these words."""
    return main(["-m", *line.split()])


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Run in an empty folder with a stand-in for jobs, which writes down what it was asked for."""
    script = tmp_path / "stub" / "stub.py"
    script.parent.mkdir()
    script.write_text(STUB)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "COMMAND", [sys.executable, str(script)])
    return script


def seen():
    return [json.loads(line) for line in Path("seen.jsonl").read_text().splitlines()]


def configurations():
    """What the jobs would have run with, in the order of their start."""
    return [compose(c["words"][0], c["words"][1:], [conf_folder()]) for c in seen()]


def statuses():
    (file,) = Path().glob("runs/sweeps/*/jobs.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_combination_runs_in_a_group_of_its_own(stub, capsys):
    assert sweep("method=mae seed=0,1 optim.lr=0.1,0.2") == 0
    cfgs = configurations()
    assert [(c.seed, c.optim.lr) for c in cfgs] == [(0, 0.1), (0, 0.2), (1, 0.1), (1, 0.2)]
    assert [s["out"] for s in statuses()] == [c.out for c in cfgs]
    assert [c.out for c in cfgs] == [f"runs/mae-optim.lr={lr}/{seed}" for seed in (0, 1) for lr in (0.1, 0.2)]
    assert len({c["group"] for c in seen()} | {os.getpgrp()}) == 5
    assert "4 ok, 0 failed" in capsys.readouterr().out
    assert {s["status"] for s in statuses()} == {"ok"}
    written = {str(p).split("/")[1] for p in Path("runs").rglob("*") if p.is_file()}
    assert written == {"sweeps"}, "nothing but the sweep's own folder"


def test_jobs_that_differ_in_the_seed_keep_the_usual_folder(stub):
    assert sweep("method=mae seed=0,1") == 0
    assert [c.out for c in configurations()] == ["runs/mae/0", "runs/mae/1"]


def test_a_name_that_is_given_is_lengthened(stub):
    assert sweep("method=mae name=short optim.lr=0.1,0.2") == 0
    assert [c.out for c in configurations()] == ["runs/short-optim.lr=0.1/0", "runs/short-optim.lr=0.2/0"]


def test_values_are_shown_as_they_were_typed(stub, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert sweep("method=mae eval=[knn],[knn,linear]") == 0
    table = capsys.readouterr().out.partition("sweep: ")[2]
    assert "eval=[knn]" in table and "eval=[knn,linear]" in table


def test_one_folder_for_all_is_refused(stub, capsys):
    assert sweep("method=mae out=here optim.lr=0.1,0.2") == 2
    assert "here" in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("line", ["evaluate ckpt=a,b out=cmp", "doctor data.path=a,b out=cmp"])
def test_one_folder_for_verbs_without_a_name_is_refused_too(stub, capsys, line):
    Path("a").mkdir()
    Path("b").mkdir()
    assert sweep(line) == 2
    error = capsys.readouterr().err
    assert "several jobs would share the run folder cmp" in error and error.count("\n") == 1


@pytest.mark.faults("C9", "jobs of a sweep fail or are killed: the others run, code 1")
def test_a_failing_job_does_not_stop_the_others(stub, capsys):
    assert sweep("method=mae seed=0,13,14,15,1 launcher.jobs=2") == 1
    assert {c["seed"] for c in seen()} == {0, 1}
    out = capsys.readouterr().out
    assert "2 ok, 3 failed" in out
    assert "exit code 1: seed 13 brings bad luck" in out and "exit code 1: ZeroDivisionError" in out
    assert "exit code -9: nothing was said" in out
    ended = {s["overrides"]: s["status"] for s in statuses()}
    assert [ended[f"seed={seed}"] for seed in (0, 13, 14, 15, 1)] == ["ok", "failed", "failed", "failed", "ok"]


def test_jobs_at_a_time_share_cores_and_gpus(stub, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert sweep("method=mae seed=0,1,2 launcher.jobs=2 launcher.gpus=[3,4,5,7]") == 0
    first, second, third = sorted(seen(), key=lambda c: c["seed"])
    assert {first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]} == {"3,5", "4,7"}
    assert third["CUDA_VISIBLE_DEVICES"] in ("3,5", "4,7")
    assert {c["OMP_NUM_THREADS"] for c in seen()} == {"4"}
    assert third["began"] > min(first["ended"], second["ended"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("launcher.jobs=0", "at least one"),
        ("launcher.jobs=3 launcher.gpus=[0,1]", "fewer"),
        ("launcher.job=2", "did you mean launcher.jobs"),
        ("launcher=slrm", "did you mean slurm"),
        ("hydra/launcher=joblib", "launcher=local"),
        ("optim.name=adamw,adamm", "adamm"),
        ("optim.lr=interval(0,1)", "sweeper=optuna"),
    ],
)
def test_a_mistake_in_any_job_is_found_before_the_first(stub, capsys, words, told):
    assert sweep(f"method=mae seed=0,1 {words}") == 2
    assert told in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_nowhere_to_write_is_one_line(stub, capsys):
    Path("runs").touch()
    assert sweep("method=mae seed=0,1") == 2
    told = capsys.readouterr().err
    assert "runs/sweeps" in told and len(told.splitlines()) == 1


def test_a_full_disk_under_the_list_of_jobs_ends_none(stub, capsys, monkeypatch):
    def full(path, *mode, **options):
        if path.name == "jobs.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, *mode, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", full)
    assert sweep("method=mae seed=0,1") == 0
    out = capsys.readouterr().out
    assert out.count("No space left on device") == 2 and "2 ok, 0 failed" in out


def test_a_launcher_needs_several_runs(stub, capsys):
    assert main(["method=mae", "launcher=slurm"]) == 2
    assert "add -m" in capsys.readouterr().err


def test_short_forms_work_in_sweeps(stub):
    assert sweep("method=mae backbone=vit_ti4,vit_s16 method.encoder.num_registers=0,4 launcher.jobs=2") == 0
    cfgs = configurations()
    encoders = {(c.method.encoder.patch_size, c.method.encoder.num_registers) for c in cfgs}
    assert encoders == {(4, 0), (4, 4), (16, 0), (16, 4)}
    assert len({c.out for c in cfgs}) == 4


@pytest.mark.faults("C16", "two sweeps start in the same second: a folder each")
def test_two_sweeps_of_the_same_second(stub, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "2030-01-01_00-00-00")
    assert sweep("method=mae seed=0") == sweep("method=mae seed=1") == 0
    assert len(list(Path("runs/sweeps").iterdir())) == 2


@pytest.mark.faults("C6", "a signal to a sweep: jobs are told and save, no more start, no process left")
@pytest.mark.parametrize(
    ("seeds", "numbers", "code"),
    [
        ("0,20,1", [signal.SIGTERM], 75),
        ("0,20,1", [signal.SIGHUP], 75),
        ("0,20,1", [signal.SIGINT], 130),
        ("0,21,1", [signal.SIGINT] * 2, 130),
    ],
    ids=["TERM", "HUP", "Ctrl-C", "Ctrl-C twice, of a job that does not end"],
)
def test_a_signal_ends_the_sweep_and_its_jobs(stub, seeds, numbers, code):
    program = "import sys; from ssl_lab.cli import launch; from ssl_lab.cli.main import main; "
    program += f"launch.COMMAND = {launch.COMMAND!r}; sys.exit(main())"
    command = [sys.executable, "-c", program, "-m", "method=mae", f"seed={seeds}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    waiting, deadline = Path(f"waiting-{seeds[2:4]}"), time.monotonic() + 120
    while not waiting.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    job = next(pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if leads(pid, stub))
    for number in numbers:
        process.send_signal(number)
        time.sleep(1)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == code, text
    assert [c["seed"] for c in seen()] == [0]
    assert "1 ok, 0 failed" in text and "not run" in text
    if len(numbers) == 1:
        assert "1 stopped, 1 not run" in text
    else:
        assert not of_session(job)
    for left in of_session(job):
        os.kill(left, signal.SIGKILL)  # the stub's own child, when the stub was asked and did not care for it


def test_a_reader_that_leaves_ends_no_sweep(stub):
    program = "import sys; from ssl_lab.cli import launch; from ssl_lab.cli.main import main; "
    program += f"launch.COMMAND = {launch.COMMAND!r}; sys.exit(main())"
    command = [sys.executable, "-c", program, "-m", "method=mae", "seed=0,1,2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert [status["status"] for status in statuses()] == ["ok"] * 3


def test_jobs_may_save_when_another_cannot_be_started(tmp_path):
    said = []

    class Patient:
        def code(self):
            return 75 if said else None

        def stop(self, number):
            said.append(number)

        def kill(self):
            said.append("kill")

    class Full:
        jobs = None

        def start(self, job, log):
            if job.number:
                raise UserError("no room")
            return Patient()

    jobs = [launch.Job(number, "", ()) for number in (1, 0)]
    source = SimpleNamespace(next=jobs.pop, ended=lambda job, code: "")
    with Signals() as signals, pytest.raises(UserError):
        launch.drive(Full(), source, signals, tmp_path, begun=lambda *_: None, over=lambda *_: None)
    assert said == [signal.SIGTERM, "kill"]


@pytest.mark.slow
@pytest.mark.faults("C8", "SIGKILL of a sweep: its jobs end too")
def test_jobs_end_with_a_sweep_that_is_killed(tmp_path, monkeypatch):
    out, words = tmp_path / "run", [*TINY, "duration=40000steps"]
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen([sys.executable, "-m", "ssl_lab", "-m", *words, f"out={out}", "seed=0"])
    try:
        wait_for((out / "metrics.csv").exists, 300, "the job makes no steps")
        assert len(ranks(out)) == 2  # the sweep and its job
        process.kill()
        process.wait()
        wait_for(lambda: not ranks(out), 30, "the job goes on")
    finally:
        for left in ranks(out):
            os.kill(left, signal.SIGKILL)


def leads(pid, script):
    """Whether a process is a job and leads its session."""
    try:
        return os.getsid(pid) == pid and str(script) in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False
