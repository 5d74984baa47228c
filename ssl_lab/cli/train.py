"""`ssl-lab train`: from a configuration to weights, numbers and pictures in one run folder. Repeat it to go on."""

import contextlib
import copy
import functools
import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ssl_lab.analysis.pictures import feature_maps
from ssl_lab.backbones.vit import ViT
from ssl_lab.bench.efficiency import Efficiency
from ssl_lab.cli.compose import build, steps_of
from ssl_lab.cli.gallery_sound import drawn_alignments
from ssl_lab.cli.ranks import join
from ssl_lab.cli.report import heading, summary
from ssl_lab.cli.resume import holding, require_fit, require_left, save_config, standing
from ssl_lab.cli.saved import run_folder
from ssl_lab.cli.screen import screen, unbroken
from ssl_lab.cli.starting import beginning, build_method, decided_by_data, require_same_words, require_tokenizer
from ssl_lab.cli.trainer import Handlers, make_trainer, quiet, require_width
from ssl_lab.cli.tuned import tune, whole
from ssl_lab.data.views import STATS
from ssl_lab.errors import UserError
from ssl_lab.evals.base import Evaluator, moved
from ssl_lab.evals.pixels import Pixels
from ssl_lab.evals.results import Row, own, read, write
from ssl_lab.evals.runner import logged, run_all
from ssl_lab.files import sweep
from ssl_lab.methods.base import Method
from ssl_lab.nn.float8 import Float8, ordinary_
from ssl_lab.nn.lora import fuse_
from ssl_lab.pictures import side_by_side, unnormalize
from ssl_lab.train import checkpoint
from ssl_lab.train.alarm import CollapseAlarm
from ssl_lab.train.callbacks import EMA, Checkpoints, Pictures, RunEvals, as_they_are
from ssl_lab.train.guard import Guard
from ssl_lab.train.loggers import Loggers
from ssl_lab.train.metrics import Log
from ssl_lab.train.parallel import Parallel
from ssl_lab.train.progress import StepBar
from ssl_lab.train.signals import Interrupted, Signals
from ssl_lab.types import Embeds
from ssl_lab.weights import io

_SHOWN = 8  # images in a picture


def run(cfg: DictConfig) -> None:
    """Train, evaluate, draw and export; a run that was cut short goes on, a finished one shows its results again.

    Raises:
        UserError: a mistake in the configuration, the data, or the run folder.
        SystemExit: 75 after SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP, 130 after SIGINT; the state is saved first.
    """
    first = join(cfg.trainer)
    with quiet(), unbroken(), Signals() as signals, holding(Path(cfg.out)) if first else contextlib.nullcontext():
        training = Training(cfg, signals, first=first)
        try:
            training.fit()
            training.finish()
        except Interrupted as left:
            found = checkpoint.find(cfg.out)
            told = "nothing to save yet" if found is None else f"saved {found}"
            training.say(f"{left.received.name}: {told}; the same command goes on from there")
            raise


