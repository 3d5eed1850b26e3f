"""A plug-in module that ends the program when it is imported."""

raise SystemExit("this module is a program")
