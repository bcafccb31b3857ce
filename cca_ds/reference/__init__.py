"""The frozen reference, where it is held and how its log-likelihoods are computed."""
