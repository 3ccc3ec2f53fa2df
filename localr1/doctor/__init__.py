"""What this machine has, what of it localr1 uses, what it does not, and what to do about that.

One module an area. In each, a frozen dataclass of facts, a function that reads them from the
machine, and a pure one that makes findings of them; so a test can plant any machine.
"""
