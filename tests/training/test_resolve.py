"""What a recipe leaves to the devices, by hand: LlamaGen-3B, whose bytes `tests/balance/test_memory.py` counts."""

import pytest
import torch

from cca_ds.config.deepspeed_file import conflicts, read_ds_config
from cca_ds.config.recipes import load_recipe
from cca_ds.training.resolve import choose_by_memory, choose_compile, compiler_problem, smallest_memory
from cca_ds.training.workload import workload_of

GIB = 2**30
CPU = torch.device("cpu")


def chosen(settings, gib, ranks=8, recipe="llamagen-3b"):
    """(checkpointing, micro-batch, lines) of a recipe on GPUs of that memory."""
    run = load_recipe(recipe, settings)
    ds = read_ds_config("zero3")
    assert conflicts(ds, run) == []
    memory = None if gib is None else gib * GIB
    found, lines = choose_by_memory(run, workload_of(run, ds, ranks, "bf16"), ranks, memory)
    return found.model.activation_checkpointing, found.batch.micro_size, lines


@pytest.mark.parametrize(
    ("gib", "settings", "expected"),
    [
        # 16.28 GiB beside the activations, 3.25 a pair without recomputation, 0.38 with it; 0.94 * 0.9 of the memory
        (80, [], (False, 15)),  # (67.68 - 16.28) / 3.25
        (141, [], (False, 31)),  # (119.29 - 16.28) / 3.25
        (40, [], (False, 5)),  # (33.84 - 16.28) / 3.25
        (32, [], (True, 27)),  # only 3 pairs without, fewer than 4: (27.07 - 16.28) / 0.387
        (40, ["batch.micro_size=8"], (True, 8)),  # the recipe's 8 pairs do not fit without
        (80, ["batch.micro_size=8"], (False, 8)),
        (80, ["model.activation_checkpointing=true"], (True, 32)),
        (40, ["model.activation_checkpointing=false"], (False, 5)),
        (8, [], (True, 1)),  # it will not fit, and the message at the end says what helps
        (80, ["batch.global_size=16"], (False, 2)),  # two pairs a rank
        (None, [], (False, 8)),
        (None, ["model.activation_checkpointing=true"], (True, 8)),
    ],
)
def test_the_choice_by_hand(gib, settings, expected):
    again, pairs, lines = chosen(settings, gib)
    assert (again, pairs) == expected
    assert len(lines) == (gib is not None)
    if lines:
        assert f"activation checkpointing {'on' if again else 'off'}, at most {pairs} pairs a forward" in lines[0]


def test_what_the_recipe_sets_stays_and_says_nothing():
    assert chosen(["model.activation_checkpointing=false", "batch.micro_size=100"], 8) == (False, 100, [])


def test_on_a_cpu_blocks_are_compiled_only_where_the_recipe_sets_it():
    assert smallest_memory(CPU) is None
    cuda = torch.device("cuda")  # not touched: the compiler is tried only where blocks may be compiled
    for setting, device, compiled in (("auto", CPU, False), ("false", cuda, False), ("true", CPU, True)):
        run, lines = choose_compile(load_recipe("digits", [f"model.compile={setting}"]), device)
        assert run.model.compile is compiled and lines == []


def test_a_compiler_that_does_not_work():
    """No C++ compiler: an error where compiling was asked for."""
    torch._dynamo.reset()
    compiler_problem.cache_clear()
    said = r"model.compile=true: torch.compile does not work here \(.+set it to false"
    try:
        with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}), pytest.raises(ValueError, match=said):
            choose_compile(load_recipe("digits", ["model.compile=true"]), CPU)
    finally:
        compiler_problem.cache_clear()
        torch._dynamo.reset()
