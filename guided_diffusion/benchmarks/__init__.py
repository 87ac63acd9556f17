"""What `python -m guided_diffusion.benchmark` measures: one function for each part, which returns rows and notes."""
