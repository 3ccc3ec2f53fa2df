"""Reading weights: Hugging Face directories and GGUF files behind one protocol (`api.py`).

Every byte here is untrusted. Headers are bounded and validated before a tensor is looked at,
tensors are read by position and never by mapping a file, nothing in a checkpoint is executed, and
whatever is wrong is one typed error that says what was expected and what was found.
"""
