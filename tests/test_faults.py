"""What goes wrong on real machines: full disks, flipped bits, foreign files, NaN, signals."""

import errno
import json
import os
import pickle
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from training import TINY, rows, run, same_end, start

from ssl_lab.cli.main import main
from ssl_lab.cli.resume import holding
from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.train import checkpoint
from ssl_lab.train.callbacks import Checkpoints
from ssl_lab.train.checkpoint import CheckpointFiles, find, read, stored
from ssl_lab.train.loggers import CSVLogger, Loggers
from ssl_lab.train.signals import Interrupted, Signals


def content(step: int) -> dict:
    return {"state_dict": {"w": torch.arange(1000.0) + step}, "global_step": step}


@pytest.fixture
def folder(tmp_path):
    """A run folder with checkpoints of steps 1, 2, 3."""
    files = CheckpointFiles(keep=3)
    for step in (1, 2, 3):
        files.save_checkpoint(content(step), tmp_path / "checkpoints" / f"step={step}.ckpt")
    return tmp_path


def test_newest_is_found_and_read_back(folder):
    assert find(folder).name == "step=3.ckpt"
    assert torch.equal(read(folder / "checkpoints" / "last.ckpt")["state_dict"]["w"], content(3)["state_dict"]["w"])
    facts = json.loads((folder / "checkpoints" / "step=3.json").read_text())
    assert facts["step"] == 3 and facts["world_size"] == 1 and len(facts["sha256"]) == 64


def damaged(data: bytes) -> dict[str, bytes]:
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    return {"empty": b"", "cut": data[:middle], "one byte short": data[:-1], "flipped": flipped, "text": b"hello" * 9}


@pytest.mark.faults("C12", "checkpoint empty, cut, flipped, no checkpoint at all: the one before is taken")
@pytest.mark.parametrize("how", ["empty", "cut", "one byte short", "flipped", "text"])
def test_damaged_newest_falls_back_to_the_one_before(folder, how, caplog):
    newest = folder / "checkpoints" / "step=3.ckpt"
    newest.write_bytes(damaged(newest.read_bytes())[how])
    assert find(folder).name == "step=2.ckpt"
    assert "step=3.ckpt is damaged" in caplog.text


@pytest.mark.faults("C12", "checkpoint whose checksum is missing or wrong: the one before is taken")
def test_missing_or_wrong_sidecar_counts_as_damage(folder):
    (folder / "checkpoints" / "step=3.json").unlink()
    (folder / "checkpoints" / "step=2.json").write_text("{")
    assert find(folder).name == "step=1.ckpt"


