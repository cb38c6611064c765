"""What every other package stands on: units, errors, registries, statistics, compiled kernels."""
