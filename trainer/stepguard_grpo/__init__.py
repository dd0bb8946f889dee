"""A small, real GRPO trainer and its SGLang-compatible server: the demo, the test bed, the example to copy."""
