"""Recipes and overrides that are wrong: each is one line with the key or the file, and nothing odd is accepted."""

import pytest

from cca_ds.config.recipes import ConfigError, load_recipe
from cca_ds.config.reference import config_lines

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)


def problems(*overrides: str, recipe: str = "digits") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, list(overrides))
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.beta=inf", "loss.beta"),
        ("loss.beta=.nan", "finite"),
        ("loss.beta=nan", "finite"),
        ("loss.beta=true", "true and false are no numbers"),
        ("batch.global_size=on", "true and false are no numbers"),
        ("batch.epochs=inf", "batch.epochs"),
        ("batch.epochs=1e9", "less than or equal to 100000"),
        ("batch.global_size=1e30", "batch.global_size"),
        ("batch.global_size=2.5", "integer"),
        ("data.prefetch=1e9", "less than or equal to 1024"),
        ("data.workers=100000", "less than or equal to 256"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.betas=[0.9, true]", "optimizer.betas"),
        ("seed=-1", "seed"),
        ("seed=99999999999999999999", "seed"),
        ("distributed.timeout_seconds=inf", "distributed.timeout_seconds"),
        ("name=../../x", "without slashes"),
        ("name=/abs", "without slashes"),
        ("name=..", "does not begin with a dot"),
        ("name=" + "x" * 101, "without slashes"),
        ("name=", "name"),
        ("name=a\tb", "without slashes"),
        ("balance.speeds={H100: inf}", "finite"),
        ("balance.speeds={H100: 0}", "greater than 0"),
        ("loss.options={margin: .inf}", "finite"),
        ("sampling.temperature=0", "greater than 0"),
        ("loss=3", "loss"),
        ("loss.beta.x=3", "beta is a value"),
        ("=3", "write KEY.PATH=VALUE"),
        ("loss.beta", "write KEY.PATH=VALUE"),
        ("loss.beta=" + "9" * 5000, "loss.beta"),
        ("model.overrides=" + "[" * 3000, "model.overrides"),
        ("logging.every_steps=2024-01-01", "logging.every_steps"),
        ("precision=fp8", "precision"),
    ],
    ids=lambda text: text[:40],
)
def test_a_value_that_is_none(override, said):
    found = problems(override)
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("loss: {beta: 1}\nloss: {beta: 2}\n", "loss is given twice"),
        ("loss:\n  beta: 1\n  beta: 2\n", "beta is given twice"),
        (BOMB, "alias *a"),
        ("a: &a {b: *a}\n", "alias *a"),
        ("loss: {beta: " + "9" * 5000 + "}\n", "digits"),
        ("name: x\nseed: 2024-99-99\n", "month must be"),
        ("a: " + "{b: " * 2000 + "1" + "}" * 2000, "recursion"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("- 1\n- 2\n", "holds a list"),
        ("? [a, b]\n: 1\n", "not a recipe"),
        ("\x00", "not a recipe"),
        ("extends: nothing\n", "no shipped recipe"),
        ("loss: [1]\n", "loss"),
        ("losss: {}\n", "did you mean loss?"),
        ("1: 2\n", "Keys should be strings"),
        ("x" * (2**20 + 1), "more than the 1,048,576"),
    ],
    ids=lambda text: text[:25],
)
def test_a_file_that_is_no_recipe(tmp_path, content, said):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    found = problems(recipe=str(path))
    assert any(said in problem for problem in found), found


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"name: \xff\xfe\n")
    assert "utf-8" in problems(recipe=str(tmp_path / "own.yaml"))[0]


def test_every_number_has_a_range():
    for row in config_lines(""):
        cells = [cell.strip() for cell in row.split("|")[1:]]
        if cells[1].split(" or ")[0] in ("number", "whole number"):
            assert "<" in cells[3] or "≤" in cells[3], cells[0]
