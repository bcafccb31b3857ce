"""What is refused before an engine is built: codes of another model or tokenizer, a VAR without its codebook."""

import dataclasses

import pytest

from cca_ds.config.recipes import load_recipe
from cca_ds.training.inputs import check_tokenizer, open_table, open_tokenizer, total_steps
from cca_ds.vq import create_tokenizer


def test_codes_of_another_model_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"64 codes an image from a vocabulary of 17, but llamagen-b takes 576 from 16384"
    ):
        open_table(load_recipe("llamagen-b", ["data.codes=digits"]), tmp_path)
    with pytest.raises(ValueError, match=r"10 classes, but digits knows 9"):
        open_table(load_recipe("digits", ["model.overrides.num_classes=9"]), tmp_path)


def test_codes_of_another_tokenizer_are_refused_by_hash(tmp_path):
    run, tokenizer = load_recipe("digits"), create_tokenizer("digits")
    table = open_table(run, tmp_path)
    check_tokenizer(run, table, tokenizer)
    check_tokenizer(run, table, None)
    table.manifest = dataclasses.replace(table.manifest, tokenizer_hash="0" * 64)
    with pytest.raises(ValueError, match=r"was made by the tokenizer 000000000000, .* encode again"):
        check_tokenizer(run, table, tokenizer)
    table.manifest = dataclasses.replace(table.manifest, tokenizer_hash="")  # imported codes do not know
    check_tokenizer(run, table, tokenizer)


def test_a_var_needs_its_tokenizer():
    with pytest.raises(ValueError, match=r"var-d16 needs its tokenizer's codebook: set tokenizer\.weights="):
        open_tokenizer(load_recipe("var-d16"))
    assert open_tokenizer(load_recipe("llamagen-b")) is None
    assert open_tokenizer(load_recipe("digits")).vocab_size == 17


def test_steps_of_a_run():
    assert total_steps(load_recipe("digits"), 56) == 56
    assert total_steps(load_recipe("digits", ["batch.epochs=2.5"]), 56) == 140
    assert total_steps(load_recipe("digits", ["batch.max_steps=7"]), 56) == 7
    assert total_steps(load_recipe("digits", ["batch.epochs=0.001"]), 56) == 1
