"""Independent float64 oracles: plain dense numpy, written from the formulas and not from the package."""
