"""How fused images are judged: metrics' maps, what one source shows, findings, comparisons."""