@pytest.mark.faults("C12", "every checkpoint damaged: refused, no fresh start")
def test_all_damaged_is_an_error_not_a_fresh_start(folder):
    for path in stored(folder / "checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"every checkpoint .* damaged"):
        find(folder)


def test_nothing_there(tmp_path):
    assert find(tmp_path) is None and find(tmp_path / "never") is None
    with pytest.raises(UserError, match="no checkpoint at"):
        read(tmp_path / "last.ckpt")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/ssl_lab_was_here",)


@pytest.mark.faults("C13", "code in a checkpoint: refused")
def test_code_in_a_checkpoint_is_refused(tmp_path):
    for name, save in (("zip", torch.save), ("raw", lambda x, path: path.write_bytes(pickle.dumps(x)))):
        path = tmp_path / f"{name}.ckpt"
        save({"state_dict": {}, "x": Evil()}, path)
        with pytest.raises(UserError, match="refused"):
            read(path)
    assert not os.path.exists("/tmp/ssl_lab_was_here")


@pytest.mark.faults("C12", "another program's file: refused and named")
def test_foreign_file_is_named(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="has no state_dict"):
        read(tmp_path / "other.ckpt")


@pytest.mark.faults("C15", "what would not load again: refused at step 0")
def test_what_would_not_load_again_is_refused_at_the_first_save(tmp_path):
    with pytest.raises(UserError, match="cannot be saved safely"):
        CheckpointFiles().save_checkpoint({**content(0), "path": tmp_path}, tmp_path / "step=0.ckpt")
    assert [*tmp_path.iterdir()] == []


def test_old_ones_go_and_two_stay(tmp_path):
    files = CheckpointFiles()
    for step in range(9, 12):
        files.save_checkpoint(content(step), tmp_path / f"step={step}.ckpt")
    assert [p.name for p in stored(tmp_path)] == ["step=10.ckpt", "step=11.ckpt"]
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["step=10.json", "step=11.json"]
    with pytest.raises(UserError, match="keep_checkpoints=1"):
        CheckpointFiles(keep=1)


@pytest.mark.faults("C14", "full disk: oldest files go, training goes on or is told")
@pytest.mark.parametrize("room", [0, 1, 5])
def test_full_disk(folder, monkeypatch, caplog, room):
    """`room`: how many files must go before there is space."""
    real, fails = checkpoint.write, [room]

    def write(data, path):
        if fails[0]:
            fails[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(data, path)

    monkeypatch.setattr(checkpoint, "write", write)
    CheckpointFiles(keep=3).save_checkpoint(content(4), folder / "checkpoints" / "step=4.ckpt")
    names = [p.name for p in stored(folder / "checkpoints")]
    assert names == (["step=3.ckpt"] if room == 5 else ["step=2.ckpt", "step=3.ckpt", "step=4.ckpt"])
    assert ("training goes on" in caplog.text) == (room == 5)
    assert find(folder) is not None


@pytest.mark.faults("C14", "full disk: no cut file under a real name")
def test_full_disk_is_noticed_before_writing_and_while_writing(tmp_path, monkeypatch):
    class Full:
        free = 100

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: Full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.write(content(1), tmp_path / "step=1.ckpt")
    real = checkpoint._Hashed.write

    def write(self, data):
        self.count = getattr(self, "count", 0) + len(data)
        if self.count > 2000:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return real(self, data)

    monkeypatch.setattr(checkpoint._Hashed, "write", write)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(content(1), tmp_path / "step=1.ckpt")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.faults("C14", "folder that cannot be written: named")
def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match=r"cannot write .*step=1.ckpt"):
        CheckpointFiles().save_checkpoint(content(1), tmp_path / "checkpoints" / "step=1.ckpt")


@pytest.mark.faults("C18", "half a row of numbers: dropped and written again")
def test_half_written_rows_and_later_steps_are_dropped(tmp_path):
    first = CSVLogger(tmp_path)
    for step in range(1, 6):
        first.log_metrics({"train/loss": step / 3} | ({"eval/x": 1.5} if step == 4 else {}), step)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("6,1.")
    again = CSVLogger(tmp_path)
    again.rewind(3)
    again.log_metrics({"train/loss": 4 / 3, "eval/x": 1.5}, 4)
    again.log_metrics({"train/loss": 5 / 3}, 5)
    whole = CSVLogger(tmp_path / "whole")
    for step in range(1, 6):
        whole.log_metrics({"train/loss": step / 3} | ({"eval/x": 1.5} if step == 4 else {}), step)
    assert rows(tmp_path) == rows(tmp_path / "whole")


@pytest.mark.faults("C18", "a logger that fails: left out")
def test_failing_logger_is_left_out(caplog):
    class Bad(CSVLogger):
        def log_metrics(self, metrics, step=None):
            raise ConnectionError("gone")

    def broken():
        raise RuntimeError("no account")

    loggers = Loggers({"bad": lambda: Bad("nowhere"), "broken": broken})
    loggers.open()
    for step in range(3):
        loggers.scalars({"x": 1.0}, step)
    assert caplog.text.count("left out") == 2 and "gone" in caplog.text and "no account" in caplog.text


def test_signals_wait_for_the_end_of_a_step():
    with Signals() as signals:
        signals.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received is signal.SIGTERM
        signals.deferred = False
        with pytest.raises(Interrupted) as left:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1)
        assert left.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_is_a_signal_unless_nohup_said_otherwise(nohup):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with Signals() as signals:
            signals.deferred = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is (None if nohup else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)


