"""The Inception network against torch-fidelity's, run on weights that a rule gives and recorded once.

`golden/inception_io.npz`: its FeatureExtractorInceptionV3 (version 0.4.0, PyTorch 2.13, CPU, float32) loaded
strictly with `ruled_weight` of every key; spatial features by a hook on Mixed_6d.branch1x1.
"""

import zlib

import numpy as np
import pytest
import torch

from cca_ds.metrics.inception import (
    WEIGHTS_SHA256,
    InceptionFID,
    InceptionWeightsError,
    load_inception,
    resize_like_tensorflow,
)


def ruled_weight(key: str, shape: torch.Size) -> torch.Tensor:
    """The recording's weights: drawn from a generator seeded by the key, so that no file is needed."""
    random = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith(("running_var", "bn.weight")):
        values = random.uniform(0.5, 1.5, shape)
    elif key.endswith(("bias", "running_mean")):
        values = random.normal(0, 0.1, shape)
    else:
        values = random.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    shapes = {key: value.shape for key, value in InceptionFID().state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({key: ruled_weight(key, shape) for key, shape in shapes.items()}, path)
    return path


def test_network_equals_the_recorded_one(weights_file, golden, device):
    """Pool features, `Mixed_6d`'s 1x1 branch (7 channels, channels last) and the classifier without its bias."""
    network = load_inception(weights_file, device)
    with np.load(golden / "inception_io.npz") as recorded:
        images_BCHW = torch.from_numpy(recorded["images"]).permute(0, 3, 1, 2).to(device)
        output = network(images_BCHW)
        assert output.pool_BD.shape == (2, 2048)
        assert output.spatial_BS.shape == (2, 2023)
        np.testing.assert_allclose(output.pool_BD.cpu(), recorded["pool"], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(output.spatial_BS.cpu(), recorded["spatial"], rtol=1e-3, atol=1e-3)
        expected = torch.from_numpy(recorded["logits_without_bias"]).softmax(dim=1)
        np.testing.assert_allclose(output.probabilities_BK.cpu(), expected, rtol=1e-2, atol=1e-5)


def test_weights_have_the_published_number_of_entries():
    state = InceptionFID().state_dict()
    assert len(state) == 566
    assert sum(value.numel() for value in state.values()) == 23_885_486
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_6d.branch7x7dbl_5.conv.weight"].shape == (192, 160, 1, 7)


def test_an_image_is_the_same_in_any_batch(weights_file):
    network = load_inception(weights_file)
    images = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together, alone = network(images), network(images[1:2])
    torch.testing.assert_close(together.pool_BD[1:2], alone.pool_BD, rtol=1e-4, atol=1e-4)


def test_resize_by_hand():
    """Two pixels 0, 10 to four: positions 0, 0.5, 1, 1.5, the last pixel repeating. No half-pixel shift."""
    row = torch.tensor([[[[0.0, 10.0]]]])
    assert resize_like_tensorflow(row, 4)[0, 0, 0].tolist() == [0.0, 5.0, 10.0, 10.0]
    grid = torch.tensor([[[[0.0, 10.0], [20.0, 30.0]]]])
    assert resize_like_tensorflow(grid, 4)[0, 0].tolist() == [
        [0.0, 5.0, 10.0, 10.0],
        [10.0, 15.0, 20.0, 20.0],
        [20.0, 25.0, 30.0, 30.0],
        [20.0, 25.0, 30.0, 30.0],
    ]
    large = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize_like_tensorflow(large, 2)[0, 0].tolist() == [[0.0, 2.0], [8.0, 10.0]]  # every other pixel


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
)
def test_other_tensors_than_uint8_batches_are_refused(images):
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\]"):
        InceptionFID()(images)


@pytest.mark.parametrize("path", [None, "missing.pth"])
def test_error_for_missing_weights_has_the_download_address(path, tmp_path):
    with pytest.raises(InceptionWeightsError) as error:
        load_inception(path and tmp_path / path)
    message = str(error.value)
    assert "\n" not in message
    assert "https://github.com/toshas/torch-fidelity/releases/" in message
    assert WEIGHTS_SHA256 in message
    assert "--inception_weights" in message


def test_other_files_are_refused_in_one_line(tmp_path, weights_file):
    state = torch.load(weights_file, weights_only=True)
    del state["fc.bias"]
    torch.save(state, tmp_path / "incomplete.pth")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "cut.pth").write_bytes(weights_file.read_bytes()[:1000])
    for name, part in [("incomplete.pth", "fc.bias"), ("text.pth", "not the FID"), ("cut.pth", "not the FID")]:
        with pytest.raises(InceptionWeightsError, match=part) as error:
            load_inception(tmp_path / name)
        assert "\n" not in str(error.value)
