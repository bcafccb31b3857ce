"""Weights in every published layout, both ways, and one clear line for each file that cannot be taken."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

import cca_ds.vq  # noqa: F401 (registers the tokenizers' files)
from cca_ds.models import (
    FAMILIES,
    LlamaGenConfig,
    WeightsError,
    check_weights,
    create_model,
    expected_shapes,
    fix_lambda,
    load_weights,
    read_weights,
    save_weights,
)
from cca_ds.models.model_card import model_card
from cca_ds.models.var import masks

TINY = LlamaGenConfig(n_layer=2, n_head=4, dim=64, vocab_size=64, sequence_length=16, num_classes=10)


@pytest.fixture
def published(golden) -> dict[str, torch.Tensor]:
    """The recorded weights, as the published file has them."""
    return torch.load(golden / "llamagen_ddp.pt", weights_only=True)["model"]


def random_model(config=TINY, **overrides) -> nn.Module:
    torch.manual_seed(3)
    model = create_model(config, **overrides)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def assert_bit_equal(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(own[key], value.to(own[key].dtype)), key


LAYOUTS = {
    "flat": lambda state: state,
    "model": lambda state: {"model": state},
    "module": lambda state: {"module": state, "global_steps": 3},
    "state_dict": lambda state: {"state_dict": state, "epoch": 1},
    "trainer": lambda state: {"epoch": 1, "iter": 0, "trainer": state, "args": {"depth": 16}},
    "trainer.var_wo_ddp": lambda state: {"trainer": {"config": {"patch_nums": (1, 2)}, "var_wo_ddp": state}},
    "compiled": lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
    "ddp of compiled": lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    "with freqs_cis": lambda state: {"model": {**state, "freqs_cis": torch.zeros(17, 8, 2)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_loads(published, tmp_path, layout):
    torch.save(LAYOUTS[layout](published), tmp_path / "weights.pt")
    model = create_model(TINY)
    load_weights(model, tmp_path / "weights.pt")
    assert_bit_equal(model, published)


def test_the_recorded_files_load(golden, published):
    for name in ("llamagen_ddp.pt", "llamagen_fsdp.pt", "llamagen_after10.pt"):
        model = create_model(TINY)
        load_weights(model, golden / name)
        assert torch.equal(model.state_dict()["norm.weight"], published["norm.weight"].float()) == ("after" not in name)


def test_the_old_pickle_format_loads(published, tmp_path):
    torch.save({"model": published}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    model = create_model(TINY)
    load_weights(model, tmp_path / "old.pt")
    assert_bit_equal(model, published)


def test_a_module_on_the_meta_device_takes_the_files_tensors(published, golden):
    with torch.device("meta"):
        model = create_model(TINY)
    load_weights(model, golden / "llamagen_ddp.pt")
    assert_bit_equal(model, published)
    codes = torch.randint(64, (2, 16))
    assert torch.isfinite(model.float().eval()(codes, torch.tensor([0, 10]))).all()


@pytest.mark.parametrize("layout", ["llamagen", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loads_bit_equal(published, tmp_path, layout, dtype):
    model = random_model().to(dtype)
    path = tmp_path / "deeper" / "weights.bin"
    save_weights(model, path, layout=layout)
    assert os.listdir(path.parent) == ["weights.bin"]
    again = create_model(TINY).to(dtype)
    load_weights(again, path)
    assert_bit_equal(again, model.state_dict())
    assert read_weights(path)["output.weight"].dtype == dtype
    # the original's strict loading: its keys, its shapes, no more and no fewer
    assert {key: value.shape for key, value in read_weights(path).items()} == {
        key: value.shape for key, value in published.items()
    }


def test_the_llamagen_layout_is_wrapped_as_the_program_expects_of_each_size(tmp_path, monkeypatch):
    model = random_model()
    save_weights(model, tmp_path / "b.pt", layout="llamagen")
    assert list(torch.load(tmp_path / "b.pt", weights_only=True)) == ["model"]
    model.config = replace(TINY, n_layer=24, dim=3200, n_head=32)  # 3B is published flat
    save_weights(model, tmp_path / "3b.pt", layout="llamagen")
    assert "output.weight" in torch.load(tmp_path / "3b.pt", weights_only=True)


def test_saving_takes_given_tensors_and_casts(tmp_path):
    model = random_model()
    state = {key: value + 1 for key, value in model.state_dict().items()}
    save_weights(model, tmp_path / "half.safetensors", state=state, dtype=torch.float16)
    read = read_weights(tmp_path / "half.safetensors")
    assert all(torch.equal(read[key], value.half()) for key, value in state.items())


def test_a_view_is_saved_without_what_is_behind_it(tmp_path):
    model = random_model()
    huge = torch.zeros(1_000_000)
    state = dict(model.state_dict(), **{"norm.weight": huge[:64]})
    save_weights(model, tmp_path / "view.pt", layout="llamagen", state=state)
    assert (tmp_path / "view.pt").stat().st_size < 1_500_000


def test_safetensors_carry_metadata_and_a_model_card(tmp_path):
    model = random_model()
    card = model_card(
        "digits-cca", FAMILIES["llamagen"], "name: digits\n", base="c2i_B_384.pt", metrics="| FID | 1.25 |"
    )
    metadata = {"recipe": "name: digits", "step": "56"}
    save_weights(model, tmp_path / "a.safetensors", metadata=metadata, beside={"README.md": card})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["recipe"] == "name: digits" and header["step"] == "56"
    assert (header["family"], header["sequence_length"], header["dim"]) == ("llamagen", "16", "64")
    text = (tmp_path / "README.md").read_text()
    for part in ("license: mit", "base_model: FoundationVision/LlamaGen", "`c2i_B_384.pt`", "2410.09347",
                 "name: digits", "| FID | 1.25 |"):  # fmt: skip
        assert part in text
    assert "Metrics" not in model_card("x", FAMILIES["var"], "name: x")


def test_lambda_embedding_is_saved_and_a_base_model_fits_under_it(golden, tmp_path):
    conditioned = random_model(lambda_conditioning=True)
    save_weights(conditioned, tmp_path / "lambda.pt", layout="llamagen")
    again = create_model(TINY, lambda_conditioning=True)
    load_weights(again, tmp_path / "lambda.pt")
    assert_bit_equal(again, conditioned.state_dict())
    load_weights(create_model(TINY, lambda_conditioning=True), golden / "llamagen_ddp.pt")
    with pytest.raises(WeightsError, match="conditioned on lambda: set lambda_conditioning=true"):
        load_weights(create_model(TINY), tmp_path / "lambda.pt")
    state = conditioned.state_dict()
    del state["lambda_embedding.fc2.bias"]
    with pytest.raises(WeightsError, match=r"1 missing: lambda_embedding\.fc2\.bias$"):
        check_weights(expected_shapes(again), state, "a file")


def test_the_published_layout_of_guidance_free_training(golden, tmp_path):
    """`{"model": state}` with the embedding's keys, and flat as of 3B; a base model fits under it."""
    state = torch.load(golden / "gft_weights.pt", weights_only=True)["model"]
    conditioned = create_model(TINY, gft_conditioning=True)
    torch.save({key: value for key, value in state.items()}, tmp_path / "flat.pt")
    for path in (golden / "gft_weights.pt", tmp_path / "flat.pt"):
        load_weights(conditioned, path)
        assert_bit_equal(conditioned, {key: value.float() for key, value in state.items()})
    save_weights(conditioned, tmp_path / "again.pt", layout="llamagen")
    again = torch.load(tmp_path / "again.pt", weights_only=True)["model"]
    assert again.keys() - {"freqs_cis"} == state.keys() - {"freqs_cis"}
    assert {key for key in again if key.startswith("t_embedder")} == {
        f"t_embedder.mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }
    assert all(torch.equal(again[key], value.float()) for key, value in state.items() if key in again)
    load_weights(create_model(TINY, gft_conditioning=True), golden / "llamagen_ddp.pt")
    with pytest.raises(WeightsError, match="conditioned on GFT's beta: set gft_conditioning=true"):
        load_weights(create_model(TINY), golden / "gft_weights.pt")


@pytest.mark.parametrize("preset", ["llamagen-3b", "llamagen-l"])
def test_a_guidance_free_model_is_laid_out_as_its_size_is_published(preset):
    with torch.device("meta"):
        module = create_model(preset, gft_conditioning=True)
    content = FAMILIES["llamagen"].layouts["llamagen"](module.config, dict(module.state_dict()))
    tensors = content if preset == "llamagen-3b" else content["model"]
    width = module.config.dim
    assert tensors["t_embedder.mlp.0.weight"].shape == (width, 256) and "output.weight" in tensors


@torch.no_grad()
def test_one_lambda_of_many_is_an_ordinary_model():
    conditioned, plain = random_model(lambda_conditioning=True).eval(), create_model(TINY).eval()
    codes, labels = torch.randint(64, (3, 16)), torch.tensor([0, 9, 10])
    for value in (1.0, 1000.0):
        plain.load_state_dict(fix_lambda(conditioned.state_dict(), value))
        expected = conditioned.logits(codes, labels, torch.full((3,), value).log())
        torch.testing.assert_close(plain.logits(codes, labels), expected, atol=1e-4, rtol=0)
    assert not torch.equal(fix_lambda(conditioned.state_dict(), 1.0)["cls_embedding.embedding_table.weight"],
                           plain.state_dict()["cls_embedding.embedding_table.weight"])  # fmt: skip


def test_missing_unexpected_and_misshaped_keys_are_named(published, tmp_path):
    state = dict(published)
    del state["layers.1.attention.wo.weight"], state["norm.weight"]
    state["layers.2.attention.wo.weight"] = torch.zeros(64, 64)
    state["output.weight"] = torch.zeros(64, 32)
    torch.save(state, tmp_path / "bad.pt")
    model = random_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, tmp_path / "bad.pt")
    assert str(caught.value) == (
        f"weights file {tmp_path / 'bad.pt'} does not fit the model: "
        "2 missing: layers.1.attention.wo.weight, norm.weight; "
        "1 unexpected: layers.2.attention.wo.weight; "
        "1 mis-shaped: output.weight is [64, 32] in the file and [64, 64] in the model"
    )
    assert_bit_equal(model, before)  # nothing half-loaded


