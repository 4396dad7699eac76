"""What ``pumice advise`` is made of: options of layers, their allocation under a budget, and the proof of it."""
