"""How far a head moved: from factors or from two models; spectra, intruders, circuits, paths."""
