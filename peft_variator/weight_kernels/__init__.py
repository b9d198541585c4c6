"""Kernels that read a weight as it is stored, packed 2:4, or under a mask and a low-rank update: products of one to a
few tokens, which never make it in memory, and, for more, the weight made in one pass, with its gradients."""
