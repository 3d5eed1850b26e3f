"""The command ``kvtoolkit`` and its parts."""
