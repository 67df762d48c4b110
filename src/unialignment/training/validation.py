"""What a run shows of itself on held-out data: losses, prompt-following, samples, and the averaged weights as a model.

Knows nothing of steps.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from unialignment.alignment.pairs import Exchange
from unialignment.storage import atomic_folder
from unialignment.training import lora
from unialignment.training.batching import collate
from unialignment.training.logging import RunLog, grid
from unialignment.training.parallel import is_sharded
from unialignment.training.run import Run
from unialignment.training.runtime import autocast
from unialignment.training.samples import move
from unialignment.training.sampling import draw, to_pictures, write


class ValidatedRun(Run):
    """A run that can be looked at."""

    @torch.no_grad()
    def validate(self, log: RunLog | None = None) -> dict[str, float]:
        """Losses, prompt-following and samples on held-out data, with the averaged weights.

        Leaves no trace in the run's random states. Also writes the averaged weights to ``model/``. All processes call
        this; with copies of the model the first does the work, with shards all go through it together.

        Returns:
            ``task/<task>`` losses and ``gap/<task>/<t>/{right,empty,gap}``, in the first process.
        """
        self.objective.eval()
        scores: dict[str, float] = {}
        exported = bool(self.parallel.agree(float(log is not None))[0])
        # Shapes here differ from training's: compiling them would cost minutes for a few passes.
        # Weights that are in bfloat16, or are gathered in it, beside float32 inputs need autocast here too.
        low = (self.config.lora.rank and self.config.lora.base_precision == "bf16") or (
            self.parallel.sharded and self.config.run.precision == "bf16"
        )
        precision = autocast(self.device, "bf16" if low else "fp32")
        exchange, self.objective.exchange = self.objective.exchange, Exchange()  # everything is here
        try:
            with self.ema.applied(), torch.compiler.set_stance("force_eager"), precision:
                if self.parallel.is_main or self.parallel.sharded:
                    scores = self.objective.within(lambda: self._gathered_scores(log, exported))
                if exported:
                    self.export()
        finally:
            self.objective.exchange = exchange
        self.parallel.on_main(lambda: None)
        self.objective.train()
        self.objective.autoencoder.eval()
        self.validations.append({"step": self.progress.step, **{k: float(f"{v:.6g}") for k, v in scores.items()}})
        if log is not None:
            log.scalars(self.progress.step, scores, "validation/")
        return scores

    def _gathered_scores(self, log: RunLog | None, draw_samples: bool) -> dict[str, float]:
        with self.parallel.gathered(self.objective):
            return self._scores(log, draw_samples)

    def _scores(self, log: RunLog | None, draw_samples: bool) -> dict[str, float]:
        scores: dict[str, float] = {}
        for task, samples in self.held_out.items():
            batches = [move(batch, self.device) for batch in collate(samples, self.tokenizer)]
            output = self.objective.forward(batches, torch.Generator().manual_seed(0))
            scores |= {name: float(value) for name, value in output.logs.items() if name.startswith("task/")}
            scores |= self.objective.prompt_gap(batches)
            if draw_samples and self.config.logging.samples:
                self._sample(task, log)
        return scores

    def _sample(self, task: str, log: RunLog | None) -> None:
        """A picture grid (sources, truth, sample) or a list of texts, for a few held-out samples of a task."""
        options = self.config.logging
        samples = self.held_out[task][: options.samples_per_task]
        rows: list[list[Any]] = []
        lines: list[str] = []
        for batch in collate(samples, self.tokenizer):
            batch = move(batch, self.device)
            texts = self.tokenizer.decode(torch.where(batch.prompt_mask, batch.prompt_ids, self.tokenizer.pad_token_id))
            if batch.target == "image":
                # Maps follow from their source alone; guidance is for prompts that leave room.
                scale = options.guidance_scale if not batch.sources else 1.0
                drawn = draw(self.objective, batch, options.sampling_steps, scale)
                assert batch.target_images is not None
                shown = [*(to_pictures(s) for s in batch.sources), to_pictures(batch.target_images), drawn]
                rows += [[pictures[i] for pictures in shown] for i in range(len(batch))]
                lines += [f"{i}. {text}" for i, text in enumerate(texts, len(lines) + 1)]
            else:
                assert batch.target_ids is not None
                wanted = self.tokenizer.decode(batch.without_questions(batch.target_ids))
                written = write(self.objective, batch, options.sampling_steps)
                for prompt, given, truth in zip(texts, written, wanted, strict=True):
                    lines.append(f"- {prompt or task}: **{given}** (truth: {truth})")
        if log is None:  # the passes were needed, by the process that writes them
            return
        if rows:
            log.image(self.progress.step, task, grid(rows))
        log.text(self.progress.step, task, "\n".join(lines))

    def export(self) -> Path:
        """Write the present weights (the average, inside :meth:`validate`) as a model folder that ``load`` takes.

        Of a LoRA run, the LoRA file alone. All processes call this; the first writes.
        """
        if self.config.lora.rank:
            return self.parallel.on_main(lambda: lora.export(self.objective.transformer, self.folder / "lora"))
        transformer, embedder = self.objective.transformer, self.objective.text_embedder
        training = transformer.training
        if self.parallel.sharded:
            transformer, embedder = self._whole(transformer), self._whole(embedder)
        folder = self.folder / "model"

        def write_model() -> None:
            from unialignment.pipeline import UniAlignmentPipeline

            UniAlignmentPipeline(
                transformer,
                embedder,
                self.objective.autoencoder,
                self.tokenizer,
                name=self.config.run.name,
                sampling=dict(self.config.sampling),
            ).save_pretrained(folder)

        self.parallel.on_main(write_model)
        self.objective.transformer.train(training)
        self.objective.text_embedder.train(training)
        return folder

    def keep_model(self) -> Path:
        """Copy what :meth:`export` wrote last, the weights of the best validation so far, out of the next one's way.

        Raises:
            StorageError: it could not be written.
        """
        written = self.folder / ("lora" if self.config.lora.rank else "model")
        kept = written.with_name(f"{written.name}-best")
        with atomic_folder(kept) as partial:
            shutil.copytree(written, partial, dirs_exist_ok=True)
        return kept

    def _whole(self, module: Any) -> Any:
        """A copy of a sharded component with whole weights, in the first process; what isn't sharded as it is."""
        if not any(is_sharded(parameter) for parameter in module.parameters()):
            return module
        state = self.parallel.whole_state(module)
        if not self.parallel.is_main:
            return module
        kept = {name: value for name, value in module.config.items() if not name.startswith("_")}
        copy = type(module)(**kept)
        copy.load_state_dict(state)
        return copy
