"""Images into a folder: the same whatever batch, ranks or interruption; whole files; readable by the evaluator."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn.functional import interpolate

from cca_ds import files
from cca_ds import sample as entry
from cca_ds.config.recipes import load_recipe
from cca_ds.metrics.image_sets import open_images
from cca_ds.models import FAMILIES, create_model, load_weights, save_weights
from cca_ds.reporting.evaluation_report import sampler_settings
from cca_ds.sampling import drawing, generate
from cca_ds.sampling.image_folder import SampleFolder, SamplesError, chosen_classes, image_indices, to_pixels
from cca_ds.vq import create_tokenizer
from tests.support.trained_run import trained_run
from tests.support.two_ranks import torchrun

FEW = ["--set", "sampling.images_per_class=2", "logging.progress=false"]
SMALL = {"n_layer": 1, "n_head": 2, "dim": 32}
BASE = Path(entry.__file__).parent / "assets" / "digits_base.safetensors"


def sample(output: Path, *flags: str) -> int:
    return entry.main(["--output", str(output), *FEW, *flags])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[str, ...]:
    """Flags of a digits model of one layer, with weights that make codes differ."""
    path = tmp_path_factory.mktemp("small") / "w.safetensors"
    torch.manual_seed(0)
    model = create_model("digits", **SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_weights(model, path)
    return ("--weights", str(path), "--set", f"model.overrides={json.dumps(SMALL)}", "precision=fp32")


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every image."""
    files = sorted((folder / "images").rglob("*.png"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, small) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "samples"
    assert sample(folder, "--npz", "--grid", *small) == 0
    return folder


def test_files_by_class_and_index(drawn):
    names = list(hashes(drawn))
    assert len(names) == 20
    for name in names:
        _, label, file = Path(name).parts
        assert int(file.removesuffix(".png")) % 10 == int(label)
    assert sorted(path.name for path in drawn.iterdir()) == ["grid.png", "images", "samples.npz", "sampling.json"]
    assert not [path for path in drawn.rglob("*") if "partial" in path.name]


def test_images_are_what_generate_draws(drawn, small, device):
    model = create_model("digits", **SMALL)
    load_weights(model, small[1])
    model.to(device)
    codes_BL = generate(model, torch.arange(20) % 10, image_indices_B=range(20))
    levels = np.rint(codes_BL.cpu().numpy().reshape(20, 8, 8) * 255 / 16).astype(np.uint8)
    for index in range(20):
        found = np.asarray(Image.open(drawn / "images" / f"{index % 10:04d}" / f"{index:06d}.png"))
        assert np.array_equal(found, levels[index])


def test_archive_is_the_evaluators(drawn):
    with np.load(drawn / "samples.npz", allow_pickle=False) as arrays:
        images_NHWC, labels_N = arrays["arr_0"], arrays["arr_1"]
    assert images_NHWC.dtype == np.uint8 and images_NHWC.shape == (20, 8, 8, 1)
    assert labels_N.tolist() == [index % 10 for index in range(20)]  # any stretch is spread over the classes
    folder, archive = open_images(drawn / "images"), open_images(drawn / "samples.npz")
    assert folder.count == archive.count == 20
    assert folder.labels_N.tolist() == archive.labels_N.tolist()
    from_folder = np.concatenate(list(folder.batches(0, 20, 7)))
    assert np.array_equal(from_folder[..., :1], images_NHWC)


def test_settings_reach_the_evaluations_report(drawn):
    run = load_recipe("digits")
    for where in (drawn / "images", drawn / "samples.npz"):
        settings, origin = sampler_settings(where, run.name, run.sampling.model_dump(mode="json", by_alias=True))
        assert origin == "sampling.json"
        assert (settings["seed"], settings["guidance_scale"], settings["guidance_of_family"]) == (0, 0.0, 1.0)
        assert settings["weights_sha256"] and settings["tokenizer_hash"] and settings["recipe"] == "digits"
        assert settings["images"] == 20 and settings["precision"] in ("fp32", "bf16")


def test_grid_has_a_column_for_each_class(drawn):
    grid = np.asarray(Image.open(drawn / "grid.png").convert("L"))
    assert grid.shape == (2 * 34, 10 * 34)  # 8 pixels enlarged fourfold and a gap of 2
    first = np.asarray(Image.open(drawn / "images" / "0003" / "000003.png"))
    cell = grid[:32, 3 * 34 : 3 * 34 + 32]
    assert np.abs(cell[::4, ::4].astype(int) - first).max() <= 1


@pytest.mark.parametrize("size", [3, 7])
def test_the_batch_does_not_matter(drawn, small, tmp_path, size):
    assert sample(tmp_path / "s", *small, "--set", f"sampling.batch_size={size}") == 0
    assert hashes(tmp_path / "s") == hashes(drawn)


def test_interrupted_and_continued(drawn, small, tmp_path, monkeypatch, capsys):
    real, calls = drawing.generate, []

    def counted(model, labels_B, **settings):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(settings["image_indices_B"])
        return real(model, labels_B, **settings)

    monkeypatch.setattr(drawing, "generate", counted)
    batches = [*small, "--set", "sampling.batch_size=4"]
    assert sample(tmp_path / "s", *batches, "--npz") == 130
    assert "the same command draws the rest" in capsys.readouterr().err
    assert len(hashes(tmp_path / "s")) == 12 and not (tmp_path / "s" / "samples.npz").exists()
    next((tmp_path / "s").rglob("000005.png")).unlink()
    calls.clear()
    assert sample(tmp_path / "s", *batches, "--npz") == 0
    assert [index for batch in calls for index in batch] == [5, *range(12, 20)]  # nothing is drawn twice
    assert hashes(tmp_path / "s") == hashes(drawn)
    assert (tmp_path / "s" / "samples.npz").read_bytes()[-4096:] == (drawn / "samples.npz").read_bytes()[-4096:]
    calls.clear()
    assert sample(tmp_path / "s", *small) == 0 and calls == []


def test_more_of_each_class_keeps_what_is_there(drawn, small, tmp_path):
    assert sample(tmp_path / "s", *small, "--set", "sampling.images_per_class=1") == 0
    before = hashes(tmp_path / "s")
    assert len(before) == 10
    assert sample(tmp_path / "s", *small) == 0
    assert hashes(tmp_path / "s") == hashes(drawn) and before.items() <= hashes(drawn).items()


def test_some_classes_are_the_same_images(drawn, small, tmp_path):
    assert sample(tmp_path / "s", *small, "--classes", "7", "2") == 0
    found = hashes(tmp_path / "s")
    assert len(found) == 4 and found.items() <= hashes(drawn).items()


def test_guidance_by_either_number_is_told_in_both(small, tmp_path, capsys):
    few = [*small, "--set", "sampling.images_per_class=1"]
    assert sample(tmp_path / "s", "--guidance_scale", "0.5", *few) == 0
    assert "guidance s = 0.5 (LlamaGen's cfg-scale = 1.5)" in capsys.readouterr().err
    assert sample(tmp_path / "g", "--cfg_scale", "1.5", *few) == 0
    assert hashes(tmp_path / "s") == hashes(tmp_path / "g")
    assert sample(tmp_path / "u", *few) == 0
    assert hashes(tmp_path / "s") != hashes(tmp_path / "u")


def test_other_settings_are_refused_in_the_same_folder(drawn, small, capsys):
    before = (drawn / "sampling.json").read_text()
    assert sample(drawn, *small, "--guidance_scale", "1") == 2
    message = capsys.readouterr().err.strip()
    assert "guidance_scale 0.0 and not 1.0" in message and "choose another folder" in message
    assert sample(drawn, *small, "--set", "sampling.seed=1") == 2
    assert (drawn / "sampling.json").read_text() == before and len(hashes(drawn)) == 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance_scale", "-1"], "guidance s = -1"),
        (["--guidance_scale", "1", "--cfg_scale", "2"], "give one"),
        (["--cfg_scale", "0.5"], "guidance s = -0.5"),
        (["--weights", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--recipe", "var-d16"], "--weights is missing"),
        (["--recipe", "var-d16", "--weights", "x.pth"], "tokenizer.weights is missing"),
        (["--classes", "10"], "classes 0 to 9"),
        (["--resize", "0"], "--resize 0"),
        (["--ema", "--weights", str(BASE)], "run's"),
        (["--set", "loss.bta=1"], "did you mean beta?"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(tmp_path, capsys, flags, message):
    assert sample(tmp_path / "s", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and message in error
    assert not (tmp_path / "s").exists()


def test_published_weights_need_their_recipe(tmp_path, capsys):
    weights = tmp_path / "c2i_B_384.pt"
    torch.save({"model": {}}, weights)
    assert sample(tmp_path / "out", "--weights", str(weights)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--weights {weights}: name its model with --recipe, docs/weights.md says which" in line


@pytest.mark.dist
def test_ranks_and_run_folder(tmp_path):
    run_folder = trained_run()
    alone, two = tmp_path / "alone", tmp_path / "two"
    one_each = ["--set", "sampling.images_per_class=1", "precision=fp32"]
    assert sample(alone, "--weights", str(run_folder), *one_each) == 0
    torchrun("-m", "cca_ds.sample", "--weights", run_folder, "--output", two, "--npz", *FEW, *one_each)
    if not torch.cuda.is_available():
        assert hashes(two) == hashes(alone)
    assert len(hashes(two)) == 10 and (two / "samples.npz").is_file()
    assert json.loads((two / "sampling.json").read_text())["recipe"] == "digits"
    ema = tmp_path / "ema"
    assert sample(ema, "--weights", str(run_folder), "--ema", *one_each) == 0
    settings = [json.loads((folder / "sampling.json").read_text()) for folder in (alone, ema)]
    assert settings[0]["weights_sha256"] != settings[1]["weights_sha256"]


@pytest.mark.parametrize(("preset", "channels"), [("llamagen", 3), ("var", 3)])
def test_both_families_with_their_tokenizers(tmp_path, preset, channels, capsys):
    """Tiny shapes and random weights: the same images in one batch and in another, resized where asked."""
    small = "{channels: 32, channel_multipliers: [1, 1, 1, 1, 1], z_channels: 32, codebook_size: 64"
    if preset == "llamagen":
        name, options = "llamagen-vq16", f"{small}}}"
        shape = {"n_layer": 1, "n_head": 2, "dim": 32, "sequence_length": 4, "vocab_size": 64}
        recipe = "llamagen-b"
    else:
        name, options = "var-vqvae", f"{small}, scales: [1, 2]}}"
        shape = {"depth": 1, "vocab_size": 64, "scales": [1, 2]}
        recipe = "var-d16"
    tokenizer = create_tokenizer(name, **yaml.safe_load(options))
    torch.save(tokenizer.state_dict(), tmp_path / "vq.pt")
    config = {**shape, "num_classes": 3}
    torch.manual_seed(0)
    model = create_model(recipe, tokenizer if preset == "var" else None, **config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_weights(model, tmp_path / "w.safetensors")
    overrides = [f"model.overrides={json.dumps(config)}", f"tokenizer.options={options}",
                 f"tokenizer.weights={tmp_path / 'vq.pt'}", "precision=fp32"]  # fmt: skip
    flags = ["--recipe", recipe, "--weights", str(tmp_path / "w.safetensors"), "--set", *overrides]
    assert sample(tmp_path / "a", *flags, "--resize", "24", "--npz", "--grid") == 0
    assert "cfg" in capsys.readouterr().err
    assert sample(tmp_path / "b", *flags, "--resize", "24", "--set", "sampling.batch_size=2") == 0
    one, other = (np.load(tmp_path / "a" / "samples.npz")["arr_0"], open_images(tmp_path / "b" / "images"))
    assert one.shape == (6, 24, 24, channels)
    apart = np.abs(one.astype(int) - np.concatenate(list(other.batches(0, 6, 6))))
    assert apart.max() <= 1  # the decoder's convolutions round by batch


def test_rounding_is_the_familys():
    images_BCHW = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 6)
    x = images_BCHW.flatten().double().numpy()
    llamagen = np.clip(127.5 * x + 128, 0, 255).astype(np.uint8)
    var = (np.clip((x + 1) / 2, 0, 1) * 255).astype(np.uint8)
    assert to_pixels(images_BCHW, FAMILIES["llamagen"].pixel_shift).flatten().tolist() == llamagen.tolist()
    assert to_pixels(images_BCHW, FAMILIES["var"].pixel_shift).flatten().tolist() == var.tolist()
    assert llamagen.tolist() != var.tolist()


def test_resizing_is_bicubic_without_antialiasing():
    class Fixed(torch.nn.Module):
        def decode(self, codes_BL: torch.Tensor) -> torch.Tensor:
            return images_BCHW[: len(codes_BL)]

    images_BCHW = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    codes_BL = torch.zeros(2, 4, dtype=torch.int64)
    found = drawing.decode(Fixed(), codes_BL, 8)
    assert torch.equal(found, interpolate(images_BCHW, (8, 8), mode="bicubic", antialias=False))
    assert torch.equal(drawing.decode(Fixed(), codes_BL, 12), images_BCHW)
    assert not torch.allclose(found, interpolate(images_BCHW, (8, 8), mode="bicubic", antialias=True))


def test_image_indices():
    assert image_indices(2, 3) == [0, 1, 2, 3, 4, 5]
    assert image_indices(2, 3, [2, 0]) == [0, 2, 3, 5]


def test_classes_by_number_and_name():
    names = ("beagle", "poodle", "7")
    assert chosen_classes(["1", "beagle", "7"], names, 3) == [1, 0, 2]
    assert chosen_classes(["2"], (), 3) == [2]
    for word, known, message in (
        ("poodel", names, "did you mean poodle?"), ("3", names, "classes 0 to 2, such as beagle"),
        ("-1", (), "classes 0 to 2"), ("cat", (), "--classes cat"),
    ):  # fmt: skip
        with pytest.raises(SamplesError, match=message):
            chosen_classes([word], known, 3)


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    folder = SampleFolder(tmp_path, classes=2)
    folder.claim({"seed": 0})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    folder.write([0, 1], np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(OSError, match="No space left"):
        folder.close()
    with pytest.raises(OSError, match="No space left"):
        files.write_streamed(tmp_path / "x.npz", lambda file: file.write(b"x"))
    folder.release()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["sampling.json"]


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert sample(tmp_path / "file" / "s") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_lambda_of_a_conditioned_model():
    def log_lambda(*overrides: str) -> float | None:
        run = load_recipe("digits", ["loss.lambda=10", *overrides])
        lambda_ = drawing.sampling_lambda(run.sampling, run.loss.lambda_, run.model.lambda_conditioning)
        return drawing.draw_settings(run.sampling, lambda_)["log_lambda"]

    assert log_lambda() is None
    assert log_lambda("model.lambda_conditioning=true") == pytest.approx(np.log(10))
    assert log_lambda("model.lambda_conditioning=true", "sampling.lambda=300") == pytest.approx(np.log(300))


def test_gft_beta_and_its_guidance(tmp_path, capsys):
    """The flag beats the recipe's value; the log and sampling.json show s = (1 - beta) / beta."""
    torch.manual_seed(0)
    model = create_model("digits", **SMALL, gft_conditioning=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_weights(model, tmp_path / "w.safetensors")
    usual = ("--weights", str(tmp_path / "w.safetensors"), "--set", f"model.overrides={json.dumps(SMALL)}",
             "precision=fp32", "sampling.images_per_class=2")  # fmt: skip
    gft = (*usual, "loss.name=gft", "sampling.gft_beta=0.5")
    assert sample(tmp_path / "recipe", *gft) == 0
    assert "GFT's beta 0.5 (like s = 1)" in capsys.readouterr().err
    assert sample(tmp_path / "flag", *gft, "--gft_beta", "0.8") == 0
    settings = json.loads((tmp_path / "flag" / "sampling.json").read_text())
    assert settings["gft_beta"] == 0.8 and settings["guidance_of_gft_beta"] == pytest.approx(0.25)
    codes_BL = generate(model, torch.arange(20) % 10, image_indices_B=range(20), gft_beta=0.8)
    levels = np.rint(codes_BL.numpy().reshape(20, 8, 8) * 255 / 16).astype(np.uint8)
    first = np.asarray(Image.open(tmp_path / "flag" / "images" / "0003" / "000003.png"))
    assert np.array_equal(first, levels[3])
    assert hashes(tmp_path / "flag") != hashes(tmp_path / "recipe")
    capsys.readouterr()
    for flags, message in (
        ((*gft, "--gft_beta", "0"), "--gft_beta 0: must be above 0 and at most 1"),
        ((*gft, "--gft_beta", "1.5"), "--gft_beta 1.5: must be above 0 and at most 1"),
        ((*gft, "--gft_beta", "nan"), "--gft_beta nan: must be above 0 and at most 1"),
        ((*usual[2:], "--gft_beta", "0.7"), "--gft_beta 0.7: the model is not trained by GFT; leave it out"),
        ((*usual,), "conditioned on GFT's beta: set gft_conditioning=true"),
    ):
        assert sample(tmp_path / "refused", *flags) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and message in error, error
        assert not (tmp_path / "refused").exists()


def test_a_second_process_that_draws_into_the_folder_is_refused(tmp_path):
    """With other settings too: before the first has drawn an image, only its lock tells of it."""
    first, second = SampleFolder(tmp_path / "s", classes=2), SampleFolder(tmp_path / "s", classes=2)
    first.claim({"seed": 0})
    with pytest.raises(ValueError, match=f"process {os.getpid()} on .* is writing there"):
        second.claim({"seed": 1})
    first.release()
    with pytest.raises(SamplesError, match="holds images drawn with seed 0 and not 1"):
        second.claim({"seed": 1})
    second.release()
    assert not (tmp_path / "s/OWNER.json").exists()


def test_what_is_no_whole_picture_is_drawn_again_and_leftovers_go(drawn, tmp_path, small):
    folder = Path(shutil.copytree(drawn, tmp_path / "samples"))
    before = hashes(folder)
    first, second, third, *_ = sorted((folder / "images").rglob("*.png"))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-9])
    third.unlink()
    (third.parent / f".{third.name}.17-abc.partial").write_bytes(b"x")
    (folder / ".samples.npz.17-abc.partial").write_bytes(b"x")
    assert sample(folder, *small) == 0
    assert hashes(folder) == before and not list(folder.rglob(".*.partial"))
