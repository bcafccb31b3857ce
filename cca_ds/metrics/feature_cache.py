"""The cache of features beside the images: an .npz under a key of the pixels' and the network's hashes."""

import contextlib
from pathlib import Path

import numpy as np

from cca_ds.files import write_streamed
from cca_ds.metrics.extraction import Features
from cca_ds.metrics.image_sets import Images, read_arrays
from cca_ds.untrusted import decoding, regular_file


def cache_key(images: Images, identity: str) -> str:
    """Key of the features of these images by the network of this identity."""
    return f"{images.sha256()} {identity}"


def cache_path(images: Images) -> Path:
    """Path of the features of these images: beside an archive, inside a folder."""
    if images.path.is_dir():
        return images.path / "features.npz"
    return images.path.with_name(f"{images.path.stem}.features.npz")


def load_cached(path: Path, key: str) -> Features | None:
    """The features stored under this key; None when the file is missing, damaged or of another key."""
    with contextlib.suppress(ValueError, OSError), decoding(path):
        regular_file(path)
        arrays = read_arrays(path, ("key", "pool", "spatial", "probabilities"))
        if str(arrays["key"]) == key:
            return Features(arrays["pool"], arrays.get("spatial"), arrays["probabilities"])
    return None


def store_cached(path: Path, key: str, features: Features) -> None:
    """Write the features under their key, atomically. Raises OSError, e.g. when the folder is read-only."""
    arrays = {"pool": features.pool_ND, "probabilities": features.probabilities_NK}
    if features.spatial_NS is not None:
        arrays["spatial"] = features.spatial_NS
    write_streamed(path, lambda file: np.savez(file, key=np.array(key), **arrays))
