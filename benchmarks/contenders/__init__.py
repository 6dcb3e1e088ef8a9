"""Who trains on a course of benchmarks/trainer.py and benchmarks/gpu.py."""
