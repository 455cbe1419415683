"""Engines: each does what a plan says; none decides anything."""
