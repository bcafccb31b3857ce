"""A VAR from pictures to pictures: encoded, trained on two ranks, exported to every layout, loaded again, sampled."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from cca_ds import export as export_entry
from cca_ds import sample as sample_entry
from cca_ds.alignment.losses import gft_loss
from cca_ds.checkpoints.deepspeed_state import consolidated_weights
from cca_ds.checkpoints.load_model import starting_weights
from cca_ds.checkpoints.run_weights import recipe_of_run
from cca_ds.checkpoints.store import complete_checkpoints
from cca_ds.config.recipes import load_recipe
from cca_ds.data.batches import BatchPlan, Steps
from cca_ds.data.codes import CodeTable
from cca_ds.models import create_model, load_weights
from tests.dist.ranks import run_ranks
from tests.dist.runs import metrics
from tests.support.golden_tokenizers import vqvae
from tests.support.var_run import BASE, DECAY, SHAPE, codes, var_run

pytestmark = pytest.mark.dist


def exported(run_folder: Path, output: Path, *flags: str) -> Path:
    assert export_entry.main(["--run", str(run_folder), "--output", str(output), *flags]) == 0
    return output


def published() -> dict[str, torch.Tensor]:
    """The state dict that the original program wrote of this model."""
    return torch.load(BASE, weights_only=True)


def original_module() -> nn.Module:
    """A module that asks for the original's keys and shapes, in float32, masks among them."""
    root = nn.Module()
    for key, value in published().items():
        *path, name = key.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        module.register_buffer(name, torch.full_like(value, 7, dtype=dtype))
    return root


def shards(run_folder: Path) -> dict[str, torch.Tensor]:
    """The policy's float32 weights after the last step, out of both ranks' files."""
    return consolidated_weights(complete_checkpoints(run_folder / "checkpoints")[0])


def averaged(run_folder: Path) -> dict[str, torch.Tensor]:
    """The moving average, worked out in float64 from the weights after each step."""
    second, first = (consolidated_weights(path) for path in complete_checkpoints(run_folder / "checkpoints"))
    run = recipe_of_run(run_folder)
    base = starting_weights(run.model, str(BASE), run.seed)
    once = {key: DECAY * base[key].double() + (1 - DECAY) * first[key].double() for key in first}
    return {key: DECAY * once[key] + (1 - DECAY) * second[key].double() for key in first}


def test_the_run_starts_at_the_reference_and_leaves_it():
    lines = metrics(var_run())
    assert [line["step"] for line in lines] == [1, 2]
    for tag in ("logps/chosen", "logps/rejected"):  # policy minus reference
        assert lines[0][tag] == pytest.approx(0.0, abs=1e-3) and abs(lines[1][tag]) > 0.1


@pytest.mark.parametrize("flags", [[], ["--ema"]], ids=["policy", "average"])
def test_every_layout_loads_again_bit_equal(tmp_path, flags):
    run_folder = var_run()
    flat = exported(run_folder, tmp_path / "var.pth", "--layout", "var", *flags)
    named = exported(run_folder, tmp_path / "hub" / "model.safetensors", "--model_card", *flags)
    state = torch.load(flat, weights_only=True)
    torch.save({"epoch": 0, "trainer": state, "args": {"depth": 2}}, tmp_path / "cca.pth")
    torch.save({"trainer": {"config": {"depth": 2}, "var_wo_ddp": state}}, tmp_path / "trainer.pth")
    first = None
    for path in (flat, named, tmp_path / "cca.pth", tmp_path / "trainer.pth"):
        module = create_model("var-d16", **SHAPE)
        load_weights(module, path)
        own = {key: value.clone() for key, value in module.state_dict().items()}
        first = first or own
        assert own.keys() == first.keys()
        assert all(torch.equal(own[key], first[key]) for key in own), path.name
    trained = shards(run_folder)
    if flags:
        expected = averaged(run_folder)
        assert all(torch.allclose(first[key].double(), expected[key], atol=1e-6) for key in first)
        assert any(not torch.equal(first[key], trained[key]) for key in first)
    else:
        assert all(torch.equal(first[key], trained[key]) for key in first)


def test_the_flat_layout_is_strict_in_the_originals_keys(tmp_path):
    state = torch.load(exported(var_run(), tmp_path / "var.pth", "--layout", "var"), weights_only=True)
    module = original_module()
    module.load_state_dict(state, strict=True)
    own, trained = module.state_dict(), shards(var_run())
    for key, value in published().items():
        assert own[key].dtype == state[key].dtype
        assert torch.equal(own[key], trained.get(key, value)), key  # the masks are not trained
    assert sum(not torch.equal(own[key], value.to(own[key].dtype)) for key, value in published().items()) > 20


