"""The published models' shapes, by preset; they move to the families' folders."""

LLAMAGEN_SHAPES = {
    "llamagen-b": {"n_layer": 12, "n_head": 12, "dim": 768},
    "llamagen-l": {"n_layer": 24, "n_head": 16, "dim": 1024},
    "llamagen-xl": {"n_layer": 36, "n_head": 20, "dim": 1280},
    "llamagen-xxl": {"n_layer": 48, "n_head": 24, "dim": 1536},
    "llamagen-3b": {"n_layer": 24, "n_head": 32, "dim": 3200},
    "digits": {
        "n_layer": 4,
        "n_head": 4,
        "dim": 128,
        "vocab_size": 17,
        "sequence_length": 64,
        "num_classes": 10,
        "multiple_of": 32,
    },
}
VAR_SHAPES = {f"var-d{depth}": {"depth": depth} for depth in (16, 20, 24, 30)}
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
