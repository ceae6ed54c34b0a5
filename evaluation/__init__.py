"""How fused images are judged: shared maps, metrics on tensors, comparison of methods, tables."""
