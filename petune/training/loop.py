"""Training: from a recipe to a run's folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.errors import PetuneError
from petune.files import write_text
from petune.training import run_folder
from petune.training.recipe import Recipe, load_recipe
from petune.training.result import Result, write_json
from petune.training.setup import make_model, make_splits, make_task, quietly, sample

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from petune.training.trainer import Adapted, AdapterTrainer

Adapt = Callable[["nn.Module", Recipe], "Adapted"]
EPOCHS = 3
"""Passes over the training data, unless the recipe says how long to train."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped from outside, at the end of a step; a checkpoint holds what was reached."""


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    adapt: Adapt | None = None,
    quiet: bool = False,
    final_eval: bool = True,
) -> Result:
    """Train what the recipe says and leave a run in its `output` folder.

    Args:
        recipe: a recipe, its values, or a YAML file.
        resume: go on from the run's last checkpoint; the result is that of a run that was never stopped.
        overwrite: throw away a run that is there already.
        adapt: makes the model trainable in place of `petune.attach`: `adapt(model, recipe)` returns an object with
            `parameters()` and `save(folder)`; if it has `model`, that is what is called, and with `load(folder)` it
            can resume.
        quiet: no progress bar.
        final_eval: score the test split at the end.

    Raises:
        PetuneError: a mistake in the recipe or its data, or a run that is in the way.
        MovedError: an installed library has changed something that the training leans on.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    from petune.training.host import SEAMS
    from petune.training.host_model import check_every

    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    recipe.check(method=adapt is None)
    SEAMS.require()
    check_every(int(recipe.training.gradient_checkpointing))
    run = Path(recipe.output)
    run_folder.make_room(run, recipe, resume=resume, overwrite=overwrite)
    if resume and (run / run_folder.RESULT).exists():
        return Result.read(run)
    with quietly():
        return _Session(recipe, run, resume, adapt, quiet).run(final_eval)


class _Session:
    """One process's share of a run."""

    def __init__(
        self, recipe: Recipe, run: Path, resume: bool, adapt: Adapt | None, quiet: bool
    ) -> None:
        import datasets
        import transformers

        from petune.training.checkpoints import last_checkpoint

        began = time.perf_counter()
        self.recipe, self.path, self.quiet = recipe, run, quiet
        self.checkpoint = (
            last_checkpoint(run / run_folder.CHECKPOINTS) if resume else None
        )
        self.splits = make_splits(recipe)
        self.task = make_task(recipe)
        self.task.quiet = quiet
        self.task.fit(self.splits["train"])
        transformers.set_seed(recipe.training.seed)
        self.model = make_model(recipe, self.task)
        encoded = self.task.encoded(self.splits["train"], "training")
        self.examples = datasets.Dataset.from_list(encoded)
        self.tuning = self._brought(adapt) if adapt is not None else self._attached()
        self.acting: nn.Module = getattr(self.tuning, "model", self.model)
        self.load_seconds = time.perf_counter() - began

    def run(self, final_eval: bool) -> Result:
        """Train, score, measure, and write the run's folder."""
        caching = getattr(self.model.config, "use_cache", True)
        loop = self._loop()
        run_folder.write_recipe(self.path, self.recipe)
        write_json(self.path / run_folder.TASK, self.task.state())
        steps, tokens = self._train(loop)
        self.tuning.save(self.path / run_folder.ADAPTER)
        began = time.perf_counter()
        metrics = (
            self.task.score(self.acting, self._scored("test")) if final_eval else {}
        )
        eval_seconds = time.perf_counter() - began
        peak, saved = self._measure(loop)
        # Trainer turns it off, and who brought `adapt` has the model still
        self.model.config.use_cache = caching
        recorder = loop.recorder
        result = Result(
            score=metrics.get(self.task.metric),
            metric=self.task.metric,
            metrics=metrics,
            train_loss=recorder.loss,
            steps=steps,
            tokens=tokens,
            train_seconds=recorder.seconds,
            step_seconds=recorder.step_seconds,
            tokens_per_second=recorder.tokens_per_second,
            peak_memory_bytes=peak,
            saved_activation_bytes=saved,
            trainable_params=sum(p.numel() for p in self.tuning.parameters()),
            adapter_bytes=_size(self.path / run_folder.ADAPTER),
            load_seconds=self.load_seconds,
            eval_seconds=eval_seconds,
            device=_device_name(self.acting),
        )
        result.write(self.path)
        return result

    def _attached(self) -> Adapted:
        """The recipe's tuning on the model, as the checkpoint has it if there is one."""
        import torch

        from petune.core.attached.attach import attach
        from petune.core.attached.load import load
        from petune.training.checkpoints import resume_schedule

        r = self.recipe
        if self.checkpoint:
            folder, _ = self.checkpoint
            tuning = load(self.model, folder / run_folder.ADAPTER)
            resume_schedule(tuning, folder)
            return tuning
        try:
            return attach(self.model, r.method, where=r.where, **r.method_args)
        except (PetuneError, torch.OutOfMemoryError):
            raise
        except (
            ArithmeticError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            # a value of the right type that the method can't work with, such as a rank of 0
            raise PetuneError(
                f"method {r.method!r} with method_args {r.method_args}: {error}"
            ) from error

    def _brought(self, adapt: Adapt) -> Adapted:
        """What the caller makes trainable, as the checkpoint has it if there is one."""
        brought: Any = adapt(self.model, self.recipe)
        if self.checkpoint:
            if not hasattr(brought, "load"):
                raise PetuneError(
                    f"{self.path}: what `adapt` made can't load a checkpoint; start anew with overwrite."
                )
            folder, _ = self.checkpoint
            brought.load(folder / run_folder.ADAPTER)
        adapted: Adapted = brought
        return adapted

    def _loop(self) -> AdapterTrainer:
        from petune.training.order import EpochSampler
        from petune.training.recorder import Recorder
        from petune.training.trainer import AdapterTrainer, arguments

        t = self.recipe.training
        batches = math.ceil(len(self.examples) / t.batch_size)
        updates = math.ceil(batches / t.gradient_accumulation)
        self.steps = t.steps or math.ceil((t.epochs or EPOCHS) * updates)
        lengths = [len(ids) for ids in self.examples["input_ids"]]
        sampler = EpochSampler(lengths, t.batch_size, t.seed, t.group_by_length)
        checkpoints = self.path / run_folder.CHECKPOINTS
        return AdapterTrainer(
            self.acting,
            self.tuning,
            self.task,
            Recorder(self.path / run_folder.METRICS, sampler, updates),
            args=arguments(self.recipe, checkpoints, self.steps, quiet=self.quiet),
            train_dataset=self.examples,
            eval_dataset=self._scored("validation") if t.eval_every else None,
        )

    def _train(self, loop: AdapterTrainer) -> tuple[int, int]:
        """(steps, tokens) of the run so far."""
        from petune.training.checkpoints import tokens_seen
        from petune.training.signals import stop_on_signal

        begin_at = None
        if self.checkpoint:
            folder, done = self.checkpoint
            loop.recorder.resume(folder, done)
            if done >= self.steps:  # only what comes after training is missing
                return done, tokens_seen(folder)
            begin_at = str(folder)
        else:
            write_text(self.path / run_folder.METRICS, "")
        with stop_on_signal(loop.recorder), loop.lean():
            loop.train(resume_from_checkpoint=begin_at)
        done = loop.state.global_step
        if done < self.steps:
            raise Interrupted(
                f"{self.path}: stopped at step {done} of {self.steps}; --resume goes on."
            )
        return done, int(loop.state.num_input_tokens_seen)

    def _scored(self, split: str) -> Dataset:
        """The rows of a split that are scored."""
        most = self.recipe.training.eval_rows or self.task.eval_rows
        return sample(self.splits[split], most, f"{split} split")

    def _measure(self, loop: AdapterTrainer) -> tuple[int, int]:
        """(peak_memory_bytes, saved_activation_bytes) of a step on the longest rows."""
        from petune.training.memory import measure_step

        training, lengths = self.recipe.training, loop.recorder.sampler.lengths
        longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[
            : training.batch_size
        ]
        rows = self.task.collate([self.examples[i] for i in longest])
        model = self.acting.train()
        optimizer: Any = loop.optimizer or loop.create_optimizer()
        # accelerate's optimizer holds torch's
        plain_optimizer = getattr(optimizer, "optimizer", optimizer)

        def loss() -> Tensor:
            with loop.accelerator.autocast():
                found: Tensor = loop.compute_loss(model, batch)
            return found

        with loop.lean(), loop.laid_out(rows) as batch:
            if training.compile:
                loss().backward()  # type: ignore[no-untyped-call]  # compiles for these shapes
            return measure_step(model, plain_optimizer, loss, batch.values())


def _size(folder: Path) -> int:
    """The bytes of all files in a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)


def _device_name(model: nn.Module) -> str:
    import platform

    import torch

    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} cpu"