def test_card_and_metadata_name_the_run(tmp_path):
    output = exported(var_run(), tmp_path / "model.safetensors", "--model_card")
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    (tmp_path / "recipe.yaml").write_text(metadata["recipe"])
    shared, own = (load_recipe(str(path)) for path in (tmp_path / "recipe.yaml", var_run() / "config.yaml"))
    assert (shared.model.weights, shared.data.codes) == ("var_depth2.pth", "var_codes")  # of paths the last name
    same = {"model", "tokenizer", "data"}
    assert shared.model_dump(exclude=same) == own.model_dump(exclude=same)
    assert shared.model.overrides == own.model.overrides and shared.tokenizer.options == own.tokenizer.options
    assert (metadata["family"], metadata["sequence_length"], metadata["step"]) == ("var", "30", "2")
    card = (tmp_path / "README.md").read_text()
    assert "`var_depth2.pth`" in card and "[VAR](" in card and "arxiv.org/abs/2404.02905" in card


def test_a_lambda_conditioned_policy_and_its_average(tmp_path):
    run_folder = var_run(conditioned=True)
    trained, average = shards(run_folder), averaged(run_folder)
    assert trained["lambda_embedding.fc2.weight"].abs().max() > 1e-4
    for flags, expected in (([], trained), (["--ema"], average)):
        module = create_model("var-d16", **SHAPE, lambda_conditioning=True)
        load_weights(module, exported(run_folder, tmp_path / "m.safetensors", *flags))
        for key, value in module.state_dict().items():
            assert torch.allclose(value.double(), expected[key].double(), atol=1e-6 if flags else 0.0), key


