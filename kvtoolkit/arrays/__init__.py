"""Any array as an address, a shape, strides and the name of a dtype."""
