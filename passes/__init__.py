"""pumice.passes."""
