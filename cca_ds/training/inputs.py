"""What a run reads before any engine is built: its codes, its tokenizer, what a global batch is, and the steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed
from torch import nn

from cca_ds.alignment.losses import LOSSES
from cca_ds.checkpoints.load_model import open_tokenizer, weights_hash
from cca_ds.cluster.collectives import barrier
from cca_ds.cluster.launch import Ranks
from cca_ds.config.recipes import resolve_path
from cca_ds.config.schema import RunConfig
from cca_ds.console import say
from cca_ds.data.batches import BatchPlan, Steps, total_steps
from cca_ds.data.codes import CodeTable
from cca_ds.data.generated import ONLINE, GeneratedCodes, open_generated
from cca_ds.data.npy_folders import import_command
from cca_ds.models import model_config
from cca_ds.vq import TOKENIZERS


@dataclass(frozen=True)
class RunInputs:
    """The part of a run that exists before its engines.

    Args:
        table: the codes, opened once.
        tokenizer: frozen; None where its weights are not named and the model does not need them.
        plan: what decides the pairs of a step.
        steps_per_epoch, steps: optimizer steps of an epoch and of the whole run.
        generated: images that the reference drew, where `data.generated` names a table of them.
    """

    table: CodeTable
    tokenizer: nn.Module | None
    plan: BatchPlan
    steps_per_epoch: int
    steps: int
    generated: GeneratedCodes | None = None

    def own_steps(self, first: int, sizes: list[int]) -> Steps:
        """The steps as a rank sees them; `first` and `sizes` as in `Steps`."""
        return Steps(self.table, self.plan, first, sizes, self.generated)

    @property
    def tables(self) -> list[CodeTable]:
        """All that it reads codes from."""
        return [self.table, *([self.generated.table] if self.generated else [])]

    def content_hash(self) -> str:
        """Identifies the data that the trajectory depends on."""
        found = self.table.manifest.content_hash()
        return f"{found}+{self.generated.table.manifest.content_hash()}" if self.generated else found


def open_inputs(run: RunConfig, cache_folder: Path) -> RunInputs:
    """Open and check everything that a run reads.

    Args:
        cache_folder: where a tokenizer's built-in table of codes (the digits') is written.

    Raises:
        CodesError, WeightsError, ValueError: what is missing, damaged, or does not belong together.
    """
    table = open_table(run, cache_folder)
    tokenizer = open_tokenizer(run.model, run.tokenizer)
    _check_tokenizer(run, table, tokenizer)
    plan = BatchPlan(
        global_size=run.batch.global_size,
        seed=run.seed,
        mask_probability=run.loss.condition_mask_probability,
        null_class=model_config(run.model.preset, **run.model.overrides).num_classes,
        contrastive=LOSSES[run.loss.name].negatives == "labels",
    )
    generated = None
    if run.data.generated and run.data.generated != ONLINE:
        generated = open_generated(resolve_path(run.data.generated), table)
    steps_per_epoch = plan.steps_per_epoch(len(table))
    return RunInputs(table, tokenizer, plan, steps_per_epoch, total_steps(run.batch, steps_per_epoch), generated)


def verify_once(table: CodeTable, ranks: Ranks) -> None:
    """Compare the table's files with their hashes, unless an earlier start did; each rank reads its share. Collective.

    Raises:
        CodesError: a file that differs from its hash; on the rank that read it.
    """
    verified = [table.is_verified()]
    if ranks.world_size > 1:
        torch.distributed.broadcast_object_list(verified, src=0)
    if verified[0]:
        return
    size = sum(shard.bytes for shard in table.manifest.shards) / 1e9
    takes_time = ranks.rank == 0 and size > 1.0
    if takes_time:
        say(f"{table.folder}: comparing {size:.0f} GB with their hashes, at the first use only")
    table.check(slice(ranks.rank, None, ranks.world_size))
    barrier(ranks)
    if ranks.rank == 0 and not table.mark_verified() and takes_time:
        say(f"{table.folder}: cannot be written, so its hashes are compared at every start")


def weights_hashes(run: RunConfig) -> dict[str, str]:
    """`weights_hash` of all weights that the recipe names, by key; reads them whole.

    Raises:
        WeightsError, CheckpointError: what cannot be read.
    """
    named = {
        "model.weights": run.model.weights, "reference.weights": run.reference.weights,
        "tokenizer.weights": run.tokenizer.weights,
    }  # fmt: skip
    return {key: weights_hash(resolve_path(name)) for key, name in named.items() if name}


def open_table(run: RunConfig, cache_folder: Path) -> CodeTable:
    """The codes to train on, checked against the model. Raises CodesError, ValueError."""
    name = run.data.codes
    builtin = TOKENIZERS[name].builtin_codes if name in TOKENIZERS else None
    if not builtin and (command := import_command(resolve_path(name), run.model.preset)):
        raise ValueError(
            f"data.codes={name} holds the original program's .npy files; import them once, and set data.codes to the "
            f"table: {command}"
        )
    table = CodeTable.open(builtin(cache_folder) if builtin else resolve_path(name))
    config = model_config(run.model.preset, **run.model.overrides)
    expected = (config.sequence_length, config.vocab_size)
    found = (table.manifest.sequence_length, table.manifest.vocab_size)
    if expected != found:
        raise ValueError(
            f"data.codes={name}: {found[0]} codes an image from a vocabulary of {found[1]}, but "
            f"{run.model.preset} takes {expected[0]} from {expected[1]}; encode the images for this model"
        )
    if table.manifest.classes > config.num_classes:
        raise ValueError(
            f"data.codes={name}: {table.manifest.classes} classes, but {run.model.preset} has "
            f"{config.num_classes}; set model.overrides.num_classes or take other data"
        )
    return table


def _check_tokenizer(run: RunConfig, table: CodeTable, tokenizer: nn.Module | None) -> None:
    """Raise ValueError for codes that another tokenizer made: they look alike, and training on them is useless."""
    found = table.manifest.tokenizer_hash  # empty for codes that were imported without their tokenizer
    if tokenizer is not None and found and found != tokenizer.hash():
        raise ValueError(
            f"data.codes={run.data.codes} was made by the tokenizer {found[:12]}, but tokenizer.weights="
            f"{run.tokenizer.weights} is {tokenizer.hash()[:12]}: name the weights that made the codes, or encode again"
        )
