"""How the planner computes, in words: the end of its report and of `plan --help`, which imports no torch."""

from cca_ds.planning.nodes import LINK_SHARE

COST_MODEL = f"""\
How this is computed
  FLOPs    2 a weight and code, attention over all pairs of codes; backward = 2 forwards, 3 with checkpointing;
           positives and negatives; the reference one forward more, and so each forward without gradient that a loss
           adds. Time = FLOPs / (peak x efficiency), both stated.
  memory   2 bytes a weight in bf16, 2 or 4 of gradient, 12 of float32 master weight and Adam's moments, sharded by the
           ZeRO stage; gathered weights at most stage3_max_live_parameters; what each block keeps for its backward; one
           chunk of logits; 1.5 GiB and 6% of the GPU stay free.
  links    every forward gathers the weights twice and scatters the gradients once (stage 3), in a ring at
           {LINK_SHARE:.0%} of the slowest stated link, overlapped with the computing.
  step     every rank runs the same number of forwards and waits at each layer for the slowest; a GPU without pairs
           computes a dummy one. Balanced partitions are those of the training's solver (cca_ds/balance/partition.py).
  drawing  images for DDO: the weights are read once a sampling step for all images drawn at once, their keys and values
           once each; or a forward's FLOPs, where that takes longer.
  share    of the allocation: the time all its GPUs would need for what must be computed, over the time predicted.
  Not in it: data loading, checkpoints, evaluation, and the first step's compilation."""
