"""Graphs of vocoders for other runtimes: ONNX and torch.export."""
