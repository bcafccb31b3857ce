"""The cache of features beside the images: an .npz under a key of the pixels' and the network's hashes."""

import zipfile
from pathlib import Path

import numpy as np

from cca_ds.files import write_streamed
from cca_ds.metrics.extraction import Features
from cca_ds.metrics.image_sets import Images


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
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            spatial_NS = arrays.get("spatial")
            return Features(arrays["pool"], spatial_NS, arrays["probabilities"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def store_cached(path: Path, key: str, features: Features) -> None:
    """Write the features under their key, atomically. Raises OSError, e.g. when the folder is read-only."""
    arrays = {"pool": features.pool_ND, "probabilities": features.probabilities_NK}
    if features.spatial_NS is not None:
        arrays["spatial"] = features.spatial_NS
    write_streamed(path, lambda file: np.savez(file, key=np.array(key), **arrays))
