"""The shipped DeepSpeed files: complete, explained, and each trains on two CPU ranks as plain PyTorch does."""

import json
from pathlib import Path

import pytest
import torch

from cca_ds.balance.memory import Sharding, memory_of
from cca_ds.config.deepspeed_file import conflicts, fill_ds_config, read_ds_config
from cca_ds.config.recipes import load_recipe, recipe_names
from cca_ds.models import LlamaGenConfig, create_model
from cca_ds.models.cost import model_cost
from tests.dist.ranks import run_ranks

FOLDER = Path(__file__).parents[2] / "ds_configs"
FILES = sorted(FOLDER.rglob("*.json"))
SHAPE = {"n_layer": 2, "n_head": 2, "dim": 64, "vocab_size": 17, "sequence_length": 64, "num_classes": 10}
NO_DROPOUT = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}


def test_all_that_were_promised_are_there():
    assert [file.stem for file in FILES] == ["zero2", "zero3", "zero3_a40", "zero3_hierarchical", "zero3_offload"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_leaves_to_the_recipe_what_stands_there_and_nothing_else(file):
    ds = read_ds_config(file)
    assert all(conflicts(ds, load_recipe(name)) == [] for name in recipe_names())
    filled = fill_ds_config(ds, load_recipe("digits"), world_size=2, forwards=3, micro_size=4, precision="bf16")
    assert filled["train_batch_size"] == 24
    assert '"auto"' not in json.dumps(filled)
    assert filled["zero_optimization"] == ds["zero_optimization"]
    assert ds["zero_optimization"]["memory_efficient_linear"] is False


def test_files_differ_in_sharding_alone():
    outside = [
        {key: value for key, value in read_ds_config(file).items() if key != "zero_optimization"} for file in FILES
    ]
    assert all(one == outside[0] for one in outside)
    stages = {file.stem: read_ds_config(file)["zero_optimization"]["stage"] for file in FILES}
    assert stages.pop("zero2") == 2 and set(stages.values()) == {3}


def test_the_table_explains_every_file():
    rows = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [file.name for file in FILES]


def plain_losses():
    """The same three steps of AdamW in plain PyTorch, on the whole batch at once."""
    run = load_recipe("digits")
    model = create_model(LlamaGenConfig(**SHAPE, **NO_DROPOUT))
    torch.manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape) * 0.05
        parameter.data.copy_(noise + 1 if noise.ndim == 1 else noise)
    adamw = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=run.optimizer.betas, eps=run.optimizer.eps, weight_decay=0.05
    )
    data, losses = torch.Generator().manual_seed(2), []
    for _ in range(3):
        codes_BL, labels_B = (torch.randint(17, (8, 64), generator=data), torch.randint(10, (8,), generator=data))
        loss = -model(codes_BL, labels_B).mean() / 64
        losses.append(loss.item())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.grad_clip)
        adamw.step()
    return losses


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_trains_on_two_ranks_like_plain_pytorch_and_holds_what_was_planned(tmp_path, precision):
    run_ranks("tests/dist/ds_configs.py", 2, arguments=[tmp_path, precision, *FILES], timeout=300)
    expected = plain_losses()
    model = model_cost("llamagen-b", SHAPE)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert list(found) == [file.stem for file in FILES]
        for file in FILES:
            one = found[file.stem]
            assert one["losses"] == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 5e-3), file.stem
            if precision == "bf16":  # hierarchical partitions and offload move bytes elsewhere, not these
                planned = memory_of(
                    model, Sharding(one["stage"], False, False, 0, 0, 1, 4), 2, False, reference_bytes=0.0
                )
                assert one["held"] == {"weights": planned.weights, "optimizer": planned.optimizer}, file.stem
    assert max(expected) - min(expected) > 1e-3  # the steps did something
