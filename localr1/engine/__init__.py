"""The prefill and decode loop, from prompt ids to events."""
