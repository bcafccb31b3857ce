"""Names of models in the original programs, in the form that presets and recipes have here."""

import re


def canonical_model(name: str) -> str:
    """A model's name as presets are written: "GPT-3B" and "c2i_3B" -> "llamagen-3b", "d30" and "VAR_d30" -> "var-d30".

    Only the text changes: lower case, hyphens for underscores and spaces, the originals' prefixes replaced. Any other
    name comes back in lower case with hyphens; whether such a preset exists is not checked.
    """
    plain = re.sub(r"[_\s]+", "-", name.strip().lower())
    plain = re.sub(r"^(gpt|c2i)-", "llamagen-", plain)
    return f"var-{plain}" if re.fullmatch(r"d\d+", plain) else plain
