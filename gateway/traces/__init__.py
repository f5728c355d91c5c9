"""Recorded sessions of coding agents: one form in memory, readers and writers of many formats."""
