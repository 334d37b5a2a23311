"""`edkm compare`: the same model and data through other methods of quantization, measured by one evaluator."""
