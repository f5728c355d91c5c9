"""Pods: discovery, health, capabilities, load and residency."""
