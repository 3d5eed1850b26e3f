"""What a cache consists of: sequences, block table, prefix index, blocks; and the passes over them."""