class Training:
    """One run: its parts, built from the configuration, and what is done with them in turn."""

    def __init__(self, cfg: DictConfig, signals: Signals, *, first: bool) -> None:
        self.cfg, self.signals, self.out, self.first = cfg, signals, Path(cfg.out), first
        self.data = build(cfg.data)
        self.data.setup("fit")
        decided_by_data(cfg.method, self.data)
        require_tokenizer(cfg.method, self.data)
        self.console = screen(quiet=not first)
        self.method: Method = build_method(cfg.method, cfg.seed, self.say)
        self.config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        self.base = tune(self.method, self.config)
        self.method.optim, self.method.seed = build(cfg.optim), cfg.seed
        self.method.parallel = Parallel(
            checkpoint_blocks=cfg.checkpoint_blocks,
            compile=cfg.compile,
            fp32_residual=cfg.fp32_residual,
            float8=Float8(cfg.float8) if cfg.get("float8") else None,
        )
        self.method.parallel.require(self.method)
        self.evaluators: dict[str, Evaluator] = {name: build(node) for name, node in cfg.eval.items()}
        make = {name: functools.partial(build, node) for name, node in cfg.logger.items()}
        self.loggers = Loggers(make if first else {})
        self.ema = None if cfg.ema is None else EMA(cfg.ema)
        require_width(cfg.trainer.precision, self.method, cfg.ema)
        self.trainer = self._trainer()
        precision = self.trainer.precision_plugin.forward_context
        self._rows = functools.partial(run_all, data=self.data, precision=precision, say=self.say)
        if (float8 := self.method.parallel.float8) is not None:
            float8.require(self.method, self.trainer.strategy.root_device, self.trainer.precision)
        world_size = self.trainer.world_size
        self.method.samples_per_step = cfg.data.batch_size * self.trainer.accumulate_grad_batches * world_size
        self.steps = steps_of(cfg.duration, self.method.samples_per_step, self.data.num_train)
        self.trainer.fit_loop.epoch_loop.max_steps = self.steps
        self.standing = standing(self.out, self.config, self.method.samples_per_step, cfg.ckpt, world_size=world_size)
        if self.standing.path is not None:
            require_left(self.standing, cfg.ckpt, self.steps, cfg.method)
            require_same_words(run_folder(self.standing.path) or self.out, self.data)
            require_fit(self.standing.path, self.method, self.base)

    def fit(self) -> None:
        """Train from where the run stands to its end, or until a signal."""
        self.say(*heading(self.cfg, self.method, self.data, self.trainer, self.steps, self.standing))
        if self.standing.path is not None and self.standing.step >= self.steps:
            content = checkpoint.read(self.standing.path)
            self.method.configure_model()
            self.method.load_state_dict(whole(content, self.base, self.standing.path))
            self.trainer.precision_plugin.convert_module(self.method)
            return
        self.loggers.open()
        self.loggers.config(self.config)
        self.loggers.rewind(self.standing.step if self.standing.step else -1)
        if self.first:
            save_config(self.out, self.config)
            if self.data.tokenizer is not None:
                self.data.tokenizer.save(self.out)
            sweep(self.out)
            sweep(self.out / "checkpoints")
        if self.cfg.baselines and self.standing.step == 0 and self.first:
            if hasattr(self.data.eval_views, "stats"):  # there are images
                self._judge({n: e for n, e in self.evaluators.items() if e.needs is Embeds}, 0, "raw pixels", Pixels())
            self._judge(self.evaluators, 0, beginning(self.cfg.method), self.method)
        self.signals.deferred = True
        try:
            self.trainer.fit(self.method, datamodule=self.data, ckpt_path=self.standing.path, weights_only=True)
        except SIGTERMException:
            pass  # Lightning's own handler was quicker; the state is saved
        except BaseException as error:
            if isinstance(error, Exception) and self.signals.received is not None:
                self.say(f"{type(error).__name__} after {self.signals.received.name}: a process that helps ended first")
                self._leave()
            self.loggers.close("failed")
            if not isinstance(error, UserError):
                newest = checkpoint.find(self.out) or "not written yet"
                self.say(f"stopped; the newest checkpoint is {newest}, the same command goes on there")
            raise
        finally:
            self.signals.deferred = False
        several = self.trainer.world_size > 1  # ranks leave together, as the end of the last step agreed
        stopped = self.trainer.should_stop if several else self.signals.received is not None
        if stopped or self.trainer.global_step < self.steps:
            self._leave()

    def finish(self) -> None:
        """Judge, draw and export the trained weights, and show it all."""
        ordinary_(self.method)
        rows = own(read(self.out / "metrics.json"))
        known = {(r.evaluator, json.dumps(r.protocol)) for r in rows if r.step == self.steps}
        missing = {k: e for k, e in self.evaluators.items() if (k, json.dumps(e.protocol)) not in known}
        self._judge(missing, self.steps, "trained", self.method)
        self.pictures.show(self.method, self.steps)
        parts = (getattr(self.method, name, None) for name in ("encoder", "decoder", "model"))
        network = next((part for part in parts if isinstance(part, nn.Module)), None)
        if self.first and network is not None:
            network = network if self.base is None else fuse_(copy.deepcopy(network))
            io.save(network, self.out / "last.safetensors")
        self.loggers.close()
        self.say(*summary(self.out, read(self.out / "metrics.json"), self.steps))

    def _trainer(self) -> L.Trainer:
        cfg, weights = self.cfg, as_they_are if self.ema is None else self.ema.applied
        guard = Guard(lambda: checkpoint.find(self.out), skip=cfg.skip_nonfinite, say=self.say)
        alarm, every = CollapseAlarm(self.say), {name: evaluator.every for name, evaluator in self.evaluators.items()}
        self.pictures = Pictures(
            self.out / "pictures", self._draw, self.loggers, every=cfg.picture_steps, weights=weights
        )
        saving = Checkpoints(
            self.out / "checkpoints",
            every_steps=cfg.save_steps,
            every_minutes=cfg.save_minutes,
            stop=lambda: self.signals.received is not None,
            before=self.loggers.save,
            extra={"config": self.config},
        )
        efficiency = Efficiency()
        callbacks: list[L.Callback] = [] if self.ema is None else [self.ema]
        callbacks += [
            Handlers(self.signals),
            guard,
            alarm,
            efficiency,  # before the log's clock starts
            Log(self.loggers, lambda: guard.grad_norm, lambda: alarm.values, efficiency.rates),
            RunEvals(every, self._evaluate, self.loggers, weights),
            self.pictures,
            saving,
        ]
        if cfg.trainer.enable_progress_bar:
            callbacks.append(StepBar(self.console))
        return make_trainer(cfg.trainer, self.out, callbacks, cfg.keep_checkpoints, self.base, cfg.save_background)

    def _evaluate(self, names: Sequence[str], step: int) -> dict[str, float]:
        """In training, where logging is the callback's business."""
        chosen = {name: self.evaluators[name] for name in names}
        return logged(self._rows(chosen, self.method, step=step, keep=self._record))

    def _judge(self, evaluators: Mapping[str, Evaluator], step: int, subject: str, method: nn.Module) -> None:
        """Before and after training, each result kept at once."""
        method.to(self.trainer.strategy.root_device)
        if not evaluators:
            return
        if subject == "trained":
            self.loggers.open()

        def keep(rows: list[Row]) -> None:
            if subject == "trained":
                self.loggers.scalars(logged(rows), step)
            self._record(rows)  # last, since what is recorded is not done again

        self._rows(evaluators, method, step=step, subject=subject, keep=keep)

    def _record(self, rows: list[Row]) -> None:
        if self.first:
            write(self.out / "metrics.json", rows)

    def _draw(self) -> dict[str, Tensor]:
        """What the method makes of some test images, and its patch features as colours."""
        precision = self.trainer.precision_plugin
        batch = precision.convert_input(moved(next(iter(self.data.eval_loader("test", _SHOWN))), self.method.device))
        drawn: dict[str, Tensor] = {}
        if "audio" in batch and "image" not in batch:
            found = drawn_alignments(self.method, self.data, precision.forward_context)
            return drawn if found is None else {"alignment": found}
        if "image" not in batch:
            return drawn
        stats = STATS[self.data.eval_views.stats]
        with precision.forward_context():
            if (pictures := getattr(self.method, "pictures", None)) is not None:
                columns = pictures(batch)
                drawn["reconstruction"] = side_by_side({k: unnormalize(v, *stats) for k, v in columns.items()})
            if isinstance(encoder := getattr(self.method, "encoder", None), ViT):
                colours = feature_maps(encoder, batch["image"])
                drawn["features"] = side_by_side({"input": unnormalize(batch["image"], *stats), "features": colours})
        return drawn

    def say(self, *parts: str | Text | Table) -> None:
        """Show on the first rank; lines are not broken, so that paths can be copied."""
        for part in parts:
            self.console.print(part, soft_wrap=not isinstance(part, Table))

    def _leave(self) -> None:
        """End with the code of the signal, which may have come to another rank; a launcher wants 0 of those."""
        self.loggers.close()
        raise Interrupted(self.signals.received or signal.SIGTERM) if self.first else SystemExit(0)
