"""A small, real GRPO trainer and its SGLang-compatible server: demo, test bed, example to copy."""
