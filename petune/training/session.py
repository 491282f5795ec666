"""A session of a run: the model and its rows are made ready, trained on, scored and measured."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.errors import DivergedError, PetuneWarning
from petune.files import write_text
from petune.training import fingerprint, plugin_files, run_folder
from petune.training.processes import Processes
from petune.training.recipe import Recipe
from petune.training.result import Result, write_json
from petune.training.setup import make_model, make_splits, make_task, sample

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from petune.training.adapting import Adapt
    from petune.training.recorder import Recorder
    from petune.training.tasks import Task
    from petune.training.trainer import AdapterTrainer

EPOCHS = 3
"""Passes over the training data, unless the recipe says how long to train."""
PUT_BACK = "put it back, or --overwrite"
"""What can be done about rows that have changed."""


class Session:
    """One process's share of a run."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        resume: bool,
        adapt: Adapt | None,
        quiet: bool,
        processes: Processes,
    ) -> None:
        import datasets
        import transformers

        from petune.training.adapting import adapted
        from petune.training.checkpoints import last_checkpoint
        from petune.training.fit import check_room

        began = time.perf_counter()
        self.recipe, self.path, self.processes = recipe, run, processes
        self.quiet = quiet or not processes.writes
        self.checkpoint = (
            last_checkpoint(run / run_folder.CHECKPOINTS) if resume else None
        )
        with processes.first_alone():  # it may fetch data and a tokenizer
            self.splits = make_splits(recipe)
            self._check_steps(resume)
            self.task = self._fitted_task()
        transformers.set_seed(recipe.training.seed)
        self.model = make_model(recipe, self.task)
        encoded = self.task.encoded(self.splits["train"], "training")
        self.examples = datasets.Dataset.from_list(encoded)
        self.tuning = adapted(self.model, recipe, self.checkpoint, adapt)
        virtual = sum(
            len(link.adapter()) for link in getattr(self.tuning, "prompts", ())
        )
        check_room(recipe, self.task, self.model, virtual)
        self.acting: nn.Module = getattr(self.tuning, "model", self.model)
        self.load_seconds = time.perf_counter() - began

    def _check_steps(self, resume: bool) -> None:
        """Settle how long to train, and see that it can be: by the rows as they were, and at rates that are numbers."""
        from petune.training.rates import check_rates
        from petune.training.resuming import check_goes_on

        if self.checkpoint:
            fingerprint.check_unchanged(self.path, self.splits, PUT_BACK)
        self.steps, self.updates = self._count()
        if resume:
            check_goes_on(self.path, self.checkpoint, self.steps)
        check_rates(self.recipe.training, self.steps)

    def _fitted_task(self) -> Task:
        """The task, which has seen what it trains on and that it can score the rest."""
        task = make_task(self.recipe)
        task.quiet = self.quiet
        task.fit(self.splits["train"])
        for split in ("validation", "test"):
            task.check(self.splits[split], split)
        return task

    def _count(self) -> tuple[int, int]:
        """How many steps the training has, and how many an epoch."""
        t = self.recipe.training
        batches = math.ceil(len(self.splits["train"]) / t.batch_size)
        updates = math.ceil(batches / t.gradient_accumulation)
        return t.steps or math.ceil((t.epochs or EPOCHS) * updates), updates

    def run(self, final_eval: bool, last_checkpoint: bool) -> Result:
        """Train, score, measure, and write the run's folder."""
        caching = getattr(self.model.config, "use_cache", True)
        loop = self._loop()
        loop.recorder.keeps_last = last_checkpoint
        if self.processes.writes:
            self._write_notes()
        steps, tokens = self._train(loop)
        if self.processes.writes:
            result = self._result(loop, steps, tokens, final_eval)
            result.write(self.path)
        # Trainer turns it off, and who brought `adapt` has the model still
        self.model.config.use_cache = caching
        self.processes.wait()
        return result if self.processes.writes else Result.read(self.path)

    def _result(
        self, loop: AdapterTrainer, steps: int, tokens: int, final_eval: bool
    ) -> Result:
        """Save the adapter, score it, and measure a step."""
        from petune.training.disk import saving

        with saving(self.path):
            self.tuning.save(self.path / run_folder.ADAPTER)
        began = time.perf_counter()
        metrics = self._score() if final_eval else {}
        eval_seconds = time.perf_counter() - began
        self._say_trouble(loop.recorder, metrics.get("loss"))
        peak, saved = self._measure(loop)
        recorder = loop.recorder
        return Result(
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
            cut_rows=self.task.cuts.by_use,
        )

    def _write_notes(self) -> None:
        """What a later session or a use of the run needs to know."""
        run_folder.write_recipe(self.path, self.recipe)
        write_json(self.path / run_folder.TASK, self.task.state())
        write_json(self.path / fingerprint.FILE, fingerprint.fingerprint(self.splits))
        if files := plugin_files.needed(self.recipe):
            write_json(self.path / plugin_files.FILE, files)

    def _score(self) -> dict[str, float]:
        """The metrics of the test split.

        Raises:
            DivergedError: the loss on it is no number; the adapter is gone then.
        """
        metrics = self.task.score(self.acting, self._scored("test"))
        loss = metrics.get("loss", 0.0)
        if not math.isfinite(loss):
            shutil.rmtree(self.path / run_folder.ADAPTER)
            raise self._diverged(f"the loss on the test split is {loss}")
        return metrics

    def _diverged(self, how: str) -> DivergedError:
        from petune.training.checkpoints import last_checkpoint

        found = last_checkpoint(self.path / run_folder.CHECKPOINTS)
        kept = (
            f"{found[0]} is the last finite checkpoint"
            if found
            else "there was no checkpoint before"
        )
        rate = self.recipe.training.learning_rate
        return DivergedError(
            f"{self.path}: the training diverged: {how}; {kept}. Lower training.learning_rate ({rate:g})."
        )

    def _say_trouble(self, recorder: Recorder, test_loss: float | None) -> None:
        """One line where the training has spoilt the model, though its weights are finite."""
        from petune.training.health import trouble

        losses = recorder.first_loss, recorder.loss, test_loss
        found = trouble(self.acting, self.task, self.examples, losses)
        if found:
            rate = self.recipe.training.learning_rate
            warnings.warn(
                f"{self.path}: after the training {found}. Lower training.learning_rate ({rate:g}).",
                PetuneWarning,
                stacklevel=2,
            )

    def _loop(self) -> AdapterTrainer:
        from petune.training.order import EpochSampler
        from petune.training.recorder import Recorder
        from petune.training.trainer import AdapterTrainer, arguments

        t = self.recipe.training
        lengths = [len(ids) for ids in self.examples["input_ids"]]
        sampler = EpochSampler(lengths, t.batch_size, t.seed, t.group_by_length)
        checkpoints = self.path / run_folder.CHECKPOINTS
        return AdapterTrainer(
            self.acting,
            self.tuning,
            self.task,
            Recorder(
                self.path / run_folder.METRICS, sampler, self.updates, self.processes
            ),
            self.processes,
            args=arguments(
                self.recipe,
                checkpoints,
                self.steps,
                quiet=self.quiet,
                several=self.processes.count > 1,
            ),
            train_dataset=self.examples,
            eval_dataset=self._scored("validation") if t.eval_every else None,
        )

    def _train(self, loop: AdapterTrainer) -> tuple[int, int]:
        """(steps, tokens) of the run so far."""
        from petune.training.checkpoints import tokens_seen
        from petune.training.disk import saving
        from petune.training.resuming import Rejoined, blamed, prepare
        from petune.training.signals import Interrupted, stop_on_signal

        begin_at = None
        if self.checkpoint:
            folder, done = self.checkpoint
            loop.recorder.resume(folder, done)
            if done == self.steps:  # only what comes after training is missing
                return done, tokens_seen(folder)
            prepare(
                self.path,
                self.recipe.training,
                self.tuning,
                self.checkpoint,
                self.steps,
            )
            loop.add_callback(Rejoined())
            begin_at = str(folder)
        elif self.processes.writes:
            write_text(self.path / run_folder.METRICS, "")
        with (
            stop_on_signal(loop.recorder),
            loop.lean(),
            saving(self.path),
            blamed(self.checkpoint, loop.recorder),
        ):
            loop.train(resume_from_checkpoint=begin_at)
        done = loop.state.global_step
        if how := loop.recorder.went_astray:
            loop.recorder.check_began()
            raise self._diverged(f"by step {done} {how}")
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
        from accelerate.utils import send_to_device

        from petune.training.memory import measure_step

        training, lengths = self.recipe.training, loop.recorder.sampler.lengths
        longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[
            : training.batch_size
        ]
        rows = self.task.collate([self.examples[i] for i in longest])
        batch = send_to_device(rows, loop.args.device)
        model = self.acting.train()
        optimizer: Any = loop.optimizer or loop.create_optimizer()
        # accelerate's optimizer holds torch's
        plain_optimizer = getattr(optimizer, "optimizer", optimizer)

        def loss() -> Tensor:
            with loop.accelerator.autocast():
                found: Tensor = loop.compute_loss(model, dict(batch))
            return found

        with loop.lean():
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
