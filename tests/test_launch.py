"""However two ranks are started - by Lightning, torchrun, srun - one folder, one owner of it, and the same end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_dist import TWO
from test_slurm import ranks, wait_for
from training import TINY, same_end

from ssl_lab.cli.main import main
from ssl_lab.train.checkpoint import find

WORDS = [*TINY, *TWO, "duration=8steps", "eval=[knn]", "eval.knn.k=3"]
PAGE = (Path(__file__).parent.parent / "docs/cluster.md").read_text()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TORCHRUN += re.search("^torchrun (--standalone .*) -m ssl_lab", PAGE, re.M)[1].replace("=8", "=2").split()
TELLTALE = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS")
FAULTY = """
import os, signal, time
from pathlib import Path
from ssl_lab import dist
from ssl_lab.methods.mae import MAE
class Faulty(MAE):
    def step(self, batch, progress):
        mark = Path(os.environ["MARK"])
        if self.global_step == 3 and dist.rank() == 1 and not mark.exists():
            mark.touch()
            os.kill({target}, signal.{name})
            time.sleep(5)
        return super().step(batch, progress)
"""


def environment(**more):
    clean = {name: value for name, value in os.environ.items() if name not in TELLTALE}
    return clean | {"OMP_NUM_THREADS": "1"} | more


def layout(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """The run that Lightning starts the second rank of."""
    out = tmp_path_factory.mktemp("ordinary") / "run"
    subprocess.run([sys.executable, "-m", "ssl_lab", *WORDS, f"out={out}"], env=environment(), check=True)
    return out


def test_torchrun(ordinary, tmp_path):
    command = [*TORCHRUN, "-m", "ssl_lab", *WORDS, f"out={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    same_end(ordinary, tmp_path / "run")
    assert layout(ordinary) == layout(tmp_path / "run")
    assert done.stdout.count("done: 8 steps") == 1, "the first rank alone speaks"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.faults("C16", "two ranks of srun start two seconds apart: one folder, the same end")
def test_ranks_that_start_apart(ordinary, tmp_path):
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "ssl_lab", *WORDS, f"out={tmp_path / 'run'}"]
    started = []
    for rank in ("1", "0"):  # the owner of the folder comes last
        env = environment(**job, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        time.sleep(2)
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "done: 8 steps" in said[1] and "done" not in said[0]
    same_end(ordinary, tmp_path / "run")
    assert layout(ordinary) == layout(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.faults(
    "C6", "SIGTERM, SIGKILL of torchrun, SIGKILL of its rank: all ranks end or start again, the same end"
)
@pytest.mark.parametrize(
    ("target", "name", "codes"),
    [("os.getppid()", "SIGTERM", [1]), ("os.getppid()", "SIGKILL", [-9]), ("os.getpid()", "SIGKILL", [0])],
    ids=["torchrun told to stop", "torchrun killed", "rank killed"],
)
def test_torchrun_comes_to_an_end(ordinary, tmp_path, target, name, codes):
    (tmp_path / "faulty.py").write_text(FAULTY.format(target=target, name=name))
    out = tmp_path / "run"
    env = environment(PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", MARK=str(tmp_path / "mark"))
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    words = ["-m", "ssl_lab", *WORDS, "method._target_=faulty.Faulty", f"out={out}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*TORCHRUN, "--max-restarts=1", *words], env=env, stdout=log, stderr=log)
    try:
        assert process.wait(300) in codes, (tmp_path / "log").read_text()
        wait_for(lambda: not ranks(out), 30, "ranks outlive torchrun")
    finally:
        for left in ranks(out):
            os.kill(left, signal.SIGKILL)
    if name == "SIGTERM":
        assert find(out).name == "step=4.ckpt", (tmp_path / "log").read_text()
    if codes != [0]:
        assert subprocess.run([sys.executable, *words], env=env).returncode == 0
    same_end(ordinary, out)


@pytest.mark.parametrize("started", [{"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}, {"SLURM_STEP_NUM_TASKS": "4"}])
@pytest.mark.parametrize("words", [TWO, ["trainer.devices=1"]], ids=["ddp", "single"])
def test_other_ranks_than_devices_are_refused(started, words, tmp_path, capsys, monkeypatch):
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert main([*TINY, *words, f"out={tmp_path / 'run'}"]) == 2
    assert "4 ranks were started for trainer.devices=" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_restarts_that_would_meet_the_dead_are_refused(tmp_path, capsys, monkeypatch):
    told = {"RUN_ID": "x", "MAX_RESTARTS": "3", "USE_AGENT_STORE": "True"}
    for name, value in told.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    assert main([*TINY, *TWO, f"out={tmp_path / 'run'}"]) == 2
    assert "torchrun --max-restarts=3: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_several_machines_need_somebody_who_counts(tmp_path, capsys, monkeypatch):
    for name in TELLTALE:
        monkeypatch.delenv(name, raising=False)
    assert main([*TINY, *TWO, "trainer.num_nodes=2", f"out={tmp_path / 'run'}"]) == 2
    assert "trainer.num_nodes=2: start the ranks with torchrun or srun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
