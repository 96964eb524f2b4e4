"""The evidence: plant known backdoors and measure (needs the `purify` extra)."""
