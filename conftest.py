"""Settings of every test: what a machine under load takes longer for is not wrong."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # no assertion is timed; speed is what the benchmarks print
settings.load_profile("untimed")
