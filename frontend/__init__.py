"""pumice.frontend."""