def test_guidance_free_training_from_codes_to_pictures(tmp_path):
    """Under ZeRO-3 with recomputed blocks: the first loss by definition, export, samples at two betas."""
    run_folder = var_run(loss="gft")
    first, second = metrics(run_folder)
    table = CodeTable.open(codes())
    (batch,) = Steps(table, BatchPlan(8, 0, 0.1, 10), 0, [8])[0]
    base = create_model("var-d16", vqvae(), **SHAPE, gft_conditioning=True).eval()
    load_weights(base, BASE)
    labels_K, beta_K = batch.positive_labels_B, batch.gft_beta_B
    expected = gft_loss(base, batch.codes_BL, labels_K, beta_K, batch.null_mask_B)
    assert first["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert first["loss"] == pytest.approx(first["nll_per_code/mixed"]) and second["loss"] < first["loss"]
    assert first["nll_per_code/unconditional"] > 0 and "rewards/chosen" not in first
    flat = exported(run_folder, tmp_path / "gft.pth", "--layout", "var")
    trained = create_model("var-d16", **SHAPE, gft_conditioning=True)
    load_weights(trained, flat)
    shown = shards(run_folder)
    assert all(torch.equal(p, shown[name]) for name, p in trained.named_parameters())
    assert trained.t_embedder.mlp[2].weight.abs().max() > 1e-4
    exported(run_folder, tmp_path / "card" / "m.safetensors", "--ema", "--model_card")
    assert "Guidance-Free Training ([arXiv 2501.15420]" in (tmp_path / "card" / "README.md").read_text()
    found = [
        pixels(sample(tmp_path / beta, "--weights", str(run_folder), "--gft_beta", beta)) for beta in ("0.9", "0.1")
    ]
    assert not np.array_equal(*found)


@pytest.mark.parametrize("generated", ["table", "online"])
def test_direct_discriminative_optimization_of_codes_by_scales(generated, tmp_path):
    """Log-ratios start at 0, so the first loss is known; one step tells real images from drawn ones."""
    run_folder = var_run(loss="ddo", generated=generated)
    first, second = metrics(run_folder)
    run = recipe_of_run(run_folder)
    steps = Steps(CodeTable.open(codes()), BatchPlan(8, 0, 0.1, 10, contrastive=False), 0, [8])
    (batch,) = steps[0]
    contrasted, lambda_ = float((~batch.null_mask_B).float().mean()), run.loss.lambda_
    assert first["loss"] == pytest.approx((1 + contrasted * lambda_) * np.log(2) / max(lambda_, 1), rel=1e-4)
    assert first["rewards/real"] == pytest.approx(0, abs=1e-4) == first["rewards/generated"]
    assert second["loss"] < first["loss"] and second["rewards/margins"] > 0
    exported(run_folder, tmp_path / "card" / "m.safetensors", "--model_card")
    assert "Direct Discriminative Optimization ([arXiv 2503.01103]" in (tmp_path / "card" / "README.md").read_text()


@torch.no_grad()
def test_a_fixed_lambda_is_an_ordinary_model_of_the_original(tmp_path):
    run_folder = var_run(conditioned=True)
    conditioned = create_model("var-d16", vqvae(), **SHAPE, lambda_conditioning=True).eval()
    load_weights(conditioned, exported(run_folder, tmp_path / "m.safetensors"))
    fixed = {}
    codes_BL, labels_B = torch.randint(64, (4, 30)), torch.tensor([0, 3, 9, 10])
    for value in (3, 300):
        flat = exported(run_folder, tmp_path / f"{value}.pth", "--layout", "var", "--lambda", str(value))
        original_module().load_state_dict(torch.load(flat, weights_only=True), strict=True)
        module = create_model("var-d16", vqvae(), **SHAPE).eval()
        load_weights(module, flat)
        fixed[value] = module.logits(codes_BL, labels_B)
        expected = conditioned.logits(codes_BL, labels_B, torch.full((4,), float(value)).log())
        torch.testing.assert_close(fixed[value], expected, atol=1e-4, rtol=0)
    assert (fixed[3] - fixed[300]).abs().max() > 1e-2


def test_a_lambda_that_cannot_be_fixed_is_refused(tmp_path, capsys):
    for conditioned, flags, message in (
        (True, ["--layout", "var"], "fix one with --lambda"),
        (True, ["--layout", "var", "--lambda", "0"], "--lambda 0: must be above 0"),
        (False, ["--lambda", "300"], "not conditioned on lambda; leave it out"),
    ):
        arguments = ["--run", str(var_run(conditioned)), "--output", str(tmp_path / "x.pth"), *flags]
        assert export_entry.main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and message in error
    assert not list(tmp_path.iterdir())


FEW = ["sampling.images_per_class=2", "logging.progress=false", "sampling.batch_size=20"]


def sample(output: Path, *flags: str, settings: tuple[str, ...] = ()) -> Path:
    arguments = ["--output", str(output), *flags, "--set", *FEW, *settings]
    assert sample_entry.main(arguments) == 0
    return output


def pixels(folder: Path) -> np.ndarray:
    """[20, 64, 64, 3] of the PNG files, in the order of their indices."""
    files = sorted((folder / "images").rglob("*.png"), key=lambda path: path.name)
    assert [path.parent.name for path in files] == [f"{index % 10:04d}" for index in range(20)]
    return np.stack([np.asarray(Image.open(path)) for path in files]).astype(int)


def assert_same_images(one: np.ndarray, other: np.ndarray) -> None:
    """But for the rounding of the decoder's convolutions, which depends on the batch."""
    assert one.shape == other.shape == (20, 64, 64, 3)
    assert np.abs(one - other).max() <= 1 and (one == other).mean() > 0.99


def test_two_ranks_and_other_batches_draw_the_same_images(tmp_path):
    flags = ["--weights", str(var_run()), "--guidance_scale", "1.5"]
    alone = sample(tmp_path / "alone", *flags, "--npz", "--grid")
    batches = sample(tmp_path / "batches", *flags, settings=("sampling.batch_size=7",))
    two = ["--output", str(tmp_path / "two"), *flags, "--npz", "--set", *FEW]
    run_ranks("cca_ds.sample", 2, arguments=two, env={"CUDA_VISIBLE_DEVICES": ""})
    images = pixels(alone)
    assert images.std() > 10 and len({image.tobytes() for image in images}) == 20
    assert_same_images(images, pixels(batches))
    assert_same_images(images, pixels(tmp_path / "two"))
    for folder in (alone, tmp_path / "two"):
        with np.load(folder / "samples.npz") as arrays:
            assert np.array_equal(arrays["arr_0"], pixels(folder))
            assert arrays["arr_1"].tolist() == [index % 10 for index in range(20)]


def test_the_exported_file_and_the_average_are_sampled_as_the_runs_folder_is(tmp_path):
    recipe = str(var_run() / "config.yaml")
    of_run = pixels(sample(tmp_path / "run", "--weights", str(var_run())))
    averages = pixels(sample(tmp_path / "ema", "--weights", str(var_run()), "--ema"))
    for name, flags, expected in (("a.pth", ["--layout", "var"], of_run), ("b.safetensors", ["--ema"], averages)):
        file = exported(var_run(), tmp_path / name, *flags)
        again = sample(tmp_path / f"of_{name}", "--recipe", recipe, "--weights", str(file))
        assert np.array_equal(pixels(again), expected)
    assert not np.array_equal(of_run, averages)


def test_lambda_moves_the_samples_of_a_conditioned_model(tmp_path):
    flags = ["--weights", str(var_run(conditioned=True))]
    found = {}
    for value in ("1", "8000"):
        folder = sample(tmp_path / value, *flags, settings=(f"sampling.lambda={value}",))
        assert json.loads((folder / "sampling.json").read_text())["lambda"] == float(value)
        found[value] = pixels(folder)
    assert not np.array_equal(found["1"], found["8000"])
