"""pumice.targets."""
