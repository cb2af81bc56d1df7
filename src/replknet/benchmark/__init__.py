"""Measuring speed: cases of real networks, timing that refuses wrong results, rooflines of the machine at hand."""
