"""Settings that all tests share."""

from hypothesis import HealthCheck, settings

# Examples are drawn the same way on every run, and a busy machine is no failure.
settings.register_profile(
    "parsim", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("parsim")
