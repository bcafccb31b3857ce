"""What goes beside exported weights: the Hugging Face model card, README.md, and config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import cca_ds
from cca_ds.models.base import CodeModel, Family, shape_of

CARD, CONFIG = "README.md", "config.json"
LIBRARY = "cca_ds"
_NAMED_CLASSES = 10  # in the card's example


def model_card(
    name: str,
    family: Family,
    recipe: str,
    *,
    base: str | None = None,
    method: tuple[str, str | None] = ("Condition Contrastive Alignment", "2410.09347"),
    file: str = "model.safetensors",
    repository: str | None = None,
    tokenizer: str | None = None,
    settings: Mapping[str, Any] | None = None,
    classes: int = 1000,
    class_names: Sequence[str] = (),
    metrics: str | None = None,
) -> str:
    """Text of a README.md with the Hub's YAML header: licence, base model, papers, an example, metrics, recipe.

    Args:
        name: of the model, the card's title.
        family: whose program, paper, licence and published weights the card names.
        recipe: the run's resolved recipe, YAML.
        base: file name of the weights that training started from; None: from random ones. It is the header's
            `base_model` where it is one of the family's published files, since the Hub takes its own models alone.
        method: name of what the model was trained with, and its paper's arXiv number.
        file: name of the weights' file, beside the card.
        repository: on the Hub, USER/NAME, where the weights are pushed to one.
        tokenizer: file name of the tokenizer's weights, which `load` needs; None: it needs none.
        settings: keyword arguments of `generate` that the model is to be sampled with.
        classes: of the model.
        class_names: in their order; none where they are not known.
        metrics: Markdown of the scores and the settings that they were reached with.
    """
    title, paper = method
    published = base is not None and family.hub and re.fullmatch(family.hub_files, base)
    header = [
        "---",
        f"license: {family.licence}",
        f"library_name: {LIBRARY}",
        *([f"base_model: {family.hub}"] if published else []),
        "pipeline_tag: unconditional-image-generation",
        f"tags: [image-generation, autoregressive, {title.lower().replace(' ', '-')}]",
        "---",
    ]
    model = f"[{family.title}]({family.program}) ({_arxiv(family.paper)})"
    start = f"`{base}`, a {model} model, fine-tuned" if base else f"A {model} model, trained from random weights"
    of_paper = f" ({_arxiv(paper)})" if paper else ""
    sections = {
        "Use": _example(file, repository, tokenizer, settings or {}, classes, class_names),
        "Metrics": metrics,
        "Recipe": f"```yaml\n{recipe.rstrip()}\n```",
    }
    body = [f"# {name}", f"{start} with {title}{of_paper}."]
    body += [f"## {heading}\n\n{text.strip()}" for heading, text in sections.items() if text]
    return "\n".join(header) + "\n\n" + "\n\n".join(body) + "\n"


def _arxiv(number: str) -> str:
    return f"[arXiv {number}](https://arxiv.org/abs/{number})"


def _example(file: str, repository: str | None, tokenizer: str | None, settings: Mapping[str, Any], classes: int,
             class_names: Sequence[str]) -> str:  # fmt: skip
    """Lines that load the weights and draw an image of each of the first classes, in Python and on a command line."""
    drawn = min(classes, _NAMED_CLASSES)
    names = f"  # {', '.join(class_names[:drawn])}" if class_names else ""
    weights = f'hf_hub_download("{repository}", "{file}")' if repository else f'"{file}"'
    argument = f', tokenizer="{tokenizer}"' if tokenizer else ""
    keywords = "".join(f", {key}={value!r}" for key, value in settings.items())
    download = ["from huggingface_hub import hf_hub_download"] if repository else []
    flag = f" --set tokenizer.weights={tokenizer}" if tokenizer else ""
    return "\n".join(
        [
            "```python",
            "import torch",
            *download,
            "from PIL import Image",
            "",
            "import cca_ds",
            "from cca_ds.data.image_grid import image_grid",
            "from cca_ds.sampling import generate",
            "",
            f"model, tokenizer, recipe = cca_ds.load({weights}{argument})",
            f"labels = torch.arange({drawn}){names}",
            f"codes = generate(model, labels{keywords})",
            "with torch.no_grad():",
            "    images = tokenizer.decode(codes)  # [B, C, H, W] in [-1, 1]",
            f'Image.fromarray(image_grid(images, columns={drawn}).squeeze()).save("samples.png")',
            "```",
            "",
            "```bash",
            f"cca-sample --weights {file} --output samples --grid{flag}",
            "```",
        ]
    )


def hub_config(module: CodeModel, preset: str, tokenizer: Mapping[str, Any], class_names: Sequence[str] = ()) -> str:
    """Text of a config.json: the model's shape, its tokenizer, and the names of its classes where they are known.

    Args:
        module: the model; on the meta device, too.
        preset: its name in recipes.
        tokenizer: name, file name and options.
        class_names: in their order.
    """
    config = {
        "library_name": LIBRARY,
        "model_type": module.family,
        "preset": preset,
        **shape_of(module),
        "sequence_length": module.sequence_length,
        "tokenizer": dict(tokenizer),
        **({"id2label": {str(label): name for label, name in enumerate(class_names)}} if class_names else {}),
        "cca_ds_version": cca_ds.__version__,
    }
    return json.dumps(config, indent=2) + "\n"
