"""The Hugging Face model card that goes beside exported weights."""

from collections.abc import Mapping

from cca_ds.models.base import Family


def model_card(
    name: str,
    family: Family,
    base_model: str,
    recipe: str,
    metrics: Mapping[str, float] | None = None,
    settings: str = "",
    file: str = "model.safetensors",
    method: tuple[str, str] = ("Condition Contrastive Alignment", "2410.09347"),
) -> str:
    """Text of a README.md with the card's YAML header: base model, licence, papers, recipe, metrics when known.

    Args:
        name: of the model, the card's title.
        family: whose program, paper and licence the card names.
        base_model: name of the checkpoint that was fine-tuned.
        recipe: the run's resolved recipe, YAML.
        file: name of the weights file beside the card.
        metrics: name -> value, for a table.
        settings: how the samples behind the metrics were drawn and scored, one sentence.
        method: name and arXiv number of what it was fine-tuned with.
    """
    title, paper = method
    header = [
        "---",
        f"license: {family.licence}",
        f"base_model: {base_model}",
        "pipeline_tag: unconditional-image-generation",
        f"tags: [image-generation, autoregressive, {title.lower().replace(' ', '-')}]",
        "---",
    ]
    body = [
        f"# {name}",
        "",
        f"{base_model} ([{family.title}]({family.program}), "
        f"[arXiv {family.paper}](https://arxiv.org/abs/{family.paper})), fine-tuned with",
        f"{title} ([arXiv {paper}](https://arxiv.org/abs/{paper})) to sample well",
        "without guidance.",
        "",
        "## Use",
        "",
        "```python",
        "import torch",
        "",
        "import cca_ds  # https://arxiv.org/abs/2410.09347 on DeepSpeed",
        "from cca_ds.sampling import generate",
        "",
        f'model, tokenizer, recipe = cca_ds.load("{file}", tokenizer="TOKENIZER_WEIGHTS")',
        "images = tokenizer.decode(generate(model, torch.arange(4), seed=0))  # [4, C, H, W] in [-1, 1]",
        "```",
        "",
        f"or `cca-sample --weights {file} --output samples --grid`.",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.rstrip(),
        "```",
    ]
    if metrics:
        rows = [f"| {key} | {value:g} |" for key, value in metrics.items()]
        body += ["", "## Metrics", "", "| metric | value |", "| --- | --- |", *rows, "", settings]
    return "\n".join([*header, "", *body, ""])
