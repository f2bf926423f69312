"""Below all front ends: addresses, options and steps, but neither NumPy arrays nor tensors of the user."""
