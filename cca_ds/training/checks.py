"""What a well-formed recipe can still get wrong: names that are not registered, and values that contradict a record."""

from __future__ import annotations

import difflib

from cca_ds.alignment.losses import LOSSES, LossSpec
from cca_ds.config.schema import RunConfig
from cca_ds.data.generated import ONLINE
from cca_ds.models.conditioning import CONDITIONINGS, GFT_BETA, LAMBDA, Conditioning
from cca_ds.models.registry import preset_problem
from cca_ds.reference.placements import PLACEMENTS
from cca_ds.vq import TOKENIZERS


def recipe_problems(run: RunConfig) -> list[str]:
    """Every problem in one line each, with the key, the value and the remedy; empty for a recipe that can run.

    A null `model.gft_conditioning` becomes what the loss needs, and then a null `sampling.gft_beta` 1.
    """
    unknown = [
        LOSSES.problem(run.loss.name),
        PLACEMENTS.problem(run.reference.placement),
        TOKENIZERS.problem(run.tokenizer.name),
        preset_problem(run.model.preset),
    ]
    found = [problem for problem in unknown if problem]
    if run.loss.name in LOSSES:
        found += _loss_problems(run) + _generated_problems(run) + _band_problems(run)
        if run.reference.placement in PLACEMENTS and LOSSES[run.loss.name].needs_reference:
            found += _reference_problems(run)
    return found


def require_base(run: RunConfig) -> None:
    """Raise ValueError for a loss that contrasts a model with its frozen copy, from random weights: it learns nothing
    of the images.
    """
    if not LOSSES[run.loss.name].needs_reference or run.model.from_scratch:
        return
    if run.model.reset_classes:
        raise ValueError(
            f"loss.name={run.loss.name} contrasts classes, and model.reset_classes=true draws them at random: train "
            "with loss.name=mle first and start from that run with model.reset_classes=false, or set "
            "model.from_scratch=true for an experiment"
        )
    if run.model.weights is None:
        raise ValueError(
            f"loss.name={run.loss.name} needs a pretrained model: set model.weights=FILE (or a run's folder), train "
            "one first with loss.name=mle, or set model.from_scratch=true for an experiment"
        )


def _loss_problems(run: RunConfig) -> list[str]:
    spec, found = LOSSES[run.loss.name], []
    for name in run.loss.options.keys() - spec.options.keys():
        near = difflib.get_close_matches(name, spec.options, n=1)
        known = f"did you mean {near[0]}?" if near else f"it has {', '.join(spec.options) or 'none'}"
        found.append(f"loss.options.{name}: loss.name={spec.name} has no such option; {known}")
    if run.model.reset_classes and run.model.weights is None:
        found.append("model.reset_classes=true needs model.weights: without them every class is drawn anyway")
    if run.model.gft_conditioning is None and spec.conditioning is GFT_BETA:
        run.model.gft_conditioning = True
    if run.model.gft_conditioning and run.sampling.gft_beta is None:
        run.sampling.gft_beta = 1.0
    elif not run.model.gft_conditioning and run.sampling.gft_beta is not None:
        found.append(f"sampling.gft_beta={run.sampling.gft_beta:g} needs a model trained by GFT: leave it out")
    for kind in CONDITIONINGS:
        able = [name for name, other in LOSSES.items() if _takes(other, kind)]
        if getattr(run.model, kind.switch) and not _takes(spec, kind):
            found.append(f"model.{kind.switch}=true needs loss.name={', '.join(able)}, not {spec.name}")
        elif spec.conditioning is kind and not getattr(run.model, kind.switch):
            found.append(f"loss.name={spec.name} needs model.{kind.switch}=true, not false")
    return found


def _generated_problems(run: RunConfig) -> list[str]:
    generated, name = run.data.generated, run.loss.name
    needed = LOSSES[name].negatives == "generated"
    if needed and generated is None:
        return [
            f"loss.name={name} needs data.generated: a folder that cca-sample --codes filled with images of the "
            f"reference, or {ONLINE}"
        ]
    if not needed and generated is not None:
        able = ", ".join(loss for loss, spec in LOSSES.items() if spec.negatives == "generated")
        return [f"data.generated={generated} needs loss.name={able}, not {name}"]
    if generated != ONLINE or run.reference.placement not in PLACEMENTS:
        return []
    found = []
    if not PLACEMENTS[run.reference.placement].draws:
        able = " or ".join(placement for placement, record in PLACEMENTS.items() if record.draws)
        found.append(f"data.generated={ONLINE} needs reference.placement={able}, not {run.reference.placement}")
    if run.reference.dropout:
        found.append(f"data.generated={ONLINE} needs reference.dropout=false: images are drawn without dropout")
    return found


def _band_problems(run: RunConfig) -> list[str]:
    if run.loss.accuracy_band is None or LOSSES[run.loss.name].compares:
        return []
    able = ", ".join(name for name, spec in LOSSES.items() if spec.compares)
    return [f"loss.accuracy_band needs a loss that compares two sequences ({able}), not loss.name={run.loss.name}"]


def _takes(spec: LossSpec, kind: Conditioning) -> bool:
    """Whether a loss can train a model that is conditioned so."""
    return spec.conditioning is kind or (kind is LAMBDA and spec.lambda_per_pair)


def _reference_problems(run: RunConfig) -> list[str]:
    settings, placement, found = run.reference, PLACEMENTS[run.reference.placement], []
    if settings.dropout and placement.stored:
        others = " or ".join(name for name, other in PLACEMENTS.items() if not other.stored)
        found.append(
            f"reference.dropout=true with reference.placement={placement.name}: a stored log-likelihood "
            f"has one dropout mask only; use placement {others}, or dropout=false"
        )
    if placement.stored and not settings.cache:
        found.append(f"reference.placement={placement.name} needs reference.cache=FOLDER")
    if settings.offload and not placement.can_offload:
        able = " or ".join(name for name, other in PLACEMENTS.items() if other.can_offload)
        found.append(f"reference.offload=true needs reference.placement={able}, not {placement.name}")
    return found
