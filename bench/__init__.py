"""Benchmarks; each is one command and writes a table, JSON and a plot."""
