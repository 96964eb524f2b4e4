"""The method: read a suspect safely, invert its trigger, tune class-wise prompts (needs the `purify` extra)."""
