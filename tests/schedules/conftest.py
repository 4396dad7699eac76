"""Settings of the property tests: the same examples every time, and no deadline, for LLVM compiles in each."""

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "kernels",
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking would compile hundreds of kernels
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("kernels")
