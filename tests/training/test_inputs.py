"""What is refused before an engine is built: codes of another model or tokenizer, a VAR without its codebook."""

import dataclasses

import pytest

from cca_ds.config.recipes import load_recipe
from cca_ds.data.batches import total_steps
from cca_ds.data.codes import CodeTable
from cca_ds.training.inputs import open_inputs, open_table, open_tokenizer


def test_the_inputs_of_a_run(tmp_path):
    inputs = open_inputs(load_recipe("digits", ["batch.epochs=2"]), tmp_path)
    assert len(inputs.table) == 1797 and inputs.tokenizer.vocab_size == 17
    assert (inputs.steps_per_epoch, inputs.steps) == (56, 112)
    assert inputs.plan.global_size == 32 and inputs.plan.null_class == 10 and inputs.plan.contrastive
    assert not open_inputs(load_recipe("digits", ["loss.name=mle"]), tmp_path).plan.contrastive


def test_the_table_is_opened_once(tmp_path, monkeypatch):
    opened, plain = [], CodeTable.open
    monkeypatch.setattr(CodeTable, "open", lambda folder: opened.append(folder) or plain(folder))
    open_inputs(load_recipe("digits"), tmp_path)
    assert len(opened) == 1


def test_codes_of_another_model_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"64 codes an image from a vocabulary of 17, but llamagen-b takes 576 from 16384"
    ):
        open_table(load_recipe("llamagen-b", ["data.codes=digits"]), tmp_path)
    with pytest.raises(ValueError, match=r"10 classes, but digits has 9"):
        open_table(load_recipe("digits", ["model.overrides.num_classes=9"]), tmp_path)


def test_codes_of_another_tokenizer_are_refused_by_hash(tmp_path, monkeypatch):
    run, plain = load_recipe("digits"), CodeTable.open

    def with_hash(tokenizer_hash):
        table = plain(open_table(run, tmp_path).folder)
        table.manifest = dataclasses.replace(table.manifest, tokenizer_hash=tokenizer_hash)
        return table

    foreign, imported = with_hash("0" * 64), with_hash("")  # imported codes have no hash
    monkeypatch.setattr(CodeTable, "open", lambda folder: foreign)
    with pytest.raises(ValueError, match=r"was made by the tokenizer 000000000000, .* encode again"):
        open_inputs(run, tmp_path)
    monkeypatch.setattr(CodeTable, "open", lambda folder: imported)
    assert open_inputs(run, tmp_path).table is imported


def test_a_var_needs_its_tokenizer():
    def opened(name):
        run = load_recipe(name)
        return open_tokenizer(run.model, run.tokenizer)

    with pytest.raises(ValueError, match=r"var-d16 needs its tokenizer's codebook: set tokenizer\.weights="):
        opened("var-d16")
    assert opened("llamagen-b") is None
    assert opened("digits").vocab_size == 17


def test_steps_of_a_run():
    for overrides, steps in (
        ([], 56),
        (["batch.epochs=2.5"], 140),
        (["batch.max_steps=7"], 7),
        (["batch.epochs=0.001"], 1),
    ):
        assert total_steps(load_recipe("digits", overrides).batch, 56) == steps
