"""pumice.schedules."""
