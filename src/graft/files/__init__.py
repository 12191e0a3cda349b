"""The parts of file-to-file fusing: plan, operations on tensors, the stream, provenance, small files."""
