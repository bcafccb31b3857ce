"""A tokenizer that is added by registering its record alone, without a change to the package."""

import pytest
import torch

from cca_ds.checkpoints.load_model import Source, load_model
from cca_ds.cluster.launch import Ranks
from cca_ds.config.schema import Model, Tokenizer
from cca_ds.data.codes import CodeTable
from cca_ds.data.table_files import write_codes
from cca_ds.models import WeightsError, create_model, save_weights
from cca_ds.sampling.drawing import decode
from cca_ds.vq import TOKENIZERS, create_tokenizer
from tests.support.toys import TOY_TOKENIZER

ALONE = Ranks(0, 0, 1, 1, 0, "here", "cpu", "alone")


@pytest.fixture(autouse=True)
def registered():
    with TOKENIZERS.temporarily(TOY_TOKENIZER):
        yield
    assert TOY_TOKENIZER.name not in TOKENIZERS


def test_built_encodes_and_decodes():
    tokenizer = create_tokenizer("toy-levels", levels=5, side=4)
    codes_BL = torch.randint(5, (3, 16))
    images_BCHW = tokenizer.decode(codes_BL)
    assert images_BCHW.shape == (3, 1, 4, 4) and torch.equal(tokenizer.encode(images_BCHW), codes_BL)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert torch.equal(decode(tokenizer, codes_BL), images_BCHW)


def test_its_weights_load_and_have_a_hash(tmp_path):
    tokenizer = create_tokenizer("toy-levels")
    tokenizer.values.data += 0.1
    save_weights(tokenizer, tmp_path / "t.safetensors")
    again = create_tokenizer("toy-levels", weights=tmp_path / "t.safetensors")
    assert again.hash() == tokenizer.hash() != create_tokenizer("toy-levels").hash()
    assert again.half().hash() == tokenizer.hash()
    with pytest.raises(WeightsError, match=r"1 mis-shaped: values is \[17\] in the file and \[5\]"):
        create_tokenizer("toy-levels", weights=tmp_path / "t.safetensors", levels=5)


def test_unknown_options_and_names_are_one_line():
    with pytest.raises(ValueError, match="the toy-levels tokenizer has no depth=3: its options are levels, side"):
        create_tokenizer("toy-levels", depth=3)
    with pytest.raises(ValueError, match="did you mean toy-levels"):
        create_tokenizer("toy-level")


def test_its_table_of_codes(tmp_path):
    tokenizer = create_tokenizer("toy-levels")
    codes_BL = tokenizer.encode(torch.rand(6, 1, 8, 8) * 2 - 1)
    write_codes(
        tmp_path / "codes", codes_BL[:, None].numpy(), torch.arange(6).numpy(), vocab_size=tokenizer.vocab_size,
        classes=10, family=TOY_TOKENIZER.family, tokenizer=TOY_TOKENIZER.name, tokenizer_hash=tokenizer.hash(),
    )  # fmt: skip
    table = CodeTable.open(tmp_path / "codes")
    assert (table.manifest.tokenizer, table.manifest.tokenizer_hash) == ("toy-levels", tokenizer.hash())
    assert table.take([2])[0].tolist() == codes_BL[2:3].tolist()


def test_loaded_with_a_model_for_sampling(tmp_path):
    """What `cca_ds.sample` does below its command line."""
    save_weights(create_tokenizer("toy-levels"), tmp_path / "t.safetensors")
    model = create_model("digits", n_layer=1)
    save_weights(model, tmp_path / "m.safetensors")
    section = Tokenizer.model_construct(name="toy-levels", weights=None, options={})
    arguments = (Model(overrides={"n_layer": 1}), section, Source(tmp_path / "m.safetensors"), ALONE, "fp32")
    with pytest.raises(ValueError, match=r"tokenizer\.weights=FILE \(toy-levels's\)"):
        load_model(*arguments)
    section.weights = str(tmp_path / "t.safetensors")
    loaded = load_model(*arguments)
    assert loaded.tokenizer_hash == create_tokenizer("toy-levels").hash()
    with pytest.raises(ValueError, match="toy-levels has 5 codes, model digits 17: they do not belong"):
        section.options, section.weights = {"levels": 5}, str(tmp_path / "t5.safetensors")
        save_weights(create_tokenizer("toy-levels", levels=5), tmp_path / "t5.safetensors")
        load_model(*arguments)
