"""Studies: comparisons, searches as a whole, and the statistics they rest on."""
