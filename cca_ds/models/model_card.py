"""The Hugging Face model card that goes beside exported weights."""

from collections.abc import Mapping

from cca_ds.models.base import Family


def model_card(
    name: str,
    family: Family,
    base_model: str,
    recipe: str,
    metrics: Mapping[str, float] | None = None,
    method: tuple[str, str] = ("Condition Contrastive Alignment", "2410.09347"),
) -> str:
    """Text of a README.md with the card's YAML header: base model, licence, papers, recipe, metrics when known.

    Args:
        name: of the model, the card's title.
        family: whose program, paper and licence the card names.
        base_model: name of the checkpoint that was fine-tuned.
        recipe: the run's resolved recipe, YAML.
        metrics: name -> value, for a table.
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
        "## Recipe",
        "",
        "```yaml",
        recipe.rstrip(),
        "```",
    ]
    if metrics:
        rows = [f"| {key} | {value:g} |" for key, value in metrics.items()]
        body += ["", "## Metrics", "", "| metric | value |", "| --- | --- |", *rows]
    return "\n".join([*header, "", *body, ""])
