"""What a cache is made of, and the policies that it chooses by name."""
