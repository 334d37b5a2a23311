"""Compare methods of quantization on one model and the same data, measured by one evaluator."""
