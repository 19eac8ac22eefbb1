"""Benchmarks: the speed of prompts, and suites of runs on one machine or many."""
