"""The public attention calls: they check their arguments, choose a backend and launch."""
