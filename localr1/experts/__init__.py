"""The routed experts of a mixture: which were chosen (trace), and what follows from it."""
