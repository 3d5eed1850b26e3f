"""Other libraries' calls on kvtoolkit's kernels, for programs that want to change an import and nothing else."""
