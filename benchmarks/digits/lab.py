"""Fine-tune and evaluate small models on the digits, in one process and without DeepSpeed.

The loop is `cca_ds/train.py`'s, over a policy in plain PyTorch: starting DeepSpeed for each of a hundred short runs
would take longer than the runs.

Letters: B images, L codes per image.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the models are small; DeepSpeed reads it when it is imported

from cca_ds.alignment.objective import SUMS, Objective, summarize
from cca_ds.cluster.coordination import Coordinator
from cca_ds.cluster.launch import Ranks
from cca_ds.config.recipes import load_recipe, resolve_path
from cca_ds.config.schema import Optimizer, RunConfig
from cca_ds.data.batches import BatchPlan, MicroBatch, Steps
from cca_ds.data.codes import CodeTable
from cca_ds.data.generated import PLAIN, open_generated
from cca_ds.metrics import frechet_distance, inception_score
from cca_ds.metrics.digits_classifier import class_accuracy, digits_classifier
from cca_ds.models import create_model
from cca_ds.models.conditioning import conditioning_of
from cca_ds.models.weight_files import state_hash
from cca_ds.models.weights import load_weights
from cca_ds.reference.interface import Reference
from cca_ds.sampling import generate
from cca_ds.sampling.code_table import draw_code_table
from cca_ds.train import train
from cca_ds.training.accuracy_band import AccuracyBand
from cca_ds.training.checks import recipe_problems
from cca_ds.training.engines import Engines, OptimizerSteps
from cca_ds.training.inputs import RunInputs
from cca_ds.training.progress import Progress
from cca_ds.training.run import Run
from cca_ds.training.utilization import Utilization
from cca_ds.vq import TOKENIZERS

IMAGES = 1800
BATCH = 450
EVALUATION_STREAM = 10**6  # an epoch that no run reaches: other pairs of the same images


@dataclass
class Tuned:
    """A fine-tuned model and the metrics of its steps."""

    model: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Digits:
    """The digits as codes, the base model, and the decoder from codes [B, L] to grey levels [B, 64]."""

    table: CodeTable
    base: nn.Module
    to_pixels: Callable[[Tensor], np.ndarray] = Tensor.numpy

    @classmethod
    def shipped(cls, folder: Path) -> Digits:
        """With the package's base model; the table of codes is written into `folder` if it is not there."""
        recipe = load_recipe("digits")
        base = create_model(recipe.model.preset)
        load_weights(base, resolve_path(recipe.model.weights))
        return cls(CodeTable.open(TOKENIZERS[recipe.data.codes].builtin_codes(folder)), base.eval())


