"""Arithmetic of memory, time and communication behind `cca_ds/plan.py`; none of it needs a GPU or weights."""
