"""The meta-training runs of the command line."""
