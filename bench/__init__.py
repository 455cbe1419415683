"""Benchmarks: workloads, the peers they are run against, and the report."""
