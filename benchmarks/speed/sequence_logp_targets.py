"""The targets of the sequence log-likelihood on a CPU, beside the results of `sequence_logp.py`."""

from __future__ import annotations

from typing import Any

SHAPE, GRADIENT_MIB = "llamagen-b", {"fp32": 72, "bf16": 36}  # of 2 x 576 x 16384 logits
TIMES_EAGER = {"fp32": 4.0, "bf16": 8.0}
COMPILED = ("compiled eager", "compiled cross_entropy")


def section(report: dict[str, Any]) -> list[str]:
    """Markdown lines; none on a GPU or when the targets' shape was not measured."""
    cases = {
        (case["dtype"], case["entry"]): case["variants"]
        for case in report["cases"]
        if case["shape"] == SHAPE and report["device_type"] == "cpu"
    }
    rows = []
    for dtype in TIMES_EAGER:
        rows += _from_logits(cases[dtype, "logits"], dtype) if (dtype, "logits") in cases else []
        rows += _with_head(cases[dtype, "linear"], dtype) if (dtype, "linear") in cases else []
    if not rows:
        return []
    head = ["", f"Against the targets, {SHAPE}, by the thread's own time:", "", "| part | target | found | |"]
    return [*head, "|---|--:|--:|---|", *rows]


def _from_logits(found: dict[str, Any], dtype: str) -> list[str]:
    own = found["cca_ds"]["thread_ms"]
    eager, compiled = found["eager"]["thread_ms"] / own, _best(found, COMPILED) / own
    memory = found["cca_ds"]["memory_mib"] - GRADIENT_MIB[dtype]
    target = TIMES_EAGER[dtype]
    return [
        _row(f"from logits, {dtype}: faster than eager", f"{target:g}x", f"{eager:.1f}x", eager >= target),
        _row(f"from logits, {dtype}: faster than torch.compile", "3x", f"{compiled:.1f}x", compiled >= 3),
        _row(f"from logits, {dtype}: MiB beyond the gradient", "0", f"{memory:.0f}", memory < 1),
    ]


def _with_head(found: dict[str, Any], dtype: str) -> list[str]:
    matmuls = found["cca_ds"]["thread_ms"] / found["matmuls alone"]["thread_ms"]
    memory = found["cca_ds"]["memory_mib"] / found["eager"]["memory_mib"]
    return [
        _row(f"with the head, {dtype}: of the three matmuls' time", "1.1", f"{matmuls:.2f}", matmuls <= 1.1),
        _row(f"with the head, {dtype}: of eager's memory", "60%", f"{memory:.0%}", memory <= 0.6),
    ]


def _best(found: dict[str, Any], names: tuple[str, ...]) -> float:
    return min(found[name]["thread_ms"] for name in names if name in found)


def _row(part: str, target: str, found: str, met: bool) -> str:
    return f"| {part} | {target} | {found} | {'met' if met else '**missed**'} |"