def test_hundreds_of_keys_are_counted_and_the_first_few_named(published, tmp_path):
    """The checkpoint of a two-layer model given to one of fifty layers, and of another width."""
    torch.save({"model": published}, tmp_path / "two_layers.pt")
    with torch.device("meta"):
        deep, wide = create_model(TINY, n_layer=50), create_model(TINY, dim=128)
    with pytest.raises(WeightsError) as caught:
        load_weights(deep, tmp_path / "two_layers.pt")
    parts = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
    named = ", ".join(f"layers.2.{part}.weight" for part in parts)
    assert str(caught.value).endswith(f"does not fit the model: 336 missing: {named} and 331 more")
    with pytest.raises(WeightsError) as caught:
        load_weights(wide, tmp_path / "two_layers.pt")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    assert "18 mis-shaped: " in message and message.count(" in the file and ") == 5
    assert message.endswith(" and 13 more")


class Code:
    """Unpickling this would run a command."""

    def __reduce__(self):
        return os.system, ("touch /nonexistent/should-not-run",)


def bad_file(name: str, golden, tmp_path):
    path = tmp_path / "file.pt"
    whole = (golden / "llamagen_ddp.pt").read_bytes()
    save_weights(random_model(), tmp_path / "whole.safetensors")
    whole_safetensors = (tmp_path / "whole.safetensors").read_bytes()
    damaged = {
        "empty": b"",
        "truncated": whole[:-1000],
        "half": whole[:4000],
        "text": b"404 not found",
        "truncated safetensors": whole_safetensors[:-1000],
        "truncated header": whole_safetensors[:50],
    }
    if name in damaged:
        path.write_bytes(damaged[name])
    elif name == "code":
        torch.save({"model": {"output.weight": torch.zeros(2)}, "args": Code()}, path)
    elif name == "old code":
        torch.save({"args": Code()}, path, _use_new_zipfile_serialization=False)
    elif name == "no tensors":
        torch.save({"epoch": 3}, path)
    return tmp_path if name == "folder" else path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist: check the path"),
        ("folder", "is a folder: name the file in it"),
        ("empty", "is empty: copy it again"),
        ("truncated", r"is truncated or damaged \([\d,]+ bytes\): copy it again"),
        ("half", "is truncated or damaged"),
        ("text", "is truncated or damaged"),
        ("truncated safetensors", "is truncated or damaged"),
        ("truncated header", "is truncated or damaged"),
        ("code", r"holds pickled code \(\w+\.system\), not tensors alone, and was not loaded"),
        ("old code", r"holds pickled code \(\w+\.system\), not tensors alone, and was not loaded"),
        ("no tensors", "holds no tensors under any of the published layouts"),
    ],
)
def test_a_file_that_cannot_be_read_gets_one_clear_line(golden, tmp_path, name, message):
    path = bad_file(name, golden, tmp_path)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(create_model(TINY), path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_the_other_familys_file_is_refused(golden, tmp_path):
    model = create_model(TINY)
    with pytest.raises(WeightsError, match="holds a VAR transformer, but a LlamaGen transformer is needed"):
        load_weights(model, golden / "var_depth2.pth")
    with pytest.raises(WeightsError, match="holds LlamaGen's tokenizer, but a LlamaGen transformer"):
        load_weights(model, golden / "vq16_ch32.pt")
    with pytest.raises(WeightsError, match="layout 'var' is for var models, this one is llamagen"):
        save_weights(model, tmp_path / "x.pth", layout="var")
    with pytest.raises(WeightsError, match="layout 'gguf' is unknown"):
        save_weights(model, tmp_path / "x.pth", layout="gguf")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_size_says_what_differs(golden, published, tmp_path):
    with pytest.raises(WeightsError, match="which has 99 codes in the vocabulary, the file 64: 2 mis-shaped"):
        load_weights(create_model(TINY, vocab_size=99), golden / "llamagen_ddp.pt")
    with pytest.raises(WeightsError, match="which has 6 classes, the null class among them, the file 11"):
        load_weights(create_model(TINY, num_classes=5), golden / "llamagen_ddp.pt")
    larger = create_model(TINY, sequence_length=36)
    torch.save({"model": {**published, "freqs_cis": torch.zeros(17, 8, 2)}}, tmp_path / "a.pt")
    save_weights(random_model(), tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        with pytest.raises(WeightsError, match="is for 16 codes an image, the model has 36"):
            load_weights(larger, tmp_path / name)


def test_an_unwritable_place_gets_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"cannot write weights to .*file/x\.pt: "):
        save_weights(random_model(), tmp_path / "file" / "x.pt", layout="llamagen")

    def full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    save_weights(random_model(), tmp_path / "kept.safetensors")
    whole = (tmp_path / "kept.safetensors").read_bytes()
    monkeypatch.setattr("cca_ds.models.weights.save_safetensors", full)
    with pytest.raises(WeightsError, match=r"cannot write weights to .*: No space left on device"):
        save_weights(random_model(), tmp_path / "kept.safetensors")
    assert (tmp_path / "kept.safetensors").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept.safetensors"]


def test_sharded_parameters_are_checked_by_their_full_shape():
    model = create_model(TINY)
    whole = expected_shapes(model)
    for name, parameter in model.named_parameters():
        parameter.ds_shape = whole[name]
        parameter.data = torch.empty(0)
    assert expected_shapes(model) == whole


def test_var_masks_equal_the_recorded_ones(golden, golden_configs):
    recorded = torch.load(golden / "var_depth2.pth", weights_only=True)
    for key, value in masks(golden_configs["var"]["patch_nums"]).items():
        assert torch.equal(value, recorded[key]) and value.dtype == recorded[key].dtype


def spoilt(kind: str, state: dict) -> object:
    name, tensor = "norm.weight", state["norm.weight"]
    if kind == "itself":
        whole: dict = {}
        whole["model"] = whole
        return whole
    if kind == "nested":
        return {"model": {"module": {"state_dict": {"trainer": {"var_wo_ddp": {"model": {"model": state}}}}}}}
    if kind == "integer key":
        return state | {7: tensor}
    return state | {
        name: {
            "int64": tensor.long(),
            "bool": tensor > 0,
            "complex": tensor.to(torch.complex64),
            "nan": tensor.clone().index_fill_(0, torch.tensor([3]), torch.nan),
            "inf": tensor.clone().index_fill_(0, torch.tensor([0]), torch.inf),
            "sparse": tensor.to_sparse(),
            "quantized": torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
            "meta": tensor.to("meta"),
        }[kind]
    }


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("itself", "holds no tensors"),
        ("nested", "holds no tensors"),
        ("integer key", "a tensor 7, which is no text"),
        ("int64", "norm.weight is int64"),
        ("bool", "norm.weight is bool"),
        ("complex", "norm.weight is complex64"),
        ("nan", "1 with values that are no numbers: norm.weight"),
        ("inf", "1 with values that are no numbers: norm.weight"),
        ("sparse", "norm.weight is sparse"),
        ("quantized", "norm.weight is quantized"),
        ("meta", "norm.weight has a shape and no values"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path, kind, said):
    module = create_model("digits", n_layer=1, n_head=2, dim=32, multiple_of=16)
    path = tmp_path / "w.pt"
    torch.save(spoilt(kind, dict(module.state_dict())), path)
    with pytest.raises(WeightsError) as caught:
        load_weights(module, path)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="is a pipe or a device"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("length", [2**62, 2**63 - 1, 2**27 - 1, 0, 1])
def test_a_header_of_any_length(tmp_path, length):
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(WeightsError):
        read_weights(tmp_path / "w.safetensors")
