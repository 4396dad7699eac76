"""Model files and live models into Pumice's module form."""

from pumice.frontend.read import read_model

__all__ = ["read_model"]
