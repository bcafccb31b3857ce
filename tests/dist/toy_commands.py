"""A command of cca_ds with the toy loss, tokenizer and family registered: toy_commands.py COMMAND ARGUMENT ..."""

import importlib
import sys

from cca_ds.alignment.losses import LOSSES
from cca_ds.models import FAMILIES
from cca_ds.vq import TOKENIZERS
from tests.support.toys import TOY_FAMILY, TOY_LOSS, TOY_TOKENIZER

if __name__ == "__main__":
    LOSSES.register(TOY_LOSS)
    FAMILIES.register(TOY_FAMILY)
    TOKENIZERS.register(TOY_TOKENIZER)
    sys.exit(importlib.import_module(f"cca_ds.{sys.argv[1]}").main(sys.argv[2:]))
