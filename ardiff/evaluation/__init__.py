"""Evaluation of a model on held-out scenes: reconstruction, continuation, and samples against real clips."""
