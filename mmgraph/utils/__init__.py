"""Helpers that know nothing of graphs or models: log, files, environment, units."""
