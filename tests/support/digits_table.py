"""The table of scikit-learn's digits, written once per folder."""

from pathlib import Path

from cca_ds.data.codes import CodeTable
from cca_ds.data.table_files import write_codes
from cca_ds.vq import create_tokenizer
from cca_ds.vq.digits import load_digit_images


def digits_table(folder: Path) -> CodeTable:
    """All 1,797 digits with one crop of 64 codes each, in `folder`/digits."""
    folder = folder / "digits"
    if not folder.exists():
        tokenizer = create_tokenizer("digits")
        images_BCHW, labels_B = load_digit_images()
        write_codes(
            folder,
            tokenizer.encode(images_BCHW)[:, None].numpy(),
            labels_B.numpy(),
            vocab_size=tokenizer.vocab_size,
            classes=10,
            family="llamagen",
            tokenizer="digits",
            tokenizer_hash=tokenizer.hash(),
        )
    return CodeTable.open(folder)
