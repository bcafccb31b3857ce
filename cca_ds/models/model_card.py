"""The Hugging Face model card that goes beside exported weights."""

from collections.abc import Mapping

_BASE = {
    "llamagen": ("LlamaGen", "https://github.com/FoundationVision/LlamaGen", "2406.06525"),
    "var": ("VAR", "https://github.com/FoundationVision/VAR", "2404.02905"),
}


def model_card(
    name: str,
    family: str,
    base_model: str,
    recipe: str,
    metrics: Mapping[str, float] | None = None,
    licence: str = "mit",
) -> str:
    """Text of a README.md with the card's YAML header: base model, licence, papers, recipe, metrics when
    known.

    `recipe` is the run's resolved YAML, `base_model` the name of the checkpoint that was fine-tuned. Both
    families' programs and weights are under the MIT licence.
    """
    title, program, paper = _BASE[family]
    header = [
        "---",
        f"license: {licence}",
        f"base_model: {base_model}",
        "pipeline_tag: unconditional-image-generation",
        "tags: [image-generation, autoregressive, condition-contrastive-alignment]",
        "---",
    ]
    body = [
        f"# {name}",
        "",
        f"{base_model} ([{title}]({program}), [arXiv {paper}](https://arxiv.org/abs/{paper})), fine-tuned with",
        "Condition Contrastive Alignment ([arXiv 2410.09347](https://arxiv.org/abs/2410.09347)) to sample well",
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