class PlainPolicy:
    """A module under PyTorch's AdamW in one process, with the interface of `cca_ds.training.policy.Policy`.

    Attributes:
        loss_scale, skipped_steps: of fp16, which is not used here.

    Args:
        module: trained in place.
        optimizer: learning rate, betas and clipping; parameters of fewer than two dimensions do not decay.
        global_size: pairs per step.
    """

    loss_scale, skipped_steps = None, 0

    def __init__(self, module: nn.Module, optimizer: Optimizer, global_size: int):
        self.module, self.global_size, self.clip = module, global_size, optimizer.grad_clip
        groups = [
            {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=optimizer.betas)

    def __call__(self, *inputs: Tensor, compute: Callable[..., Tensor] | None = None) -> Tensor:
        """log p [B] float32 of codes [B, L] under labels [B], or what `compute` does of them, with gradient."""
        return self.module(*inputs, compute=compute)

    def backward(self, loss_sum: Tensor) -> None:
        """Add the gradient of a micro-batch, given its loss summed over pairs."""
        (loss_sum / self.global_size).backward()

    def step(self, learning_rate: float, weight_decay: float) -> float:
        """Clip, step and clear the gradients; returns the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


class WholeBatches:
    """Every step's global batch as one micro-batch, in the place of `training.reader.BatchReader`."""

    def __init__(self, own_steps: Steps, last: int):
        self.own_steps, self.last = own_steps, last

    def steps(self, first: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(step, its micro-batch) from step `first` on."""
        return ((step, self.own_steps[step]) for step in range(first, self.last))


class History:
    """Keeps the values of every step, in the place of `training.run_log.RunLog`."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def step(self, step: int, values: dict[str, float], write: bool = True) -> None:
        """Keep the values of step `step`."""
        self.steps.append(values)


class Never:
    """Grids and checkpoints of a run that draws and saves nothing."""

    def due(self, *_: int) -> bool:
        """Never."""
        return False

    def overdue(self) -> bool:
        """Never."""
        return False


class Base(Reference):
    """The model that a run starts from, as its reference."""

    def __init__(self, module: nn.Module):
        self.module = module

    @torch.no_grad()
    def __call__(self, batch: MicroBatch, inputs: tuple[Tensor, ...]) -> Tensor:
        """See `Reference`."""
        return self.module(*inputs[:2])


def draw_table(digits: Digits, folder: Path, seed: int) -> Path:
    """A table of as many images as the digits have, drawn from the base model: what `cca-sample --codes` writes."""
    weights = state_hash(dict(digits.base.named_parameters()))
    drawn = {"weights_sha256": weights, "tokenizer_hash": "", "seed": seed, **PLAIN}
    draw_code_table(folder, digits.base, "digits", range(IMAGES), {"seed": seed}, BATCH, drawn)
    return folder


def fine_tune(digits: Digits, seed: int, overrides: list[str]) -> Tuned:
    """One run of the digits recipe from the base model with lambda 10 and overrides (KEY.PATH=VALUE)."""
    recipe = load_recipe("digits", [f"seed={seed}", "loss.lambda=10", *overrides], recipe_problems)
    torch.manual_seed(seed)
    policy = PlainPolicy(_policy_module(digits, recipe), recipe.optimizer, recipe.batch.global_size)
    objective = Objective(recipe.loss, recipe.model.lambda_conditioning)
    own_steps = _steps(digits, recipe, objective.spec.negatives == "labels")
    total = round(recipe.batch.epochs * own_steps.steps_per_epoch)
    device, history = torch.device("cpu"), History()

    train(
        Run(
            RunInputs(digits.table, None, own_steps.plan, own_steps.steps_per_epoch, total),
            Engines(policy, Base(digits.base) if objective.spec.needs_reference else None, objective, device, "fp32"),
            Progress(
                0,
                total,
                history,
                {},
                recipe.batch.global_size,
                Utilization(0.0, ["cpu"]),
                device,
                1,
                AccuracyBand(None),
            ),
            WholeBatches(own_steps, total),
            OptimizerSteps(policy, recipe.optimizer, recipe.schedule, total, own_steps.steps_per_epoch, print),
            Never(),
            Never(),
            Coordinator(Ranks(0, 0, 1, 1, 0, "localhost", "cpu", "alone")),
        )
    )
    policy.module.eval()
    return Tuned(policy.module, history.steps)


def _policy_module(digits: Digits, run: RunConfig) -> nn.Module:
    kind = conditioning_of(run.model)
    if kind is None:
        return copy.deepcopy(digits.base).train(run.model.dropout)
    policy = create_model(digits.base.config, **{kind.switch: True})
    policy.load_state_dict(digits.base.state_dict(), strict=False)  # the embedding of the number starts without effect
    return policy.train(run.model.dropout)


def _steps(digits: Digits, run: RunConfig, contrastive: bool) -> Steps:
    plan = BatchPlan(
        run.batch.global_size, run.seed, run.loss.condition_mask_probability, digits.base.null_class, contrastive
    )
    drawn = open_generated(Path(run.data.generated), digits.table) if run.data.generated else None
    return Steps(digits.table, plan, 0, [run.batch.global_size], drawn)


@torch.no_grad()
def likelihood_change(digits: Digits, model: nn.Module, batches: int = 8) -> tuple[float, float]:
    """Mean log p_policy - log p_reference of positives and of negatives after training, in nats an image."""
    run = load_recipe("digits", ["loss.condition_mask_probability=0"])
    objective, steps = Objective(run.loss), _steps(digits, run, True)
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    for place in range(batches):
        (batch,) = steps[EVALUATION_STREAM * steps.steps_per_epoch + place]
        inputs = objective.stacked(batch)
        sums += objective(model(*inputs), digits.base(*inputs), batch)[1]
    means = summarize(sums, objective.spec)
    return means["logps/chosen"], means["logps/rejected"]


def sampled(
    model: nn.Module, labels_B: Tensor, scale: float = 0.0, seed: int = 0, **conditioning: float
) -> tuple[Tensor, float]:
    """Codes [B, L] of the seed's first images, and the seconds that sampling took.

    `conditioning` is `log_lambda` or `gft_beta` of a model that takes it. On a CPU the seconds are the processor time
    of one thread, on which the machine's load has little effect.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    clock, threads = time.process_time if on_cpu else time.perf_counter, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started, parts = clock(), []
        for first in range(0, len(labels_B), BATCH):
            part_B = labels_B[first : first + BATCH]
            indices_B = range(first, first + len(part_B))
            codes_BL = generate(
                model, part_B, guidance_scale=scale, seed=seed, image_indices_B=indices_B, **conditioning
            )
            parts.append(codes_BL.cpu())
        return torch.cat(parts), clock() - started
    finally:
        torch.set_num_threads(threads)


def sampling_seconds(samplers: list[tuple[nn.Module, float]], rounds: int = 3) -> list[float]:
    """Median seconds that each (model, guidance scale) takes for `BATCH` images, measured in turns."""
    labels_B = torch.arange(BATCH) % 10
    measured = [[sampled(model, labels_B, scale)[1] for model, scale in samplers] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*measured, strict=True)]


def evaluate(digits: Digits, model: nn.Module, scale: float = 0.0, seed: int = 0, **conditioning: float) -> dict:
    """Sample 1,800 images, 180 a class, and score them by the digits' classifier; `conditioning` as in `sampled`."""
    labels_B = torch.arange(IMAGES) % 10
    codes_BL, seconds = sampled(model, labels_B, scale, seed, **conditioning)
    return {"seconds": seconds, **scores(digits.to_pixels(codes_BL), labels_B.numpy())}


def scores(pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """FID, inception score and class accuracy of grey levels [B, 64]."""
    classifier = digits_classifier()
    probabilities = classifier.probabilities(pixels)
    real = classifier.features(classifier.reference_codes)
    return {
        "fid": frechet_distance(real, classifier.features(pixels)),
        "inception_score": inception_score(probabilities),
        "accuracy": class_accuracy(probabilities, labels),
    }


def mean_and_spread(values: list[float]) -> dict[str, float]:
    """Mean and half the range of a few repeats."""
    return {"mean": float(np.mean(values)), "spread": float((max(values) - min(values)) / 2)}


def average(repeats: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and spread of every number over repeats."""
    return {name: mean_and_spread([repeat[name] for repeat in repeats]) for name in repeats[0]}


def untimed(repeats: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """`average` without the sampling time."""
    return {name: value for name, value in average(repeats).items() if name != "seconds"}
