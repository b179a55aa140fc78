"""Helpers that do not depend on graphs or models: log, files, environment, units."""
