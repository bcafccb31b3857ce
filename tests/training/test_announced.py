"""What a run shows of itself: the columns of TensorBoard's table of runs, and the names of its classes."""

from cca_ds.config.recipes import load_recipe
from cca_ds.training.run import class_list, hyperparameters


def test_runs_are_compared_by_what_their_trajectory_depends_on():
    values = hyperparameters(load_recipe("llamagen-3b"))
    expected = {"model.preset": "llamagen-3b", "loss.lambda": 500.0, "loss.beta": 0.02, "batch.global_size": 256,
                "optimizer.learning_rate": 1e-5, "seed": 0, "reference.dropout": False}  # fmt: skip
    assert values.items() >= expected.items()
    speed = ["model.compile=true", "model.activation_checkpointing=true", "batch.micro_size=4"]
    assert hyperparameters(load_recipe("llamagen-3b", speed)) == values
    assert hyperparameters(load_recipe("llamagen-3b", ["loss.beta=0.1"])) != values


def test_a_losss_own_options_are_columns():
    run = load_recipe("digits")
    run.loss.options = {"margin": 0.5}
    assert hyperparameters(run)["loss.options.margin"] == 0.5


def test_the_first_classes_are_named():
    assert class_list(()) == ""
    assert class_list(("beagle", "poodle")) == " (beagle, poodle)"
    assert class_list(tuple("abcdefg")) == " (a, b, c, d, e, ...)"
