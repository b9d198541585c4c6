"""Products of one to a few tokens and a weight that is packed 2:4, or under a mask and a low-rank update: they read
what is stored of it as it lies, and never make it in memory. For more tokens, the packed weight, unpacked fast."""
