"""Pumice: compiles trained networks into small, sparse int8 libraries."""
