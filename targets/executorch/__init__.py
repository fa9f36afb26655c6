"""Targets of ExecuTorch, one small file for each delegate; imported only when asked for."""
