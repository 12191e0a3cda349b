"""Directories that ``torch.distributed.checkpoint`` (DCP) writes, read without its pickles being run."""
