"""Score a set of images against a reference, on one rank or many: images -> features -> scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed

from cca_ds.console import progress, say
from cca_ds.metrics.extraction import Extractor, Features, ScoringNetwork, extract, join
from cca_ds.metrics.feature_cache import cache_key, cache_path, load_cached, store_cached
from cca_ds.metrics.image_sets import Images, ImagesError, open_images, read_record, read_statistics
from cca_ds.metrics.scores import MINIMUM, Reference, Scores, order_note, reference_of, score
from cca_ds.untrusted import decoding


@dataclass(frozen=True)
class RankGroup:
    """The ranks that extract features together; alone without a process group.

    Attributes:
        group: of all ranks, with a backend that sends objects between CPUs (gloo); None for a single process.
    """

    rank: int = 0
    size: int = 1
    group: torch.distributed.ProcessGroup | None = None

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; collective."""
        if self.group is None:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks by rank, on rank 0; None on the others; collective."""
        if self.group is None:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        torch.distributed.gather_object(value, values, dst=0, group=self.group)
        return values


@dataclass(frozen=True)
class FeatureSource:
    """Features of whole image sets, from the cache beside them or computed by all ranks together.

    Attributes:
        ranks: every one of them calls `features` with the same images.
        extractor: the network.
        batch_size: images per forward.
        cached: read and write the cache beside the images.
    """

    ranks: RankGroup
    extractor: Extractor
    batch_size: int
    cached: bool = True

    def features(self, images: Images, title: str) -> Features | None:
        """Features of all images, on rank 0; None on the others. Collective.

        Args:
            images: the set.
            title: of the set, for the progress bar.

        Raises:
            ImagesError: an image cannot be read, or the network cannot score images of this size.
        """
        first, found, key = self.ranks.rank == 0, None, ""
        if first and self.cached:
            key = cache_key(images, self.extractor.identity)
            found = load_cached(cache_path(images), key)
        if self.ranks.broadcast(found is not None):
            if first:
                say(f"{title}: features of {images.count} images from {cache_path(images).name}")
            return found
        part = extract(
            images,
            self.extractor,
            self.batch_size,
            lambda batches, total: progress(batches, title, total, show=first),
            self.ranks.rank,
            self.ranks.size,
        )
        parts = self.ranks.gather(part)
        if self.ranks.broadcast(parts is not None and all(part is None for part in parts)):
            raise ImagesError(
                f"{images.path}: none of the {images.count} images can be read: replace them, or name another source"
            )
        if parts is None:
            return None
        features = join(parts)
        if self.cached:
            try:
                store_cached(cache_path(images), key, features)
            except OSError as error:
                say(f"warning: features are not cached beside the images ({error})")
        return features


def find_reference(path: str | None, network: ScoringNetwork, source: FeatureSource) -> Reference | None:
    """The statistics of the real images, on rank 0; None on the others. Collective.

    Statistics stored in the file are preferred to those of its images, as in the ADM evaluator; the images then serve
    precision and recall.

    Args:
        path: an .npz or folder of real images, or an .npz of statistics; None: the package's own real images.
        network: whose real images those are.
        source: of features.

    Raises:
        ImagesError: no path and no real images in the package, or a path without images and statistics.
    """
    if path is None:
        if network.real_features is None:
            raise ImagesError("--reference is missing: real images or their statistics, an .npz or a folder")
        return reference_of(network.real_features())
    stored = read_statistics(path)
    try:
        images = open_images(path)
    except ImagesError:
        if stored is None:
            raise
        return Reference(*stored, features_ND=None)
    features = source.features(images, "reference")
    if features is None:
        return None
    return Reference(*stored, features.pool_ND) if stored else reference_of(features)


def reference_notes(path: str | None, images: Images, extractor: Extractor) -> list[str]:
    """What sets scores against a reference of `evaluate --make_reference` apart from others.

    Raises:
        ImagesError: another network made its statistics.
    """
    record = read_record(path) if path is not None else {}
    with decoding(f"{path}: its record `about` cannot be read", ImagesError, "make it again with --make_reference"):
        made_by, side = record.get("protocol", {}).get("network_identity"), record.get("side")
    if made_by not in (None, extractor.identity):
        raise ImagesError(
            f"{path}: its statistics are of another FID network ({made_by}) than this one ({extractor.identity}): make "
            "it again, or give the same --inception_weights"
        )
    if side in (None, images.shape[0]):
        return []
    return [f"the reference has images of {side} pixels, the samples of {images.shape[0]}: FID sees the difference"]


def evaluate_images(
    images: Images, reference_path: str | None, network: ScoringNetwork, source: FeatureSource, device: str
) -> Scores | None:
    """All metrics of the images, on rank 0; None on the others. Collective.

    Args:
        images: the samples.
        reference_path: see `find_reference`.
        network: of the samples' tokenizer.
        source: of features, by this network.
        device: where distances for precision and recall are computed.

    Raises:
        ValueError: images, reference or their number cannot be scored.
    """
    labels_N = images.labels_N if network.label_classes else None
    if labels_N is not None and labels_N.max() >= network.label_classes:
        raise ImagesError(
            f"{images.path}: label {labels_N.max()} is outside the network's classes 0..{network.label_classes - 1}"
        )
    if images.count < MINIMUM:
        raise ImagesError(f"{images.path}: {images.count} image: a Frechet distance needs at least {MINIMUM}")
    notes = reference_notes(reference_path, images, source.extractor)
    reference = find_reference(reference_path, network, source)
    samples = source.features(images, "samples")
    if source.ranks.rank != 0:
        return None
    assert reference is not None and samples is not None
    scores = score(samples, reference, labels_N, device=device)
    return Scores(scores.values, [*scores.notes, *notes, *order_note(images.labels_N)])