def test_whoever_stops_the_training_has_it_saved(tmp_path, monkeypatch):
    saved = []
    callback = Checkpoints(tmp_path)
    monkeypatch.setattr(callback, "save", lambda trainer: saved.append(trainer.global_step))
    trainer = SimpleNamespace(global_step=1, max_steps=9, accumulate_grad_batches=1, should_stop=False)
    method = SimpleNamespace(device=torch.device("cpu"))
    callback.on_train_start(trainer, method)
    callback.on_train_batch_end(trainer, method, None, None, 0)
    assert saved == []
    trainer.global_step, trainer.should_stop = 2, True
    callback.on_train_batch_end(trainer, method, None, None, 1)
    assert saved == [2] and trainer.should_stop


@pytest.mark.faults("C16", "two runs of one folder at a time: the second is refused")
def test_one_process_per_folder(tmp_path):
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(1) as pool:
        with holding(tmp_path):
            assert "another process" in pool.apply(_try_to_hold, (tmp_path,))
        assert pool.apply(_try_to_hold, (tmp_path,)) == ""


def _try_to_hold(path):
    try:
        with holding(path):
            return ""
    except UserError as error:
        return str(error)


LONG = [*TINY, "duration=4000steps", "save_steps=0", "trainer.log_every_n_steps=100"]


def wait_for(path, seconds=60):
    for _ in range(seconds * 20):
        if path.exists() and path.stat().st_size:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


OTHERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
OTHERS = [pytest.param(number, 75, marks=pytest.mark.slow) for number in OTHERS]


@pytest.mark.faults("C6", "SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGHUP: saved at the end of the step, code 75 or 130")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), *OTHERS])
def test_signal_saves_and_leaves(tmp_path, number, code):
    out = tmp_path / "run"
    process = start([*LONG, f"out={out}", "data.num_workers=2"], log=tmp_path / "log")
    wait_for(out / "metrics.csv")
    os.killpg(process.pid, number)  # as a cluster does, and a terminal: the workers get it too
    process.join(60)
    assert process.exitcode == code, (tmp_path / "log").read_text()
    step = checkpoint.facts(find(out))["step"]
    assert 0 < step < 4000
    text = (tmp_path / "log").read_text()
    assert f"step={step}.ckpt" in text and "the same command goes on" in text and "Traceback" not in text


def test_a_signal_in_the_last_step_leaves_the_judging_to_the_next_start(tmp_path, monkeypatch, capsys):
    original = Method.optimizer_step

    def step(self, *args, **kwargs):
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    out = tmp_path / "run"
    words = [*TINY, "duration=3steps", "eval=[collapse]", f"out={out}"]
    monkeypatch.setattr(Method, "optimizer_step", step)
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 75 and "step=3.ckpt" in capsys.readouterr().out
    assert not (out / "metrics.json").exists()
    assert main(words) == 0 and (out / "metrics.json").exists()


def test_crash_in_the_data_saves_first(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "from ssl_lab.data.shapes import Shapes\n"
        "class Broken(Shapes):\n"
        "    count = 0\n"
        "    def read(self, rows):\n"
        "        Broken.count += 1\n"
        "        if Broken.count == 9: raise RuntimeError('disk on fire')\n"
        "        return super().read(rows)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out, whole = tmp_path / "run", tmp_path / "whole"
    quiet = [*TINY, "save_steps=0"]
    assert run([*quiet, "data.train._target_=broken.Broken", f"out={out}"], log=tmp_path / "log") == 1
    assert "disk on fire" in (tmp_path / "log").read_text()
    assert checkpoint.facts(find(out))["step"] == 7  # one batch is read ahead
    config = (out / "config.yaml").read_text().replace("broken.Broken", "ssl_lab.data.shapes.Shapes")
    (out / "config.yaml").write_text(config)
    assert run([*quiet, f"out={out}"]) == 0 and run([*quiet, f"out={whole}"]) == 0
    same_end(whole, out)
